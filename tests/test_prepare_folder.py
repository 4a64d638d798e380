"""
Your own clips: one folder per class, or a table.
"""
import shutil
import unicodedata
from collections import Counter

import numpy as np
import pytest
import soundfile as sf
from conftest import encode, index_of, prepare, sound, tone

from data import SPLITS, Clips, Prepared


def own(root, *args, name="mine"):
    """Prepares root/in; returns the exit status, or the error line."""
    return prepare(root / "out", "folder", f"--name={name}", "--workers=1", *args)


def of_folder(root, *args):
    return own(root, f"--path={root / 'in'}", *args)


def index(root, name="mine"):
    return index_of(root / "out" / name)


@pytest.fixture
def genres(tmp_path):
    """12 rock and 6 jazz clips in folders of albums."""
    for genre, count in (("rock", 12), ("jazz", 6)):
        for k in range(count):
            sound(tmp_path / "in" / genre / f"album {k % 2}" / f"{k:02d}.flac", seed=k)
    return tmp_path


# -----------------------------------------------------------------------------
# a folder per class

def test_folders_are_classes_with_a_stratified_split(genres):
    assert of_folder(genres) == 0
    assert index(genres)["classes"] == {"genre": ["jazz", "rock"]}
    for genre, train in ((1, 10), (0, 5)):
        items = [item for item in index(genres)["items"] if item["genre"] == [genre]]
        split = Counter(item["split"] for item in items)
        assert abs(split["train"] - train) <= 1 and split["valid"] + split["test"] >= 1


def test_other_files_are_skipped_and_broken_ones_reported(genres, capsys):
    (genres / "in" / "rock" / "cover.jpg").write_bytes(b"x")
    (genres / "in" / "jazz" / "album 0" / "broken.mp3").write_bytes(b"x" * 1000)
    assert of_folder(genres) == 3
    output = capsys.readouterr().out
    assert "skipped 1 files" in output and "broken.mp3: not audio" in output
    assert len(index(genres)["items"]) == 18


def test_mixed_formats(tmp_path):
    for k, (name, codec) in enumerate((("a.m4a", "aac"), ("a.opus", "libopus"), ("a.wma", "wmav2"),
                                       ("a.webm", "libopus"), ("a.M4A", "alac"))):
        for genre in "xy":
            (tmp_path / "in" / genre).mkdir(parents=True, exist_ok=True)
            encode(tmp_path / "in" / genre / f"{k}{name}", tone(440, 48000, 5), 48000, codec)
    sf.write(tmp_path / "in" / "x" / "b.WAV", tone(440, 16000, 5), 16000, format="WAV")
    assert of_folder(tmp_path) == 0 and len(index(tmp_path)["items"]) == 11


def test_folders_train_valid_and_test_are_splits(tmp_path):
    for split in ("train", "Val", "test"):
        for genre in "ab":
            sound(tmp_path / "in" / split / genre / "0.wav")
    assert of_folder(tmp_path) == 0
    split = {item["name"].split("/")[0]: item["split"] for item in index(tmp_path)["items"]}
    assert split == {"train": "train", "Val": "valid", "test": "test"}
    assert index(tmp_path)["classes"] == {"genre": ["a", "b"]}
    sound(tmp_path / "in" / "extra" / "a" / "0.wav")
    assert "extra" in of_folder(tmp_path)


def test_class_may_be_named_like_a_split(tmp_path):
    for genre in ("training", "sleep"):
        sound(tmp_path / "in" / genre / "0.wav")
    assert of_folder(tmp_path) == 0
    assert index(tmp_path)["classes"] == {"genre": ["sleep", "training"]}


def test_folders_without_classes_are_refused(genres):
    (genres / "up").mkdir()
    shutil.copytree(genres / "in", genres / "up" / "all")
    assert "['all'] in 18 audio files" in own(genres, f"--path={genres / 'up'}")
    sound(genres / "in" / "loose.wav")
    assert "loose.wav has no class" in of_folder(genres)
    (genres / "empty").mkdir()
    assert "[] in 0 audio files" in own(genres, f"--path={genres / 'empty'}")
    assert "is not a folder" in own(genres, f"--path={genres / 'nowhere'}")
    assert "no --path=FOLDER" in own(genres)
    assert "give --csv=FILE" in of_folder(genres, "--group=artist")


def test_error_names_the_reason_if_no_file_is_usable(genres):
    answer = of_folder(genres, "--min_seconds=6")
    for fact in ("18 files", "jazz/album 0/00.flac", "too short", "--min_seconds=6"):
        assert fact in answer


