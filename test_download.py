"""
Tests of downloading, from a local server that does what servers do.

    python -m pytest -q test_download.py
"""
import hashlib
import http.server
import io
import shutil
import threading
import zipfile

import numpy as np
import pytest

import download
import labels
import prepare_data
from test_prepare import magnatagatune, prepare


class Server(http.server.BaseHTTPRequestHandler):
    files, mood, seen = {}, {}, []

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        name = self.path.strip("/")
        mood, start = self.mood.get(name, []), 0
        now = mood.pop(0) if mood and body else ""
        self.seen.append((self.command, name, self.headers.get("Range")))
        if name not in self.files or now == "busy":
            return self.send_error(503 if now == "busy" else 404)
        content = self.files[name] if now != "wrong" else bytes(len(self.files[name]))
        if self.headers.get("Range") and now != "no ranges":
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start + (100_000 if now == 'other range' else 0)}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if now != "no length":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if body:
            self.wfile.write(content[start:start + 300_000] if now in ("drop", "no length") else content[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSES", (0.01, 0.01))
    Server.files, Server.mood, Server.seen = {}, {}, []
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}/"
    running.shutdown()


def served(server, name, content):
    Server.files[name] = content
    return server + name, "sha256:" + hashlib.sha256(content).hexdigest()


def test_a_download_survives_what_servers_do(server, tmp_path, capsys):
    content = np.random.default_rng(0).bytes(1_500_000)
    source = served(server, "a.bin", content)
    Server.mood["a.bin"] = ["drop", "busy", "drop", "no ranges"]
    download.download([source], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == content and not (tmp_path / "a.bin.part").exists()
    assert [r for c, _, r in Server.seen if c == "GET"] == [None, "bytes=300000-", "bytes=300000-", "bytes=600000-"]
    said = capsys.readouterr().out
    assert "broke off at 0.3 MB" in said and "503" in said

    Server.seen.clear()
    download.download([source], str(tmp_path))  # it is there, and was checked
    assert not Server.seen
    (tmp_path / "a.bin").unlink()
    (tmp_path / "a.bin.part").write_bytes(content[:1_000_000])  # an earlier process was killed
    download.download([source], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == content and ("GET", "a.bin", "bytes=1000000-") in Server.seen
    (tmp_path / "a.bin").rename(tmp_path / "a.bin.part")        # killed between the last byte and the renaming
    download.download([source], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == content


def test_wrong_bytes_a_missing_file_a_full_disk_and_a_dead_server(server, tmp_path, monkeypatch):
    source = served(server, "a.bin", bytes(range(256)) * 4000)
    Server.mood["a.bin"] = ["wrong"]
    with pytest.raises(ValueError, match="is not the file that the dataset's authors published"):
        download.download([source], str(tmp_path))
    assert not list(tmp_path.iterdir())  # what was wrong is gone: the next attempt starts anew
    download.download([source], str(tmp_path))
    (tmp_path / "a.bin").write_bytes(b"the user's own")
    with pytest.raises(ValueError, match="delete it to download it again"):
        download.download([source], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == b"the user's own"
    with pytest.raises(ValueError, match="is not there any more .404 Not Found"):
        download.download([(server + "gone.zip", "md5:0")], str(tmp_path))
    served(server, "b.bin", bytes(100_000))
    Server.mood["b.bin"] = ["busy"] * 9
    with pytest.raises(ValueError, match="503 .*2 attempts more brought nothing"):
        download.download([(server + "b.bin", "md5:0")], str(tmp_path))
    with pytest.raises(ValueError, match="refused"):
        download.download([("http://127.0.0.1:9/c.bin", "md5:0")], str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1000))
    Server.seen.clear()
    with pytest.raises(ValueError, match="0.00 GB for the download, the disk has 0.00 GB free"):
        download.download([(server + "b.bin", "md5:0")], str(tmp_path))
    assert {command for command, *_ in Server.seen} == {"HEAD"}  # looked at before a byte was fetched


def test_answers_that_do_not_fit_cost_nothing_of_what_is_there(server, tmp_path, capsys):
    content = np.random.default_rng(0).bytes(900_000)
    source = served(server, "a.bin", content)
    (tmp_path / "a.bin.part").write_bytes(content[:300_000])
    Server.mood["a.bin"] = ["other range", "no length"]
    download.download([source], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == content
    assert [r for c, _, r in Server.seen if c == "GET"] == ["bytes=300000-", "bytes=300000-", "bytes=600000-"]
    assert "instead of what follows byte 300000" in capsys.readouterr().out
    (tmp_path / "a.bin").unlink()
    (tmp_path / "a.bin.part").write_bytes(bytes(2_000_000))   # longer than the file
    download.download([source], str(tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == content


def test_mtat_downloads_what_is_missing_and_prepares_it(server, tmp_path, monkeypatch, capsys):
    rows, _ = magnatagatune(tmp_path / "raw", clips=32)
    monkeypatch.setattr(labels, "MTAT_CLIPS", {"clean": 28})
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as z:
        for row in rows:
            z.write(tmp_path / "raw" / "mp3" / row[-1], row[-1])
    raw = packed.getvalue()
    parts = {f"mp3.zip.00{k + 1}": raw[k * len(raw) // 3:(k + 1) * len(raw) // 3] for k in range(3)}
    csvs = {name: (tmp_path / "raw" / name).read_bytes() for name in ("annotations_final.csv", "clip_info_final.csv")}
    monkeypatch.setitem(prepare_data.SOURCES, "mtat", [served(server, name, content) for name, content in {**csvs, **parts}.items()])
    here = tmp_path / "out" / "raw" / "mtat"
    here.mkdir(parents=True)
    (here / "mp3.zip.002").write_bytes(parts["mp3.zip.002"])   # an archive that lies there already
    assert prepare(tmp_path / "out", "mtat") == 0
    assert not [s for s in Server.seen if s[1] == "mp3.zip.002"] and sum(c == "GET" for c, *_ in Server.seen) == 4
    assert prepare(tmp_path / "other", "mtat", f"--path={tmp_path / 'raw'}") == 0
    assert (tmp_path / "out" / "mtat" / "audio.int16").read_bytes() == (tmp_path / "other" / "mtat" / "audio.int16").read_bytes()
    Server.seen.clear()
    for part in parts:
        (here / part).unlink()
    (here / "mp3.zip").write_bytes(raw)                        # joined by hand
    assert prepare(tmp_path / "out", "mtat", "--overwrite=True") == 0 and not Server.seen
    (here / "mp3.zip").unlink()
    shutil.copytree(tmp_path / "raw" / "mp3", here / "mp3")    # unpacked by hand: the archives are not needed
    assert prepare(tmp_path / "out", "mtat", "--overwrite=True") == 0 and not Server.seen


@pytest.mark.skipif(not (shutil.which("ffmpeg") and shutil.which("ffprobe")), reason="ffmpeg is not installed")
def test_the_previews_are_the_musdb_packages(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(prepare_data, "fetch_missing", lambda sources, folder: asked.extend(sources))
    (tmp_path / "raw" / "musdb_7s").mkdir(parents=True)
    assert "no train/" in prepare(tmp_path, "musdb", "--download=True")
    assert len(asked) == 1 and asked[0][0].startswith("https://") and asked[0][0].endswith("/MUSDB18-7-STEMS.zip")
    (tmp_path / "raw" / "musdb_7s" / "MUSDB18-7-STEMS.zip").write_bytes(b"not all of it")
    with pytest.raises(ValueError, match="size 13, not 147209385.*delete it"):
        download.fetch_missing(asked, str(tmp_path / "raw" / "musdb_7s"))
