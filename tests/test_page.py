"""
HTML pages of songs, results and runs; in a headless Chromium if there is one.

    python -m pytest -q tests/test_page.py
"""
import base64
import io
import json
import os
import re
import select
import shutil
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import NARROW, TAIL, randomise, run, sound

import model
from audio import files
from reports import page

CHROMIUM = shutil.which("chromium")


def tracks_of(path):
    """[(name, seconds)] of the sounds in a page, which must refer to no other file."""
    text = path.read_text()
    assert "{{" not in text and not re.search(r"(src|href)=\"(?!data:)", text)
    sounds = re.search(r'id="sound">(.*?)</script>', text, re.DOTALL)[1]
    tracks = []
    for track in json.loads(sounds):
        wave, rate, damage = files.read(io.BytesIO(base64.b64decode(track["mp3"])))
        assert rate == page.RATE and not damage
        tracks.append((track["name"], len(wave) / rate))
    return tracks


class Browser:
    """A page in a headless Chromium, controlled by the DevTools protocol over two pipes."""

    def __init__(self, page_path, profile):
        stdin, self.out = os.pipe()
        self.into, stdout = os.pipe()
        # Chromium uses file descriptors 3 and 4
        command = ["bash", "-c", f"exec chromium \"$@\" 3<&{stdin} 4>&{stdout}", "",
                   "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync",
                   "--disable-background-networking", "--disable-component-update",
                   "--no-first-run", f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(command, pass_fds=(stdin, stdout),
                                        stderr=subprocess.DEVNULL)
        os.close(stdin)
        os.close(stdout)
        self.buffer, self.session, self.errors, self.number = b"", {}, [], 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=page_path.as_uri())

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                assert select.select([self.into], [], [], 60)[0], f"no answer to {method}"
                self.buffer += os.read(self.into, 1 << 16)
            raw, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(raw)
            if answer.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown",
                                        "Log.entryAdded"):
                self.errors.append(answer["params"])
            if answer.get("id") == self.number:
                return answer["result"]

    def value(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, userGesture=True,
                           returnByValue=True)
        return answer["result"].get("value")

    def wait(self, expression, seconds=60):
        until = time.time() + seconds
        while not self.value(expression):
            assert time.time() < until, (expression, self.errors)
            time.sleep(0.1)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def listened(tmp_path_factory):
    """What listen.py writes for a song with HTML in its name, with a page."""
    folder = tmp_path_factory.mktemp("songs")
    for name, net in (("sep", model.Separator(["vocals", "drums"], NARROW)),
                      ("tags", model.Classifier(3, True, "tail", tail_widths=TAIL))):
        kind = "separator" if name == "sep" else "classifier"
        classes = ["a", "<script>alert(1)</script>", "c & d"] if name == "tags" else None
        torch.save({"kind": kind, "args": net.args, "model": randomise(net).state_dict(),
                    "step": 9, "config": {}, "classes": classes}, folder / f"{name}.pt")
    song = folder / "<b>x & y.flac"
    sound(song, 6.5, 22_050)
    run("listen.py", song, f"--separator={folder}/sep.pt", f"--tagger={folder}/tags.pt",
        f"--out={folder}/o", "--report=True")
    return folder / "o" / "<b>x & y"


def test_page_of_a_song_has_players_spectrograms_and_curves(listened):
    tracks = tracks_of(listened / "song.html")
    assert [name for name, _ in tracks] == ["mixture", "vocals", "drums", "accompaniment",
                                            "remainder"]
    assert {round(seconds, 3) for _, seconds in tracks} == {6.5}        # equal lengths: in sync
    text = (listened / "song.html").read_text()
    assert text.count("data:image/png") == 1 + 2 * 4 and text.count("<polygon") == 3
    assert "<b>x" not in text and "alert(1)</script>" not in text       # escaped


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_browser_plays_all_tracks_in_sync_without_errors(listened, tmp_path):
    with Browser(listened / "song.html", tmp_path) as browser:
        browser.wait("document.getElementById('play')?.disabled === false")
        assert browser.value("document.getElementById('time').textContent") == "0:00 / 0:06"
        durations = browser.value("tracks.map(track => track.buffer.duration)")
        assert durations == [6.5] * 5
        # the mixture first, then one source solo
        browser.value("play.click()")
        browser.wait("now() > 0.2")
        gains = "tracks.map(track => track.gain.gain.value)"
        assert browser.value(gains) == [1, 0, 0, 0, 0]
        browser.value("document.querySelectorAll('.solo')[2].click()")
        assert browser.value(gains) == [0, 0, 1, 0, 0]
        # click the middle of a spectrogram
        browser.value("""{
            const strip = document.querySelectorAll('.strip')[1];
            const box = strip.getBoundingClientRect();
            strip.dispatchEvent(new MouseEvent('click', {clientX: box.left + box.width / 2}));
        }""")
        assert 3.2 < browser.value("now()") < 5
        browser.wait("!playing")                                        # the end
        assert browser.value("now()") == 0 and not browser.errors


