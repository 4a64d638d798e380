"""
Tests of the networks and of reading checkpoints, on small things they make themselves; with ../shared beside the project also on the
released-format checkpoints there. test_pipeline.py tests the rest.

    python -m pytest -q test_*.py
"""
import math
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import model
import tf_checkpoint

SHARED = Path(__file__).resolve().parent.parent / "shared" / "fixtures"
NARROW = [4, 4, 4, 4, 4, 4]
TAIL = [4, 4, 4, 4, 4, 4, 8]
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared beside the project")


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomise(net, seed=0):
    """Weights and BatchNorm statistics with no special values, so that swapping any two of them shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5 if "running_var" in name or value.dim() == 1 and name.endswith("weight")
                        else 0.3 * torch.randn(value.shape, generator=generator))
    return net.eval()


# -----------------------------------------------------------------------------
# networks

@pytest.mark.parametrize("count, make", [
    (3_921_061, lambda: model.Separator(["vocals"])),
    (3_921_928, lambda: model.Separator(["vocals", "other", "drums", "bass"])),
    (2_396_530, lambda: model.Classifier(50, True, "tail")),
    (7_240_151, lambda: model.Classifier(50, True, "v1")),
    (6_797_783, lambda: model.Classifier(50, True, "v1", skips=3)),
    (7_225_304, lambda: model.Classifier(16, False, "v1", sources="vodb")),
])
def test_parameter_counts_are_the_papers(count, make):
    assert sum(p.numel() for p in make().parameters() if p.requires_grad) == count


def test_stft_and_its_inverse_against_plain_loops():
    wave = noise(model.CROP).double().numpy()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    plain = np.stack([np.fft.rfft(window * wave[160 * t:160 * t + 512]) for t in range(384)])
    spec = model.stft(torch.from_numpy(wave).float()[None])[0]
    assert spec.shape == (384, 257)
    np.testing.assert_allclose(spec.numpy(), plain, atol=2e-5)
    total = np.array([sum(window[n % 160 + 160 * k] ** 2 for k in range(4) if n % 160 + 160 * k < 512) for n in range(512)])
    back = np.zeros(model.CROP)
    for t in range(384):
        back[160 * t:160 * t + 512] += np.fft.irfft(plain[t]) * window / total
    ours = model.istft(spec[None])[0].numpy()
    np.testing.assert_allclose(ours, back, atol=1e-6)
    np.testing.assert_allclose(ours[model.EDGE:-model.EDGE], wave[model.EDGE:-model.EDGE], atol=1e-6)


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
    theirs = torchaudio.functional.melscale_fbanks(256, 100, 7800, 128, 16000, mel_scale="htk").numpy()  # triangles drawn in Hz
    assert 1e-4 < np.abs(ours - theirs).max() < 3e-3


def test_separator_of_any_length_joins_its_windows_without_seams():
    net = model.Separator(["vocals", "bass"], NARROW).eval()
    net.masks = lambda spec: torch.full((len(spec), 2, 384, 256), 1.0)
    for n in (1, 100, model.CROP - 1, model.CROP + 1, 123_456):
        wave = noise(2, n)
        torch.testing.assert_close(net(wave), wave[:, None].expand(-1, 2, -1), atol=2e-6, rtol=0)
    del net.masks
    wave = noise(1, 2 * model.CROP)
    with torch.no_grad():
        together = net(torch.cat([wave, noise(1, 2 * model.CROP, seed=1)]))
        torch.testing.assert_close(together[:1], net(wave), atol=1e-5, rtol=0)
    assert together.shape == (2, 2, 2 * model.CROP)
    for bad in (wave[0], (wave * 32767).short()):
        with pytest.raises(ValueError, match="batch, samples"):
            net(bad)


@pytest.mark.parametrize("multilabel", [True, False])
def test_classifier_averages_scores_over_crops(multilabel):
    net = randomise(model.Classifier(5, multilabel, widths=NARROW, tail_widths=TAIL))
    squash = torch.sigmoid if multilabel else lambda z: torch.softmax(z, -1)
    wave = noise(1, model.CROP + 2 * 192 * 160 + 1000)
    with torch.no_grad():
        crops = [squash(net(wave[:, at:at + model.CROP])) for at in (0, 192 * 160, 2 * 192 * 160)]
        torch.testing.assert_close(squash(net(wave)), torch.stack(crops).mean(0), atol=1e-5, rtol=0)
        assert torch.isfinite(net(torch.zeros(1, 10))).all()
    extreme = model.mean_score_logits(torch.tensor([[[200.0, -200.0], [200.0, -200.0]]]), multilabel)
    assert torch.isfinite(extreme).all()


@pytest.mark.parametrize("variant, skips", [("tail", 5), ("v1", 5), ("v1", 2), ("v3", 5), ("v3", 0), ("v3_concat", 5)])
def test_every_variant_trains_all_its_weights(variant, skips):
    net = model.Classifier(3, True, variant, skips, sources=["vocals", "bass"], widths=NARROW, tail_widths=TAIL)
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


# -----------------------------------------------------------------------------
# released checkpoints

FIXTURES = ["vocals", "multisource", "mtat_tail", "mtat_vocals", "fma_multisource", "mtat_multisource_v3"]


@needs_shared
@pytest.mark.parametrize("name", FIXTURES)
def test_released_checkpoints_give_the_original_outputs(name, tmp_path):
    with tarfile.open(SHARED / "msspt_tf" / f"{name}.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    net, meta = model.load(tmp_path / name / "checkpoint-1")
    io = np.load(tmp_path / name / "io.npz")
    with torch.no_grad():
        ours = net(torch.from_numpy(io["audio"]))
    if meta["kind"] == "separator":
        theirs = torch.from_numpy(io["output"]).reshape(2, model.CROP, -1).transpose(1, 2)
        ours, theirs = ours[..., 512:-512], theirs[..., 512:-512]
    else:
        ours, theirs = torch.sigmoid(ours) if net.multilabel else torch.softmax(ours, -1), torch.from_numpy(io["output"])
    error = (ours - theirs).abs().max().item()
    print(f"{name}: largest error {error:.1e}")
    assert error < 2e-5


@needs_shared
@pytest.mark.parametrize("name, kind, variant", [("separators_vocals", "separator", None), ("separators_multisource", "separator", None),
                                                 ("downstream_models_MTAT_tail", "classifier", "tail"), ("downstream_models_MTAT_vocals", "classifier", "v1"),
                                                 ("downstream_models_FMA_multisource", "classifier", "v1")])
def test_real_index_files_are_understood(name, kind, variant):
    found, args = model.tensorflow_architecture(tf_checkpoint.read_index(SHARED / "msspt_released_index" / name))
    net = model.KINDS[found](**args)
    assert (found, args.get("variant")) == (kind, variant)
    for module, layer in zip(model.weighted_layers(net), tf_checkpoint.read_index(SHARED / "msspt_released_index" / name), strict=True):
        assert module.weight.numel() == math.prod(layer.get("kernel", layer.get("gamma"))["shape"])


def slow_crc(raw):
    """CRC-32C bit by bit, from its definition."""
    c = 0xFFFFFFFF
    for byte in raw:
        c ^= byte
        for _ in range(8):
            c = c >> 1 ^ (0x82F63B78 if c & 1 else 0)
    return c ^ 0xFFFFFFFF


def mask(c):
    return ((c >> 15 | c << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def write_tensorflow(net, prefix):
    """A checkpoint as TensorFlow writes it: our weights under Keras' names and layouts, plus an optimizer slot to be ignored."""
    entries, raw = {}, b""
    for n, m in enumerate(model.weighted_layers(net)):
        w = m.weight.detach().numpy()
        if w.ndim == 4:
            tensors = {"kernel": w.transpose(2, 3, 1, 0), "bias": m.bias}
        elif w.ndim == 2:
            w = w.reshape(len(w), -1, 2, 1).transpose(2, 3, 1, 0).reshape(-1, len(w)) if m is net.tail.dense else w.T  # (time, mel, channel) first
            tensors = {"kernel": w, "bias": m.bias}
        else:
            tensors = {"gamma": w, "beta": m.bias, "moving_mean": m.running_mean, "moving_variance": m.running_var}
        for key, value in tensors.items():
            value = np.ascontiguousarray(value.detach().numpy() if isinstance(value, torch.Tensor) else value, "<f4")
            shape = b"".join(b"\x12" + varint(len(d)) + d for d in (b"\x08" + varint(s) for s in value.shape))
            entry = b"\x08\x01\x12" + varint(len(shape)) + shape + b"\x20" + varint(len(raw)) + b"\x28" + varint(value.nbytes)
            entries[f"layer_with_weights-{n}/{key}/.ATTRIBUTES/VARIABLE_VALUE"] = entry + b"\x35" + mask(slow_crc(value.tobytes())).to_bytes(4, "little")
            entries[f"layer_with_weights-{n}/{key}/.OPTIMIZER_SLOT/optimizer/m/.ATTRIBUTES/VARIABLE_VALUE"] = entry
            raw += value.tobytes()

    def block(pairs, at):
        body, last = b"", b""
        for i, (key, value) in enumerate(pairs):
            shared = len(os.path.commonprefix([key, last])) if i % 16 else 0
            body += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
            last = key
        body += bytes(4) + (1).to_bytes(4, "little") + b"\0"
        return body + mask(slow_crc(body)).to_bytes(4, "little"), varint(at) + varint(len(body) - 1)

    pairs, table, handles = sorted((k.encode(), v) for k, v in entries.items()), b"", []
    for i in range(0, len(pairs), 50):  # several data blocks
        written, handle = block(pairs[i:i + 50], len(table))
        handles.append((pairs[i:i + 50][-1][0], handle))
        table += written
    meta, meta_handle = block([], len(table))
    table += meta
    index, index_handle = block(handles, len(table))
    table += index + (meta_handle + index_handle).ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")
    Path(f"{prefix}.index").write_bytes(table)
    Path(f"{prefix}.data-00000-of-00001").write_bytes(raw)


