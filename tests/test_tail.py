"""
The transformer that may stand in place of the convolutional tail, and published ViT weights.

    python -m pytest -q tests/test_tail.py
"""
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import CLS, NARROW, facts, noise, randomise, run, same_weights, weights_of

import model
import tail

D, DEPTH, HEADS = 16, 5, 2
TINY = [arg for arg in CLS if "tail_widths" not in arg] + [
    f"--transformer={D},{DEPTH},{HEADS}", "--frames=128", "--skips=2"]


def small(variant="ast", **more):
    net = model.Classifier(3, True, variant, 2, widths=NARROW, transformer=(D, DEPTH, HEADS),
                           frames=128, **more)
    return randomise(net)


def test_a_layer_is_pytorchs_encoder_layer():
    ours = randomise(tail.Layer(D, HEADS))
    theirs = nn.TransformerEncoderLayer(D, HEADS, 4 * D, 0.1, "gelu", 1e-6, True, True).eval()
    attention = ours.attention
    parts = (attention.query, attention.key, attention.value)
    theirs.load_state_dict({
        "self_attn.in_proj_weight": torch.cat([part.weight for part in parts]),
        "self_attn.in_proj_bias": torch.cat([part.bias for part in parts]),
        "self_attn.out_proj.weight": attention.out.weight,
        "self_attn.out_proj.bias": attention.out.bias,
        **{f"{name}.{kind}": getattr(layer, kind) for kind in ("weight", "bias")
           for name, layer in (("linear1", ours.mlp[0]), ("linear2", ours.mlp[3]),
                               ("norm1", ours.norm1), ("norm2", ours.norm2))}})
    x = noise(2, 9, D)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frames", [128, 768])
