"""
The networks, separating songs of any length, and checkpoints. tests/ has the rest.

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
import torch.nn.functional as F

import audio
import model

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
def test_parameter_counts_are_the_papers(count, make):
    assert sum(p.numel() for p in make().parameters() if p.requires_grad) == count


def test_stft_and_its_inverse_against_plain_loops():
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


def test_mel_filters_against_a_plain_loop_and_torchaudio():
    import torchaudio
    ours, plain = model.mel_filters().numpy(), np.zeros((256, 128))
    mel = [1127 * math.log(1 + f / 700) for f in np.linspace(0, 8000, 256)]
    low, high = 1127 * math.log(1 + 100 / 700), 1127 * math.log(1 + 7800 / 700)
    step = (high - low) / 129
    for b in range(256):
        for m in range(128):
            plain[b, m] = max(0, 1 - abs(mel[b] - (low + step * (m + 1))) / step)
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    assert (ours.sum(0) > 0).all()
    theirs = torchaudio.functional.melscale_fbanks(256, 100, 7800, 128, 16000, mel_scale="htk")
    assert 1e-4 < np.abs(ours - theirs.numpy()).max() < 3e-3  # whose triangles are drawn in Hz


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
def test_a_song_in_windows_equals_the_song_at_once(net, n):
    wave = noise(n)
    with torch.no_grad():
        whole = plain_separate(net, wave)
    for batch in (1, 4):
        found = model.separate(net, wave, batch=batch)
        torch.testing.assert_close(found, whole, atol=1e-6, rtol=0)


def test_calling_the_network_separates_too(net):
    songs = noise(2, 100_000)
    apart = torch.stack([model.separate(net, song) for song in songs])
    torch.testing.assert_close(net(songs), apart, atol=1e-6, rtol=0)


def test_masks_of_one_give_the_song_back():
    net = model.Separator(["vocals"], NARROW).eval()
    net.masks = lambda spec: torch.ones(len(spec), 1, spec.shape[1], 256)
    for n in LENGTHS:
        wave = noise(n)
        torch.testing.assert_close(model.separate(net, wave), wave[None], atol=2e-6, rtol=0)


def test_a_wave_of_another_form_is_refused(net):
    for bad in (noise(3, 4, 5), noise(3, 5).int(), noise(2, 0)):
        with pytest.raises(ValueError, match="batch, samples"):
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
def test_masks_of_one_give_back_what_is_below_8_khz_at_any_rate(rate):
    net = model.Separator(["vocals"], NARROW).eval()
    net.masks = lambda spec: torch.ones(len(spec), 1, spec.shape[1], 256)
    time = torch.arange(5 * rate, dtype=torch.float64) / rate
    low, high = (torch.sin(2 * torch.pi * hertz * time) for hertz in (440.0, 12_000.0))
    wave = torch.stack([low, 0.5 * low + (high if rate > 24_000 else 0)]).float() / 4
    (stem,) = model.separate(net, wave, rate)
    assert stem.shape == wave.shape
    inner = slice(rate // 10, -rate // 10)      # a tone that begins at once has all frequencies
    want = torch.stack([low, 0.5 * low]).float() / 4
    torch.testing.assert_close(stem[:, inner], want[:, inner], atol=2e-5, rtol=0)


def test_a_song_that_begins_a_window_later_is_separated_the_same(net):
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
    at_16k = torch.from_numpy(audio.resample(song.mean(0).numpy(), 44100, 16000))
    found = model.tag(tagger, song, 44100)
    torch.testing.assert_close(found, model.tag(tagger, at_16k), atol=1e-6, rtol=0)


def test_songs_of_another_form_and_other_networks_are_refused(net):
    tagger = model.Classifier(3, True, "tail", tail_widths=[4] * 7).eval()
    for bad in (noise(1, 1, 1, 9), noise(3, 5).int(), noise(2, 0), noise(9).numpy()):
        with pytest.raises(ValueError, match="a song is"):
            model.separate(net, bad)
        with pytest.raises(ValueError, match="a song is"):
            model.tag(tagger, bad)
    with pytest.raises(ValueError, match=r"from_numpy.* got ndarray \(9,\) of float32$"):
        model.separate(net, noise(9).numpy())
    with pytest.raises(ValueError, match="hop must be"):
        model.tag(tagger, noise(9), hop=-1.0)
    with pytest.raises(ValueError, match="is a Classifier, not a Separator"):
        model.separate(tagger, noise(9))
    with pytest.raises(ValueError, match="is a Separator, not a Classifier"):
        model.tag(net, noise(9))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")
def test_the_memory_of_separating_grows_by_the_song_and_its_result_only():
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


# -----------------------------------------------------------------------------
# checkpoints

def test_a_checkpoint_loads_on_its_own(net, tmp_path):
    saved = {"kind": "separator", "args": net.args, "model": net.state_dict(), "step": 3}
    torch.save(saved, tmp_path / "a.pt")
    loaded, meta = model.load(tmp_path / "a.pt")
    wave = noise(1, model.CROP)
    with torch.no_grad():
        assert torch.equal(loaded(wave), net(wave)) and meta["step"] == 3
    assert not loaded.training


def test_other_files_are_not_checkpoints(tmp_path):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"model": {}}, tmp_path / "alien.pt")
    torch.save({"kind": "separator", "args": {"sources": ["a"]}, "model": {}}, tmp_path / "odd.pt")
    for name, error in (("junk.pt", ValueError), ("alien.pt", ValueError), ("odd.pt", ValueError),
                        ("none.pt", FileNotFoundError)):
        with pytest.raises(error, match=name):
            model.load(tmp_path / name)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"kind": os.system, "args": {}, "model": {}}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt cannot be read as a checkpoint"):
        model.load(tmp_path / "evil.pt")


def test_the_model_needs_nothing_of_the_scripts():
    code = "import sys, model\nprint(sorted(sys.modules.keys() & {'runtime', 'data', 'audio'}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
