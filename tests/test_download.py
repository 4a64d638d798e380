"""
Downloads from a local server with the faults of real ones.
"""
import hashlib
import os
import shutil

import numpy as np
import pytest
from conftest import Server

from common import download

CONTENT = np.random.default_rng(0).bytes(1_500_000)


@pytest.fixture
def source(server):
    """(address, checksum) of a file on the server."""
    Server.files["a.bin"] = CONTENT
    return server + "a.bin", "sha256:" + hashlib.sha256(CONTENT).hexdigest()


def ranges():
    return [wanted for command, _, wanted in Server.requests if command == "GET"]


def test_download_survives_faults_of_the_server(source, tmp_path, capsys):
    Server.mood["a.bin"] = ["drop", "busy", "drop", "no ranges"]
    download.fetch([source], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT and os.listdir(tmp_path) == ["a.bin"]
    assert ranges() == [None, "bytes=300000-", "bytes=300000-", "bytes=600000-"]
    output = capsys.readouterr().out
    assert "0.3 MB" in output and "503" in output


def test_git_blob_ids_are_checksums(source, tmp_path):
    blob = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()
    download.fetch([(source[0], f"gitblob:{blob}")], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_existing_file_is_not_downloaded(source, tmp_path):
    (tmp_path / "a.bin").write_bytes(CONTENT)
    download.fetch([source], str(tmp_path))
    assert not Server.requests


def test_download_of_a_killed_process_is_resumed(source, tmp_path):
    for have in (1_000_000, len(CONTENT)):  # killed during the download, and before the rename
        (tmp_path / "a.bin.part").write_bytes(CONTENT[:have])
        download.fetch([source], str(tmp_path))
        assert (tmp_path / "a.bin").read_bytes() == CONTENT
        (tmp_path / "a.bin").unlink()
    assert ranges() == ["bytes=1000000-"]


def test_wrong_answers_keep_what_is_downloaded(source, tmp_path, capsys):
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:300_000])
    Server.mood["a.bin"] = ["other range", "no length"]
    download.fetch([source], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert ranges() == ["bytes=300000-", "bytes=300000-", "bytes=600000-"]
    assert "byte 300000" in capsys.readouterr().out


def test_too_long_part_is_downloaded_again(source, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(bytes(2_000_000))
    download.fetch([source], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_wrong_checksum_leaves_no_file(source, tmp_path):
    Server.mood["a.bin"] = ["wrong"]
    with pytest.raises(ValueError, match="a.bin is not the published file"):
        download.fetch([source], str(tmp_path))
    assert not list(tmp_path.iterdir())
    download.fetch([source], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_missing_file_and_dead_server_are_reported(server, tmp_path):
    with pytest.raises(ValueError, match="gone.zip .*404"):
        download.fetch([(server + "gone.zip", "md5:0")], str(tmp_path))
    Server.files["b.bin"] = bytes(100_000)
    Server.mood["b.bin"] = ["busy"] * 9
    with pytest.raises(ValueError, match="b.bin: 503 .*, 3 times.*internet connection"):
        download.fetch([(server + "b.bin", "md5:0")], str(tmp_path))
    with pytest.raises(ValueError, match="refused"):
        download.fetch([("http://127.0.0.1:9/c.bin", "md5:0")], str(tmp_path))


def test_full_disk_is_reported_before_the_download(source, tmp_path, monkeypatch):
    small = shutil._ntuple_diskusage(10, 9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: small)
    with pytest.raises(ValueError, match="GB free"):
        download.fetch([source], str(tmp_path))
    assert {command for command, *_ in Server.requests} == {"HEAD"}


def test_parts_joined_by_hand_are_not_downloaded(server, tmp_path):
    (tmp_path / "mp3.zip").write_bytes(b"x")
    download.fetch([(server + "mp3.zip.001", "md5:0")], str(tmp_path))
    assert not Server.requests
