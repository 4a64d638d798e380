"""
Atomic files and locks.
"""
import errno
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from common import files


def python(code, **options):
    """A process that runs this code."""
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


# -----------------------------------------------------------------------------
# atomic files

@pytest.mark.parametrize("name, write", [
    ("big.pt", 'files.save_atomically({"x": torch.zeros(1_000_000)}, path)'),
    ("big.txt", 'files.write_atomically("x" * 1_000_000, path)')])
def test_full_disk_names_the_path_and_leaves_no_file(tmp_path, name, write):
    process = python(f"""
import resource, torch
from common import files, settings
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
path = {str(tmp_path / name)!r}
def main():
    {write}
settings.script(main)""")
    output, _ = process.communicate(timeout=120)
    assert f"{tmp_path}/{name}: File too large" in output and process.returncode == 1
    assert "Traceback" not in output and not os.listdir(tmp_path)


def test_failed_write_keeps_the_old_file(tmp_path):
    files.write_atomically("old", str(tmp_path / "a"))
    with pytest.raises(TypeError):
        files.write_atomically(3, str(tmp_path / "a"))
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


# -----------------------------------------------------------------------------
# locks

def test_lock_is_exclusive_until_it_is_closed(tmp_path):
    path = str(tmp_path / "new" / ".lock")
    with files.lock(path, "the folder"):
        with pytest.raises(ValueError, match=f"the folder.*{path}"):
            files.lock(path, "the folder")
    files.lock(path, "the folder").close()


def test_lock_is_held_even_if_the_caller_drops_it(tmp_path):
    path = str(tmp_path / ".lock")
    files.lock(path, "it")
    with pytest.raises(ValueError, match=path):
        files.lock(path, "it")


def test_lock_can_be_waited_for(tmp_path):
    path = str(tmp_path / ".lock")
    with files.lock(path, "it"):
        process = python(f"from common import files\nfiles.lock({path!r}, 'it', wait=True)\n"
                         "print('locked')")
        time.sleep(1)
        assert process.poll() is None
    assert process.communicate(timeout=60)[0] == "locked\n"


@pytest.mark.skipif(files.fcntl is None, reason="needs inherited locks")
def test_child_processes_keep_the_lock_of_a_killed_script(tmp_path):
    path = str(tmp_path / ".lock")
    process = python(f"""
import subprocess, sys, time
from common import files
files.lock({path!r}, "it")
child = subprocess.Popen([sys.executable, "-c", "input()"], close_fds=False)
print("started", flush=True)
time.sleep(60)""", stdin=subprocess.PIPE)
    assert process.stdout.readline() == "started\n"
    process.kill()
    process.wait()
    with pytest.raises(ValueError, match=path):
        files.lock(path, "it")
    process.stdin.close()                   # ends the child
    files.lock(path, "it", wait=True).close()


@pytest.mark.skipif(files.fcntl is None, reason="needs fcntl")
@pytest.mark.parametrize("number, noted", [(errno.ENOLCK, True), (errno.EIO, False)])
def test_file_systems_without_locks_are_noted(tmp_path, monkeypatch, capsys, number, noted):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    if noted:
        files.lock(str(tmp_path / ".lock"), "the folder")
        assert "note: the folder" in capsys.readouterr().out
    else:
        with pytest.raises(OSError):
            files.lock(str(tmp_path / ".lock"), "the folder")