def test_adapters_bring_every_decoder_output_to_the_patches(frames):
    for d in range(5):
        skip = noise(2, 4, frames // 2 ** (5 - d), 256 // 2 ** (5 - d))
        assert tail.Adapter(4, D, d)(skip).shape == (2, frames // 16 * 8, D)


def test_a_skip_changes_the_patches_where_it_is_in_time():
    adapter = tail.Adapter(1, D, 3)
    skip = torch.zeros(1, 1, 32, 64)
    skip[..., 8:12, 16:24] = 1
    changed = (adapter(skip) != adapter(torch.zeros_like(skip))).any(-1)[0].view(8, 8)
    assert changed.nonzero().tolist() == [[2, 2]]


def test_the_full_size_is_that_of_vit_b_16():
    with torch.device("meta"):
        net = tail.Transformer(3, 10, 768, 768, 12, 12, [], False)
    count = sum(p.numel() for p in net.parameters())
    # ViT-B/16 at 384 x 384 has 86,859,496 with 1,000 classes and 577 positions
    assert count == 86_859_496 - 990 * 769 - (577 - 385) * 768


def test_a_clip_is_the_mean_over_its_crops_whoever_its_neighbours_are():
    net, clips = small(), noise(2, 60_000)
    with torch.no_grad():
        together, alone = net(clips), net(clips[:1])
        crops = clips[:1].unfold(1, net.crop, 64 * model.HOP)[0]
        scores = torch.sigmoid(torch.cat([net(crop[None]) for crop in crops])).mean(0)
    assert net.crop == 127 * 160 + 512 and len(crops) == 4
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.sigmoid(alone[0]), scores, atol=1e-5, rtol=0)


def test_the_scale_is_that_of_the_training_set_and_not_of_the_batch():
    net, crops = small(), noise(4, 127 * 160 + 512)
    crops[2:] *= 100
    with torch.no_grad():
        x, _ = net.features(model.magnitudes(crops))
        net.tail.measure(x)
        torch.testing.assert_close(net.tail.mean[:, 0, 0], x.mean((0, 2, 3)))
        net.tail.batch_scale = True
        assert (net(crops)[:2] - net(crops[:2])).abs().max() > 1e-3     # the authors' way
        net.tail.batch_scale = False
        torch.testing.assert_close(net(crops)[:2], net(crops[:2]), atol=1e-5, rtol=0)


def test_every_parameter_learns():
    net = small().train()
    net(noise(2, net.crop)).square().sum().backward()
    still = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    # the finest decoder block and the rest see the loss through the masks
    assert not [name for name in still if not name.endswith("key.bias")]


# -----------------------------------------------------------------------------
# published weights

def fake_vit(path, side=6):
    """An .npz file with the names and layouts of the published ones, of random weights."""
    rng = np.random.default_rng(0)

    def some(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    w = {"embedding/kernel": some(16, 16, 3, D), "embedding/bias": some(D), "cls": some(1, 1, D),
         "Transformer/posembed_input/pos_embedding": some(1, side * side + 1, D),
         "Transformer/encoder_norm/scale": some(D), "Transformer/encoder_norm/bias": some(D),
         "head/kernel": some(D, 10), "head/bias": some(10)}
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        for k in (0, 2):
            w |= {f"{block}/LayerNorm_{k}/scale": some(D), f"{block}/LayerNorm_{k}/bias": some(D)}
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            w |= {f"{attention}/{part}/kernel": some(D, HEADS, D // HEADS),
                  f"{attention}/{part}/bias": some(HEADS, D // HEADS)}
        w |= {f"{attention}/out/kernel": some(HEADS, D // HEADS, D),
              f"{attention}/out/bias": some(D),
              f"{block}/MlpBlock_3/Dense_0/kernel": some(D, 4 * D),
              f"{block}/MlpBlock_3/Dense_0/bias": some(4 * D),
              f"{block}/MlpBlock_3/Dense_1/kernel": some(4 * D, D),
              f"{block}/MlpBlock_3/Dense_1/bias": some(D)}
    np.savez(path, **w)
    return w


def test_published_weights_give_what_their_formulas_say(tmp_path):
    w, net = fake_vit(tmp_path / "v.npz"), small("ast_tail").tail
    tail.load_vit(net, tmp_path / "v.npz")
    x = np.random.default_rng(1).standard_normal((1, 7, D))
    name = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1"
    q, k, v = (np.einsum("bpd,dhe->bphe", x, w[f"{name}/{part}/kernel"]) + w[f"{name}/{part}/bias"]
               for part in ("query", "key", "value"))
    scores = np.exp(np.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(D // HEADS))
    mixed = np.einsum("bhqk,bkhe->bqhe", scores / scores.sum(-1, keepdims=True), v)
    theirs = np.einsum("bqhe,hed->bqd", mixed, w[f"{name}/out/kernel"]) + w[f"{name}/out/bias"]
    with torch.no_grad():
        ours = net.layers[1].attention(torch.from_numpy(x).float())
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_same_picture_in_all_channels_gives_the_published_patches(tmp_path):
    w, net = fake_vit(tmp_path / "v.npz"), small("ast").tail
    tail.load_vit(net, tmp_path / "v.npz")
    picture = np.random.default_rng(1).standard_normal((16, 16)).astype(np.float32)
    # a grey picture has the same values in red, green and blue, each a third of the sum
    theirs = np.einsum("hw,hwcd->d", picture / 3, w["embedding/kernel"]) + w["embedding/bias"]
    with torch.no_grad():
        ours = net.patches(torch.from_numpy(picture).expand(1, 2, 16, 16))[0, :, 0, 0]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_positions_of_the_square_are_stretched_over_time_and_mel():
    square = torch.arange(24.0)[:, None] + 100 * torch.arange(24.0)             # (24, 24)
    positions = torch.cat([torch.tensor([-1.0]), square.flatten()])[None, :, None]
    ours = tail.resized(positions, 48 * 8)[0, :, 0]
    grid = ours[1:].view(48, 8)
    assert ours[0] == -1 and grid[:, 0].diff().min() >= 0 and grid[0].diff().min() > 0
    torch.testing.assert_close(grid.mean(), square.mean(), atol=1e-2, rtol=0)


def test_a_vit_of_another_size_is_told(tmp_path):
    fake_vit(tmp_path / "v.npz")
    net = model.Classifier(3, True, "ast_tail", transformer=(8, 3, 2), frames=128).tail
    with pytest.raises(ValueError, match="is not the .npz file of a ViT of this size"):
        tail.load_vit(net, tmp_path / "v.npz")


def test_a_vit_of_other_heads_or_more_layers_or_without_numbers_is_told(tmp_path):
    w = fake_vit(tmp_path / "v.npz")
    for size, message in (((D, DEPTH, 4), "it has 2 heads, not 4"), ((D, 3, HEADS), "more layers")):
        net = model.Classifier(3, True, "ast_tail", transformer=size, frames=128).tail
        with pytest.raises(ValueError, match=message):
            tail.load_vit(net, tmp_path / "v.npz")
    np.savez(tmp_path / "v.npz", **{**w, "cls": np.full_like(w["cls"], np.nan)})
    with pytest.raises(ValueError, match="not all of its numbers are finite"):
        tail.load_vit(small("ast_tail").tail, tmp_path / "v.npz")


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04" + bytes(100), b"\x93NUMPY" + bytes(100)])
def test_a_vit_that_cannot_be_read_is_told(tmp_path, raw):
    (tmp_path / "v.npz").write_bytes(raw)
    with pytest.raises(ValueError, match="cannot be read as an .npz file"):
        tail.load_vit(small("ast_tail").tail, tmp_path / "v.npz")


def test_silence_scaled_by_the_batch_gives_numbers():
    net = small(batch_scale=True)
    with torch.no_grad():
        assert torch.isfinite(net(torch.zeros(1, net.crop))).all()


# -----------------------------------------------------------------------------
# the script

def finetune(demo, out, *args, ok=True):
    return run("finetune_cls.py", *TINY, f"--data={demo}/demo_clips", f"--out={out}", *args, ok=ok)


def test_a_transformer_is_trained_joined_and_measured(demo, separator, tmp_path):
    fake_vit(tmp_path / "v.npz")
    said = finetune(demo, tmp_path / "alone.pt", "--variant=ast_tail", f"--vit={tmp_path}/v.npz",
                    "--epochs=1")
    assert "transformer from" in said
    said = finetune(demo, tmp_path / "both.pt", "--variant=ast", f"--init={separator}",
                    f"--tail={tmp_path}/alone.pt", "--epochs=0")
    weights = weights_of(tmp_path / "both.pt")
    kernel = weights_of(tmp_path / "alone.pt")["tail.patches.weight"]
    torch.testing.assert_close(weights["tail.patches.weight"], kernel.expand(-1, 2, -1, -1) / 2)
    assert weights["tail.mean"].shape == (2, 1, 1) and (weights["tail.std"] != 1).all()
    said = run("eval.py", tmp_path / "both.pt", f"--out={tmp_path}/r", "--bootstrap=0")
    assert "ast classifier of 16 classes" in said


def test_its_recipe_halves_the_rate_and_resumes_to_the_same_bits(demo, tmp_path):
    arguments = ["--variant=ast_tail", "--recipe=ast", "--halvings=1", "--sgd_rates=1e-3",
                 "--learning_rate=1e-3", "--batch_size=5"]
    said = finetune(demo, tmp_path / "a.pt", *arguments, "--epochs=8")
    assert "phase 1: Adam at 0.0005" in said and "phase 2: SGD at 0.001" in said
    rates = [entry["lr"] for entry in facts(tmp_path / "a.pt") if entry["lr"]]
    assert rates == [1e-3] * 10 + [5e-4] * 4 + [1e-3] * 2
    finetune(demo, tmp_path / "b.pt", *arguments, "--epochs=8")
    assert same_weights(tmp_path / "a.resume", tmp_path / "b.resume")
