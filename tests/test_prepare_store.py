"""
Preparing is like make: interrupted and repeated runs, and folders that are not to be touched.
"""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, index_of, prepare, run, sound

from data import Prepared
from prepare import store


def samples_of(folder):
    """{name: (index entry without offset, samples)}, which must not depend on earlier runs."""
    data = Prepared(str(folder), "clips")
    return {item["name"]: ({**item, "offset": 0}, data.read(item).tobytes())
            for item in data.index["items"]}


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """42 clips, two of them broken, and the result of an uninterrupted run."""
    root = tmp_path_factory.mktemp("many")
    for k in range(40):
        sound(root / "in" / f"class {k % 3}" / f"{k:02d}.flac", 6 + k % 3, seed=k)
    for k in (7, 21):
        (root / "in" / "class 0" / f"{k:02d}x.mp3").write_bytes(b"x" * k * 100)
    assert prepare(root / "whole", "folder", f"--path={root / 'in'}", "--workers=1") == 3
    return root


@pytest.fixture
def done(many, tmp_path):
    """A copy of the clips and the prepared folder that a test may change."""
    shutil.copytree(many / "in", tmp_path / "in")
    shutil.copytree(many / "whole", tmp_path / "out")
    header, *lines = (tmp_path / "out" / "folder" / "journal.jsonl").read_text().splitlines(True)
    header = header.replace(str(many), str(tmp_path))
    (tmp_path / "out" / "folder" / "journal.jsonl").write_text("".join([header, *lines]))
    return tmp_path


def again(root, *args):
    return prepare(root / "out", "folder", f"--path={root / 'in'}", "--workers=1", *args)


def start(out, path, *args, limit=None):
    """prepare_data.py in a new process, which syncs after every file.

    limit: of the size of a file, in bytes.
    """
    code = "import sys, resource\nfrom prepare import store\nstore.SYNC_EVERY = 0\n"
    if limit:
        code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    code += "import prepare_data\nfrom common import settings\nsettings.script(prepare_data.main)"
    command = [sys.executable, "-c", code, "folder", f"--path={path}", f"--out={out}",
               "--workers=1", *args]
    # tests that run in the background ignore Ctrl-C, and so would their processes
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def lines_in(out):
    path = out / "folder" / "journal.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(process, out, lines):
    while process.poll() is None and lines_in(out) < lines:
        time.sleep(0.005)


# -----------------------------------------------------------------------------
# interrupted runs

def test_killed_runs_resume_to_the_same_bytes(many, tmp_path):
    for lines in (0, 5, 20, 35):
        process = start(tmp_path, many / "in")
        wait_for(process, tmp_path, lines)
        process.kill()
        process.communicate()
        assert not (tmp_path / "folder" / "index.json").exists()
    assert 30 < lines_in(tmp_path) < 43  # each resumed the one before
    assert prepare(tmp_path, "folder", f"--path={many / 'in'}") == 3
    assert bytes_of(tmp_path / "folder") == bytes_of(many / "whole" / "folder")


def test_partial_writes_are_truncated(done):
    folder = done / "out" / "folder"
    whole = bytes_of(folder)
    with open(folder / "journal.jsonl", "a") as f:
        f.write('{"name": "class 2/5')
    with open(folder / "audio.int16", "ab") as f:
        f.write(b"not yet in the journal")
    sound(done / "in" / "class 1" / "new.wav")
    assert again(done) == 3
    assert bytes_of(folder)["audio.int16"].startswith(whole["audio.int16"])
    assert len(samples_of(folder)) == 41


def test_result_does_not_depend_on_the_number_of_workers(many, tmp_path):
    assert prepare(tmp_path, "folder", f"--path={many / 'in'}", "--workers=3") == 3
    assert bytes_of(tmp_path / "folder") == bytes_of(many / "whole" / "folder")


