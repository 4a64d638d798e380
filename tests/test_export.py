"""
Networks in other programs: the same answers in onnxruntime, and back from safetensors.

    python -m pytest -q tests/test_export.py
"""
import json

import numpy as np
import pytest
import torch
from conftest import NARROW, TAIL, noise, randomise, run, weights_of

import export
import model

NETS = {
    "four": model.Separator(["vocals", "other", "drums", "bass"], NARROW, "avg"),
    "v1": model.Classifier(3, False, "v1", 5, ["a"], NARROW, tail_widths=TAIL, mel_of_log=True),
    "ast": model.Classifier(3, True, "ast", 1, ["a"], NARROW, transformer=[16, 4, 2], frames=128),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of NETS as checkpoints."""
    folder = tmp_path_factory.mktemp("nets")
    for name, net in NETS.items():
        separates = isinstance(net, model.Separator)
        torch.save({"kind": "separator" if separates else "classifier", "args": net.args,
                    "model": randomise(net).state_dict(), "step": 9, "config": {"data": "x"},
                    "classes": None if separates else ["one", "two", "drei ö"]},
                   folder / f"{name}.pt")
    return folder


def answer(path, x):
    """(metadata, what onnxruntime makes of x)."""
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["about"])
    return about, session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


@pytest.fixture(scope="module")
def onnx(made):
    pytest.importorskip("onnxscript")
    run("export.py", *(made / f"{name}.pt" for name in ("four", "v1", "ast")))
    return made


def test_masks_and_sources_are_those_of_pytorch_for_any_batch_and_length(onnx):
    net = NETS["four"]
    for batch, k in ((1, 6), (3, 1), (2, 10)):
        wave = noise(batch, 10_240 * k + 352)
        magnitude = model.magnitudes(wave)
        about, masks = answer(onnx / "four.onnx", magnitude)
        _, sources = answer(onnx / "four_wave.onnx", wave)
        with torch.no_grad():
            spec = model.stft(wave)
            want = net.masks(spec)
            waves = net.apply_masks(spec, want)
        assert about["sources"] == net.sources and about["sample_rate"] == 16000
        np.testing.assert_allclose(masks, want, atol=1e-5, rtol=0)
        np.testing.assert_allclose(sources, waves, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["v1", "ast"])
def test_scores_are_those_of_pytorch_for_any_batch(onnx, name):
    net = NETS[name]
    for batch in (1, 5):
        wave = noise(batch, net.crop, seed=batch)
        with torch.no_grad():
            logits = net(wave)
        want = logits.sigmoid() if net.multilabel else logits.softmax(-1)
        about, scores = answer(onnx / f"{name}_wave.onnx", wave)
        _, same = answer(onnx / f"{name}.onnx", model.magnitudes(wave))
        assert about["classes"] == ["one", "two", "drei ö"]
        np.testing.assert_allclose(scores, want, atol=1e-4, rtol=0)
        np.testing.assert_allclose(same, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NETS)
def test_safetensors_load_back_as_the_same_network(made, name, tmp_path):
    pytest.importorskip("safetensors")
    run("export.py", made / f"{name}.pt", "--to=safetensors", f"--out={tmp_path}")
    path = tmp_path / f"{name}.safetensors"
    net, meta = model.load(path)
    weights = weights_of(made / f"{name}.pt")
    assert all(torch.equal(net.state_dict()[key], value) for key, value in weights.items())
    assert meta["step"] == 9 and meta["config"] == {"data": "x"}
    assert net.args == NETS[name].args
    # the header can be read without any of our code
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    assert json.loads(json.loads(raw[8:8 + size])["__metadata__"]["about"])["kind"] == meta["kind"]


def test_what_exists_is_not_replaced_and_junk_is_refused(made, tmp_path):
    pytest.importorskip("safetensors")
    args = ["export.py", made / "v1.pt", "--to=safetensors", f"--out={tmp_path}"]
    run(*args)
    assert "exists" in run(*args, ok=False)
    run(*args, "--overwrite=True")
    for name, junk in (("a", b"junk"), ("b", b"\x02\0\0\0\0\0\0\0{}")):
        (tmp_path / f"{name}.safetensors").write_bytes(junk)
        with pytest.raises(ValueError, match="not a checkpoint"):
            model.load(tmp_path / f"{name}.safetensors")
    assert "name one or more" in run("export.py", ok=False)
    assert "must be a folder" in run(*args[:3], "--out=a.safetensors", ok=False)
    assert "to must be one of" in run("export.py", made / "v1.pt", "--to=tflite", ok=False)


def test_the_inverse_stft_as_a_convolution_equals_the_plain_one():
    net = model.Separator(["vocals"], NARROW).eval()
    wave = noise(2, model.CROP)
    with torch.no_grad():
        torch.testing.assert_close(export.Sources(net)(wave), net(wave), atol=1e-6, rtol=0)
