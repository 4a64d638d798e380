"""
Songs with stems: your own, MUSDB18-HQ, MUSDB18.
"""
import os
import shutil
import zipfile
from collections import Counter

import numpy as np
import pytest
from conftest import REAL, encode, index_of, needs_real, prepare, sound, tone

from audio.files import read as read_audio
from common import download
from data import TRACKS, Prepared
from prepare import musdb

STEMS = TRACKS[1:]


def read(folder):
    """(songs, {name: item}) of a prepared folder."""
    songs = Prepared(str(folder), "stems")
    return songs, {item["name"]: item for item in songs.index["items"]}


# -----------------------------------------------------------------------------
# your own

def own(root, *args):
    return prepare(root / "out", "stems", f"--path={root / 'in'}", "--workers=1", *args)


@pytest.fixture
def songs(tmp_path):
    """Ten songs; one has no bass, one has a mixture that is not the sum."""
    for k in range(10):
        for n, stem in enumerate(STEMS):
            if (k, stem) != (3, "bass"):
                sound(tmp_path / "in" / f"song {k}" / f"{stem}.wav", 7, seed=10 * k + n)
    sound(tmp_path / "in" / "song 0" / "mixture.wav", 7, seed=99)
    return tmp_path


def test_songs_without_splits_get_8_1_1(songs):
    assert own(songs) == 0
    split = Counter(item["split"] for item in read(songs / "out" / "stems")[1].values())
    assert split == {"train": 8, "valid": 1, "test": 1}


def test_missing_stem_is_silence_and_missing_mixture_is_the_sum(songs):
    assert own(songs) == 0
    data, items = read(songs / "out" / "stems")
    assert not data.read(items["song 3"], "bass").any()
    for name, is_sum in (("song 2", True), ("song 3", True), ("song 0", False)):
        mixture, item = data.read(items[name], "mixture"), items[name]
        error = np.abs(mixture - sum(data.read(item, stem) for stem in STEMS)).max()
        assert (error < 3 / 32768) == is_sum


def test_reasons_why_a_folder_is_not_a_song(songs):
    for name, stems in (("only", ["mixture"]), ("typo", ["voice"]), ("nearly", ["bass", "vocal"])):
        for stem in stems:
            sound(songs / "in" / name / f"{stem}.wav", 7)
    sound(songs / "in" / "twice" / "bass.wav", 7)
    sound(songs / "in" / "twice" / "bass.flac", 7)
    sound(songs / "in" / "broken" / "bass.wav", 7)
    (songs / "in" / "broken" / "drums.wav").write_bytes(b"x" * 100)
    for stem in ("bass", "drums"):
        sound(songs / "in" / "cut" / f"{stem}.wav", 7)
    whole = (songs / "in" / "cut" / "drums.wav").read_bytes()
    (songs / "in" / "cut" / "drums.wav").write_bytes(whole[:100_000])
    assert own(songs) == 3
    left_out = index_of(songs / "out" / "stems")["left_out"]
    reasons = {entry["name"]: entry["reason"] for entry in left_out}
    facts = {"only": ["no stems"], "twice": ["bass"],
             "typo": ["no drums, bass, other, vocals", "voice.wav"],
             "nearly": ["no drums, other, vocals", "vocal.wav"],
             "cut": ["drums.wav", "3.1 s", "3.9 s"], "broken": ["drums.wav", "not audio"]}
    assert reasons.keys() == facts.keys()
    for name, words in facts.items():
        assert all(word in reasons[name] for word in words), reasons[name]


def test_tag_after_the_samples_of_a_stem_is_not_audio(songs):
    path = songs / "in" / "song 1" / "drums.wav"
    chunk = b"id3 " + (20000).to_bytes(4, "little") + bytes(20000)  # 0.6 s if it were audio
    path.write_bytes(path.read_bytes() + chunk)
    assert own(songs) == 0
    assert not index_of(songs / "out" / "stems")["notes"]


def test_file_names_are_case_insensitive(songs):
    for stem in STEMS:
        path = songs / "in" / "song 1" / f"{stem}.wav"
        path.rename(path.with_name(f"{stem.title()}.WAV"))
    assert own(songs) == 0 and len(read(songs / "out" / "stems")[1]) == 10


def test_changed_stem_is_decoded_again(songs):
    assert own(songs) == 0
    sound(songs / "in" / "song 5" / "drums.wav", 7, seed=1234)
    shutil.rmtree(songs / "in" / "song 6")
    assert own(songs) == 0
    data, items = read(songs / "out" / "stems")
    assert len(items) == 9
    assert prepare(songs / "fresh", "stems", f"--path={songs / 'in'}") == 0
    fresh, again = read(songs / "fresh" / "stems")
    for track in TRACKS:
        assert np.array_equal(data.read(items["song 5"], track), fresh.read(again["song 5"], track))


def test_either_all_songs_or_none_are_in_split_folders(songs):
    (songs / "in" / "train").mkdir()
    (songs / "in" / "song 1").rename(songs / "in" / "train" / "song 1")
    assert "some songs are in train/" in own(songs)
    shutil.rmtree(songs / "in")
    (songs / "in").mkdir()
    assert "no folders with vocals.wav" in own(songs)


# -----------------------------------------------------------------------------
# MUSDB18

