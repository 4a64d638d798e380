"""
The networks, and songs of any length. tests/ has the rest, one file per module.

    python -m pytest -q test_model.py
"""
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from audio.resample import resample

ROOT = Path(__file__).resolve().parent
NARROW = [4, 4, 4, 4, 4, 4]
TAIL = [4, 4, 4, 4, 4, 4, 8]


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -----------------------------------------------------------------------------
# the networks

@pytest.mark.parametrize("count, make", [
    (3_921_061, lambda: model.Separator(["vocals"])),
    (3_921_928, lambda: model.Separator(["vocals", "other", "drums", "bass"])),
    (2_396_530, lambda: model.Classifier(50, True, "tail")),
    (7_240_151, lambda: model.Classifier(50, True, "v1")),
    (6_797_783, lambda: model.Classifier(50, True, "v1", skips=3)),
    (7_225_304, lambda: model.Classifier(16, False, "v1", sources="vodb"))])
def test_parameter_counts_match_the_paper(count, make):
    assert sum(p.numel() for p in make().parameters() if p.requires_grad) == count


def test_stft_and_istft_match_plain_loops():
    wave = noise(model.CROP).double().numpy()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    starts = range(0, 384 * 160, 160)
    plain = np.stack([np.fft.rfft(window * wave[at:at + 512]) for at in starts])
    spec = model.stft(torch.from_numpy(wave).float()[None])[0]
    assert spec.shape == (384, 257)
    np.testing.assert_allclose(spec.numpy(), plain, atol=2e-5)
    total = np.zeros(512)
    for n in range(512):
        total[n] = sum(window[k] ** 2 for k in range(n % 160, 512, 160))
    back = np.zeros(model.CROP)
    for at, frame in zip(starts, plain, strict=True):
        back[at:at + 512] += np.fft.irfft(frame) * window / total
    ours, edge = model.istft(spec[None])[0].numpy(), model.EDGE
    np.testing.assert_allclose(ours, back, atol=1e-6)
    np.testing.assert_allclose(ours[edge:-edge], wave[edge:-edge], atol=1e-6)


@pytest.mark.parametrize("length, hop", [(512, 160), (12, 4), (5, 5), (3, 7)])
def test_overlap_add_and_its_gradient_match_a_plain_loop(length, hop):
    torch.manual_seed(1)
    frames = torch.randn(2, 3, 6, length, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(2, 3, 5 * hop + length, dtype=torch.float64)
    for t in range(6):
        expected[..., t * hop:t * hop + length] += frames[:, :, t].detach()
    torch.testing.assert_close(model.OverlapAdd.apply(frames, hop), expected)
    if length < 512:
        assert torch.autograd.gradcheck(lambda x: model.OverlapAdd.apply(x, hop), frames)


def test_mel_filters_match_a_plain_loop():
    ours, plain = model.mel_filters().numpy(), np.zeros((256, 128))
    mel = [1127 * math.log(1 + f / 700) for f in np.linspace(0, 8000, 256)]
    low, high = 1127 * math.log(1 + 100 / 700), 1127 * math.log(1 + 7800 / 700)
    step = (high - low) / 129
    for b in range(256):
        for m in range(128):
            plain[b, m] = max(0, 1 - abs(mel[b] - (low + step * (m + 1))) / step)
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    assert (ours.sum(0) > 0).all()


def test_mel_filters_differ_little_from_torchaudios():
    functional = pytest.importorskip("torchaudio").functional
    theirs = functional.melscale_fbanks(256, 100, 7800, 128, 16000, mel_scale="htk")
    difference = (model.mel_filters() - theirs).abs().max()
    assert 1e-4 < difference < 3e-3         # torchaudio draws the triangles in Hz


@pytest.mark.parametrize("variant, skips", [
    ("tail", 5), ("v1", 5), ("v1", 2), ("v3", 5), ("v3", 0), ("v3_concat", 5)])
def test_every_variant_trains_all_its_weights(variant, skips):
    net = model.Classifier(3, True, variant, skips, ["vocals", "bass"], NARROW, tail_widths=TAIL)
    net(noise(2, model.CROP)).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_stays_close(dtype):
    net, wave = model.Separator(["vocals"], [8] * 6).eval(), noise(2, model.CROP)
    with torch.no_grad():
        exact, net.amp_dtype = net(wave), dtype
        reduced = net(wave)
    assert reduced.dtype == torch.float32 and not torch.equal(reduced, exact)
    torch.testing.assert_close(reduced, exact, atol=2e-3, rtol=0)


@pytest.mark.parametrize("multilabel", [True, False])
def test_a_classifier_averages_scores_over_crops(multilabel):
    net = model.Classifier(5, multilabel, widths=NARROW, tail_widths=TAIL).eval()
    squash = torch.sigmoid if multilabel else lambda z: torch.softmax(z, -1)
    hop = 192 * 160
    wave = noise(1, model.CROP + 2 * hop + 1000)
    with torch.no_grad():
        crops = [squash(net(wave[:, at:at + model.CROP])) for at in (0, hop, 2 * hop)]
        mean = torch.stack(crops).mean(0)
        torch.testing.assert_close(squash(net(wave)), mean, atol=1e-5, rtol=0)
        assert torch.isfinite(net(torch.zeros(1, 10))).all()
    extreme = torch.tensor([[[200.0, -200.0], [200.0, -200.0]]])
    assert torch.isfinite(model.mean_score_logits(extreme, multilabel)).all()


def test_losses_refuse_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="2, 3.*2, 1"):
        model.crop_losses(torch.zeros(2, 3), torch.zeros(2, 1), True)
    with pytest.raises(ValueError, match="2, 2, 900.*2, 1, 900"):
        model.l1_loss(torch.zeros(2, 2, 900), torch.zeros(2, 1, 900))


