"""
Exported networks: the same outputs in onnxruntime.

    python -m pytest -q tests/test_export.py
"""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import NARROW, ROOT, TAIL, noise, randomise

import model
import weights
from tools import export

NETS = {
    "four": model.Separator(["vocals", "other", "drums", "bass"], NARROW, "avg"),
    "v1": model.Classifier(3, False, "v1", 5, ["a"], NARROW, tail_widths=TAIL, mel_of_log=True),
    "ast": model.Classifier(3, True, "ast", 1, ["a"], NARROW, transformer=[16, 4, 2]),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folder with NETS as checkpoints."""
    folder = tmp_path_factory.mktemp("nets")
    for name, net in NETS.items():
        separates = isinstance(net, model.Separator)
        torch.save({"kind": "separator" if separates else "classifier", "args": net.args,
                    "model": randomise(net).state_dict(), "step": 9, "config": {"data": "x"},
                    "classes": None if separates else ["one", "two", "drei ö"]},
                   folder / f"{name}.pt")
    return folder


def run_onnx(path, x):
    """(metadata, the output of onnxruntime for x)."""
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["about"])
    return about, session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def run_export(*args):
    """Runs the script in this process."""
    before, sys.argv = sys.argv, ["export.py", *map(str, args)]
    try:
        export.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def onnx(checkpoints):
    pytest.importorskip("onnxscript")
    run_export(*(checkpoints / f"{name}.pt" for name in NETS))
    return checkpoints


def test_onnx_separator_for_any_batch_and_length(onnx):
    net = NETS["four"]
    for batch, k in ((1, 6), (3, 1), (2, 10)):
        wave = noise(batch, 10_240 * k + 352)
        magnitude = model.magnitudes(wave)
        about, masks = run_onnx(onnx / "four.onnx", magnitude)
        _, sources = run_onnx(onnx / "four_wave.onnx", wave)
        with torch.no_grad():
            spec = model.stft(wave)
            want = net.masks(spec)
            waves = net.apply_masks(spec, want)
        assert about["sources"] == net.sources and about["sample_rate"] == 16000
        np.testing.assert_allclose(masks, want, atol=1e-5, rtol=0)
        np.testing.assert_allclose(sources, waves, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["v1", "ast"])
def test_onnx_classifier_for_any_batch(onnx, name):
    net = NETS[name]
    for batch in (1, 5):
        wave = noise(batch, net.crop, seed=batch)
        with torch.no_grad():
            logits = net(wave)
        want = logits.sigmoid() if net.multilabel else logits.softmax(-1)
        about, scores = run_onnx(onnx / f"{name}_wave.onnx", wave)
        _, same = run_onnx(onnx / f"{name}.onnx", model.magnitudes(wave))
        assert about["classes"] == ["one", "two", "drei ö"]
        np.testing.assert_allclose(scores, want, atol=1e-4, rtol=0)
        np.testing.assert_allclose(same, want, atol=1e-4, rtol=0)


def test_export_to_safetensors_from_the_command_line(checkpoints, tmp_path):
    pytest.importorskip("safetensors")
    subprocess.run([sys.executable, "-m", "tools.export", checkpoints / "v1.pt", "--to=safetensors",
                    f"--out={tmp_path}/new"], cwd=ROOT, check=True)
    net, meta = weights.load(tmp_path / "new" / "v1.safetensors")
    wanted = torch.load(checkpoints / "v1.pt", weights_only=True)["model"]
    assert all(torch.equal(net.state_dict()[key], value) for key, value in wanted.items())
    assert meta["classes"] == ["one", "two", "drei ö"]


def test_existing_files_and_wrong_settings(checkpoints, tmp_path):
    pytest.importorskip("safetensors")
    args = [checkpoints / "v1.pt", "--to=safetensors", f"--out={tmp_path}"]
    run_export(*args)
    for more, message in (([], "v1.safetensors exists"),
                          ([checkpoints / "v1.pt", "--overwrite=True"], "two of these checkpoints"),
                          (["--out=a.safetensors"], "a.safetensors"), (["--to=tflite"], "tflite")):
        with pytest.raises(SystemExit, match=message):
            run_export(*args, *more)
    with pytest.raises(SystemExit, match="expected checkpoints"):
        run_export("--to=safetensors")
    run_export(*args, "--overwrite=True")


def test_inverse_stft_as_a_convolution():
    net = model.Separator(["vocals"], NARROW).eval()
    wave = noise(2, model.CROP)
    with torch.no_grad():
        torch.testing.assert_close(export.Sources(net, True)(wave), net(wave), atol=1e-6, rtol=0)