def test_full_disk_is_reported_and_resumed_from(many, tmp_path):
    process = start(tmp_path, many / "in", limit=3_000_000)
    _, output = process.communicate(timeout=120)
    assert process.returncode == 1 and "File too large" in output and str(tmp_path) in output
    assert "resumes" in output and "Traceback" not in output
    assert 5 < lines_in(tmp_path) < 43
    assert prepare(tmp_path, "folder", f"--path={many / 'in'}") == 3
    assert bytes_of(tmp_path / "folder") == bytes_of(many / "whole" / "folder")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_ctrl_c_does_not_wait_for_a_hanging_decoder(tmp_path):
    sound(tmp_path / "in" / "a" / "0.wav")
    sound(tmp_path / "in" / "b" / "0.wav")
    os.mkfifo(tmp_path / "in" / "a" / "1.wav")
    process = start(tmp_path, tmp_path / "in", "--timeout=60")
    wait_for(process, tmp_path, 2)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=30)
    assert "interrupted" in output and process.returncode == 1
    assert time.monotonic() - began < 15


def test_second_process_is_refused(many, tmp_path):
    with store.locked(str(tmp_path / "folder")):
        process = start(tmp_path, many / "in")
        _, output = process.communicate(timeout=60)
    assert ".folder.lock" in output and process.returncode == 1


# -----------------------------------------------------------------------------
# the same command again

def test_unchanged_files_are_not_decoded_again(done, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in (done / "out" / "folder").iterdir()}
    index = json.loads((done / "out" / "folder" / "index.json").read_text())
    capsys.readouterr()
    assert again(done) == 3
    output = capsys.readouterr().out
    assert "nothing new to decode" in output and "class 1 10 / 2 / 1" in output
    assert "have changed since" not in output
    assert index_of(done / "out" / "folder")["items"] == index["items"]
    assert (done / "out" / "folder" / "audio.int16").stat().st_mtime_ns == before["audio.int16"]


def test_new_repaired_and_changed_files_are_decoded(done, capsys):
    sound(done / "in" / "class 1" / "new.wav", 8)
    sound(done / "in" / "class 0" / "07x.mp3", 8)                   # was broken
    sound(done / "in" / "class 2" / "02.flac", 9, seed=99)          # another recording
    os.utime(done / "in" / "class 0" / "00.flac")                   # touched: decoded again
    capsys.readouterr()
    assert again(done) == 3
    output = capsys.readouterr().out
    assert "3 files have changed" in output and "have changed since the last run" in output
    samples = samples_of(done / "out" / "folder")
    assert prepare(done / "fresh", "folder", f"--path={done / 'in'}") == 3
    assert samples == samples_of(done / "fresh" / "folder")
    assert samples["class 2/02.flac"][0]["length"] == 9 * 16000


def test_splits_and_min_seconds_change_without_decoding(done, capsys):
    audio = (done / "out" / "folder" / "audio.int16").read_bytes()
    old = {i["name"]: i["split"] for i in index_of(done / "out" / "folder")["items"]}
    assert again(done, "--seed=2") == 3
    new = {i["name"]: i["split"] for i in index_of(done / "out" / "folder")["items"]}
    assert old.keys() == new.keys() and old != new
    assert again(done, "--min_seconds=7") == 3
    assert len(index_of(done / "out" / "folder")["items"]) == 26
    assert again(done) == 3
    assert {i["name"]: i["split"] for i in index_of(done / "out" / "folder")["items"]} == old
    assert (done / "out" / "folder" / "audio.int16").read_bytes() == audio
    assert capsys.readouterr().out.count("nothing new to decode") == 3


def test_deleted_clips_are_no_longer_listed(done):
    (done / "in" / "class 1" / "01.flac").unlink()
    assert again(done) == 3
    samples = samples_of(done / "out" / "folder")
    assert len(samples) == 39 and "class 1/01.flac" not in samples


def test_prepared_data_can_be_split_again_without_the_files(done, capsys):
    names = {i["name"] for i in index_of(done / "out" / "folder")["items"]}
    shutil.rmtree(done / "in")
    assert again(done, "--shares=0.5,0.25,0.25") == 3
    items = index_of(done / "out" / "folder")["items"]
    assert {i["name"] for i in items} == names
    assert sum(i["split"] == "train" for i in items) == 20
    assert "keeps the clips and labels of the last run" in capsys.readouterr().out