def test_loss_of_large_logits_is_finite():
    losses = model.crop_losses(torch.full((2, 3), 200.0), torch.zeros(2, 3), True)
    assert torch.isfinite(losses).all()


# -----------------------------------------------------------------------------
# the transformer

D, DEPTH, HEADS = 16, 5, 2


@pytest.fixture
def tiny_ast(monkeypatch):
    monkeypatch.setattr(model, "AST_FRAMES", 128)
    net = model.Classifier(3, True, "ast", 2, widths=NARROW, transformer=(D, DEPTH, HEADS))
    return randomise(net)


def randomise(net):
    """Random weights instead of zeros and ones: swapping two of them shows."""
    generator = torch.Generator().manual_seed(0)
    for name, value in net.state_dict().items():
        if "running_var" in name or value.dim() == 1 and name.endswith("weight"):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.is_floating_point():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return net.eval()


def test_layer_equals_pytorchs_encoder_layer():
    ours = randomise(model.Layer(D, HEADS))
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
def test_adapters_map_every_decoder_output_to_patches(frames):
    for d in range(5):
        skip = noise(2, 4, frames // 2 ** (5 - d), 256 // 2 ** (5 - d))
        assert model.Adapter(4, D, d)(skip).shape == (2, frames // 16 * 8, D)


def test_a_skip_changes_only_the_patches_at_its_position():
    adapter = model.Adapter(1, D, 3)
    skip = torch.zeros(1, 1, 32, 64)
    skip[..., 8:12, 16:24] = 1
    changed = (adapter(skip) != adapter(torch.zeros_like(skip))).any(-1)[0].view(8, 8)
    assert changed.nonzero().tolist() == [[2, 2]]


def test_full_size_is_vit_b_16():
    with torch.device("meta"):
        net = model.Transformer(3, 10, 768, 768, 12, 12, [])
    count = sum(p.numel() for p in net.parameters())
    # ViT-B/16 at 384 x 384 has 86,859,496 with 1,000 classes and 577 positions
    assert count == 86_859_496 - 990 * 769 - (577 - 385) * 768


def test_ast_averages_scores_over_crops_for_any_batch(tiny_ast):
    net, clips = tiny_ast, noise(2, 60_000)
    with torch.no_grad():
        together, alone = net(clips), net(clips[:1])
        crops = clips[:1].unfold(1, net.crop, 64 * model.HOP)[0]
        scores = torch.sigmoid(torch.cat([net(crop[None]) for crop in crops])).mean(0)
    assert net.crop == 127 * 160 + 512 and len(crops) == 4
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.sigmoid(alone[0]), scores, atol=1e-5, rtol=0)


def test_input_is_normalised_by_the_training_set(tiny_ast):
    crops = noise(4, tiny_ast.crop)
    crops[2:] *= 100
    with torch.no_grad():
        x, _ = tiny_ast.features(model.magnitudes(crops))
        tiny_ast.tail.measure(x)
        torch.testing.assert_close(tiny_ast.tail.mean[:, 0, 0], x.mean((0, 2, 3)))
        alone = tiny_ast(crops[:2])
        torch.testing.assert_close(tiny_ast(crops)[:2], alone, atol=1e-5, rtol=0)


def test_every_parameter_of_ast_learns(tiny_ast):
    net = tiny_ast.train()
    net(noise(2, net.crop)).square().sum().backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    # the finest decoder block and the rest see the loss through the masks
    assert not [name for name in idle if not name.endswith("key.bias")]


# -----------------------------------------------------------------------------
# songs

def plain_separate(net, wave):
    """A whole song at once, (N,) -> (S, N): all its masks are in memory at the same time."""
    n, step, length = len(wave), model.WINDOW - model.OVERLAP, model.WINDOW * model.HOP + model.EDGE
    windows = max(1, math.ceil((n + 2 * model.EDGE - length) / (step * model.HOP)) + 1)
    padding = length + (windows - 1) * step * model.HOP - model.EDGE - n
    spec = model.stft(F.pad(wave[None], (model.EDGE, padding)))
    ramp = torch.arange(1, model.OVERLAP + 1, dtype=torch.float32)
    middle = torch.full((model.WINDOW - 2 * model.OVERLAP,), model.OVERLAP + 1.0)
    shape = torch.cat([ramp, middle, ramp.flip(0)])[:, None]
    masks = torch.zeros(1, len(net.sources), spec.shape[1], model.BINS)
    weight = torch.zeros(spec.shape[1], 1)
    for at in range(0, windows * step, step):
        masks[:, :, at:at + model.WINDOW] += shape * net.masks(spec[:, at:at + model.WINDOW])
        weight[at:at + model.WINDOW] += shape
    return net.apply_masks(spec, masks / weight)[0, :, model.EDGE:model.EDGE + n]


@pytest.fixture(scope="module")
def net():
    return model.Separator(["vocals", "bass"], NARROW).eval()


LENGTHS = [1, 100, model.CROP - 1, model.CROP, model.CROP + 1, 123_456, 60 * 16000]


@pytest.mark.parametrize("n", LENGTHS)
def test_separation_in_windows_equals_the_whole_song_at_once(net, n):
    wave = noise(n)
    with torch.no_grad():
        whole = plain_separate(net, wave)
    for batch in (1, 4):
        actual = model.separate(net, wave, batch=batch)
        torch.testing.assert_close(actual, whole, atol=1e-6, rtol=0)


def test_forward_separates_songs_of_any_length(net):
    songs = noise(2, 100_000)
    apart = torch.stack([model.separate(net, song) for song in songs])
    torch.testing.assert_close(net(songs), apart, atol=1e-6, rtol=0)


def test_masks_of_one_reconstruct_the_song():
    net = model.Separator(["vocals"], NARROW).eval()
    net.masks = lambda spec: torch.ones(len(spec), 1, spec.shape[1], 256)
    for n in LENGTHS:
        wave = noise(n)
        torch.testing.assert_close(model.separate(net, wave), wave[None], atol=2e-6, rtol=0)


def test_batches_of_wrong_shape_or_dtype_are_refused(net):
    for bad in (noise(3, 4, 5), noise(3, 5).int(), noise(2, 0)):
        with pytest.raises(ValueError, match="samples"):
            net(bad)


# -----------------------------------------------------------------------------
# whole songs at their own rate, with their own channels

def test_the_mask_of_the_mean_is_applied_to_each_channel(net):
    left = noise(100_000)
    stems = model.separate(net, torch.stack([left, torch.zeros(100_000)]))      # (2, 2, N)
    whole = plain_separate(net, left)                                           # (2, N)
    assert stems.shape == (2, 2, 100_000) and not stems[:, 1].any()
    halved = plain_separate(net, left / 2)
    torch.testing.assert_close(stems[:, 0], 2 * halved, atol=1e-6, rtol=0)
    both = model.separate(net, torch.stack([left, left]))
    torch.testing.assert_close(both, whole[:, None].expand(-1, 2, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 44101, 192000])
def test_masks_of_one_reconstruct_what_is_below_8_khz_at_any_rate(rate):
    net = model.Separator(["vocals"], NARROW).eval()
    net.masks = lambda spec: torch.ones(len(spec), 1, spec.shape[1], 256)
    time = torch.arange(5 * rate, dtype=torch.float64) / rate
    low, high = (torch.sin(2 * torch.pi * hertz * time) for hertz in (440.0, 12_000.0))
    wave = torch.stack([low, 0.5 * low + (high if rate > 24_000 else 0)]).float() / 4
    (stem,) = model.separate(net, wave, rate)
    assert stem.shape == wave.shape
    inner = slice(rate // 10, -rate // 10)      # the onset of a tone is broadband
    want = torch.stack([low, 0.5 * low]).float() / 4
    torch.testing.assert_close(stem[:, inner], want[:, inner], atol=2e-5, rtol=0)


def test_separation_is_invariant_to_a_shift_by_whole_windows(net):
    step = (model.WINDOW - model.OVERLAP) * model.HOP * 441 // 160      # 423,360 at 44.1 kHz
    wave = noise(2, 4 * step)
    early = model.separate(net, wave, 44100)
    late = model.separate(net, torch.nn.functional.pad(wave, (step, 0)), 44100)
    inner = slice(2 * step, 3 * step)
    shifted = late[..., 3 * step:4 * step]
    torch.testing.assert_close(shifted, early[..., inner], atol=1e-5, rtol=0)


def test_a_batch_of_songs_equals_them_one_by_one(net):
    songs = noise(2, 2, 50_000)
    apart = torch.stack([model.separate(net, song, 22050) for song in songs])
    assert torch.equal(model.separate(net, songs, 22050), apart)
    tagger = model.Classifier(3, True, "tail", tail_widths=[4] * 7).eval()
    apart = torch.stack([model.tag(tagger, song, 22050) for song in songs])
    assert torch.equal(model.tag(tagger, songs, 22050), apart)


@pytest.mark.parametrize("multilabel", [True, False])
def test_tags_of_a_song_are_those_of_the_network(multilabel):
    tagger = model.Classifier(3, multilabel, "tail", tail_widths=[4] * 7).eval()
    song = noise(20 * 16000)
    with torch.no_grad():
        logits = tagger(song[None])[0]
        second = tagger(song[None, 8000:8000 + model.CROP])[0]
    scores = logits.sigmoid() if multilabel else logits.softmax(0)
    torch.testing.assert_close(model.tag(tagger, song), scores, atol=1e-6, rtol=0)
    along = model.tag(tagger, song, hop=0.25)
    assert len(along) == (len(song) - model.CROP) // 4000 + 1
    want = second.sigmoid() if multilabel else second.softmax(0)
    torch.testing.assert_close(along[2], want, atol=1e-6, rtol=0)
    assert model.tag(tagger, song[:100]).shape == (3,)          # padded with silence


def test_tags_are_resampled_as_prepared_data_is():
    tagger = model.Classifier(3, True, "tail", tail_widths=[4] * 7).eval()
    song = noise(2, 10 * 44100)
    at_16k = resample(song.mean(0), 44100, 16000)
    actual = model.tag(tagger, song, 44100)
    torch.testing.assert_close(actual, model.tag(tagger, at_16k), atol=1e-6, rtol=0)


def test_other_shapes_dtypes_and_networks_are_refused(net):
    tagger = model.Classifier(3, True, "tail", tail_widths=[4] * 7).eval()
    for bad in (noise(1, 1, 1, 9), noise(3, 5).int(), noise(2, 0), noise(9).numpy()):
        with pytest.raises(ValueError, match="samples"):
            model.separate(net, bad)
        with pytest.raises(ValueError, match="samples"):
            model.tag(tagger, bad)
    with pytest.raises(ValueError, match=r"from_numpy.*ndarray \(9,\).*float32"):
        model.separate(net, noise(9).numpy())
    with pytest.raises(ValueError, match="Classifier.*Separator"):
        model.separate(tagger, noise(9))
    with pytest.raises(ValueError, match="Separator.*Classifier"):
        model.tag(net, noise(9))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")
def test_memory_of_separate_grows_by_song_and_result_only():
    code = """
import resource, sys, torch, model
net = model.Separator(["a", "b"], [4] * 6).eval()
model.separate(net, torch.rand(int(sys.argv[1]) * 16000))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"""
    used = []
    for seconds in (20, 120):
        done = subprocess.run([sys.executable, "-c", code, str(seconds)], cwd=ROOT, text=True,
                              capture_output=True, check=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        used.append(int(done.stdout))
    song_and_result = 4 * 100 * 16000 * (1 + 2)
    assert used[1] - used[0] < song_and_result + 20e6
