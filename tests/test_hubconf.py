"""
The networks through torch.hub.

    python -m pytest -q tests/test_hubconf.py
"""
import copy
import subprocess
import sys

import pytest
import torch
from conftest import NARROW, ROOT, TAIL, noise, randomise

import model


def load(entry, path):
    return torch.hub.load(str(ROOT), entry, str(path), source="local")


@pytest.fixture
def nets(tmp_path):
    """The folder of separator.pt and classifier.pt."""
    for net in (model.Separator(["vocals", "drums"], NARROW),
                model.Classifier(2, False, "v1", 5, ["a"], NARROW, tail_widths=TAIL)):
        kind = type(net).__name__.lower()
        torch.save({"kind": kind, "args": net.args, "model": randomise(net).state_dict(), "step": 9,
                    "config": {}, "classes": ["one", "two"]}, tmp_path / f"{kind}.pt")
    return tmp_path


def test_separate_and_tag_from_another_folder(nets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wave = noise(2, 50_000)
    separator, tagger = load("separator", nets / "separator.pt"), load("tagger", "classifier.pt")
    assert torch.equal(separator.separate(wave, 22_050), model.separate(separator, wave, 22_050))
    assert tagger.classes == ["one", "two"]
    assert torch.equal(tagger.tag(wave, 22_050), model.tag(tagger, wave, 22_050))
    assert tagger.tag(wave[0], hop=0.5).shape == (1, 2)
    with pytest.raises(ValueError, match="classifier.pt is a classifier"):
        load("separator", nets / "classifier.pt")


def test_methods_follow_a_copy(nets):
    net = load("separator", nets / "separator.pt")
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.unet.head[1].bias.fill_(-100)
    wave = noise(50_000)
    assert net.separate(wave).any() and twin.separate(wave).abs().max() < 1e-2


def test_no_compiler_and_no_audio_library_is_loaded():
    modules = {"av", "soundfile", "torchaudio", "kernels", "torch._dynamo"}
    code = f"import sys, hubconf; print(*sys.modules.keys() & {modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr
