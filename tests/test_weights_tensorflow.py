"""
TensorFlow checkpoints, read without TensorFlow.

    python -m pytest -q tests/test_weights_tensorflow.py
"""
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NARROW, SHARED, TAIL, noise, randomise, write_tensorflow

import model
import weights
from weights import tensorflow

FIXTURES = SHARED / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs the fixtures")


# -----------------------------------------------------------------------------
# the authors' files

@needs_fixtures
@pytest.mark.parametrize("name", [
    "vocals", "multisource", "mtat_tail", "mtat_vocals", "fma_multisource", "mtat_multisource_v3"])
def test_outputs_equal_those_of_the_original_graphs(name, tmp_path):
    with tarfile.open(FIXTURES / "msspt_tf" / f"{name}.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    net, meta = weights.load(tmp_path / name / "checkpoint-1")
    io = np.load(tmp_path / name / "io.npz")
    theirs = torch.from_numpy(io["output"])
    with torch.no_grad():
        ours = net(torch.from_numpy(io["audio"]))
    if meta["kind"] == "separator":
        theirs = theirs.reshape(2, model.CROP, -1).transpose(1, 2)              # (B, S, N)
        ours, theirs = ours[..., 512:-512], theirs[..., 512:-512]
    elif net.multilabel:
        ours = torch.sigmoid(ours)
    else:
        ours = torch.softmax(ours, -1)
    error = (ours - theirs).abs().max().item()
    print(f"{name}: largest error {error:.1e}")
    assert error < 2e-5


@needs_fixtures
@pytest.mark.parametrize("name, kind, variant", [
    ("separators_vocals", model.Separator, None), ("separators_multisource", model.Separator, None),
    ("downstream_models_MTAT_tail", model.Classifier, "tail"),
    ("downstream_models_MTAT_vocals", model.Classifier, "v1"),
    ("downstream_models_FMA_multisource", model.Classifier, "v1")])
def test_architecture_of_real_index_files(name, kind, variant):
    index = tensorflow.read_index(FIXTURES / "msspt_released_index" / name)
    network_class, args = tensorflow.architecture(index, name)
    assert (network_class, args.get("variant")) == (kind, variant)
    net = network_class(**args)
    for module, layer in zip(tensorflow.weighted_layers(net), index, strict=True):
        entry = layer.get("kernel", layer.get("gamma"))
        assert module.weight.numel() == math.prod(entry["shape"])


# -----------------------------------------------------------------------------
# checkpoints written by the tests

@pytest.mark.parametrize("net", [
    model.Separator(["vocals"], NARROW),
    model.Separator(["vocals", "other", "drums", "bass"], NARROW, "avg"),
    model.Classifier(50, True, "tail", tail_widths=TAIL),
    model.Classifier(50, True, "v3", 4, ["a", "b"], NARROW, tail_widths=TAIL),
    model.Classifier(7, False, "v3_concat", 3, "abcd", NARROW, tail_widths=TAIL),
    model.Classifier(50, True, "v1", 5, ["a"], NARROW, tail_widths=[4, 8, 8, 8, 8, 8, 8],
                     mel_of_log=True)], ids=lambda net: type(net).__name__)
def test_architecture_and_weights_of_every_network(net, tmp_path):
    write_tensorflow(randomise(net), tmp_path / "checkpoint-1")
    loaded, meta = weights.load(tmp_path / "checkpoint-1")
    with torch.no_grad():
        assert torch.equal(loaded(noise(1, model.CROP)), net(noise(1, model.CROP)))
    assert not loaded.training and meta["kind"] == type(net).__name__.lower()
    free = ("sources", "skips")  # names are not in the file; a tail has no skips
    ours, theirs = ({k: v for k, v in a.items() if k not in free} for a in (net.args, meta["args"]))
    assert ours == theirs


@pytest.fixture
def small(tmp_path):
    """(network, prefix of its checkpoint)"""
    net = randomise(model.Classifier(50, True, "tail", tail_widths=TAIL))
    write_tensorflow(net, tmp_path / "checkpoint-1")
    return net, tmp_path / "checkpoint-1"


def test_several_shards(small, tmp_path):
    net, _ = small
    write_tensorflow(net, tmp_path / "many", shards=12)
    assert (tmp_path / "many.data-00003-of-00012").exists()
    loaded, _ = weights.load(tmp_path / "many")
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    (tmp_path / "many.data-00003-of-00012").unlink()
    with pytest.raises(FileNotFoundError, match="data-00003-of-00012"):
        weights.load(tmp_path / "many")


@pytest.mark.parametrize("dtype, tolerance", [("half", 2 ** -10), ("bfloat16", 2 ** -7)])
def test_16_bit_tensors(small, tmp_path, dtype, tolerance):
    net, _ = small
    write_tensorflow(net, tmp_path / "short", dtype=dtype)
    loaded = weights.load(tmp_path / "short")[0].state_dict()
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(loaded[name], value, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5", "MODEL.H5"])
def test_keras_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=f"{name}.*Keras"):
        weights.load(tmp_path / name)


def test_other_networks_are_refused(small):
    layers = tensorflow.read_index(small[1])
    for wrong in (layers[1:], layers[:-1], layers[:2]):
        with pytest.raises(ValueError, match="checkpoint-1 is not"):
            tensorflow.architecture(wrong, small[1])
    wider = model.Classifier(50, True, "tail", tail_widths=[8] * 7)
    for net, wrong, where in ((wider, layers, "layer 0 "), (small[0], layers[:-1], "for 31"),
                              (small[0], layers[1::-1] + layers[2:], "layer 0 ")):
        with pytest.raises(ValueError, match=f"checkpoint-1.* {where}"):
            tensorflow.copy_layers(wrong, net, small[1])


def test_truncated_or_changed_data_is_refused(small):
    data = Path(f"{small[1]}.data-00000-of-00001")
    raw = data.read_bytes()
    data.write_bytes(raw[:-1])
    with pytest.raises(ValueError, match="data-00000-of-00001: checksum"):
        weights.load(small[1])
    data.write_bytes(raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:])
    with pytest.raises(ValueError, match="checksum"):
        weights.load(small[1])


def tensors(prefix):
    return [{key: tensorflow.read_tensor(entry, key) for key, entry in layer.items()}
            for layer in tensorflow.read_index(prefix)]


def test_a_changed_byte_in_the_index_is_an_error_or_harmless(small):
    index, rng = Path(f"{small[1]}.index"), np.random.default_rng(0)
    raw, whole = index.read_bytes(), tensors(small[1])
    for _ in range(100):
        at, change = int(rng.integers(len(raw))), int(rng.integers(1, 256))
        index.write_bytes(raw[:at] + bytes([raw[at] ^ change]) + raw[at + 1:])
        try:
            values = tensors(small[1])
        except ValueError:
            continue
        for ours, theirs in zip(values, whole, strict=True):
            assert all(np.array_equal(ours[key], value) for key, value in theirs.items())
    index.write_bytes(raw[:100])
    with pytest.raises(ValueError, match="checkpoint-1.index"):
        weights.load(small[1])
