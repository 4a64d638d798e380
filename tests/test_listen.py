"""
listen.py: stems and tags of songs.

    python -m pytest -q tests/test_listen.py
"""
import csv
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import NARROW, ROOT, TAIL, noise, randomise, run

import listen
import model
import weights
from audio import files as audio
from audio.resample import resample


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """{name: path} of a separator of vocals, one of two sources, a tagger and a genre network."""
    made = {
        "vocals": model.Separator(["vocals"], NARROW),
        "two": model.Separator(["vocals", "drums"], NARROW),
        "tags": model.Classifier(3, True, "tail", tail_widths=TAIL),
        "genre": model.Classifier(2, False, "v1", 5, ["a"], NARROW, tail_widths=TAIL),
    }
    folder, paths = tmp_path_factory.mktemp("nets"), {}
    for name, net in made.items():
        kind = "classifier" if isinstance(net, model.Classifier) else "separator"
        classes = [f"{name} {i}" for i in range(net.args.get("n_classes", 0))]
        torch.save({"kind": kind, "args": net.args, "model": randomise(net).state_dict(),
                    "step": 9, "config": {}, "classes": classes}, folder / f"{name}.pt")
        paths[name] = folder / f"{name}.pt"
    return paths


def song_at(path, seconds=6.0, rate=44100, channels=2, seed=0, **options):
    wave = 0.1 * np.random.default_rng(seed).standard_normal((int(seconds * rate), channels))
    sf.write(path, wave, rate, **options)
    return path


def int16(path):
    return sf.read(path, dtype="int16", always_2d=True)[0].astype(int)


def test_stems_tags_and_rerun(nets, tmp_path):
    song, out = song_at(tmp_path / "a song.wav"), tmp_path / "out"
    args = [song, f"--separator={nets['vocals']}", f"--tagger={nets['tags']},{nets['genre']}",
            f"--out={out}"]
    output = run("listen.py", *args)
    assert "tags 0" in output and "genre 1" in output
    folder = out / "a song"
    assert sorted(path.name for path in folder.iterdir()) == [
        "accompaniment.wav", "genre.csv", "genre.json", "listen.json", "tags.csv", "tags.json",
        "vocals.wav"]
    assert sf.info(folder / "vocals.wav").samplerate == 44100
    both = int16(folder / "vocals.wav") + int16(folder / "accompaniment.wav")
    assert np.array_equal(both, int16(song)) and int16(folder / "vocals.wav").any()

    rows = json.loads((folder / "tags.json").read_text())
    assert [(row["start"], row["end"]) for row in rows] == [(0.0, 3.862), (1.92, 5.782)]
    # rows end with the song
    song_at(tmp_path / "short.wav", 0.5)
    run("listen.py", tmp_path / "short.wav", f"--tagger={nets['tags']}", f"--out={out}")
    assert json.loads((out / "short" / "tags.json").read_text())[0]["end"] == 0.5
    scores = [tag["score"] for tag in rows[0]["tags"]]
    assert scores == sorted(scores, reverse=True) and len(scores) == 3
    with open(folder / "tags.csv", newline="") as f:
        head, *lines = csv.reader(f)
    assert head == ["start", "end", "tags 0", "tags 1", "tags 2"] and len(lines) == 2
    # the same scores as from model.tag
    net, _ = weights.load(nets["tags"])
    wave, rate, _ = audio.read(song)
    expected = model.tag(net, torch.from_numpy(wave), rate)
    means = json.loads((folder / "listen.json").read_text())["tags"]["tags"]
    assert [means[f"tags {i}"] for i in range(3)] == pytest.approx(expected.tolist(), abs=1e-4)

    # finished songs are skipped, and replaced only with --overwrite
    before = (folder / "vocals.wav").stat().st_mtime_ns
    assert "already finished" in run("listen.py", *args)
    error = run("listen.py", *args, "--hop=1", ok=False)
    assert "different hop:" in error and "--overwrite" in error
    assert (folder / "vocals.wav").stat().st_mtime_ns == before
    run("listen.py", *args, "--hop=1", "--codec=flac", "--overwrite=True")
    assert len(json.loads((folder / "tags.json").read_text())) == 3
    # the old files are gone
    assert sorted(path.name for path in folder.glob("*.[wf]*")) == [
        "accompaniment.flac", "vocals.flac"]


