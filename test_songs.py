"""
Tests of prepare_data.py for songs with stems: one's own, MUSDB18-HQ, MUSDB18.

    python -m pytest -q test_songs.py
"""
import subprocess
import zipfile
from collections import Counter

import numpy as np

import data
from test_decode import needs_ffmpeg
from test_prepare import index_of, prepare, sound


def test_any_songs_with_stems(tmp_path, capsys):
    for k in range(10):
        for n, stem in enumerate(("drums", "bass", "other", "vocals")):
            if (k, stem) != (3, "bass"):
                sound(tmp_path / "in" / f"song {k}" / f"{stem}.wav", 7, 44100, seed=10 * k + n)
    sound(tmp_path / "in" / "song 0" / "mixture.wav", 7, 44100, seed=99)
    sound(tmp_path / "in" / "only" / "mixture.wav", 7, 44100)
    sound(tmp_path / "in" / "typo" / "voice.wav", 7, 44100)
    sound(tmp_path / "in" / "nearly" / "bass.wav", 7, 44100)
    sound(tmp_path / "in" / "nearly" / "vocal.wav", 7, 44100)
    sound(tmp_path / "in" / "twice" / "bass.wav", 7, 44100)
    sound(tmp_path / "in" / "twice" / "bass.flac", 7, 44100)
    sound(tmp_path / "in" / "broken" / "bass.wav", 7, 44100)
    (tmp_path / "in" / "broken" / "drums.wav").write_bytes(b"x" * 100)
    sound(tmp_path / "in" / "cut" / "bass.wav", 7, 44100)
    sound(tmp_path / "in" / "cut" / "drums.wav", 7, 44100)
    whole = (tmp_path / "in" / "cut" / "drums.wav").read_bytes()
    (tmp_path / "in" / "cut" / "drums.wav").write_bytes(whole[:300_000])             # not silence from there on
    assert prepare(tmp_path / "out", "stems", f"--path={tmp_path / 'in'}") == 3
    songs = data.Prepared(str(tmp_path / "out" / "stems"), "stems")
    found = {i["name"]: i for i in songs.index["items"]}
    assert len(found) == 10 and Counter(i["split"] for i in found.values()) == {"train": 8, "valid": 1, "test": 1}
    assert {e["name"]: e["reason"] for e in songs.index["left_out"]} == {
        "only": "has a mixture, but no stems", "typo": "has no drums, bass, other, vocals, but voice.wav: give it its name, or move it away",
        "nearly": "has no drums, other, vocals, but vocal.wav: give it its name, or move it away", "twice": "has two files for bass",
        "cut": "drums.wav: its header and its size do not agree: it may be cut off; its tracks differ by up to 3.6 s",
        "broken": "drums.wav: not audio that libsndfile can read (wav, flac, ogg, mp3, aiff, au)"}
    assert not songs.read(found["song 3"], "bass").any()
    for name in ("song 2", "song 3"):
        np.testing.assert_allclose(songs.read(found[name], "mixture"), sum(songs.read(found[name], t) for t in data.TRACKS[1:]), atol=3 / 32768)
    assert np.abs(songs.read(found["song 0"], "mixture") - sum(songs.read(found["song 0"], t) for t in data.TRACKS[1:])).max() > 0.1

    names = {i["name"] for i in songs.index["items"]}
    (tmp_path / "in" / "song 2").rename(tmp_path / "gone")
    assert prepare(tmp_path / "out", "stems", f"--path={tmp_path / 'in'}", "--relabel=True", "--seed=2") == 3
    assert {i["name"] for i in index_of(tmp_path / "out" / "stems")["items"]} == names        # what was decoded stays

    (tmp_path / "in" / "train").mkdir()
    (tmp_path / "in" / "song 1").rename(tmp_path / "in" / "train" / "song 1")
    assert "some songs lie in train/" in prepare(tmp_path / "out", "stems", f"--path={tmp_path / 'in'}", "--name=x")
    assert "no song folders" in prepare(tmp_path / "out", "stems", f"--path={tmp_path / 'out'}", "--name=x")


MUSDB = [("train", "Actions - One Minute Smile"), ("train", "Some - Song"), ("train", "Other - Song"), ("test", "Test - Song")]


