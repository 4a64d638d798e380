"""
Checkpoints: .pt, .safetensors, and published ViT weights.

    python -m pytest -q tests/test_weights.py
"""
import json
import os

import numpy as np
import pytest
import torch
from conftest import NARROW, TAIL, noise, randomise

import model
import weights
from weights.vit import load_vit, resize

NETS = {
    "separator": model.Separator(["vocals", "bass"], NARROW, "avg"),
    "classifier": model.Classifier(3, False, "v1", 5, ["a"], NARROW, tail_widths=TAIL,
                                   mel_of_log=True),
    "ast": model.Classifier(3, True, "ast", 1, ["a"], NARROW, transformer=(16, 4, 2)),
}


@pytest.fixture(params=NETS)
def saved(request, tmp_path):
    """(network, path of its .pt file)."""
    net = randomise(NETS[request.param])
    torch.save({"kind": type(net).__name__.lower(), "args": net.args, "model": net.state_dict(),
                "step": 3, "config": {"data": "x"}, "classes": ["one", "zwö"]}, tmp_path / "a.pt")
    return net, tmp_path / "a.pt"


def test_load_pt(saved):
    net, path = saved
    loaded, meta = weights.load(path)
    wave = noise(1, net.crop if isinstance(net, model.Classifier) else model.CROP)
    with torch.no_grad():
        assert torch.equal(loaded(wave), net(wave))
    assert not loaded.training and loaded.args == net.args
    assert meta["step"] == 3 and "model" not in meta


def test_safetensors_round_trip(saved, tmp_path):
    pytest.importorskip("safetensors")
    net, meta = weights.load(saved[1])
    path = tmp_path / "b.safetensors"
    weights.save_safetensors(net, meta, path)
    loaded, header = weights.load(path)
    assert loaded.args == net.args and header["classes"] == ["one", "zwö"]
    assert header["step"] == 3 and header["config"] == {"data": "x"}
    ours, theirs = loaded.state_dict(), net.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    # the header is readable without this project's code
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    about = json.loads(json.loads(raw[8:8 + size])["__metadata__"]["about"])
    assert about["kind"] == meta["kind"] and about["sample_rate"] == 16000


def test_other_files_are_refused(tmp_path):
    args = {"sources": ["a"]}
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"model": {}}, tmp_path / "alien.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"kind": "separator", "args": args, "model": {}}, tmp_path / "empty.pt")
    torch.save({"kind": "vocoder", "args": args, "model": {}}, tmp_path / "kind.pt")
    torch.save({"kind": "separator", "args": {"n": 1}, "model": {}}, tmp_path / "args.pt")
    for name in ("junk.pt", "alien.pt", "list.pt", "empty.pt", "kind.pt", "args.pt"):
        with pytest.raises(ValueError, match=name):
            weights.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none.pt"):
        weights.load(tmp_path / "none.pt")


@pytest.mark.parametrize("raw", [b"junk", b"\x02\0\0\0\0\0\0\0{}"])
def test_other_safetensors_are_refused(tmp_path, raw):
    pytest.importorskip("safetensors")
    (tmp_path / "a.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match="a.safetensors"):
        weights.load(tmp_path / "a.safetensors")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"kind": os.system, "args": {}, "model": {}}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt"):
        weights.load(tmp_path / "evil.pt")


def test_names_of_checkpoints():
    assert weights.name_of("released:mtat_tune+") == "released_mtat_tune+"
    assert weights.name_of("ckpt/a.pt") == weights.name_of("x/a.safetensors") == "a"
    assert weights.name_of("MTAT/vocals/checkpoint-25") == "vocals_checkpoint-25"


# -----------------------------------------------------------------------------
# weights to start from

def test_load_matching(capsys):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 3))
    state = {"0.weight": torch.eye(2), "0.bias": torch.zeros(2)}
    weights.load_matching(net, state, "a.pt", ["1.*"])
    assert torch.equal(net[0].weight, torch.eye(2))
    assert "2 of 4 tensors from a.pt, 2 new" in capsys.readouterr().out
    wrong = {"0.weight": torch.ones(2, 3), "1.weight": torch.ones(3, 2), "2.bias": torch.ones(1)}
    with pytest.raises(ValueError, match="a.pt .*2 missing .0.weight, 0.bias"):      # whole names
        weights.load_matching(net, {"1.weight": net[1].weight}, "a.pt", ["1.bias", "weight", "0"])
    with pytest.raises(ValueError, match=r"a.pt .*2 missing \(0.bias, 1.bias\).*1 unexpected "
                                         r"\(2.bias\).*1 of another shape \(0.weight \(2, 3\)"):
        weights.load_matching(net, wrong, "a.pt")
    assert torch.equal(net[0].weight, torch.eye(2))