@pytest.mark.parametrize("rate, channels, codec", [
    (8000, 1, "wav"), (16000, 2, "flac"), (192_000, 6, "flac"), (44_101, 1, "wav"),
    (22_050, 2, "mp3"), (44_100, 2, "opus")])
def test_stems_have_the_rate_and_channels_of_the_song(nets, tmp_path, rate, channels, codec):
    song = song_at(tmp_path / "a.wav", 1.5, rate, channels)
    run("listen.py", song, f"--separator={nets['two']}", f"--out={tmp_path}/o", f"--codec={codec}")
    folder = tmp_path / "o" / "a"
    for name in ("vocals", "drums", "accompaniment", "remainder"):
        with audio.Blocks(folder / f"{name}.{codec}") as stem:
            n = sum(block.shape[1] for block in stem)
            assert not stem.damage and stem.channels == channels
            assert stem.rate == (48000 if codec == "opus" else rate)
            assert n / stem.rate == pytest.approx(1.5, abs=0.02)
    if codec in ("wav", "flac"):
        parts = [int16(folder / f"{name}.{codec}") for name in ("vocals", "drums", "remainder")]
        assert np.array_equal(sum(parts), int16(song))
        both = int16(folder / f"vocals.{codec}") + int16(folder / f"accompaniment.{codec}")
        assert np.array_equal(both, int16(song))


