"""
Tests of what happens to prepare_data.py on its way: kills, full disks, second processes, odd files, other settings.

    python -m pytest -q test_collect.py
"""
import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import collect
from test_prepare import RATE, ROOT, index_of, prepare, sound


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """60 clips of 20 s, which take seconds to resample, some of them broken; and what an undisturbed run makes of them."""
    root = tmp_path_factory.mktemp("many")
    for k in range(60):
        sound(root / "in" / f"class {k % 3}" / f"{k:02d}.flac", 20, 44100, seed=k)
    for k in (7, 21, 40):
        (root / "in" / "class 0" / f"{k:02d}x.mp3").write_bytes(b"x" * k * 100)
    assert prepare(root / "whole", "folder", f"--path={root / 'in'}") == 3
    return root


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(many, tmp_path, workers):
    assert prepare(tmp_path, "folder", f"--path={many / 'in'}", f"--workers={workers}") == 3
    assert files_of(tmp_path / "folder") == files_of(many / "whole" / "folder")


def start(out, path, *args, sync=0.0, limit=None):
    """prepare_data.py folder in a process of its own, which syncs after every file; with a limit to the size of files."""
    code = (f"import sys, collect, prepare_data, resource\ncollect.SYNC_EVERY = {sync}\n"
            + (f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n" if limit else "")
            + "prepare_data.run()")
    command = [sys.executable, "-c", code, "folder", f"--path={path}", f"--out={out}", *args]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def journal_lines(out):
    path = out / "folder.partial" / "audio.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(many, tmp_path):
    reached = []
    for share in (0.1, 0.4, 0.8):
        process = start(tmp_path, many / "in")
        while process.poll() is None and journal_lines(tmp_path) < share * 63:
            time.sleep(0.005)
        process.kill()
        process.wait()
        reached.append(journal_lines(tmp_path))
        assert not (tmp_path / "folder").exists()
    assert 0 < reached[0] < reached[1] < reached[2] < 63  # each went on where the one before was
    with open(tmp_path / "folder.partial" / "audio.jsonl", "a") as f:
        f.write('{"name": "class 2/5')                    # torn by the kill
    with open(tmp_path / "folder.partial" / "audio.int16", "ab") as f:
        f.write(b"not yet in the journal")
    assert prepare(tmp_path, "folder", f"--path={many / 'in'}") == 3
    assert files_of(tmp_path / "folder") == files_of(many / "whole" / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".folder.lock", "folder"]


def test_a_full_disk_is_told_and_gone_on_from(many, tmp_path):
    process = start(tmp_path, many / "in", limit=8_000_000)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and "File too large" in said and "goes on from here" in said and "Traceback" not in said
    assert 5 < journal_lines(tmp_path) < 63
    assert prepare(tmp_path, "folder", f"--path={many / 'in'}") == 3
    assert files_of(tmp_path / "folder") == files_of(many / "whole" / "folder")


def test_a_second_process_and_other_settings_are_refused(many, tmp_path, capsys):
    process = start(tmp_path, many / "in")
    while process.poll() is None and journal_lines(tmp_path) < 5:
        time.sleep(0.005)
    assert "another process" in prepare(tmp_path, "folder", f"--path={many / 'in'}")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert "other settings or other files" in prepare(tmp_path, "folder", f"--path={many / 'in'}", "--min_seconds=5")
    assert prepare(tmp_path, "folder", f"--path={many / 'in'}", "--min_seconds=5", "--overwrite=True") == 3
    assert "min_seconds: 5.0 -> 3.862" in prepare(tmp_path, "folder", f"--path={many / 'in'}")
    for name in ("mine", "new.partial", ".newer.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("x")
    assert "not prepared data" in prepare(tmp_path, "folder", f"--path={many / 'in'}", "--name=mine", "--overwrite=True")
    assert "not begun by prepare_data.py" in prepare(tmp_path, "folder", f"--path={many / 'in'}", "--name=new", "--overwrite=True")
    assert "not prepared data" in prepare(tmp_path, "folder", f"--path={many / 'in'}", "--name=newer")
    assert all((tmp_path / name / "thesis.txt").exists() for name in ("mine", "new.partial", ".newer.replaced"))


def test_odd_files_among_the_clips_cost_themselves_only(tmp_path, capsys):
    for genre in "ab":
        for k in range(4):
            sound(tmp_path / "in" / genre / f"{k}.wav", seed=k)
    (tmp_path / "in" / "a" / "gone.wav").symlink_to("nowhere")
    (tmp_path / "in" / "a" / "circle.wav").symlink_to("circle.wav")
    (tmp_path / "in" / "a" / "loop").symlink_to("..")
    (tmp_path / "in" / "a" / "._mp3.zip").write_bytes(b"x")
    (tmp_path / "in" / "a" / "junk.zip").write_bytes(b"x")
    os.link(tmp_path / "in" / "a" / "0.wav", tmp_path / "in" / "b" / "-new\nline \udcff.wav")
    assert prepare(tmp_path / "out", "folder", f"--path={tmp_path / 'in'}") == 3
    found = index_of(tmp_path / "out" / "folder")
    assert len(found["items"]) == 9 and {e["name"]: e["reason"] for e in found["left_out"]} == {
        "a/gone.wav": "is not there", "a/circle.wav": "is not there"}
    for wrong in ("seed=-1", "name=../x", "name=raw", "memory=1e999", "shares=1,1", "shares=1e999,1,1", "timeout=0"):
        assert prepare(tmp_path / "out", "folder", f"--path={tmp_path / 'in'}", f"--{wrong}").startswith("error: ")
    assert "one of the two" in prepare(tmp_path / "out", "folder", f"--path={tmp_path / 'in'}", "--relabel=True", "--overwrite=True")
    (tmp_path / "out" / "folder" / "audio.jsonl").unlink()
    assert "has lost its audio.jsonl" in prepare(tmp_path / "out", "folder")
    (tmp_path / "out" / "folder" / "index.json").write_text("[]")
    assert "was not written by prepare_data.py" in prepare(tmp_path / "out", "folder")


def test_killed_while_it_deletes_what_was_replaced(many, tmp_path, monkeypatch):
    """At whichever of its files: the same command then clears up, and nothing is decoded twice."""
    arguments = ("folder", f"--path={many / 'in'}", "--seed=2", "--overwrite=True")
    for survivors in (["index.json", "job.json", "audio.jsonl"], ["index.json", "job.json"], ["index.json"], []):
        out = tmp_path / str(len(survivors))
        shutil.copytree(many / "whole" / "folder", out / "folder")
        remove = os.remove

        def killed(file, *, dir_fd=None):
            if os.path.basename(file) in survivors and ".replaced" in str(file):
                raise KeyboardInterrupt
            remove(file)
        monkeypatch.setattr(os, "remove", killed)
        if survivors:
            with pytest.raises(KeyboardInterrupt):
                prepare(out, *arguments)
            assert sorted(os.listdir(out / ".folder.replaced")) == sorted(survivors)
        else:
            (out / ".folder.replaced").mkdir()
        monkeypatch.setattr(os, "remove", remove)
        assert prepare(out, *arguments[:3], *([] if survivors else arguments[3:])) == 3
        assert sorted(p.name for p in out.iterdir() if not p.name.endswith(".lock")) == ["folder"]
        assert index_of(out / "folder")["settings"]["seed"] == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a file that can be waited for in vain")
def test_ctrl_c_does_not_wait_for_a_hanging_decoder(tmp_path):
    sound(tmp_path / "in" / "a" / "0.wav")
    sound(tmp_path / "in" / "b" / "0.wav")
    os.mkfifo(tmp_path / "in" / "a" / "1.wav")
    process = start(tmp_path, tmp_path / "in", "--timeout=60")
    while process.poll() is None and not journal_lines(tmp_path):
        time.sleep(0.05)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - began < 10 and "interrupted: the same command goes on" in said and process.returncode == 1
    assert subprocess.run(["pgrep", "-f", f"decode.py {RATE} .* 60$"], capture_output=True).returncode == 1  # no orphans


def test_splits_and_labels_are_listed_and_changed_without_decoding(many, tmp_path, capsys):
    shutil.copytree(many / "whole" / "folder", tmp_path / "folder")
    before = (tmp_path / "folder" / "audio.int16").stat().st_mtime_ns
    capsys.readouterr()
    assert prepare(tmp_path, "folder") == 3 and "class 1 16 / 2 / 2" in capsys.readouterr().out
    assert "--relabel=True" in prepare(tmp_path, "folder", "--seed=2")
    assert prepare(tmp_path, "folder", "--seed=2", "--relabel=True") == 3
    new, old = index_of(tmp_path / "folder"), index_of(many / "whole" / "folder")
    assert [i["offset"] for i in new["items"]] == [i["offset"] for i in old["items"]]
    assert [i["split"] for i in new["items"]] != [i["split"] for i in old["items"]]
    assert (tmp_path / "folder" / "audio.int16").stat().st_mtime_ns == before
    shutil.copytree(many / "in", tmp_path / "in")
    sound(tmp_path / "in" / "class 0" / "new.wav")
    assert "have not been decoded, such as class 0/new.wav" in prepare(tmp_path, "folder", f"--path={tmp_path / 'in'}", "--relabel=True")
    (tmp_path / "in" / "class 0" / "new.wav").unlink()
    for gone in sorted((tmp_path / "in" / "class 1").iterdir())[:5]:
        gone.unlink()
    assert prepare(tmp_path, "folder", f"--path={tmp_path / 'in'}", "--relabel=True") == 3
    assert index_of(tmp_path / "folder")["items"] == new["items"]                   # what was decoded stays


def test_what_can_only_be_read_is_listed(many, tmp_path, monkeypatch):
    def refuse(lock):
        raise PermissionError(errno.EACCES, "Permission denied", lock.lock_file)
    shutil.copytree(many / "whole" / "folder", tmp_path / "folder")
    monkeypatch.setattr(collect.FileLock, "acquire", refuse)
    assert prepare(tmp_path, "folder") == 3
    assert "Permission denied" in prepare(tmp_path, "folder", f"--path={many / 'in'}", "--name=new")


def test_files_that_are_cut_off_show_in_the_exit_status(tmp_path, capsys):
    for genre in "ab":
        for k in range(3):
            sound(tmp_path / "in" / genre / f"{k}.flac", 10, seed=k)
    assert prepare(tmp_path, "folder", f"--path={tmp_path / 'in'}", "--name=whole") == 0
    cut = tmp_path / "in" / "a" / "1.flac"
    cut.write_bytes(cut.read_bytes()[:cut.stat().st_size // 2])
    capsys.readouterr()
    assert prepare(tmp_path, "folder", f"--path={tmp_path / 'in'}", "--name=cut") == 3
    said = capsys.readouterr().out
    assert "DAMAGED: 1 files" in said and "such as a/1.flac" in said and len(index_of(tmp_path / "cut")["items"]) == 6