def test_inflate_keeps_the_output_for_equal_inputs():
    kernel, x = noise(5, 1, 3, 3), noise(2, 1, 8, 8)
    inflated = weights.inflate(kernel, 4)
    assert inflated.shape == (5, 4, 3, 3)
    torch.testing.assert_close(torch.conv2d(x.expand(-1, 4, -1, -1), inflated),
                               torch.conv2d(x, kernel))


# -----------------------------------------------------------------------------
# ViT

D, DEPTH, HEADS = 16, 5, 2


def transformer(variant="ast_tail", size=(D, DEPTH, HEADS)):
    return randomise(model.Classifier(3, True, variant, 2, widths=NARROW, transformer=size)).tail


def fake_vit(path, side=6):
    """Writes random weights under the names and in the layouts of the published .npz files."""
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


def test_vit_attention_against_its_formula(tmp_path):
    w, net = fake_vit(tmp_path / "v.npz"), transformer()
    load_vit(net, tmp_path / "v.npz")
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


def test_vit_names_of_norms_and_mlp(tmp_path):
    w, net = fake_vit(tmp_path / "v.npz"), transformer()
    load_vit(net, tmp_path / "v.npz")
    layer, block = net.layers[2], "Transformer/encoderblock_2"
    for ours, theirs in ((layer.norm1.weight, w[f"{block}/LayerNorm_0/scale"]),
                         (layer.norm2.bias, w[f"{block}/LayerNorm_2/bias"]),
                         (layer.mlp[0].weight, w[f"{block}/MlpBlock_3/Dense_0/kernel"].T),
                         (layer.mlp[3].bias, w[f"{block}/MlpBlock_3/Dense_1/bias"]),
                         (net.norm.weight, w["Transformer/encoder_norm/scale"]),
                         (net.class_token, w["cls"])):
        np.testing.assert_array_equal(ours.detach(), theirs)


def test_vit_patches_of_a_grey_picture(tmp_path):
    w, net = fake_vit(tmp_path / "v.npz"), transformer("ast")
    load_vit(net, tmp_path / "v.npz")
    picture = np.random.default_rng(1).standard_normal((16, 16)).astype(np.float32)
    # red, green and blue are equal, each a third of the sum
    theirs = np.einsum("hw,hwcd->d", picture / 3, w["embedding/kernel"]) + w["embedding/bias"]
    with torch.no_grad():
        ours = net.patches(torch.from_numpy(picture).expand(1, 2, 16, 16))[0, :, 0, 0]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_vit_positions_are_interpolated_over_time_and_mel():
    square = torch.arange(24.0)[:, None] + 100 * torch.arange(24.0)             # (24, 24)
    positions = torch.cat([torch.tensor([-1.0]), square.flatten()])[None, :, None]
    ours = resize(positions, 48 * 8)[0, :, 0]
    grid = ours[1:].view(48, 8)
    assert ours[0] == -1 and grid[:, 0].diff().min() >= 0 and grid[0].diff().min() > 0
    torch.testing.assert_close(grid.mean(), square.mean(), atol=1e-2, rtol=0)


def test_vit_of_another_size_is_refused(tmp_path):
    w = fake_vit(tmp_path / "v.npz")
    for size, message in (((8, DEPTH, HEADS), "another shape"), ((D, DEPTH + 1, HEADS), "5 layers"),
                          ((D, DEPTH, 4), "2 heads"), ((D, 3, HEADS), "5 layers")):
        with pytest.raises(ValueError, match=f"v.npz.*transformer={size[0]},{size[1]}.*{message}"):
            load_vit(transformer(size=size), tmp_path / "v.npz")
    np.savez(tmp_path / "v.npz", **{**w, "cls": np.full_like(w["cls"], np.nan)})
    with pytest.raises(ValueError, match="finite"):
        load_vit(transformer(), tmp_path / "v.npz")


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04" + bytes(100), b"\x93NUMPY" + bytes(100)])
def test_damaged_npz_is_refused(tmp_path, raw):
    (tmp_path / "v.npz").write_bytes(raw)
    with pytest.raises(ValueError, match="v.npz"):
        load_vit(transformer(), tmp_path / "v.npz")