def test_musdb_hq_takes_the_packages_validation_songs_and_no_ffmpeg(tmp_path, capsys, monkeypatch):
    for split, title in MUSDB:
        for n, track in enumerate(data.TRACKS):
            sound(tmp_path / "in" / split / title / f"{track}.wav", 7, 44100, seed=n)
    monkeypatch.setenv("PATH", "/nonexistent")
    with zipfile.ZipFile(tmp_path / "in" / "musdb18hq.zip", "w") as z:  # the same songs once more, still packed
        for p in sorted((tmp_path / "in").rglob("*.wav")):
            z.write(p, p.relative_to(tmp_path / "in"))
    for split in ("train", "test"):
        (tmp_path / "in" / "musdb18hq").mkdir(exist_ok=True)
        (tmp_path / "in" / split).rename(tmp_path / "in" / "musdb18hq" / split)
    for title, track in (("Some - Song", "bass"), ("Lost - Song", "drums")):  # of the first the archive has all
        sound(tmp_path / "in" / "musdb18hq" / "train" / title / f"{track}.wav", 7, 44100)
    (tmp_path / "in" / "musdb18hq" / "train" / "Some - Song" / "vocals.wav").unlink()
    assert prepare(tmp_path / "out", "musdb", f"--path={tmp_path / 'in'}") == 3
    found = index_of(tmp_path / "out" / "musdb")
    assert [(e["name"], e["reason"]) for e in found["left_out"]] == [("Lost - Song", "has no mixture, bass, other, vocals")]
    assert not np.allclose(data.Prepared(str(tmp_path / "out" / "musdb"), "stems").read(found["items"][3], "vocals"), 0)
    assert [(i["split"], i["name"]) for i in found["items"]] == [
        ("test", "Test - Song"), ("valid", "Actions - One Minute Smile"), ("train", "Other - Song"), ("train", "Some - Song")]
    assert "NOT COMPLETE: 2 / 1 / 1 instead of 86 / 14 / 50 songs" in capsys.readouterr().out
    cut = tmp_path / "in" / "musdb18hq" / "train" / "Other - Song" / "vocals.wav"
    cut.write_bytes(cut.read_bytes()[:60000])
    assert "two files that differ would be Other - Song" in prepare(tmp_path / "out", "musdb", f"--path={tmp_path / 'in'}", "--name=x")
    answer = prepare(tmp_path / "out", "musdb", "--name=x")
    assert "apt install ffmpeg" in answer and "--hq=True" in answer
    (tmp_path / "mp4" / "train").mkdir(parents=True)
    (tmp_path / "mp4" / "train" / "a.stem.mp4").write_bytes(b"x")
    assert "--hq=True" in prepare(tmp_path / "out", "musdb", f"--path={tmp_path / 'mp4'}", "--name=x")
    assert "no train/*/mixture.wav" in prepare(tmp_path / "out", "musdb", f"--path={tmp_path / 'out'}", "--name=x")


@needs_ffmpeg
def test_musdb_stem_files(tmp_path, capsys):
    for n in range(5):
        sound(tmp_path / f"{n}.wav", 7, 44100, seed=n)
    arguments = [a for n in range(5) for a in ("-i", str(tmp_path / f"{n}.wav"))] + [a for n in range(5) for a in ("-map", str(n))]
    for split, title in MUSDB:
        (tmp_path / "in" / split).mkdir(parents=True, exist_ok=True)
        subprocess.run(["ffmpeg", "-v", "error", *arguments, "-c:a", "aac", str(tmp_path / "in" / split / f"{title}.stem.mp4")], check=True)
    (tmp_path / "in" / "train" / "broken.stem.mp4").write_bytes(b"x" * 1000)
    assert prepare(tmp_path / "out", "musdb", f"--path={tmp_path / 'in'}") == 3
    found = index_of(tmp_path / "out" / "musdb")
    assert Counter(i["split"] for i in found["items"]) == {"train": 2, "valid": 1, "test": 1}
    assert [e["name"] for e in found["left_out"]] == ["broken"] and "audio streams" in found["left_out"][0]["reason"]
