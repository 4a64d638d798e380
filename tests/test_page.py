"""
Pages to look at and to listen to.

    python -m pytest -q tests/test_page.py
"""
import base64
import importlib.util
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
from conftest import CLS, NARROW, SEP, TAIL, randomise, run, sound

import audio
import model
import page

CHROMIUM = shutil.which("chromium")


def tracks_of(path):
    """[(name, seconds)] of the sounds in a page; all of it is in the page itself."""
    text = path.read_text()
    assert "{{" not in text and not re.search(r"(src|href)=\"(?!data:)", text)
    found = re.search(r'id="sound">(.*?)</script>', text, re.DOTALL)[1]
    tracks = []
    for track in json.loads(found):
        wave, rate, damage = audio.read(io.BytesIO(base64.b64decode(track["mp3"])))
        assert rate == page.RATE and not damage
        tracks.append((track["name"], len(wave) / rate))
    return tracks


class Browser:
    """A page in a headless Chromium, which is spoken to through two pipes (DevTools protocol)."""

    def __init__(self, page_path, profile):
        theirs_in, self.out = os.pipe()
        self.into, theirs_out = os.pipe()
        # the protocol wants the numbers 3 and 4
        command = ["bash", "-c", f"exec chromium \"$@\" 3<&{theirs_in} 4>&{theirs_out}", "",
                   "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync",
                   "--disable-background-networking", "--disable-component-update",
                   "--no-first-run", f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out),
                                        stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self.kept, self.session, self.complaints, self.number = b"", {}, [], 0
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        found = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": found["sessionId"]}
        for domain in ("Runtime", "Log", "Page"):
            self.ask(f"{domain}.enable")
        self.ask("Page.navigate", url=page_path.as_uri())

    def ask(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.kept:
                assert select.select([self.into], [], [], 60)[0], f"no answer to {method}"
                self.kept += os.read(self.into, 1 << 16)
            raw, _, self.kept = self.kept.partition(b"\0")
            answer = json.loads(raw)
            if answer.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown",
                                        "Log.entryAdded"):
                self.complaints.append(answer["params"])
            if answer.get("id") == self.number:
                return answer["result"]

    def value(self, expression):
        found = self.ask("Runtime.evaluate", expression=expression, userGesture=True,
                         returnByValue=True)
        return found["result"].get("value")

    def wait(self, expression, seconds=60):
        until = time.time() + seconds
        while not self.value(expression):
            assert time.time() < until, (expression, self.complaints)
            time.sleep(0.1)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """The folder of a song with a hostile name, listened to with a page."""
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


def test_a_song_has_players_pictures_and_curves_in_one_file(heard):
    tracks = tracks_of(heard / "song.html")
    assert [name for name, _ in tracks] == ["mixture", "vocals", "drums", "accompaniment",
                                            "remainder"]
    assert {round(seconds, 3) for _, seconds in tracks} == {6.5}        # in step to the end
    text = (heard / "song.html").read_text()
    assert text.count("data:image/png") == 1 + 2 * 4 and text.count("<polygon") == 3
    assert "<b>x" not in text and "alert(1)</script>" not in text       # names are text


@pytest.mark.skipif(not CHROMIUM, reason="there is no chromium")
def test_a_browser_plays_all_tracks_in_step_without_a_complaint(heard, tmp_path):
    with Browser(heard / "song.html", tmp_path) as browser:
        browser.wait("document.getElementById('play')?.disabled === false")
        assert browser.value("document.getElementById('time').textContent") == "0:00 / 0:06"
        durations = browser.value("tracks.map(track => track.buffer.duration)")
        assert durations == [6.5] * 5
        # at first the mixture, then one source alone
        browser.value("play.click()")
        browser.wait("now() > 0.2")
        heard_now = "tracks.map(track => track.gain.gain.value)"
        assert browser.value(heard_now) == [1, 0, 0, 0, 0]
        browser.value("document.querySelectorAll('.solo')[2].click()")
        assert browser.value(heard_now) == [0, 0, 1, 0, 0]
        # a click in the middle of a spectrogram
        browser.value("""{
            const strip = document.querySelectorAll('.strip')[1];
            const box = strip.getBoundingClientRect();
            strip.dispatchEvent(new MouseEvent('click', {clientX: box.left + box.width / 2}));
        }""")
        assert 3.2 < browser.value("now()") < 5
        browser.wait("!playing")                                        # the end
        assert browser.value("now()") == 0 and not browser.complaints


