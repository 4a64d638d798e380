"""
What lies in a folder, and downloads from a local server that does what servers do.

    python -m pytest -q tests/test_files.py
"""
import hashlib
import http.server
import os
import shutil
import threading
import unicodedata
import zipfile

import numpy as np
import pytest
from conftest import sound

from prepare import files

# -----------------------------------------------------------------------------
# what lies in a folder

def test_names_are_compared_in_one_form_of_unicode(tmp_path):
    sound(tmp_path / unicodedata.normalize("NFD", "é") / "a.wav")
    assert list(files.inventory(str(tmp_path))) == [unicodedata.normalize("NFC", "é/a.wav")]


def test_one_name_in_two_forms_is_refused(tmp_path):
    for form in ("NFC", "NFD"):
        sound(tmp_path / unicodedata.normalize(form, "é.wav"))
    if len(os.listdir(tmp_path)) == 2:  # some file systems know one form only
        with pytest.raises(ValueError, match="in two spellings"):
            files.inventory(str(tmp_path))


def test_links_take_nothing_away(tmp_path, capsys):
    sound(tmp_path / "in" / "a" / "0.wav")
    sound(tmp_path / "in" / "b" / "0.wav")
    sound(tmp_path / "elsewhere" / "new.wav")
    (tmp_path / "in" / "a" / "b again").symlink_to(tmp_path / "in" / "b")
    (tmp_path / "in" / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "a" / "loop").symlink_to("..")
    found = files.inventory(str(tmp_path / "in"))
    assert list(found) == ["a/0.wav", "b/0.wav", "a/linked/new.wav"]
    assert "b again: it leads to files that are there already" in capsys.readouterr().out


def test_hidden_files_and_unfinished_downloads_are_passed_over(tmp_path):
    for name in ("._a.zip", "a.zip.part", ".DS_Store", "a.wav"):
        (tmp_path / name).write_bytes(b"x")
    assert list(files.inventory(str(tmp_path))) == ["a.wav"]


def test_an_archive_in_parts_must_be_complete(tmp_path):
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as z:
        z.writestr("f/a.wav", bytes(1000))
    raw = (tmp_path / "whole.zip").read_bytes()
    (tmp_path / "in").mkdir()
    for k in range(3):
        part = raw[k * len(raw) // 3:(k + 1) * len(raw) // 3]
        (tmp_path / "in" / f"a.zip.00{k + 1}").write_bytes(part)
    assert list(files.inventory(str(tmp_path / "in"))) == ["f/a.wav"]
    assert files.inventory(str(tmp_path / "in"), skip=["a.zip"]) == {}
    (tmp_path / "in" / "a.zip").write_bytes(raw)
    with pytest.raises(ValueError, match="lies beside its own parts"):
        files.inventory(str(tmp_path / "in"))
    (tmp_path / "in" / "a.zip").unlink()
    (tmp_path / "in" / "a.zip.002").unlink()
    with pytest.raises(ValueError, match="a part is missing"):
        files.inventory(str(tmp_path / "in"))


def test_an_unpacking_that_broke_off_is_noticed(tmp_path):
    sound(tmp_path / "a.wav")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as z:
        z.write(tmp_path / "a.wav", "f/a.wav")
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:5000])
    found = files.inventory(str(tmp_path))
    with pytest.raises(ValueError, match="two files that differ would be a.wav"):
        files.by_name(found, lambda file: file.split("/")[-1], {"a.wav"})


def test_a_table_says_where_it_is_wrong():
    for raw, message in ((b"a,b\n1", "t: line 2 has 1 cells instead of 2"),
                         ("a\nä".encode("latin-1"), "t: not UTF-8"), (b'a\n"x', "t: line 2")):
        with pytest.raises(ValueError, match=message):
            list(files.table(raw, name="t: "))


# -----------------------------------------------------------------------------
# downloads

