"""
Songs in, sources and tags out; the networks through torch.hub.

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

import audio
import listen
import model


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


def test_one_command_gives_sources_and_tags(nets, tmp_path):
    song, out = song_at(tmp_path / "a song.wav"), tmp_path / "out"
    args = [song, f"--separator={nets['vocals']}", f"--tagger={nets['tags']},{nets['genre']}",
            f"--out={out}"]
    said = run("listen.py", *args)
    assert "tags 0" in said and "genre 1" in said
    folder = out / "a song"
    assert sorted(path.name for path in folder.iterdir()) == [
        "accompaniment.wav", "genre.csv", "genre.json", "listen.json", "tags.csv", "tags.json",
        "vocals.wav"]
    assert sf.info(folder / "vocals.wav").samplerate == 44100
    both = int16(folder / "vocals.wav") + int16(folder / "accompaniment.wav")
    assert np.array_equal(both, int16(song)) and int16(folder / "vocals.wav").any()

    rows = json.loads((folder / "tags.json").read_text())
    assert [(row["start"], row["end"]) for row in rows] == [(0.0, 3.862), (1.92, 5.782)]
    # no row is longer than the song
    song_at(tmp_path / "short.wav", 0.5)
    run("listen.py", tmp_path / "short.wav", f"--tagger={nets['tags']}", f"--out={out}")
    assert json.loads((out / "short" / "tags.json").read_text())[0]["end"] == 0.5
    scores = [tag["score"] for tag in rows[0]["tags"]]
    assert scores == sorted(scores, reverse=True) and len(scores) == 3
    with open(folder / "tags.csv", newline="") as f:
        head, *lines = csv.reader(f)
    assert head == ["start", "end", "tags 0", "tags 1", "tags 2"] and len(lines) == 2
    # the same as a program gets
    net, _ = model.load(nets["tags"])
    wave, rate, _ = audio.read(song)
    want = model.tag(net, torch.from_numpy(wave), rate)
    told = json.loads((folder / "listen.json").read_text())["tags"]["tags"]
    assert [told[f"tags {i}"] for i in range(3)] == pytest.approx(want.tolist(), abs=1e-4)

    # what is finished is left alone, and not replaced by something else unasked
    before = (folder / "vocals.wav").stat().st_mtime_ns
    assert "is finished" in run("listen.py", *args)
    assert "with another hop: --overwrite" in run("listen.py", *args, "--hop=1", ok=False)
    assert (folder / "vocals.wav").stat().st_mtime_ns == before
    run("listen.py", *args, "--hop=1", "--format=flac", "--overwrite=True")
    assert len(json.loads((folder / "tags.json").read_text())) == 3
    # nothing of the old run is left beside the new
    assert sorted(path.name for path in folder.glob("*.[wf]*")) == [
        "accompaniment.flac", "vocals.flac"]


@pytest.mark.parametrize("rate, channels, kind", [
    (8000, 1, "wav"), (16000, 2, "flac"), (192_000, 6, "flac"), (44_101, 1, "wav"),
    (22_050, 2, "mp3"), (44_100, 2, "opus")])
def test_sources_have_the_rate_and_channels_of_the_song(nets, tmp_path, rate, channels, kind):
    song = song_at(tmp_path / "a.wav", 1.5, rate, channels)
    run("listen.py", song, f"--separator={nets['two']}", f"--out={tmp_path}/o", f"--format={kind}")
    folder = tmp_path / "o" / "a"
    names = ["vocals", "drums", "accompaniment", "remainder"]
    found = {}
    for name in names:
        wave, its_rate, damage = audio.read(folder / f"{name}.{kind}")
        assert not damage and len(wave) / its_rate == pytest.approx(1.5, abs=0.02)
        assert its_rate == (48000 if kind == "opus" else rate)
        found[name] = wave
    if kind in ("wav", "flac"):
        parts = [int16(folder / f"{name}.{kind}") for name in ("vocals", "drums", "remainder")]
        assert np.array_equal(sum(parts), int16(song))
        both = int16(folder / f"vocals.{kind}") + int16(folder / f"accompaniment.{kind}")
        assert np.array_equal(both, int16(song))


@pytest.mark.parametrize("rate, seconds", [(8000, 125.3), (11_025, 100.0), (4001, 60.0)])
def test_a_song_in_pieces_is_the_song_at_once(nets, tmp_path, rate, seconds, monkeypatch):
    monkeypatch.setattr(listen, "MOST", 1)
    separator, tagger = (model.load(nets[name])[0] for name in ("vocals", "tags"))
    wave = noise(1, int(rate * seconds))
    whole = model.separate(separator, wave, rate)
    blocks = torch.split(wave, 7001, 1)
    length, left, right = listen.sizes(rate, 1, {"tags": (tagger, [])})
    parts, rows = [], []
    for samples, at, begin in listen.pieces((b.numpy() for b in blocks), length, left, right):
        stems = model.separate(separator, torch.from_numpy(samples), rate)
        parts.append(stems[..., begin - at:begin - at + length])
        at_16k = audio.resample(samples.mean(0), rate, 16000)
        where = (x * 16000 // rate for x in (at, begin, length))
        rows.append(listen.tag_rows(tagger, at_16k, *where))
    assert len(parts) == -(-wave.shape[1] // length) > 1
    torch.testing.assert_close(torch.cat(parts, -1), whole, atol=1e-5, rtol=0)
    along = model.tag(tagger, wave, rate, hop=1.92)
    torch.testing.assert_close(torch.cat(rows), along, atol=1e-5, rtol=0)


@pytest.mark.parametrize("hop", [0.3, 7.7, 60.0])
def test_no_row_of_the_tags_is_lost_between_pieces(nets, hop, monkeypatch):
    monkeypatch.setattr(listen, "hop", hop)
    tagger = model.load(nets["tags"])[0]
    wave = noise(130 * 16000)
    length, left, right = 48 * 16000, listen.STEP, listen.STEP
    rows = []
    for samples, at, begin in listen.pieces([wave[None].numpy()], length, left, right):
        rows.append(listen.tag_rows(tagger, samples[0], at, begin, length))
    want = model.tag(tagger, wave, hop=hop)
    torch.testing.assert_close(torch.cat(rows), want, atol=1e-5, rtol=0)


def test_one_broken_song_does_not_stop_the_others(nets, tmp_path):
    songs = tmp_path / "songs"
    (songs / "sub").mkdir(parents=True)
    (songs / "a.mp3").write_bytes(b"no sound" * 100)
    (songs / "notes.txt").write_text("not audio")
    song_at(songs / "sub" / "b.wav", 0.05, 16000, 1)
    args = [songs, f"--tagger={nets['tags']}", f"--out={songs}/listened"]
    assert "1 of 2 songs failed" in run("listen.py", *args, ok=False)
    assert (songs / "listened" / "sub" / "b" / "tags.json").exists()
    # what was written is not listened to again
    (songs / "a.mp3").unlink()
    assert "is finished" in run("listen.py", *args)
    # a page is made later too, but once
    html = songs / "listened" / "sub" / "b" / "song.html"
    assert "page:" in run("listen.py", *args, "--report=True")
    made = html.stat().st_mtime_ns
    assert "page:" not in run("listen.py", *args, "--report=True")
    assert html.stat().st_mtime_ns == made


def test_songs_of_one_name_have_folders_of_their_own(nets, tmp_path):
    song_at(tmp_path / "a.wav", 1)
    song_at(tmp_path / "a.flac", 1)
    (tmp_path / "sub").mkdir()
    song_at(tmp_path / "sub" / "a.wav", 1)
    args = [f"--tagger={nets['tags']}", f"--out={tmp_path}/o"]
    run("listen.py", tmp_path, *args)
    assert sorted(path.parent.relative_to(tmp_path / "o").as_posix()
                  for path in (tmp_path / "o").rglob("tags.csv")) == ["a.flac", "a.wav", "sub/a"]
    # of several folders they would be mixed up
    said = run("listen.py", tmp_path / "sub", tmp_path / "sub" / "a.wav", tmp_path / "a.wav", *args,
               ok=False)
    assert "would both be written" in said
    # nothing that was written is a song, wherever it is written to now
    said = run("listen.py", tmp_path / "o", f"--tagger={nets['tags']}", f"--out={tmp_path}/p",
               ok=False)
    assert "holds no audio" in said


@pytest.mark.parametrize("name", ["vocals", "two"])
def test_parts_of_a_loud_song_add_up_too(nets, tmp_path, name, monkeypatch):
    """Where vocals and the song have the other sign, the rest would be louder than 16 bits hold."""
    wave = np.sign(np.random.default_rng(0).standard_normal((48_000, 2)))
    wave[:24_000] *= np.linspace(0, 1, 24_000)[:, None]
    sf.write(tmp_path / "a.wav", wave, 16_000)
    run("listen.py", tmp_path / "a.wav", f"--separator={nets[name]}", f"--out={tmp_path}/o")
    found = {path.stem: int16(path) for path in (tmp_path / "o" / "a").glob("*.wav")}
    song = int16(tmp_path / "a.wav")
    assert np.array_equal(found["vocals"] + found.pop("accompaniment"), song)
    if name == "two":
        assert np.array_equal(sum(found.values()), song)
    # it was needed here
    net, _ = model.load(nets["vocals"])
    stem = model.separate(net, torch.from_numpy(wave.T).float())[0].numpy()
    assert np.abs(song.T - 32768 * stem).max() > 33_000


def test_room_is_made_by_moving_sources_towards_zero():
    rng = np.random.default_rng(0)
    stems = rng.integers(-32768, 32768, (4, 2, 1000)).astype(np.int32)
    whole = rng.integers(-32768, 32768, (2, 1000)).astype(np.int32)
    moved = stems.copy()
    listen.make_room(moved, whole)
    rest = whole - moved.sum(0)
    assert rest.min() >= -32768 and rest.max() <= 32767
    assert (np.abs(moved) <= np.abs(stems)).all() and (moved * stems >= 0).all()
    free = np.abs(whole - stems.sum(0) + 0.5) < 32768       # nothing is changed without need
    assert free.any() and np.array_equal(moved[:, free], stems[:, free])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "opus"])
def test_a_disk_that_takes_no_more_is_one_line(nets, tmp_path, kind):
    song = song_at(tmp_path / "a.wav", 20)
    code = ("import resource, sys, listen, runtime\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
            "sys.argv[0] = 'listen.py'\n"
            "runtime.script(listen.main)")
    done = subprocess.run(
        [sys.executable, "-c", code, str(song), f"--separator={nets['two']}", f"--format={kind}",
         f"--out={tmp_path}/o"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "PyAV" not in done.stderr
    said = done.stdout + done.stderr
    assert "File too large" in said and said.count("error:") == 2       # the song, then the sum
    assert [path.name for path in (tmp_path / "o" / "a").iterdir()] == ["listen.json"]


def test_a_folder_that_is_not_ours_is_left_alone(nets, tmp_path):
    song = song_at(tmp_path / "a.wav", 1)
    mine = tmp_path / "o" / "a" / "vocals.wav"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    said = run("listen.py", song, f"--separator={nets['vocals']}", f"--out={tmp_path}/o", ok=False)
    assert "has not made them" in said and mine.read_bytes() == b"mine"


def test_another_song_of_the_same_name_and_size_is_not_finished(nets, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        song_at(tmp_path / name / "mix.wav", 1, seed=ord(name))
    args = [f"--tagger={nets['tags']}", f"--out={tmp_path}/o"]
    run("listen.py", tmp_path / "a" / "mix.wav", *args)
    assert "from another file" in run("listen.py", tmp_path / "b" / "mix.wav", *args, ok=False)


def test_a_song_that_failed_can_be_tried_with_other_settings(nets, tmp_path):
    song = song_at(tmp_path / "a.wav", 1, channels=3)
    args = ["listen.py", song, f"--separator={nets['vocals']}", f"--out={tmp_path}/o"]
    run(*args, "--format=mp3", ok=False)
    run(*args, "--format=wav")
    assert (tmp_path / "o" / "a" / "vocals.wav").exists()


def test_names_in_a_checkpoint_cannot_lead_out_of_the_folder(nets, tmp_path):
    song, out = song_at(tmp_path / "a.wav", 1), f"--out={tmp_path}/o"
    for sources in (["../x"], ["/tmp/x"], ["remainder"], ["a", "a"], [""]):
        net = model.Separator(sources, NARROW)
        torch.save({"kind": "separator", "args": net.args, "model": net.state_dict(), "step": 1,
                    "config": {}}, tmp_path / "bad.pt")
        said = run("listen.py", song, f"--separator={tmp_path}/bad.pt", out, ok=False)
        assert "bad.pt: " in said and "name" in said
    (tmp_path / "listen.pt").write_bytes(nets["tags"].read_bytes())
    said = run("listen.py", song, f"--tagger={tmp_path}/listen.pt", out, ok=False)
    assert "'listen' is taken" in said and not (tmp_path / "o").exists()


def test_wrong_settings_are_one_line(nets, tmp_path):
    song = song_at(tmp_path / "a.wav", 1, channels=3)
    base = [song, f"--out={tmp_path}/o"]
    assert "name one or more songs" in run("listen.py", ok=False)
    assert "not a separator" in run("listen.py", *base, f"--separator={nets['tags']}", ok=False)
    assert "hop must be" in run("listen.py", *base, "--hop=-1", ok=False)
    said = run("listen.py", tmp_path / "none.wav", f"--tagger={nets['tags']}", ok=False)
    assert "none.wav" in said
    run("listen.py", *base, f"--separator={nets['vocals']}", "--format=mp3", ok=False)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_a_stop_leaves_no_half_written_files(nets, tmp_path):
    song = song_at(tmp_path / "long.wav", 1500, 8000, 1)
    args = [sys.executable, "listen.py", str(song), f"--separator={nets['vocals']}",
            f"--out={tmp_path}/o"]
    process = subprocess.Popen(args, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "o" / "long"
    while not list(folder.glob("*.tmp")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert "goes on with this song" in process.communicate(timeout=120)[1]
    assert [path.name for path in folder.iterdir()] == ["listen.json"]
    # what was begun is not foreign
    done = subprocess.Popen(args, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(folder.glob("*.tmp")):
        assert done.poll() is None
        time.sleep(0.1)
    done.send_signal(signal.SIGTERM)
    assert "goes on with this song" in done.communicate(timeout=120)[1]


# -----------------------------------------------------------------------------
# torch.hub

def test_hub_gives_networks_that_are_used_in_one_line(nets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wave = noise(2, 50_000)
    separator = torch.hub.load(str(ROOT), "separator", str(nets["two"]), source="local")
    assert separator.separate(wave, 22_050).shape == (2, 2, 50_000)
    tagger = torch.hub.load(str(ROOT), "tagger", str(nets["genre"]), source="local")
    assert tagger.classes == ["genre 0", "genre 1"]
    assert tagger.tag(wave, 22_050).sum().item() == pytest.approx(1)
    assert tagger.tag(wave[0], hop=0.5).shape == (1, 2)
    with pytest.raises(ValueError, match="not a separator"):
        torch.hub.load(str(ROOT), "separator", str(nets["genre"]), source="local")
