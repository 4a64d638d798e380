"""
Tests of prepare_data.py: each dataset of labelled clips from small files made here as its authors
ship it; the published splits where they lie beside the project.

    python -m pytest -q test_prepare.py
"""
import io
import json
import lzma
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

import data
import labels
import prepare_data

ROOT = Path(__file__).resolve().parent
REAL = ROOT.parent / "shared" / "realdata"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not there")
RATE = 16000


def prepare(out, *args):
    """Runs prepare_data.py in this process; returns the exit status, or the error line."""
    try:
        return prepare_data.main([*map(str, args), f"--out={out}"])
    except (ValueError, OSError) as e:
        return f"error: {e}"
    except SystemExit as e:
        return e.code


def sound(path, seconds=5.0, rate=RATE, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.1 * np.random.default_rng(seed).standard_normal(int(rate * seconds))
    sf.write(path, wave, rate, format=options.pop("format", None) or path.suffix[1:].upper(), **options)


def index_of(folder):
    return json.loads((folder / "index.json").read_text())


# -----------------------------------------------------------------------------
# MagnaTagATune

def magnatagatune(root, clips=40, seed=0):
    """annotations_final.csv and clip_info_final.csv as they are written, and an mp3 for each clip; returns the rows."""
    rng = np.random.default_rng(seed)
    tags = [f"tag {k}" for k in range(60)]
    rows = []
    for k in range(clips):
        folder = "0123456789abcdef"[k % 16]
        rows.append([str(100 + k), *map(str, (rng.random(60) < np.linspace(0.5, 0.02, 60)).astype(int)), f"{folder}/artist-song-{k:02d}-0-29.mp3"])
    rows[3][1:-1] = ["0"] * 60                    # no tag at all
    rows[5][1:-1] = ["0"] * 59 + ["1"]            # none of the top 50
    rows[6][0], rows[7][0] = "35644", "29"
    root.mkdir(parents=True, exist_ok=True)

    def write(name, table):
        (root / name).write_bytes("".join("\t".join(f'"{c}"' for c in row) + "\r\n" for row in table).encode())
    write("annotations_final.csv", [["clip_id", *tags, "mp3_path"], *rows])
    info = [[r[0], "1", f"Title {r[0]}", "Artist", "Album", "", "0", "29", "", r[-1]] for r in rows]
    write("clip_info_final.csv", [["clip_id", "track_number", "title", "artist", "album", "url", "segmentStart", "segmentEnd", "original_url", "mp3_path"],
                                  *info, ["9999", "1", "t", "a", "b", "", "0", "29", "", ""]])
    for row in rows:
        sound(root / "mp3" / row[-1], seed=int(row[0]))
    (root / "mp3" / rows[6][-1]).write_bytes(b"")
    return rows, tags


def test_mtat_from_the_files_and_from_the_zip_in_parts(tmp_path, capsys, monkeypatch):
    rows, tags = magnatagatune(tmp_path / "raw")
    monkeypatch.setattr(labels, "MTAT_CLIPS", {"clean": 36, "full": 39})
    assert prepare(tmp_path / "a", "mtat", f"--path={tmp_path / 'raw'}") == 0
    found = index_of(tmp_path / "a" / "mtat")
    counts = {t: sum(r[1 + k] == "1" for r in rows) for k, t in enumerate(tags)}
    top = sorted(tags, key=lambda t: -counts[t])[:50]  # ties stay in the file's order
    assert found["classes"] == {"tags": top} and found["multilabel"] == ["tags"]
    wanted = {r[-1]: [t for t in top if r[1 + tags.index(t)] == "1"] for r in rows if r[0] not in ("35644", "29")}
    wanted = {name: its for name, its in wanted.items() if its}
    assert {i["name"]: sorted(top[c] for c in i["tags"]) for i in found["items"]} == {n: sorted(t) for n, t in wanted.items()}
    assert all(i["split"] == ("train" if i["name"][0] in "0123456789ab" else "valid" if i["name"][0] == "c" else "test") for i in found["items"])
    assert {e["reason"] for e in found["left_out"]} == {"is empty in the distribution", "is not in the published clean split"}
    assert found["items"][0]["title"].startswith("Artist - Title")
    prepared = data.Prepared(str(tmp_path / "a" / "mtat"), "clips")
    for item in prepared.items("train")[:3]:
        reference, _ = sf.read(tmp_path / "raw" / "mp3" / item["name"])
        np.testing.assert_allclose(prepared.read(item), np.clip(reference, -1, 1), atol=2e-5)
    assert "clean protocol" in capsys.readouterr().out

    assert prepare(tmp_path / "a", "mtat", f"--path={tmp_path / 'raw'}", "--protocol=full", "--name=full") == 0
    full = index_of(tmp_path / "a" / "full")
    assert len(full["items"]) == len(rows) - 1 and sum(not i["tags"] for i in full["items"]) >= 2

    shutil.copytree(tmp_path / "a" / "full", tmp_path / "a" / "both")  # from full to clean: the same clips, without decoding
    assert prepare(tmp_path / "a", "mtat", "--name=both", "--protocol=clean", "--relabel=True") == 0
    both = data.Prepared(str(tmp_path / "a" / "both"), "clips")
    assert [{**i, "offset": 0} for i in both.index["items"]] == [{**i, "offset": 0} for i in found["items"]]
    assert all(np.array_equal(both.read(i), prepared.read(j)) for i, j in zip(both.index["items"], found["items"]))
    assert "have not been decoded" in prepare(tmp_path / "a", "mtat", "--protocol=full", "--relabel=True")

    packed = tmp_path / "packed"
    packed.mkdir()
    with zipfile.ZipFile(tmp_path / "mp3.zip", "w") as z:
        for row in rows:
            z.write(tmp_path / "raw" / "mp3" / row[-1], row[-1])
    raw = (tmp_path / "mp3.zip").read_bytes()
    for k in range(3):
        (packed / f"mp3.zip.00{k + 1}").write_bytes(raw[k * len(raw) // 3:(k + 1) * len(raw) // 3])
    for name in ("annotations_final.csv", "clip_info_final.csv"):
        shutil.copy(tmp_path / "raw" / name, packed)
    assert prepare(tmp_path / "b", "mtat", f"--path={packed}", "--workers=3") == 0
    assert (tmp_path / "b" / "mtat" / "audio.int16").read_bytes() == (tmp_path / "a" / "mtat" / "audio.int16").read_bytes()
    assert index_of(tmp_path / "b" / "mtat")["items"] == found["items"]
    for part in "21":
        (packed / f"mp3.zip.00{part}").unlink()
        assert "part" in prepare(tmp_path / "c", "mtat", f"--path={packed}")
    shutil.copy(tmp_path / "mp3.zip", packed)
    assert "beside its own parts" in prepare(tmp_path / "c", "mtat", f"--path={packed}")
    (packed / "mp3.zip.003").unlink()
    cut = packed / "mp3" / rows[0][-1]  # an unpacking that broke off, beside the archive
    cut.parent.mkdir(parents=True)
    cut.write_bytes((tmp_path / "raw" / "mp3" / rows[0][-1]).read_bytes()[:5000])
    assert "two files that differ would be 0/artist-song-00-0-29.mp3" in prepare(tmp_path / "c", "mtat", f"--path={packed}")


def test_a_table_that_was_cut_at_a_line_is_not_taken_for_the_dataset(tmp_path, capsys, monkeypatch):
    magnatagatune(tmp_path / "raw", clips=32)
    assert prepare(tmp_path / "out", "mtat", f"--path={tmp_path / 'raw'}", "--protocol=full") == 3
    assert "31 instead of 25,860 clips in its table" in capsys.readouterr().out


def test_mtat_with_part_of_the_files_says_which_share_it_found(tmp_path, capsys, monkeypatch):
    rows, _ = magnatagatune(tmp_path / "raw", clips=32)
    monkeypatch.setattr(labels, "MTAT_CLIPS", {"full": 31})
    names = [r[-1] for r in rows]
    for name in names[16:]:
        (tmp_path / "raw" / "mp3" / name).unlink()
    assert prepare(tmp_path / "out", "mtat", f"--path={tmp_path / 'raw'}", "--protocol=full") == 3
    assert "found 15 of 31 files (48.4 %)" in capsys.readouterr().out
    absent = [e for e in index_of(tmp_path / "out" / "mtat")["left_out"] if not e["expected"]]
    assert sorted(e["name"] for e in absent) == sorted(names[16:]) and {e["reason"] for e in absent} == {"is not there"}
    assert prepare(tmp_path / "out", "mtat", "--protocol=full") == 3   # listed again, from nothing but the prepared folder


@needs_real
def test_mtat_splits_are_the_published_ones_cell_for_cell(tmp_path):
    def real(name):
        return lzma.open(REAL / "mtat" / name).read()
    annotations, info = real("annotations_final.csv.xz"), real("clip_info_final.csv.xz")
    classes, items, left_out = labels.mtat(annotations, info, "clean")
    published = (REAL / "mtat" / "published_clean_split" / "top50_tags.txt").read_text().split()
    assert [t.replace(" ", "").lower() for t in classes["tags"]] == [t.lower() for t in published] and len(left_out) == 6
    for split, count in zip(data.SPLITS, (15244, 1529, 4332)):
        keys = np.load(io.BytesIO(real(f"published_clean_split/{split}_keys.npy.xz")))
        cells = np.load(io.BytesIO(real(f"published_clean_split/y_{split}_pub.npy.xz")))
        mine = [i for i in items if i["split"] == split]
        ours = np.zeros((count, 50))
        for row, item in zip(ours, mine):
            row[item["tags"]] = 1
        assert [i["name"] for i in mine] == [f"{k}.mp3" for k in keys] and np.array_equal(ours, cells)
    assert len(items) == labels.MTAT_CLIPS["clean"]
    classes, items, _ = labels.mtat(annotations, info, "full")
    assert len(items) == labels.MTAT_CLIPS["full"]
    assert Counter(i["split"] for i in items) == {"train": 18706, "valid": 1825, "test": 5329}
    text = (REAL / "mtat" / "published_full_split" / "output_labels_mtt.txt").read_text()
    order = [classes["tags"].index(t) for t in json.loads(text.split("=")[1].replace("'", '"'))]
    by_name = {i["name"]: i for i in items}
    names = dict(line.split("\t") for line in real("published_full_split/index_mtt.tsv.xz").decode().splitlines())
    for split, file in (("valid", "val"), ("test", "test")):
        lines = [line.split("\t") for line in real(f"published_full_split/{file}_gt_mtt.tsv.xz").decode().splitlines()]
        assert len(lines) == sum(i["split"] == split for i in items)
        for clip, cells in lines:
            item = by_name[names[clip]]
            assert item["split"] == split and np.array_equal(np.isin(order, item["tags"]), np.array(json.loads(cells)) == 1)


@pytest.mark.parametrize("file, change, message", [
    ("annotations_final.csv", (b'"0/artist', b'"mp3/0/artist'), "must have a path like a/name.mp3"),
    ("annotations_final.csv", (b'"100"\t"', b'"100"\t"2'), "tags of 0 or 1"), ("annotations_final.csv", (b'"tag 3"\t', b""), "cells instead of 61"),
    ("annotations_final.csv", (b"-01-0-29", b"-17-0-29"), "listed twice, such as 1/artist-song-17"), ("clip_info_final.csv", (b"title", b"name"), "clip_id, title")])
def test_an_edited_csv_is_not_misread(tmp_path, file, change, message):
    magnatagatune(tmp_path / "raw", clips=32)
    raw = (tmp_path / "raw" / file).read_bytes()
    assert raw.count(change[0]) >= 1
    (tmp_path / "raw" / file).write_bytes(raw.replace(*change))
    answer = prepare(tmp_path / "out", "mtat", f"--path={tmp_path / 'raw'}", "--protocol=full")
    assert message in str(answer), answer


# -----------------------------------------------------------------------------
# FMA, GTZAN

def fma_tracks(tracks):
    """tracks.csv with its three header rows, of (id, split, subset, genre)."""
    lines = [",album,artist,set,set,track,track", ",comments,bio,split,subset,genre_top,title", "track_id,,,,,,"]
    return "\r\n".join(lines + [f'{t},0,"a, ""b""\nc",{split},{subset},{genre},x' for t, split, subset, genre in tracks]).encode()


def test_fma_from_nested_and_flat_folders_and_zips(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(labels, "FMA_TRACKS", {"medium_minus_small": 3, "medium": 5, "small": 2})
    tracks = [(2, "training", "small", "Hip-Hop"), (5, "training", "medium", "Jazz"), (10, "validation", "medium", "Rock"), (140, "test", "medium", "Rock"),
              (141, "training", "large", "Rock"), (1486, "training", "medium", "Rock"), (100200, "test", "small", "Pop"), (193, "training", "medium", "")]
    nested, flat, packed = tmp_path / "nested", tmp_path / "flat", tmp_path / "packed"
    for track, *_ in tracks:
        name = f"{track:06d}.mp3"
        sound(nested / "fma_medium" / name[:3] / name, rate=44100, seed=track)
        (flat / "x").mkdir(parents=True, exist_ok=True)
        shutil.copy(nested / "fma_medium" / name[:3] / name, flat / "x" / name)
    packed.mkdir()
    with zipfile.ZipFile(packed / "fma_medium.zip", "w") as z:
        for p in sorted(nested.rglob("*.mp3")):
            z.write(p, p.relative_to(nested))
    with zipfile.ZipFile(packed / "fma_metadata.zip", "w", zipfile.ZIP_BZIP2) as z:
        z.writestr("fma_metadata/tracks.csv", fma_tracks(tracks))
    for root in (nested, flat):
        (root / "tracks.csv").write_bytes(fma_tracks(tracks))
    audio = []
    for root in (nested, flat, packed):
        assert prepare(tmp_path / root.name / "out", "fma", f"--path={root}") == 0
        found = index_of(tmp_path / root.name / "out" / "fma")
        assert [(i["name"], i["split"], found["classes"]["genre"][i["genre"][0]]) for i in found["items"]] == [
            ("000005.mp3", "train", "Jazz"), ("000010.mp3", "valid", "Rock"), ("000140.mp3", "test", "Rock")]
        assert {e["name"]: e["expected"] for e in found["left_out"]} == {"000193.mp3": True, "001486.mp3": True}
        audio.append((tmp_path / root.name / "out" / "fma" / "audio.int16").read_bytes())
    assert audio[0] == audio[1] == audio[2]
    assert "medium without small" in capsys.readouterr().out
    for subset, names in (("medium", 5), ("small", 2)):
        assert prepare(tmp_path / "out", "fma", f"--path={nested}", f"--subset={subset}", f"--name={subset}") == 0
        assert len(index_of(tmp_path / "out" / subset)["items"]) == names
    assert "subset must be one of" in prepare(tmp_path / "out", "fma", f"--path={nested}", "--subset=large")
    (flat / "tracks.csv").write_text("track_id,genre\n1,Rock\n")
    assert "three header rows" in prepare(tmp_path / "out", "fma", f"--path={flat}", "--name=x")


@needs_real
def test_fma_has_the_published_tracks():
    raw = lzma.open(REAL / "fma" / "tracks_medium_derived.csv.xz").read()
    for subset, genres in (("small", 8), ("medium_minus_small", 16), ("medium", 16)):
        classes, items, left_out = labels.fma(raw, subset)
        import csv
        rows = list(csv.reader(io.StringIO(raw.decode(), newline="")))
        column = {head: i for i, head in enumerate(zip(*rows[:2]))}
        chosen = {f"{int(r[0]):06d}.mp3": r for r in rows[3:] if subset == "medium" or r[column["set", "subset"]] == subset.split("_")[0]}
        assert len(chosen) == len(items) + len(left_out) and len(classes["genre"]) == genres
        for item in items:
            row = chosen[item["name"]]
            assert classes["genre"][item["genre"][0]] == row[column["track", "genre_top"]]
            assert row[column["set", "split"]].startswith(item["split"])
        assert len(items) == labels.FMA_TRACKS[subset]
        if subset != "small":
            assert classes["genre"] == labels.FMA_GENRES


def test_gtzan_is_the_fault_filtered_split(tmp_path, capsys):
    classes, items, _ = labels.gtzan()
    assert Counter(i["split"] for i in items) == {"train": 443, "valid": 197, "test": 290} and len(classes["genre"]) == 10
    names = {i["name"] for i in items}
    faulty = next(n for n in (f"{genre}.{k:05d}" for genre in classes["genre"] for k in range(100)) if n not in names)
    sound(tmp_path / "songs" / "1.wav", 5)
    sound(tmp_path / "others" / "1.wav", 6)    # of no concern
    for name, extension in (("blues.00029", "wav"), ("rock.00040", "au"), ("rock.00040", "wav"), (faulty, "wav")):
        sound(tmp_path / "genres" / name.split(".")[0] / f"{name}.{extension}", rate=22050)
    assert prepare(tmp_path / "out", "gtzan", f"--path={tmp_path}") == 3
    found = index_of(tmp_path / "out" / "gtzan")
    assert {i["name"] for i in found["items"]} == {"blues.00029", "rock.00040"}
    assert "no working official address" in prepare(tmp_path / "out", "gtzan", "--name=x")


# -----------------------------------------------------------------------------
# the user's own

def test_a_folder_per_class(tmp_path, capsys):
    for genre, count in (("rock", 12), ("jazz", 6)):
        for k in range(count):
            sound(tmp_path / "in" / genre / f"album {k % 2}" / f"{k:02d}.flac", seed=k)
    (tmp_path / "in" / "rock" / "cover.jpg").write_bytes(b"x")
    (tmp_path / "in" / "jazz" / "album 0" / "broken.mp3").write_bytes(b"x" * 1000)
    assert prepare(tmp_path / "out", "folder", f"--path={tmp_path / 'in'}") == 3
    said = capsys.readouterr().out
    assert "passed over 1 files" in said and "broken.mp3: not audio" in said
    found = index_of(tmp_path / "out" / "folder")
    assert found["classes"] == {"genre": ["jazz", "rock"]} and len(found["items"]) == 18
    for genre, counts in ((1, (10, 1, 1)), (0, (5, 1, 0))):
        split = Counter(i["split"] for i in found["items"] if i["genre"] == [genre])
        assert abs(split["train"] - counts[0]) <= 1 and split["valid"] + split["test"] >= 1
    for split in ("train", "val", "test"):
        for genre in "ab":
            sound(tmp_path / "split" / split / genre / "0.wav")
    assert prepare(tmp_path / "out", "folder", f"--path={tmp_path / 'split'}", "--name=split") == 0
    found = index_of(tmp_path / "out" / "split")
    assert found["classes"] == {"genre": ["a", "b"]} and [i["split"] for i in found["items"]] == ["test"] * 2 + ["train"] * 2 + ["valid"] * 2
    assert "none of 6 files can be used, such as test/a/0.wav (is too short: 5.000 s" in prepare(
        tmp_path / "out", "folder", f"--path={tmp_path / 'split'}", "--name=long", "--min_seconds=6")
    assert not (tmp_path / "out" / "long.partial").exists()   # nothing to go on from, nothing in the way
    sound(tmp_path / "in" / "loose.wav")
    assert "loose.wav is in no class" in prepare(tmp_path / "out", "folder", f"--path={tmp_path / 'in'}", "--name=x")
    (tmp_path / "in" / "loose.wav").unlink()
    sound(tmp_path / "split" / "extra" / "a" / "0.wav")
    for genre in ("training", "sleep"):
        sound(tmp_path / "mood" / genre / "0.wav")
    assert prepare(tmp_path / "out", "folder", f"--path={tmp_path / 'mood'}", "--name=mood") == 0   # a class that is called like a split
    assert "beside extra? Splits are called" in prepare(tmp_path / "out", "folder", f"--path={tmp_path / 'split'}", "--name=x")
    (tmp_path / "up").mkdir()
    shutil.copytree(tmp_path / "in", tmp_path / "up" / "genres")
    assert "are of one class" in prepare(tmp_path / "out", "folder", f"--path={tmp_path / 'up'}", "--name=x")
    assert "give --csv=FILE" in prepare(tmp_path / "out", "folder", f"--path={tmp_path / 'in'}", "--name=x", "--group=artist")
    (tmp_path / "in" / "jazz" / "again.flac").symlink_to(tmp_path / "in" / "rock" / "album 0" / "00.flac")
    assert "are the same file" in prepare(tmp_path / "out", "folder", f"--path={tmp_path / 'in'}", "--name=x")
    (tmp_path / "in" / "jazz" / "again.flac").unlink()
    (tmp_path / "in" / "jazz" / "favourites").symlink_to(tmp_path / "in" / "rock")  # takes nothing away from rock
    (tmp_path / "elsewhere").mkdir()
    sound(tmp_path / "elsewhere" / "new.wav")
    (tmp_path / "in" / "jazz" / "linked").symlink_to(tmp_path / "elsewhere")
    assert prepare(tmp_path / "out", "folder", f"--path={tmp_path / 'in'}", "--name=links") == 3
    names = {i["name"] for i in index_of(tmp_path / "out" / "links")["items"]}
    assert names == {i["name"] for i in index_of(tmp_path / "out" / "folder")["items"]} | {"jazz/linked/new.wav"}
    assert "favourites: it leads to files that are there already" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "in")                                                   # neither the list nor another split needs the files
    assert prepare(tmp_path / "out", "folder", "--name=links") == 3
    assert prepare(tmp_path / "out", "folder", "--name=links", "--relabel=True", "--shares=0.5,0.25,0.25") == 3
    assert {i["name"] for i in index_of(tmp_path / "out" / "links")["items"]} == names
    assert prepare(tmp_path / "out", "folder", "--name=links", "--relabel=True", "--seed=7") == 3
    assert index_of(tmp_path / "out" / "links")["settings"]["shares"] == [0.5, 0.25, 0.25]
    (tmp_path / "empty").mkdir()
    assert "no audio files" in prepare(tmp_path / "out", "folder", f"--path={tmp_path / 'empty'}", "--name=x")
    assert "not a folder" in prepare(tmp_path / "out", "folder", f"--path={tmp_path / 'nowhere'}", "--name=x")


def test_a_csv_with_several_labels_groups_and_its_own_splits(tmp_path, capsys):
    for k in range(20):
        sound(tmp_path / "in" / f"{k}.wav", seed=k)
    lines = [f"{k}.wav;{'calm|warm' if k % 2 else 'loud'};artist {k // 2}" for k in range(20)]
    (tmp_path / "in" / "own.csv").write_bytes("\r\n".join(["\ufeffpath;label;artist", *lines, ""]).encode())
    assert prepare(tmp_path / "out", "folder", f"--csv={tmp_path / 'in' / 'own.csv'}", "--separator=|") == 0
    found = index_of(tmp_path / "out" / "folder")
    assert found["classes"] == {"tags": ["calm", "loud", "warm"]} and found["multilabel"] == ["tags"]
    splits = {i["name"]: i["split"] for i in found["items"]}
    assert all(splits[f"{k}.wav"] == splits[f"{k + 1}.wav"] for k in range(0, 20, 2)) and len(set(splits.values())) == 3
    assert next(i for i in found["items"] if i["name"] == "3.wav")["tags"] == [0, 2]
    data.Clips(data.Prepared(str(tmp_path / "out" / "folder"), "clips"), "train", "tags")

    lines = [f"{tmp_path}/in/{k}.wav,{'a' if k % 3 else 'b'},{('training', 'val', 'test')[k % 3]}" for k in range(20)]
    (tmp_path / "own.csv").write_text("\n".join(["path,label,split", *lines, "gone.wav,a,test"]))
    assert prepare(tmp_path / "out", "folder", f"--csv={tmp_path / 'own.csv'}", "--name=genres") == 3
    found = index_of(tmp_path / "out" / "genres")
    assert [e["name"] for e in found["left_out"]] == ["gone.wav"]
    assert all(i["split"] == data.SPLITS[int(Path(i["name"]).stem) % 3] for i in found["items"])

    for text, message in (("path,genre\na,b", "needs the columns path and label"), ("path,label\na.wav", "1 cells instead of 2"),
                          ("path,label,split\na.wav,x,devel", "split is 'devel'"), ("path,label\na.wav,x\na.wav,y", "names a.wav twice"),
                          ("path,label\na.wav,", "line 2: no label"), ("", "needs the columns"), ("sep=;\npath;label", "delete that line"), ('path,label\na.wav,"x', "line 2"),
                          ("path,label\na\0.wav,x", "zero byte"), ("path,label\n", "has no rows")):
        (tmp_path / "wrong.csv").write_text(text)
        answer = prepare(tmp_path / "out", "folder", f"--csv={tmp_path / 'wrong.csv'}", "--name=x")
        assert message in answer and "wrong.csv" in answer, answer
    for text, message in (("path,label\nin/0.wav,x\nin/0.wav,y".replace("in/0.wav,y", f"{tmp_path}/in/0.wav,y"), "are the same file"),
                          ("path,label\na.wav,x|y", "no label has the separator ';'")):
        (tmp_path / "wrong.csv").write_text(text)
        assert message in prepare(tmp_path / "out", "folder", f"--csv={tmp_path / 'wrong.csv'}", "--name=x", "--separator=;")
    lines = [f"in/{k}.wav,{'a' if k % 2 else 'b|c'},,album {k // 4},{data.SPLITS[k % 3]}" for k in range(20)]
    (tmp_path / "torn.csv").write_text("\n".join(["path,label,artist,album,split", *lines]))
    capsys.readouterr()
    assert prepare(tmp_path / "out", "folder", f"--csv={tmp_path / 'torn.csv'}", "--name=torn") == 0
    said = capsys.readouterr().out
    assert "5 groups (artists, albums) have clips in more than one split" in said and "'b|c' is taken for one class" in said
    (tmp_path / "torn.csv").write_text("\n".join(",".join(line.split(",")[:4]) for line in ["path,label,artist,album", *lines]))
    assert prepare(tmp_path / "out", "folder", "--name=torn") == 0                     # listed as it was
    assert "what the CSV says has changed" in prepare(tmp_path / "out", "folder", f"--csv={tmp_path / 'torn.csv'}", "--name=torn")
    assert prepare(tmp_path / "out", "folder", f"--csv={tmp_path / 'torn.csv'}", "--name=torn", "--relabel=True") == 0
    (tmp_path / "torn.csv").unlink()
    assert prepare(tmp_path / "out", "folder", "--name=torn") == 0
    assert prepare(tmp_path / "out", "folder", f"--csv={tmp_path / 'torn.csv'}", "--name=torn") == 0
    assert "torn.csv is not a file" in prepare(tmp_path / "out", "folder", "--name=torn", "--seed=2", "--relabel=True")
    homes = {(i["group"], i["split"]) for i in index_of(tmp_path / "out" / "torn")["items"]}
    assert len(homes) == 5 and len({split for _, split in homes}) == 3      # by album, as no artist is named
    (tmp_path / "wrong.csv").write_bytes("path,label\nä.wav,x".encode("latin-1"))
    assert "UTF-8" in prepare(tmp_path / "out", "folder", f"--csv={tmp_path / 'wrong.csv'}", "--name=x")
    assert "no column 'composer'" in prepare(tmp_path / "out", "folder", f"--csv={tmp_path / 'own.csv'}", "--group=composer", "--name=x")


def test_splits_are_even_seeded_and_keep_groups_together():
    rng = np.random.default_rng(0)
    kinds = [sorted(set(rng.integers(0, 8, rng.integers(1, 4)).tolist())) for _ in range(1000)] + [[8]] * 20
    groups = [f"artist {k}" for k in rng.integers(0, 300, 1020)]
    splits = labels.split_evenly(kinds, groups, [0.8, 0.1, 0.1], 1)
    assert len({(g, s) for g, s in zip(groups, splits)}) == len(set(groups))
    for c in range(9):
        counts = Counter(s for s, k in zip(splits, kinds) if c in k)
        for split, share in zip(data.SPLITS, (0.8, 0.1, 0.1)):
            assert abs(counts[split] / sum(counts.values()) - share) < (0.05 if c < 8 else 0.11), (c, counts)
    order = rng.permutation(1020)
    other_seed = labels.split_evenly(kinds, groups, [0.8, 0.1, 0.1], 2)
    shuffled = labels.split_evenly([kinds[i] for i in order], [groups[i] for i in order], [0.8, 0.1, 0.1], 1)
    for kinds, groups, counts in (([[c] for c in range(200) for _ in range(3)], range(600), (480, 60, 60)),    # fewer clips than splits want
                                  ([[0]] * 200, np.arange(200) // 50, (100, 50, 50)), ([[]] * 4, range(4), (2, 1, 1))):
        few = Counter(labels.split_evenly(kinds, [str(g) for g in groups], [0.8, 0.1, 0.1], 1))
        assert sum(few.values()) == len(kinds)
        assert [few[s] for s in data.SPLITS] == list(counts)
    artists = np.repeat(np.arange(90), (250 / np.arange(1, 91) ** 1.1).astype(int) + 1)  # few have much: they belong into train
    uneven = labels.split_evenly([[c] for c in rng.integers(0, 30, len(artists))], [str(a) for a in artists], [0.8, 0.1, 0.1], 1)
    assert all(abs(uneven.count(s) / len(artists) - share) < 0.04 for s, share in zip(data.SPLITS, (0.8, 0.1, 0.1)))
    assert shuffled == [splits[i] for i in order] and splits != other_seed