def test_file_in_two_classes_is_refused(genres):
    twin = genres / "in" / "jazz" / "again.flac"
    twin.symlink_to(genres / "in" / "rock" / "album 0" / "00.flac")
    assert "are the same file" in of_folder(genres)


def test_dangling_links_are_left_out(genres):
    (genres / "in" / "rock" / "gone.wav").symlink_to("nowhere")
    (genres / "in" / "rock" / "circle.wav").symlink_to("circle.wav")
    assert of_folder(genres) == 3
    assert {e["name"]: e["reason"] for e in index(genres)["left_out"]} == {
        "rock/gone.wav": "not found", "rock/circle.wav": "not found"}


def test_unusual_file_names(genres):
    for k, name in enumerate(("-new\nline \udcff.wav", "日本語 🎵.wav", "Ba$$in.wav")):
        sound(genres / "a.wav", seed=k)
        (genres / "a.wav").rename(genres / "in" / "rock" / name)
    assert of_folder(genres) == 0 and len(index(genres)["items"]) == 21


def test_class_names_are_in_composed_unicode(tmp_path):
    for k, form in enumerate(("NFC", "NFD")):
        sound(tmp_path / "in" / unicodedata.normalize(form, "café") / f"{k}.wav", seed=k)
    sound(tmp_path / "in" / "bar" / "0.wav")
    assert of_folder(tmp_path) == 0
    assert index(tmp_path)["classes"]["genre"] == ["bar", unicodedata.normalize("NFC", "café")]


def test_silent_clips_are_left_out(genres):
    sf.write(genres / "in" / "rock" / "silent.flac", np.zeros(16000 * 5), 16000)
    assert of_folder(genres) == 3
    assert [e["reason"] for e in index(genres)["left_out"]] == ["is silent"]


# -----------------------------------------------------------------------------
# a table

@pytest.fixture
def clips(tmp_path):
    for k in range(20):
        sound(tmp_path / "in" / f"{k}.wav", seed=k)
    return tmp_path


def table(root, lines, name="own.csv"):
    (root / "in" / name).write_text("\n".join(lines), encoding="utf-8")
    return f"--csv={root / 'in' / name}"


def test_table_with_tags_and_groups(clips):
    lines = [f"{k}.wav;{'calm|warm' if k % 2 else 'loud'};artist {k // 2}" for k in range(20)]
    raw = "\r\n".join(["\ufeffpath;label;artist", *lines, ""]).encode()
    (clips / "in" / "own.csv").write_bytes(raw)
    assert own(clips, f"--csv={clips / 'in' / 'own.csv'}", "--separator=|") == 0
    assert index(clips)["classes"] == {"tags": ["calm", "loud", "warm"]}
    assert index(clips)["multilabel"] == ["tags"]
    split = {item["name"]: item["split"] for item in index(clips)["items"]}
    assert all(split[f"{k}.wav"] == split[f"{k + 1}.wav"] for k in range(0, 20, 2))
    assert len(set(split.values())) == 3
    tags = {item["name"]: item["tags"] for item in index(clips)["items"]}
    assert tags["3.wav"] == [0, 2]
    Clips(Prepared(str(clips / "out" / "mine"), "clips"), "train", "tags")


def test_table_with_splits(clips):
    names = ("training", "val", "test")
    lines = [f"{clips}/in/{k}.wav,{'a' if k % 3 else 'b'},{names[k % 3]}" for k in range(20)]
    option = table(clips, ["path,label,split", *lines, "gone.wav,a,test"])
    assert own(clips, option) == 3
    assert [e["name"] for e in index(clips)["left_out"]] == ["gone.wav"]
    for item in index(clips)["items"]:
        number = int(item["name"].split("/")[-1][:-4])
        assert item["split"] == SPLITS[number % 3]


def test_table_with_folds_and_another_label_column(clips):
    lines = [f"{k}.wav,{'ab'[k % 2]},calm|{'cd'[k % 2]},{k % 4}" for k in range(20)]
    option = table(clips, ["path,genre,mood,fold", *lines])
    assert own(clips, option, "--label=Mood", "--separator=|") == 0
    assert index(clips)["classes"] == {"tags": ["c", "calm", "d"]}
    split = {item["name"]: item["split"] for item in index(clips)["items"]}
    assert split["0.wav"] == "test" and split["5.wav"] == "valid" and split["2.wav"] == "train"
    assert own(clips, option, "--label=genre", name="genre") == 0
    assert index(clips, "genre")["classes"] == {"genre": ["a", "b"]}