TITLES = [("train", "Actions - One Minute Smile"), ("train", "Some - Song"),
          ("train", "Other - Song"), ("test", "Test - Song")]


@pytest.fixture
def hq(tmp_path):
    for split, title in TITLES:
        for n, track in enumerate(TRACKS):
            sound(tmp_path / "in" / split / title / f"{track}.wav", 7, seed=n)
    return tmp_path


def musdb18(root, *args):
    return prepare(root / "out", "musdb", f"--path={root / 'in'}", "--workers=1", *args)


def test_musdb_hq_has_the_validation_songs_of_the_musdb_package(hq, capsys):
    assert musdb18(hq) == 3
    items = read(hq / "out" / "musdb")[1]
    assert {name: item["split"] for name, item in items.items()} == {
        "Test - Song": "test", "Actions - One Minute Smile": "valid", "Other - Song": "train",
        "Some - Song": "train"}
    assert "2 / 1 / 1 instead of 86 / 14 / 50" in capsys.readouterr().out


def pack(root):
    """Packs a copy of the songs."""
    with zipfile.ZipFile(root / "in" / "musdb18hq.zip", "w") as z:
        for p in sorted((root / "in").rglob("*.wav")):
            z.write(p, p.relative_to(root / "in"))


def test_incomplete_song_is_read_from_the_archive_or_left_out(hq):
    pack(hq)
    (hq / "in" / "unpacked").mkdir()
    for split in ("train", "test"):
        (hq / "in" / split).rename(hq / "in" / "unpacked" / split)
    (hq / "in" / "unpacked" / "train" / "Some - Song" / "vocals.wav").unlink()
    sound(hq / "in" / "unpacked" / "train" / "Lost - Song" / "drums.wav", 7)
    assert musdb18(hq) == 3
    left_out = index_of(hq / "out" / "musdb")["left_out"]
    assert [(entry["name"], entry["reason"]) for entry in left_out] == [
        ("Lost - Song", "has no mixture, bass, other, vocals")]
    data, items = read(hq / "out" / "musdb")
    assert data.read(items["Some - Song"], "vocals").any()


def test_truncated_copy_of_a_packed_stem_is_refused(hq):
    pack(hq)
    (hq / "in" / "x").mkdir()
    (hq / "in" / "train").rename(hq / "in" / "x" / "train")
    cut = hq / "in" / "x" / "train" / "Other - Song" / "vocals.wav"
    cut.write_bytes(cut.read_bytes()[:60000])
    assert "Other - Song has two copies" in musdb18(hq)


def test_stem_files_are_read_without_an_ffmpeg_program(tmp_path, monkeypatch):
    wave = np.stack([tone(300, 44100, 7), tone(300, 44100, 7) / 2], 1)
    for split, title in TITLES:
        (tmp_path / "in" / split).mkdir(parents=True, exist_ok=True)
        encode(tmp_path / "in" / split / f"{title}.stem.mp4", wave, 44100, "aac", streams=5)
    (tmp_path / "in" / "train" / "broken.stem.mp4").write_bytes(b"x" * 1000)
    monkeypatch.setenv("PATH", os.path.join(os.sep, "nonexistent"))
    assert musdb18(tmp_path) == 3
    data, items = read(tmp_path / "out" / "musdb")
    assert len(items) == 4
    entries = index_of(tmp_path / "out" / "musdb")["left_out"]
    assert [entry["name"] for entry in entries] == ["broken"]
    for k, track in enumerate(TRACKS):
        wave = data.read(items["Test - Song"], track)[2000:100_000]
        loudness = np.sqrt(2 * np.mean(wave ** 2))
        assert loudness == pytest.approx(0.375 / (k + 1), rel=0.05)


def test_musdb_hq_and_previews_are_not_mixed(hq):
    assert musdb18(hq) == 3
    answer = musdb18(hq, "--download=True")
    assert "MUSDB18-HQ" in answer and "previews" in answer


def test_url_of_the_previews():
    folder, tables, archives = musdb.downloads(download=True)
    assert folder == "musdb_7s" and not tables
    assert archives[0][0].endswith("/MUSDB18-7-STEMS.zip")


def test_decoded_songs_need_no_files(hq, monkeypatch, capsys):
    raw = hq / "out" / "raw" / "musdb_hq"
    raw.parent.mkdir(parents=True)
    (hq / "in").rename(raw)

    def fetch(wanted, folder, hint):
        os.makedirs(folder, exist_ok=True)

    monkeypatch.setattr(download, "fetch", fetch)
    arguments = (hq / "out", "musdb", "--hq=True", "--workers=1")
    assert prepare(*arguments) == 3
    shutil.rmtree(raw)
    assert prepare(*arguments) == 3
    assert "keeps the clips and labels of the last run" in capsys.readouterr().out
    assert len(read(hq / "out" / "musdb")[1]) == 4


@needs_real
def test_real_stem_file_equals_stempeg(tmp_path):
    stempeg = pytest.importorskip("stempeg", exc_type=(ImportError, RuntimeError))
    song = next((REAL / "stems").rglob("*.stem.mp4"))
    reference, rate = stempeg.read_stems(str(song))                             # (5, N, 2)
    for k in range(5):
        wave, file_rate, damage = read_audio(song, k)
        assert file_rate == rate and not damage
        assert np.abs(wave - reference[k].mean(1)).max() < 1e-4