def test_a_name_that_looks_like_a_place_to_fill_is_text(tmp_path):
    page.write(tmp_path / "a.html", "{{sound}} caf\udce9", "<p>{{title}}</p>")
    text = (tmp_path / "a.html").read_text()
    assert "<title>{{sound}} caf?</title>" in text and "<p>{{title}}</p>" in text


def test_long_songs_are_cut_in_the_page_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "SHOWN", 2)
    sound(tmp_path / "a.wav", 5, 8000)
    wave, rate = page.beginning(tmp_path / "a.wav")
    assert (len(wave), rate) == (16_000, 8000)
    assert np.array_equal(wave, audio.read(tmp_path / "a.wav")[0][:16_000])


def test_curves_of_ten_hours_stay_small():
    rows = [(1.92 * k, [k % 2, 1.0]) for k in range(18_750)]
    found = page.curve(rows, 0, 36_000.0)
    assert len(found) < 30_000
    heights = [float(point.split(",")[1]) for point in found.split('"')[5].split()]
    assert max(abs(np.array(heights[1:-1]) - 0.5)) < 0.02       # means, not single rows


@pytest.fixture(scope="module")
def watched(demo, tmp_path_factory):
    """A folder with a separator and a tagger, trained with a page."""
    folder = tmp_path_factory.mktemp("watched")
    run("pretrain_sep.py", "config/vocals.py", *SEP, f"--data={demo}/demo_songs", "--steps=4",
        f"--out={folder}/sep.pt", "--report=True")
    run("finetune_cls.py", "config/mtat.py", "config/tail.py", *CLS, f"--data={demo}/demo_clips",
        f"--out={folder}/cls.pt", "--report=True")
    return folder


@pytest.mark.parametrize("name", ["sep", "cls"])
def test_a_run_can_be_watched(watched, name):
    text = (watched / f"{name}_run.html").read_text()
    assert text.count("data:image/png") == 1 and "val_loss" in text
    script = "pretrain_sep.py" if name == "sep" else "finetune_cls.py"
    assert f"python {script}" in text and not tracks_of(watched / f"{name}_run.html")


def test_results_have_their_scores_pictures_and_sound(watched, tmp_path):
    run("eval.py", watched / "sep.pt", watched / "cls.pt", f"--out={tmp_path}", "--report=True")
    names = [name for name, _ in tracks_of(tmp_path / "sep.html")]
    assert names == ["mixture", "vocals, estimate", "vocals, truth"]
    assert "SI-SDR" in (tmp_path / "sep.html").read_text()
    text = (tmp_path / "cls.html").read_text()
    assert "ROC-AUC" in text and text.count("data:image/png") == 2 and "every class" in text


def test_what_has_no_page_is_one_line(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    assert "not a result" in run("page.py", tmp_path / "x.json", ok=False)
    assert "name folders" in run("page.py", ok=False)
    assert "listen.json" in run("page.py", tmp_path, ok=False)
    (tmp_path / "x.mp3").write_bytes(b"\xff")
    assert "is not a folder of listen.py" in run("page.py", tmp_path / "x.mp3", ok=False)


# -----------------------------------------------------------------------------
# other people's boards

def test_a_missing_board_is_one_line_and_costs_nothing(demo, tmp_path):
    args = ["pretrain_sep.py", "config/vocals.py", *SEP, f"--data={demo}/demo_songs", "--steps=2",
            f"--out={tmp_path}/a.pt"]
    assert "track must be one of" in run(*args, "--track=paper", ok=False)
    if importlib.util.find_spec("wandb") is None:
        assert "pip install wandb" in run(*args, "--track=wandb", ok=False)
        assert not (tmp_path / "a.jsonl").exists()


def test_the_board_gets_the_numbers_of_the_log(demo, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run("pretrain_sep.py", "config/vocals.py", *SEP, f"--data={demo}/demo_songs", "--steps=4",
        f"--out={tmp_path}/a.pt", "--track=tensorboard")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    board = EventAccumulator(str(tmp_path / "a")).Reload()
    for key in ("loss", "val_loss", "lr"):
        want = [(line["step"], line[key]) for line in lines if key in line]
        found = [(event.step, event.value) for event in board.Scalars(key)]
        assert found == [(step, pytest.approx(value)) for step, value in want]