def test_placeholders_in_names_are_not_replaced(tmp_path):
    page.write(tmp_path / "a.html", "{{sound}} caf\udce9", "<p>{{title}}</p>")
    text = (tmp_path / "a.html").read_text()
    assert "<title>{{sound}} caf?</title>" in text and "<p>{{title}}</p>" in text


def test_players_have_the_beginning_of_long_songs(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "SHOWN", 2)
    sound(tmp_path / "a.wav", 5, 8000)
    wave, rate = page.beginning(tmp_path / "a.wav")
    assert (len(wave), rate) == (16_000, 8000)
    assert np.array_equal(wave, files.read(tmp_path / "a.wav")[0][:16_000])


def test_curves_of_ten_hours_stay_small():
    rows = [(1.92 * k, [k % 2, 1.0]) for k in range(18_750)]
    svg = page.curve(rows, 0, 36_000.0)
    assert len(svg) < 30_000
    heights = [float(point.split(",")[1]) for point in svg.split('"')[5].split()]
    assert max(abs(np.array(heights[1:-1]) - 0.5)) < 0.02       # means over rows


def test_listen_json_that_is_damaged_is_refused(tmp_path):
    assert page.read_marker(str(tmp_path)) is None
    (tmp_path / "listen.json").write_text("{}")
    with pytest.raises(ValueError, match="listen.json"):
        page.read_marker(str(tmp_path))


@pytest.mark.parametrize("name", ["sep", "tail"])
@pytest.mark.parametrize("running", [False, True])
def test_page_of_a_run(separator, tail_only, tmp_path, name, running):
    run_path = separator if name == "sep" else tail_only
    for ending in (".resume", ".jsonl") if running else (".resume", ".jsonl", ".pt"):
        (tmp_path / f"{name}{ending}").write_bytes(run_path.with_suffix(ending).read_bytes())
    if running:
        with open(tmp_path / f"{name}.jsonl", "a") as f:
            f.write('{"step": 5, "lo')                          # half-written
    run(["-m", "reports.page"], tmp_path / f"{name}.jsonl")
    text = (tmp_path / f"{name}_run.html").read_text()
    assert text.count("data:image/png") == 1 and "val_loss" in text
    script = "pretrain_sep.py" if name == "sep" else "finetune_cls.py"
    assert f"python {script}" in text and not tracks_of(tmp_path / f"{name}_run.html")


def test_pages_of_results(separator, tail_only, tmp_path):
    run("eval.py", separator, tail_only, f"--out={tmp_path}")
    run(["-m", "reports.page"], tmp_path / "sep.json", tmp_path / "tail.json")
    names = [name for name, _ in tracks_of(tmp_path / "sep.html")]
    assert names == ["mixture", "vocals, estimate", "vocals, truth"]
    text = (tmp_path / "sep.html").read_text()
    assert "SI-SDR" in text and "vocals, oracle" in text
    assert "python pretrain_sep.py" in text and f"python eval.py {separator}" in text
    text = (tmp_path / "tail.html").read_text()
    assert "ROC-AUC" in text and text.count("data:image/png") == 2 and "every class" in text


def test_page_of_a_table(tmp_path):
    entries = [{"task": "tags", "labels": 0.5, "row": row, "runs": 2, "chance": {},
                "metrics": {"ROC-AUC": [0.625, 0.75]}, "differences": differences}
               for row, differences in (("tail", {}), ("<b>", {"tail": {"ROC-AUC": [
                   0.1, -0.2, 0.3, [0.1]]}}))]
    table = {"kind": "table", "checkpoint": "", "baselines": ["tail"], "entries": entries}
    (tmp_path / "table.json").write_text(json.dumps(table))
    run(["-m", "reports.page"], tmp_path / "table.json")
    text = (tmp_path / "table.html").read_text()
    assert "<td>0.688 ± 0.088</td><td>+0.100 (-0.200 to +0.300)</td>" in text
    assert "50 % of the labels" in text and "&lt;b&gt;" in text


def test_other_files_have_no_page(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "x.mp3").write_bytes(b"\xff")
    for arguments, message in ((["x.json"], "x.json"), (["x.mp3"], "x.mp3"),
                               ([""], "listen.json"), ([], "listened/song")):
        paths = [tmp_path / argument for argument in arguments]
        assert message in run(["-m", "reports.page"], *paths, ok=False)
