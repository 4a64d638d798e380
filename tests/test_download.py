"""
Downloads: what servers and connections do to them.

    python -m pytest -q tests/test_download.py
"""
import hashlib
import os
import shutil

import numpy as np
import pytest
from conftest import Server

import download

CONTENT = np.random.default_rng(0).bytes(1_500_000)


@pytest.fixture
def source(server):
    """(address, checksum) of a file on the server."""
    Server.files["a.bin"] = CONTENT
    return server + "a.bin", "sha256:" + hashlib.sha256(CONTENT).hexdigest()


def ranges():
    return [wanted for command, _, wanted in Server.seen if command == "GET"]


def test_a_download_survives_what_servers_do(source, tmp_path, capsys):
    Server.mood["a.bin"] = ["drop", "busy", "drop", "no ranges"]
    download.fetch([source], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT and os.listdir(tmp_path) == ["a.bin"]
    assert ranges() == [None, "bytes=300000-", "bytes=300000-", "bytes=600000-"]
    said = capsys.readouterr().out
    assert "broke off at 0.3 MB" in said and "503" in said


def test_a_file_that_is_there_is_not_downloaded(source, tmp_path):
    (tmp_path / "a.bin").write_bytes(CONTENT)
    download.fetch([source], str(tmp_path))
    assert not Server.seen


def test_what_an_earlier_process_downloaded_is_kept(source, tmp_path):
    for have in (1_000_000, len(CONTENT)):  # killed on the way, and right before the renaming
        (tmp_path / "a.bin.part").write_bytes(CONTENT[:have])
        download.fetch([source], str(tmp_path))
        assert (tmp_path / "a.bin").read_bytes() == CONTENT
        (tmp_path / "a.bin").unlink()
    assert ranges() == ["bytes=1000000-"]


def test_answers_that_do_not_fit_cost_nothing_of_what_is_there(source, tmp_path, capsys):
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:300_000])
    Server.mood["a.bin"] = ["other range", "no length"]
    download.fetch([source], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert ranges() == ["bytes=300000-", "bytes=300000-", "bytes=600000-"]
    assert "instead of what follows byte 300000" in capsys.readouterr().out


def test_a_part_that_is_longer_than_the_file_is_started_again(source, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(bytes(2_000_000))
    download.fetch([source], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_wrong_bytes_never_get_the_name(source, tmp_path):
    Server.mood["a.bin"] = ["wrong"]
    with pytest.raises(ValueError, match="is not the file that its authors published"):
        download.fetch([source], str(tmp_path))
    assert not list(tmp_path.iterdir())
    download.fetch([source], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_file_that_is_gone_and_a_server_that_is_dead_are_told(server, tmp_path):
    with pytest.raises(ValueError, match="is not there any more .404"):
        download.fetch([(server + "gone.zip", "md5:0")], str(tmp_path))
    Server.files["b.bin"] = bytes(100_000)
    Server.mood["b.bin"] = ["busy"] * 9
    with pytest.raises(ValueError, match="503 .*, 3 times, .*is there a network"):
        download.fetch([(server + "b.bin", "md5:0")], str(tmp_path))
    with pytest.raises(ValueError, match="refused"):
        download.fetch([("http://127.0.0.1:9/c.bin", "md5:0")], str(tmp_path))


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(source, tmp_path, monkeypatch):
    small = shutil._ntuple_diskusage(10, 9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: small)
    with pytest.raises(ValueError, match="0.00 GB for the download, the disk has 0.00 GB free"):
        download.fetch([source], str(tmp_path))
    assert {command for command, *_ in Server.seen} == {"HEAD"}


def test_parts_that_were_joined_by_hand_are_not_downloaded(server, tmp_path):
    (tmp_path / "mp3.zip").write_bytes(b"x")
    download.fetch([(server + "mp3.zip.001", "md5:0")], str(tmp_path))
    assert not Server.seen