@pytest.mark.parametrize("rate, seconds", [(8000, 125.3), (11_025, 100.0), (4001, 60.0)])
def test_pieces_equal_the_whole_song(nets, tmp_path, rate, seconds, monkeypatch):
    monkeypatch.setattr(listen, "MAX_SAMPLES", 1)
    separator, tagger = (weights.load(nets[name])[0] for name in ("vocals", "tags"))
    wave = noise(1, int(rate * seconds))
    whole = model.separate(separator, wave, rate)
    blocks = torch.split(wave, 7001, 1)
    length, left, right = listen.piece_sizes(rate, 1, {"tags": tagger})
    parts, rows = [], []
    for samples, at, begin in listen.pieces((b.numpy() for b in blocks), length, left, right):
        stems = model.separate(separator, torch.from_numpy(samples), rate)
        parts.append(stems[..., begin - at:begin - at + length])
        at_16k = resample(torch.from_numpy(samples.mean(0)), rate, 16000)
        position = (x * 16000 // rate for x in (at, begin, length))
        rows.append(listen.tag_piece(tagger, at_16k, *position))
    assert len(parts) == -(-wave.shape[1] // length) > 1
    torch.testing.assert_close(torch.cat(parts, -1), whole, atol=1e-5, rtol=0)
    expected = model.tag(tagger, wave, rate, hop=1.92)
    torch.testing.assert_close(torch.cat(rows), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("hop", [0.3, 7.7, 60.0])
def test_no_row_of_tags_is_lost_between_pieces(nets, hop, monkeypatch):
    monkeypatch.setattr(listen, "hop", hop)
    tagger = weights.load(nets["tags"])[0]
    wave = noise(130 * 16000)
    length, left, right = 48 * 16000, listen.STEP, listen.STEP
    rows = []
    for samples, at, begin in listen.pieces([wave[None].numpy()], length, left, right):
        mono = torch.from_numpy(samples[0])
        rows.append(listen.tag_piece(tagger, mono, at, begin, length))
    expected = model.tag(tagger, wave, hop=hop)
    torch.testing.assert_close(torch.cat(rows), expected, atol=1e-5, rtol=0)


def test_broken_song_is_skipped(nets, tmp_path):
    songs = tmp_path / "songs"
    (songs / "sub").mkdir(parents=True)
    (songs / "a.mp3").write_bytes(b"no sound" * 100)
    (songs / "notes.txt").write_text("not audio")
    song_at(songs / "sub" / "b.wav", 0.05, 16000, 1)
    args = [songs, f"--tagger={nets['tags']}", f"--out={songs}/listened"]
    assert "1 of 2 songs failed" in run("listen.py", *args, ok=False)
    assert (songs / "listened" / "sub" / "b" / "tags.json").exists()
    # output is not input
    (songs / "a.mp3").unlink()
    assert "already finished" in run("listen.py", *args)
    # a page can be added later, and is kept
    html = songs / "listened" / "sub" / "b" / "song.html"
    assert "page:" in run("listen.py", *args, "--report=True")
    made = html.stat().st_mtime_ns
    assert "page:" not in run("listen.py", *args, "--report=True")
    assert html.stat().st_mtime_ns == made


def test_songs_with_equal_names_have_separate_folders(nets, tmp_path):
    song_at(tmp_path / "a.wav", 1)
    song_at(tmp_path / "a.flac", 1)
    (tmp_path / "sub").mkdir()
    song_at(tmp_path / "sub" / "a.wav", 1)
    args = [f"--tagger={nets['tags']}", f"--out={tmp_path}/o"]
    run("listen.py", tmp_path, *args)
    assert sorted(path.parent.relative_to(tmp_path / "o").as_posix()
                  for path in (tmp_path / "o").rglob("tags.csv")) == ["a.flac", "a.wav", "sub/a"]
    # not across arguments
    error = run("listen.py", tmp_path / "sub", tmp_path / "sub" / "a.wav", tmp_path / "a.wav",
                *args, ok=False)
    assert "same output folder" in error and str(tmp_path / "sub" / "a.wav") in error
    # output is no input for another --out either
    error = run("listen.py", tmp_path / "o", f"--tagger={nets['tags']}", f"--out={tmp_path}/p",
                ok=False)
    assert "contains no audio files" in error


@pytest.mark.parametrize("name", ["vocals", "two"])
def test_stems_of_a_loud_song_sum_to_it(nets, tmp_path, name):
    """The residual would overflow int16 where vocals and song differ in sign."""
    wave = np.sign(np.random.default_rng(0).standard_normal((48_000, 2)))
    wave[:24_000] *= np.linspace(0, 1, 24_000)[:, None]
    sf.write(tmp_path / "a.wav", wave, 16_000)
    run("listen.py", tmp_path / "a.wav", f"--separator={nets[name]}", f"--out={tmp_path}/o")
    stems = {path.stem: int16(path) for path in (tmp_path / "o" / "a").glob("*.wav")}
    song = int16(tmp_path / "a.wav")
    assert np.array_equal(stems["vocals"] + stems.pop("accompaniment"), song)
    if name == "two":
        assert np.array_equal(sum(stems.values()), song)
    # the plain residual does overflow here
    net, _ = weights.load(nets["vocals"])
    stem = model.separate(net, torch.from_numpy(wave.T).float())[0].numpy()
    assert np.abs(song.T - 32768 * stem).max() > 33_000


def test_limit_residual_moves_stems_towards_zero():
    rng = np.random.default_rng(0)
    stems = rng.integers(-32768, 32768, (4, 2, 1000)).astype(np.int32)
    mixture = rng.integers(-32768, 32768, (2, 1000)).astype(np.int32)
    limited = stems.copy()
    listen.limit_residual(limited, mixture)
    residual = mixture - limited.sum(0)
    assert residual.min() >= -32768 and residual.max() <= 32767
    assert (np.abs(limited) <= np.abs(stems)).all() and (limited * stems >= 0).all()
    fits = np.abs(mixture - stems.sum(0) + 0.5) < 32768     # those stay unchanged
    assert fits.any() and np.array_equal(limited[:, fits], stems[:, fits])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize("codec", audio.ENCODERS)
def test_file_size_limit_is_one_line(nets, tmp_path, codec):
    song = song_at(tmp_path / "a.wav", 20)
    code = ("import resource, sys, listen\n"
            "from common import settings\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
            "sys.argv[0] = 'listen.py'\n"
            "settings.script(listen.main)")
    done = subprocess.run(
        [sys.executable, "-c", code, str(song), f"--separator={nets['two']}", f"--codec={codec}",
         f"--out={tmp_path}/o"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "PyAV" not in done.stderr
    output = done.stdout + done.stderr
    assert "File too large" in output and output.count("error:") == 2   # the song, the summary
    assert [path.name for path in (tmp_path / "o" / "a").iterdir()] == ["listen.json"]


def test_foreign_files_are_kept(nets, tmp_path):
    song = song_at(tmp_path / "a.wav", 1)
    foreign = tmp_path / "o" / "a" / "vocals.wav"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"foreign")
    error = run("listen.py", song, f"--separator={nets['vocals']}", f"--out={tmp_path}/o", ok=False)
    assert str(foreign.parent) in error and foreign.read_bytes() == b"foreign"


def test_another_song_with_the_same_name_and_size_is_noticed(nets, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        song_at(tmp_path / name / "mix.wav", 1, seed=ord(name))
    args = [f"--tagger={nets['tags']}", f"--out={tmp_path}/o"]
    run("listen.py", tmp_path / "a" / "mix.wav", *args)
    assert "different song" in run("listen.py", tmp_path / "b" / "mix.wav", *args, ok=False)


def test_failed_song_can_be_retried_with_other_settings(nets, tmp_path):
    song = song_at(tmp_path / "a.wav", 1, channels=3)
    args = ["listen.py", song, f"--separator={nets['vocals']}", f"--out={tmp_path}/o"]
    run(*args, "--codec=mp3", ok=False)
    run(*args, "--codec=wav")
    assert (tmp_path / "o" / "a" / "vocals.wav").exists()


def test_names_in_checkpoints_cannot_leave_the_folder(nets, tmp_path):
    song, out = song_at(tmp_path / "a.wav", 1), f"--out={tmp_path}/o"
    for sources in (["../x"], ["/tmp/x"], ["remainder"], ["a", "a"], [""]):
        net = model.Separator(sources, NARROW)
        torch.save({"kind": "separator", "args": net.args, "model": net.state_dict(), "step": 1,
                    "config": {}}, tmp_path / "bad.pt")
        error = run("listen.py", song, f"--separator={tmp_path}/bad.pt", out, ok=False)
        assert "bad.pt: " in error and repr(sources[0]) in error
    (tmp_path / "listen.pt").write_bytes(nets["tags"].read_bytes())
    error = run("listen.py", song, f"--tagger={tmp_path}/listen.pt", out, ok=False)
    assert "'listen'" in error and not (tmp_path / "o").exists()


def test_wrong_settings_are_one_line(nets, tmp_path):
    song = song_at(tmp_path / "a.wav", 1)
    base = [song, f"--out={tmp_path}/o"]
    assert "listen.py song.mp3" in run("listen.py", ok=False)
    assert "tags.pt" in run("listen.py", *base, f"--separator={nets['tags']}", ok=False)
    assert "hop" in run("listen.py", *base, "--hop=-1", ok=False)
    assert "codec" in run("listen.py", *base, "--codec=aac", ok=False)
    assert "--codec" in run("listen.py", *base, "--format=flac", ok=False)      # renamed
    error = run("listen.py", tmp_path / "none.wav", f"--tagger={nets['tags']}", ok=False)
    assert "none.wav" in error


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_stop_leaves_no_partial_files(nets, tmp_path):
    song = song_at(tmp_path / "long.wav", 1500, 8000, 1)
    args = [sys.executable, "listen.py", str(song), f"--separator={nets['vocals']}",
            f"--out={tmp_path}/o"]
    process = subprocess.Popen(args, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "o" / "long"
    while not list(folder.glob("*.tmp")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert "same command" in process.communicate(timeout=120)[1]
    assert [path.name for path in folder.iterdir()] == ["listen.json"]
    # the same command resumes: the folder counts as its own output
    again = subprocess.Popen(args, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(folder.glob("*.tmp")):
        assert again.poll() is None
        time.sleep(0.1)
    again.send_signal(signal.SIGTERM)
    assert "same command" in again.communicate(timeout=120)[1]