def test_damaged_index_is_rewritten(done):
    (done / "out" / "folder" / "index.json").write_text("[")
    again(done)
    (done / "out" / "folder" / "index.json").unlink()
    assert again(done) == 3 and len(samples_of(done / "out" / "folder")) == 40


def test_overwrite_decodes_again(done, many):
    (done / "out" / "folder" / "audio.int16").write_bytes(b"damaged")
    assert "audio.int16 is shorter" in again(done)
    assert again(done, "--overwrite=True") == 3
    whole = bytes_of(many / "whole" / "folder")
    assert (done / "out" / "folder" / "audio.int16").read_bytes() == whole["audio.int16"]


def test_overwrite_keeps_audio_whose_files_are_gone(done):
    shutil.rmtree(done / "in")
    assert "is not a folder" in again(done, "--overwrite=True")
    assert len(samples_of(done / "out" / "folder")) == 40


def test_readers_ignore_appended_audio(done):
    data = Prepared(str(done / "out" / "folder"), "clips")
    with open(done / "out" / "folder" / "audio.int16", "ab") as f:
        f.write(bytes(1000))
    other = Prepared(str(done / "out" / "folder"), "clips")
    item = data.index["items"][3]
    assert np.array_equal(data.read(item), other.read(item))


# -----------------------------------------------------------------------------
# folders that are not to be touched

def test_other_folders_and_files_are_not_touched(many, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for more in ([], ["--overwrite=True"]):
        answer = prepare(tmp_path, "folder", f"--path={many / 'in'}", "--name=mine", *more)
        assert "is not prepared data" in answer
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]
    (tmp_path / "file").write_text("x")
    answer = prepare(tmp_path, "folder", f"--path={many / 'in'}", "--name=file")
    assert "Not a directory" in answer


def test_audio_of_two_sources_is_not_mixed(done, tmp_path):
    for genre in "ab":
        sound(tmp_path / "other" / genre / "0.wav")
    answer = prepare(done / "out", "folder", f"--path={tmp_path / 'other'}")
    assert "has clips of" in answer and "--name=NAME" in answer
    assert len(samples_of(done / "out" / "folder")) == 40


def test_read_only_folder_can_be_listed(done, monkeypatch):
    def refuse(path, what):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(store, "lock", refuse)
    assert again(done) == 3
    assert "Permission denied" in again(done, "--name=new")


def test_temporary_files_of_killed_processes_are_removed(done):
    (done / "out" / "folder" / "index.json.123.tmp").write_text("half")
    assert again(done) == 3
    assert not list((done / "out" / "folder").glob("*.tmp"))


@pytest.mark.parametrize("wrong", [
    "seed=-1", "seed=4294967296", "name=../x", "name=raw", "name=a/b", "memory=1e999",
    "shares=1,1", "shares=1e999,1,1", "timeout=0", "workers=-1", "min_seconds=nan"])
def test_settings_are_checked_first(many, tmp_path, wrong):
    answer = prepare(tmp_path, "folder", f"--path={many / 'in'}", f"--{wrong}")
    assert str(answer).startswith("error: ") and not os.listdir(tmp_path)


def test_truncated_file_gives_exit_status_3(tmp_path, capsys):
    for genre in "ab":
        for k in range(3):
            sound(tmp_path / "in" / genre / f"{k}.flac", 10, seed=k)
    assert prepare(tmp_path, "folder", f"--path={tmp_path / 'in'}", "--workers=1") == 0
    cut = tmp_path / "in" / "a" / "1.flac"
    cut.write_bytes(cut.read_bytes()[:cut.stat().st_size // 2])
    assert prepare(tmp_path, "folder", f"--path={tmp_path / 'in'}", "--workers=1") == 3
    output = capsys.readouterr().out
    assert "DAMAGED: 1 files" in output and "such as a/1.flac" in output
    assert len(index_of(tmp_path / "folder")["items"]) == 6


def test_one_dataset_must_be_named():
    assert "'demos'" in run("prepare_data.py", "demos", ok=False)