def test_artist_in_two_folds_is_noted(clips, capsys):
    """Folds 2 and 3 are both in the train split of a prepared folder."""
    lines = [f"{k}.wav,{'ab'[k % 2]},{'x' if k in (2, 3) else k},{k % 4}" for k in range(20)]
    assert own(clips, table(clips, ["path,label,artist,fold", *lines])) == 0
    assert "note: 1 groups" in capsys.readouterr().out


@pytest.mark.parametrize("text, message", [
    ("path,label,fold\na.wav,x,one", "fold is 'one'"),
    ("path,label,fold\na.wav,x,0\nb.wav,x,1", "needs clips with folds 0, 1, 2"),
    ("path,genre\na,b", "needs the columns path and label"), ("path,label\na.wav", "1 cells"),
    ("path,label,split\na.wav,x,devel", "split is 'devel'"), ("", "needs the columns"),
    ("path,label\na.wav,x\na.wav,y", "names a.wav twice"), ("path,label\n", "and rows"),
    ("path,label\na.wav,", "line 2: no label"), ("path,label\n,x", "line 2: path is empty"),
    ("sep=;\npath;label", "delete the first line"), ('path,label\na.wav,"x', "line 2"),
    ("path,label\na\0.wav,x", "zero byte")])
def test_table_errors_name_file_and_line(tmp_path, text, message):
    (tmp_path / "in").mkdir()
    answer = own(tmp_path, table(tmp_path, [text], "wrong.csv"))
    assert message in answer and "wrong.csv" in answer


def test_table_must_be_utf_8(tmp_path):
    (tmp_path / "own.csv").write_bytes("path,label\nä.wav,x".encode("latin-1"))
    assert "UTF-8" in own(tmp_path, f"--csv={tmp_path / 'own.csv'}")


def test_wrong_separator_is_refused(clips, capsys):
    lines = [f"{k}.wav,{'a' if k % 2 else 'b|c'}" for k in range(20)]
    option = table(clips, ["path,label", *lines])
    assert "no label contains the separator ';'" in own(clips, option, "--separator=;")
    assert own(clips, option) == 0
    assert "'b|c' is one class" in capsys.readouterr().out


def test_first_filled_group_column_is_used(clips, capsys):
    lines = [f"{k}.wav,{'ab'[k % 2]},,album {k // 4}" for k in range(20)]
    assert own(clips, table(clips, ["path,label,artist,album", *lines])) == 0
    homes = {(item["group"], item["split"]) for item in index(clips)["items"]}
    assert len(homes) == 5
    lines = [f"{line},{SPLITS[k % 3]}" for k, line in enumerate(lines)]
    assert own(clips, table(clips, ["path,label,artist,album,split", *lines])) == 0
    output = capsys.readouterr().out
    assert "note: 5 groups" in output
    answer = own(clips, table(clips, ["path,label", *lines[:0], "0.wav,a"]), "--group=composer")
    assert "label and composer" in answer


def test_labels_change_without_decoding(clips, capsys):
    lines = [f"{k}.wav,{'ab'[k % 2]}" for k in range(20)]
    assert own(clips, table(clips, ["path,label", *lines])) == 0
    lines = [f"{k}.wav,{'xyz'[k % 3]}" for k in range(20)]
    option = table(clips, ["path,label", *lines])
    assert own(clips, option) == 0
    output = capsys.readouterr().out
    assert "nothing new to decode" in output and "have changed since the last run" in output
    assert index(clips)["classes"]["genre"] == ["x", "y", "z"]
    (clips / "in" / "3.wav").unlink()  # its audio stays
    assert own(clips, option) == 0 and len(index(clips)["items"]) == 20
    (clips / "in" / "own.csv").unlink()
    assert own(clips, option) == 0 and len(index(clips)["items"]) == 20


def test_paths_in_the_spelling_of_another_system_are_found(tmp_path):
    for folder in (unicodedata.normalize("NFD", "é"), "b"):
        for k in range(2):
            sound(tmp_path / "in" / folder / f"{k}.wav", seed=k)
    accent = unicodedata.normalize("NFC", "é")
    lines = [f"{accent}/0.wav,x", f"{accent}\\1.wav,y", "B/0.WAV,x", "b\\1.wav,y"]
    assert own(tmp_path, table(tmp_path, ["path,label", *lines])) == 0
    assert len(index(tmp_path)["items"]) == 4