@pytest.mark.parametrize("net", [
    model.Separator(["vocals"], NARROW), model.Separator(["vocals", "other", "drums", "bass"], NARROW, "avg"),
    model.Classifier(50, True, "tail", tail_widths=TAIL), model.Classifier(50, True, "v3", 4, ["a", "b"], NARROW, tail_widths=TAIL),
    model.Classifier(7, False, "v3_concat", 3, ["a", "b", "c", "d"], NARROW, tail_widths=TAIL),
    model.Classifier(50, True, "v1", 5, ["a"], NARROW, tail_widths=[4, 8, 8, 8, 8, 8, 8], mel_of_log=True)], ids=lambda n: type(n).__name__)
def test_self_made_tensorflow_checkpoints(net, tmp_path):
    write_tensorflow(randomise(net), tmp_path / "checkpoint-1")
    loaded, meta = model.load(tmp_path / "checkpoint-1")
    with torch.no_grad():
        assert torch.equal(loaded(noise(1, model.CROP)), net(noise(1, model.CROP)))
    assert not loaded.training and meta["kind"] == type(net).__name__.lower()
    assert {k: v for k, v in meta["args"].items() if k not in ("sources", "skips")} == {k: v for k, v in net.args.items() if k not in ("sources", "skips")}


def test_damaged_tensorflow_checkpoints_are_refused(tmp_path):
    prefix = tmp_path / "checkpoint-1"
    write_tensorflow(model.Classifier(50, True, "tail", tail_widths=TAIL), prefix)
    index, raw = Path(f"{prefix}.index"), Path(f"{prefix}.data-00000-of-00001")
    good_index, good_raw = index.read_bytes(), raw.read_bytes()
    raw.write_bytes(good_raw[:-1])
    with pytest.raises(ValueError, match="download it again"):
        model.load(prefix)
    raw.write_bytes(good_raw[:5000] + bytes([good_raw[5000] ^ 1]) + good_raw[5001:])
    with pytest.raises(ValueError, match="checksum"):
        model.load(prefix)
    raw.write_bytes(good_raw)
    rng, whole = np.random.default_rng(0), tf_checkpoint.read(prefix)
    for _ in range(200):  # any one byte changed: an error, or the same network
        at = int(rng.integers(len(good_index)))
        index.write_bytes(good_index[:at] + bytes([good_index[at] ^ int(rng.integers(1, 256))]) + good_index[at + 1:])
        try:
            found = tf_checkpoint.read(prefix)
        except ValueError:
            continue
        assert all(np.array_equal(found[n][k], v) for n, layer in enumerate(whole) for k, v in layer.items())
    index.write_bytes(good_index[:100])
    with pytest.raises(ValueError, match="not a TensorFlow checkpoint index"):
        model.load(prefix)


def test_crc32c():
    assert tf_checkpoint.crc32c(b"123456789") == 0xE3069283  # the check value of the standard
    for n in (0, 1, 3, 4, 5, 63, 64, 1000, 4097):
        raw = np.random.default_rng(n).bytes(n)
        assert tf_checkpoint.crc32c(raw) == slow_crc(raw)


def test_other_files_are_not_checkpoints(tmp_path):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"model": {}}, tmp_path / "alien.pt")
    for name, error in (("junk.pt", ValueError), ("alien.pt", ValueError), ("none.pt", FileNotFoundError)):
        with pytest.raises(error, match=name):
            model.load(tmp_path / name)
