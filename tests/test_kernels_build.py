"""
Compiling the CPU kernels, the fallback without them, and imports that must not compile.

    python -m pytest -q tests/test_kernels_build.py
"""
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import CLS, NARROW, ROOT, SEP, sound

from kernels import build

# a training step; prints how many layers were swapped
STEP = f"""
import torch, kernels, model
net = kernels.accelerate(model.Separator(["vocals"], {NARROW}))
net(torch.randn(1, model.CROP)).sum().backward()
assert all(p.grad.abs().sum() > 0 for p in net.parameters())
print(sum(type(m).__module__ == "kernels.layers" for m in net.modules()))"""


def python(code, cwd=ROOT, **env):
    """(stdout, stderr) of a process that runs this code; it must succeed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


@pytest.fixture
def cache(tmp_path):
    """An empty cache folder, and a compiler that copies the library instead of compiling it."""
    if build.library() is None:
        pytest.skip("there is no C++ compiler")
    fake = tmp_path / "c++"
    fake.write_text(f'#!/bin/sh\nfor last; do :; done\ncp "{build.library_path()}" "$last"\n')
    fake.chmod(0o755)
    return {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(fake)}


def test_a_library_is_compiled_once(cache, tmp_path):
    out, err = python(STEP, **cache)
    assert int(out) > 50 and err.count("\n") == 1 and "compiling" in err
    files = sorted(os.listdir(tmp_path / "music-sep-pretrain"))
    name = os.path.basename(build.library_path())
    assert files == [name, f"{name}.sha256"]
    assert python(STEP, XDG_CACHE_HOME=str(tmp_path), CXX="false") == (out, "")


@pytest.mark.parametrize("damage", ["truncated", "empty", "other library", "digest"])
def test_a_damaged_library_is_compiled_again(cache, tmp_path, damage):
    source = build.library_path()
    library = tmp_path / "music-sep-pretrain" / os.path.basename(source)
    digest = library.with_name(f"{library.name}.sha256")
    library.parent.mkdir()
    shutil.copy(source, library), shutil.copy(f"{source}.sha256", digest)
    if damage == "other library":
        subprocess.run(["cc", "-shared", "-x", "c", "-o", library, "/dev/null"], check=True)
    elif damage == "digest":
        digest.write_bytes(b"\xff" * 64)
    else:
        os.truncate(library, 20_000 if damage == "truncated" else 0)
    code = "from kernels import build; print(build.library().winograd_forward is not None)"
    out, err = python(code, **cache)
    assert out == "True\n" and "compiling" in err
    assert build.is_whole(str(library)) and build.is_whole(source)
    digest.unlink()
    assert not build.is_whole(str(library))


@pytest.mark.parametrize("reason", ["no-such-compiler", "false", "cache"])
def test_without_a_library_pytorchs_functions_are_used(tmp_path, reason):
    env = {"XDG_CACHE_HOME": str(tmp_path), "CXX": reason}
    if reason == "cache":
        (tmp_path / "file").write_text("")
        env = {"XDG_CACHE_HOME": str(tmp_path / "file")}    # not a folder: not writable
    out, err = python(STEP, **env)
    assert int(out) == 0
    assert "cannot be compiled" in err.splitlines()[-1] and err.count("\n") <= 2
    assert not list(tmp_path.glob("*/*"))


def test_importing_and_loading_never_compile(tmp_path):
    code = f"""
import sys, torch, hubconf, listen, model, table, weights
from reports import figures, page
from tools import export
net = model.Separator(["vocals"], {NARROW})
saved = dict(kind="separator", args=net.args, model=net.state_dict())
torch.save(saved, "{tmp_path}/a.pt")
net, _ = weights.load("{tmp_path}/a.pt")
model.separate(net, torch.randn(70_000))
assert not any(type(m).__module__.startswith("kernels") for m in net.modules())
assert "torch._dynamo" not in sys.modules       # as slow to import as all the rest"""
    assert python(code, XDG_CACHE_HOME=str(tmp_path / "cache")) == ("", "")
    assert not (tmp_path / "cache").exists()


# -----------------------------------------------------------------------------
# the folder is optional

def test_every_script_works_without_the_folder(demo, tmp_path):
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*/*.html")]:
        copied = tmp_path / path.relative_to(ROOT)
        if copied.parent.name not in ("kernels", "tests"):
            copied.parent.mkdir(exist_ok=True)
            shutil.copy(path, copied)
    sound(tmp_path / "song.wav", 5)
    scripts = [
        ["pretrain_sep.py", f"--data={demo}/demo_songs", *SEP, "--steps=2", "--out=sep.pt"],
        ["finetune_cls.py", f"--data={demo}/demo_clips", *CLS, "--epochs=1", "--init=sep.pt",
         "--out=cls.pt"],
        ["eval.py", "sep.pt", "--device=cpu", f"--data={demo}/demo_songs", "--pictures=False"],
        ["eval.py", "cls.pt", "--device=cpu", f"--data={demo}/demo_clips", "--pictures=False"],
        ["listen.py", "song.wav", "--separator=sep.pt", "--tagger=cls.pt", "--device=cpu"]]
    code = f"""
import os, runpy, sys, torch, torch._dynamo
for args in {json.dumps(scripts)}:
    sys.argv = args
    try:
        runpy.run_path(args[0], run_name="__main__")
    except SystemExit as e:
        assert not e.code, (args, e.code)
assert "kernels" not in sys.modules"""
    python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (tmp_path / "cls.pt").exists() and list((tmp_path / "listened").rglob("*.wav"))