class Server(http.server.BaseHTTPRequestHandler):
    """files: {name: bytes}; mood: {name: what to do at the next requests}; seen: requests."""
    files, mood, seen = {}, {}, []

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        name = self.path.strip("/")
        moods, start = self.mood.get(name, []), 0
        now = moods.pop(0) if moods and body else ""
        wanted = self.headers.get("Range")
        self.seen.append((self.command, name, wanted))
        if now == "busy":
            return self.send_error(503)
        if name not in self.files:
            return self.send_error(404)
        content = self.files[name] if now != "wrong" else bytes(len(self.files[name]))
        if wanted and now != "no ranges":
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            if start >= len(content):
                return self.send_error(416)
            first = start + 100_000 if now == "other range" else start
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if now != "no length":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if body:
            end = start + 300_000 if now in ("drop", "no length") else len(content)
            self.wfile.write(content[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(files, "PAUSES", (0.01, 0.01))
    Server.files, Server.mood, Server.seen = {}, {}, []
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}/"
    running.shutdown()


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
    files.fetch([source], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT and os.listdir(tmp_path) == ["a.bin"]
    assert ranges() == [None, "bytes=300000-", "bytes=300000-", "bytes=600000-"]
    said = capsys.readouterr().out
    assert "broke off at 0.3 MB" in said and "503" in said


def test_a_file_that_is_there_is_not_downloaded(source, tmp_path):
    (tmp_path / "a.bin").write_bytes(CONTENT)
    files.fetch([source], str(tmp_path))
    assert not Server.seen


def test_what_an_earlier_process_downloaded_is_kept(source, tmp_path):
    for have in (1_000_000, len(CONTENT)):  # killed on the way, and right before the renaming
        (tmp_path / "a.bin.part").write_bytes(CONTENT[:have])
        files.fetch([source], str(tmp_path))
        assert (tmp_path / "a.bin").read_bytes() == CONTENT
        (tmp_path / "a.bin").unlink()
    assert ranges() == ["bytes=1000000-"]


def test_answers_that_do_not_fit_cost_nothing_of_what_is_there(source, tmp_path, capsys):
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:300_000])
    Server.mood["a.bin"] = ["other range", "no length"]
    files.fetch([source], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert ranges() == ["bytes=300000-", "bytes=300000-", "bytes=600000-"]
    assert "instead of what follows byte 300000" in capsys.readouterr().out


def test_a_part_that_is_longer_than_the_file_is_started_again(source, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(bytes(2_000_000))
    files.fetch([source], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_wrong_bytes_never_get_the_name(source, tmp_path):
    Server.mood["a.bin"] = ["wrong"]
    with pytest.raises(ValueError, match="is not the file that the dataset's authors published"):
        files.fetch([source], str(tmp_path))
    assert not list(tmp_path.iterdir())
    files.fetch([source], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_file_that_is_gone_and_a_server_that_is_dead_are_told(server, tmp_path):
    with pytest.raises(ValueError, match="is not there any more .404"):
        files.fetch([(server + "gone.zip", "md5:0")], str(tmp_path))
    Server.files["b.bin"] = bytes(100_000)
    Server.mood["b.bin"] = ["busy"] * 9
    with pytest.raises(ValueError, match="503 .*2 attempts more brought nothing"):
        files.fetch([(server + "b.bin", "md5:0")], str(tmp_path))
    with pytest.raises(ValueError, match="refused"):
        files.fetch([("http://127.0.0.1:9/c.bin", "md5:0")], str(tmp_path))


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(source, tmp_path, monkeypatch):
    small = shutil._ntuple_diskusage(10, 9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: small)
    with pytest.raises(ValueError, match="0.00 GB for the download, the disk has 0.00 GB free"):
        files.fetch([source], str(tmp_path))
    assert {command for command, *_ in Server.seen} == {"HEAD"}


def test_parts_that_were_joined_by_hand_are_not_downloaded(server, tmp_path):
    (tmp_path / "mp3.zip").write_bytes(b"x")
    files.fetch([(server + "mp3.zip.001", "md5:0")], str(tmp_path))
    assert not Server.seen
