"""
MagnaTagATune, FMA, GTZAN and MTG-Jamendo in the layout of their authors, with synthetic files;
and the published splits, if they are available.
"""
import csv
import hashlib
import io
import json
import lzma
import shutil
import zipfile
from collections import Counter

import numpy as np
import pytest
import soundfile as sf
from conftest import REAL, index_of, needs_real, prepare, sound

from common import download
from data import SPLITS, Prepared
from prepare import files, fma, gtzan, jamendo, mtat


def classes_of(index, task):
    """{name: names of its classes}"""
    names = index["classes"][task]
    return {item["name"]: [names[c] for c in item[task]] for item in index["items"]}


# -----------------------------------------------------------------------------
# MagnaTagATune

@pytest.fixture(scope="module")
def magna(tmp_path_factory):
    """(folder, rows of its table, tags): 40 clips in the layout of MagnaTagATune."""
    root, rng = tmp_path_factory.mktemp("magna"), np.random.default_rng(0)
    tags, rows = [f"tag {k}" for k in range(60)], []
    for k in range(40):
        name = f"{'0123456789abcdef'[k % 16]}/artist-song-{k:02d}-0-29.mp3"
        cells = (rng.random(60) < np.linspace(0.5, 0.02, 60)).astype(int)
        rows.append([str(100 + k), *map(str, cells), name])
    rows[3][1:-1] = ["0"] * 60                    # no tag at all
    rows[5][1:-1] = ["0"] * 59 + ["1"]            # none of the top 50
    rows[6][0], rows[7][0] = "35644", "29"        # empty, and not in the clean split

    def write(name, table):
        lines = ["\t".join(f'"{cell}"' for cell in row) for row in table]
        (root / name).write_bytes(("\r\n".join(lines) + "\r\n").encode())
    write("annotations_final.csv", [["clip_id", *tags, "mp3_path"], *rows])
    columns = ["clip_id", "track_number", "title", "artist", "mp3_path"]
    info = [[row[0], "1", f"Title {row[0]}", "Artist", row[-1]] for row in rows]
    write("clip_info_final.csv", [columns, *info, ["9999", "1", "t", "a", ""]])
    for row in rows:
        sound(root / "mp3" / row[-1], 4, seed=int(row[0]))
    (root / "mp3" / rows[6][-1]).write_bytes(b"")
    return root, rows, tags


@pytest.fixture
def small_counts(monkeypatch):
    monkeypatch.setattr(mtat, "COUNTS", {"clean": 36, "full": 39})


@pytest.fixture
def copy(magna, tmp_path):
    """A copy of the dataset that a test may change."""
    shutil.copytree(magna[0], tmp_path / "raw")
    return tmp_path / "raw"


def prepare_mtat(out, raw, *args):
    return prepare(out, "mtat", f"--path={raw}", "--workers=1", *args)


def test_mtat_clean_protocol(magna, tmp_path, small_counts, capsys):
    root, rows, tags = magna
    assert prepare_mtat(tmp_path, root) == 0
    index = index_of(tmp_path / "mtat")
    counts = {t: sum(row[1 + k] == "1" for row in rows) for k, t in enumerate(tags)}
    top = sorted(tags, key=lambda tag: -counts[tag])[:50]  # ties stay in the file's order
    assert index["classes"] == {"tags": top} and index["multilabel"] == ["tags"]
    wanted = {}
    for row in rows:
        present = [tag for tag in top if row[1 + tags.index(tag)] == "1"]
        if present and row[0] not in ("35644", "29"):
            wanted[row[-1]] = present
    assert {n: sorted(t) for n, t in classes_of(index, "tags").items()} == {
        n: sorted(t) for n, t in wanted.items()}
    assert {e["name"] for e in index["left_out"]} == {rows[6][-1], rows[7][-1]}
    assert all(e["expected"] for e in index["left_out"])
    assert index["items"][0]["title"].startswith("Artist - Title")
    assert "clean protocol" in capsys.readouterr().out


def test_mtat_splits_by_folder(magna):
    items = mtat.listing(files.inventory(str(magna[0]))).items
    split = {**dict.fromkeys("0123456789ab", "train"), "c": "valid"}
    assert all(item["split"] == split.get(item["name"][0], "test") for item in items)


def test_mtat_audio_equals_soundfile(magna, tmp_path, small_counts):
    prepare_mtat(tmp_path, magna[0])
    data = Prepared(str(tmp_path / "mtat"), "clips")
    for item in data.items("train")[:3]:
        reference, _ = sf.read(magna[0] / "mp3" / item["name"])
        np.testing.assert_allclose(data.read(item), np.clip(reference, -1, 1), atol=2e-5)


def test_mtat_protocols_share_decoded_audio(magna, tmp_path, small_counts, capsys):
    assert prepare_mtat(tmp_path, magna[0], "--protocol=full") == 0
    full = index_of(tmp_path / "mtat")
    assert len(full["items"]) == 39 and sum(not item["tags"] for item in full["items"]) >= 2
    audio = (tmp_path / "mtat" / "audio.int16").read_bytes()
    assert prepare_mtat(tmp_path, magna[0]) == 0
    output = capsys.readouterr().out
    assert "nothing new to decode" in output and "have changed since the last run" in output
    assert len(index_of(tmp_path / "mtat")["items"]) == 36
    assert (tmp_path / "mtat" / "audio.int16").read_bytes() == audio


def pack(magna, folder):
    """The dataset as published, tables and a zip in three parts; returns {name: bytes}."""
    root, rows, _ = magna
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as z:
        for row in rows:
            z.write(root / "mp3" / row[-1], row[-1])
    raw = packed.getvalue()
    parts = {f"mp3.zip.00{k + 1}": raw[k * len(raw) // 3:(k + 1) * len(raw) // 3] for k in range(3)}
    for name in ("annotations_final.csv", "clip_info_final.csv"):
        parts[name] = (root / name).read_bytes()
    folder.mkdir(parents=True)
    for name, content in parts.items():
        (folder / name).write_bytes(content)
    return parts


def test_mtat_from_the_split_zip_is_identical(magna, tmp_path, small_counts):
    pack(magna, tmp_path / "packed")
    assert prepare_mtat(tmp_path / "a", magna[0]) == prepare_mtat(
        tmp_path / "b", tmp_path / "packed") == 0
    a, b = (tmp_path / name / "mtat" for name in "ab")
    assert (a / "audio.int16").read_bytes() == (b / "audio.int16").read_bytes()
    assert index_of(a)["items"] == index_of(b)["items"]


def test_mtat_downloads_only_missing_files(magna, tmp_path, small_counts, monkeypatch):
    packed = pack(magna, tmp_path / "served")
    fetched = []

    def fetch(wanted, folder, hint):
        names = [url.rsplit("/", 1)[1] for url, _ in wanted]
        fetched.extend(names)
        (tmp_path / "out" / "raw" / "mtat").mkdir(parents=True, exist_ok=True)
        for name in names:
            (tmp_path / "out" / "raw" / "mtat" / name).write_bytes(packed[name])

    monkeypatch.setattr(download, "fetch", fetch)
    arguments = (tmp_path / "out", "mtat", "--workers=1")
    assert prepare(*arguments) == 0 and len(fetched) == 5
    for name in packed:
        (tmp_path / "out" / "raw" / "mtat" / name).unlink()
    fetched.clear()
    assert prepare(*arguments) == 0 and len(fetched) == 2     # the tables: everything is decoded
    assert len(index_of(tmp_path / "out" / "mtat")["items"]) == 36
    fetched.clear()
    assert prepare(*arguments, "--overwrite=True") == 0 and len(fetched) == 5
    for name in packed:
        (tmp_path / "out" / "raw" / "mtat" / name).unlink()
    shutil.copytree(magna[0] / "mp3", tmp_path / "out" / "raw" / "mtat" / "mp3")
    fetched.clear()
    assert prepare(*arguments, "--overwrite=True") == 0 and len(fetched) == 2  # unpacked by hand


def test_mtat_reports_the_share_of_files_found(copy, magna, tmp_path, small_counts, capsys):
    names = [row[-1] for row in magna[1]]
    for name in names[20:]:
        (copy / "mp3" / name).unlink()
    assert prepare_mtat(tmp_path, copy, "--protocol=full") == 3
    assert "found 19 of 39 files (48.7 %)" in capsys.readouterr().out
    absent = [e for e in index_of(tmp_path / "mtat")["left_out"] if not e["expected"]]
    assert sorted(e["name"] for e in absent) == sorted(names[20:])
    assert {e["reason"] for e in absent} == {"not found"}


def test_truncated_table_is_reported_as_incomplete(magna, tmp_path, capsys):
    assert prepare_mtat(tmp_path, magna[0], "--protocol=full") == 3
    assert "39 instead of 25,860" in capsys.readouterr().out


@pytest.mark.parametrize("file, old, new, message", [
    ("annotations_final.csv", b'"0/artist', b'"mp3/0/artist', "a/name.mp3"),
    ("annotations_final.csv", b'"100"\t"', b'"100"\t"2', "tags of 0 or 1"),
    ("annotations_final.csv", b'"tag 3"\t', b"", "61"),
    ("annotations_final.csv", b"-01-0-29", b"-17-0-29", "1/artist-song-17"),
    ("clip_info_final.csv", b"title", b"name", "clip_id, title")])
def test_edited_table_is_refused(copy, tmp_path, file, old, new, message):
    raw = (copy / file).read_bytes()
    assert old in raw
    (copy / file).write_bytes(raw.replace(old, new))
    assert message in str(prepare_mtat(tmp_path, copy, "--protocol=full"))


def real(name):
    return lzma.open(REAL / "mtat" / name).read()


@needs_real
def test_mtat_clean_equals_the_published_split():
    tags, items, left_out = mtat.labels(real("annotations_final.csv.xz"),
                                        real("clip_info_final.csv.xz"), "clean")
    published = (REAL / "mtat" / "published_clean_split" / "top50_tags.txt").read_text().split()
    assert [t.replace(" ", "").lower() for t in tags] == [t.lower() for t in published]
    assert len(left_out) == 6 and len(items) == mtat.COUNTS["clean"]
    for split, count in zip(SPLITS, (15244, 1529, 4332), strict=True):
        keys = np.load(io.BytesIO(real(f"published_clean_split/{split}_keys.npy.xz")))
        cells = np.load(io.BytesIO(real(f"published_clean_split/y_{split}_pub.npy.xz")))
        chosen, targets = [i for i in items if i["split"] == split], np.zeros((count, 50))
        for row, item in zip(targets, chosen, strict=True):
            row[item["tags"]] = 1
        assert [item["name"] for item in chosen] == [f"{key}.mp3" for key in keys]
        assert np.array_equal(targets, cells)


@needs_real
def test_mtat_full_equals_the_published_split():
    tags, items, _ = mtat.labels(real("annotations_final.csv.xz"), None, "full")
    assert Counter(i["split"] for i in items) == {"train": 18706, "valid": 1825, "test": 5329}
    assert len(items) == mtat.COUNTS["full"]
    folder = REAL / "mtat" / "published_full_split"
    text = (folder / "output_labels_mtt.txt").read_text()
    order = [tags.index(t) for t in json.loads(text.split("=")[1].replace("'", '"'))]
    rows = real("published_full_split/index_mtt.tsv.xz").decode().splitlines()
    by_name, names = {i["name"]: i for i in items}, dict(row.split("\t") for row in rows)
    for split, file in (("valid", "val"), ("test", "test")):
        rows = real(f"published_full_split/{file}_gt_mtt.tsv.xz").decode().splitlines()
        assert len(rows) == sum(item["split"] == split for item in items)
        for row in rows:
            clip, cells = row.split("\t")
            item = by_name[names[clip]]
            assert item["split"] == split
            assert np.array_equal(np.isin(order, item["tags"]), np.array(json.loads(cells)) == 1)


# -----------------------------------------------------------------------------
# FMA

TRACKS = [(2, "training", "small", "Hip-Hop"), (5, "training", "medium", "Jazz"),
          (10, "validation", "medium", "Rock"), (140, "test", "medium", "Rock"),
          (141, "training", "large", "Rock"), (1486, "training", "medium", "Rock"),
          (100200, "test", "small", "Pop"), (193, "training", "medium", "")]


def tracks_csv():
    """tracks.csv with its three header rows."""
    lines = [",album,artist,set,set,track,track", ",comments,bio,split,subset,genre_top,title",
             "track_id,,,,,,"]
    for track, split, subset, genre in TRACKS:
        lines.append(f'{track},0,"a, ""b""\nc",{split},{subset},{genre},x')
    return "\r\n".join(lines).encode()


@pytest.fixture
def fma_files(tmp_path, monkeypatch):
    """FMA in its own folders, flat, and packed."""
    monkeypatch.setattr(fma, "SUBSETS", {
        name: (*subset[:2], count)
        for (name, subset), count in zip(fma.SUBSETS.items(), (3, 5, 2), strict=True)})
    for track, *_ in TRACKS:
        name = f"{track:06d}.mp3"
        sound(tmp_path / "nested" / "fma_medium" / name[:3] / name, 4, seed=track)
        (tmp_path / "flat" / "x").mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "nested" / "fma_medium" / name[:3] / name, tmp_path / "flat" / "x")
    (tmp_path / "packed").mkdir()
    with zipfile.ZipFile(tmp_path / "packed" / "fma_medium.zip", "w") as z:
        for p in sorted((tmp_path / "nested").rglob("*.mp3")):
            z.write(p, p.relative_to(tmp_path / "nested"))
    with zipfile.ZipFile(tmp_path / "packed" / "fma_metadata.zip", "w", zipfile.ZIP_BZIP2) as z:
        z.writestr("fma_metadata/tracks.csv", tracks_csv())
    for name in ("nested", "flat"):
        (tmp_path / name / "tracks.csv").write_bytes(tracks_csv())
    return tmp_path


@pytest.mark.parametrize("how", ["nested", "flat", "packed"])
def test_fma_medium_minus_small(fma_files, how, capsys):
    assert prepare(fma_files / "out", "fma", f"--path={fma_files / how}", "--workers=1") == 0
    index = index_of(fma_files / "out" / "fma")
    assert classes_of(index, "genre") == {
        "000005.mp3": ["Jazz"], "000010.mp3": ["Rock"], "000140.mp3": ["Rock"]}
    assert [item["split"] for item in index["items"]] == ["train", "valid", "test"]
    assert {e["name"]: e["expected"] for e in index["left_out"]} == {
        "000193.mp3": True, "001486.mp3": True}
    assert "medium without small" in capsys.readouterr().out


def test_fma_subsets_share_decoded_audio(fma_files, capsys):
    path = f"--path={fma_files / 'nested'}"
    for subset, count in (("medium", 5), ("small", 2), ("medium_minus_small", 3)):
        assert prepare(fma_files, "fma", path, "--workers=1", f"--subset={subset}") == 0
        assert len(index_of(fma_files / "fma")["items"]) == count
    assert capsys.readouterr().out.count("nothing new to decode") == 2


def test_fma_refuses_another_table_or_subset(fma_files):
    (fma_files / "flat" / "tracks.csv").write_text("track_id,genre\n1,Rock\n")
    assert "header rows" in prepare(fma_files, "fma", f"--path={fma_files / 'flat'}")
    answer = prepare(fma_files, "fma", f"--path={fma_files / 'nested'}", "--subset=large")
    assert "subset must be one of" in answer


@needs_real
@pytest.mark.parametrize("subset, genres", [
    ("small", 8), ("medium_minus_small", 16), ("medium", 16)])
def test_fma_equals_the_published_tracks(subset, genres):
    raw = lzma.open(REAL / "fma" / "tracks_medium_derived.csv.xz").read()
    names, items, left_out = fma.labels(raw, subset)
    rows = list(csv.reader(io.StringIO(raw.decode(), newline="")))
    column = {head: i for i, head in enumerate(zip(*rows[:2], strict=True))}
    wanted = ("small", "medium") if subset == "medium" else (subset.split("_")[0],)
    chosen = {f"{int(row[0]):06d}.mp3": row for row in rows[3:]
              if row[column["set", "subset"]] in wanted}
    assert len(chosen) == len(items) + len(left_out) and len(names) == genres
    assert len(items) == fma.SUBSETS[subset][2]
    for item in items:
        row = chosen[item["name"]]
        assert names[item["genre"][0]] == row[column["track", "genre_top"]]
        assert row[column["set", "split"]].startswith(item["split"])


# -----------------------------------------------------------------------------
# GTZAN

def test_gtzan_has_the_fault_filtered_split_of_torchaudio():
    listed = gtzan.listing({})
    counts = Counter(item["split"] for item in listed.items)
    assert counts == {"train": 443, "valid": 197, "test": 290}
    lists = pytest.importorskip("torchaudio.datasets.gtzan")
    assert listed.classes == {"genre": lists.gtzan_genres}
    published = lists.filtered_train, lists.filtered_valid, lists.filtered_test
    wanted = [(name, split, name.split(".")[0])
              for split, names in zip(SPLITS, published, strict=True) for name in sorted(names)]
    assert [(item["name"], item["split"], lists.gtzan_genres[item["genre"][0]])
            for item in listed.items] == wanted


def test_gtzan_reads_wav_and_au_and_skips_faulty_clips(tmp_path):
    names = {item["name"] for item in gtzan.listing({}).items}
    faulty = next(n for n in (f"jazz.{k:05d}" for k in range(100)) if n not in names)
    for name in ("blues.00029.wav", "rock.00040.au", "rock.00040.wav", f"{faulty}.wav"):
        sound(tmp_path / "genres" / name.split(".")[0] / name)
    assert prepare(tmp_path / "out", "gtzan", f"--path={tmp_path / 'genres'}", "--workers=1") == 3
    index = index_of(tmp_path / "out" / "gtzan")
    assert {item["name"] for item in index["items"]} == {"blues.00029", "rock.00040"}


def test_gtzan_needs_a_path(tmp_path):
    assert "no --path=FOLDER (GTZAN" in prepare(tmp_path, "gtzan")


# -----------------------------------------------------------------------------
# MTG-Jamendo

@pytest.fixture
def jam(tmp_path):
    """Tables and audio in the layout of MTG-Jamendo; one track in low quality only."""
    head = "TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS"
    rows = {
        "train": ["track_0000214\tartist_000014\talbum_000031\t14/214.mp3\t5.0\tgenre---rock",
                  "track_0000215\tartist_000014\talbum_000031\t15/215.mp3\t5.0\tgenre---rock"
                  "\tinstrument---guitar\tmood/theme---happy"],
        "validation": ["track_1000216\tartist_000015\talbum_000032\t16/1000216.mp3\t5.0"
                       "\tgenre---jazz"],
        "test": ["track_0000300\tartist_000016\talbum_000033\t00/300.mp3\t5.0\tgenre---jazz"
                 "\tinstrument---guitar"]}
    for split, lines in rows.items():
        for table in ("autotagging_top50tags", "autotagging"):
            path = tmp_path / "in" / "split-0" / f"{table}-{split}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join([head, *lines]) + "\n")
        genre = ["\t".join(cell for cell in line.split("\t") if cell.count("---") == 0
                           or cell.startswith("genre")) for line in lines]
        (tmp_path / "in" / "split-0" / f"autotagging_genre-{split}.tsv").write_text(
            "\n".join([head, *genre]) + "\n")
    for name in ("14/214.mp3", "15/215.low.mp3", "16/1000216.mp3", "00/300.mp3"):
        sound(tmp_path / "in" / "audio" / name)
    return tmp_path


def test_jamendo_splits_tags_and_artists(jam):
    assert prepare(jam, "jamendo", f"--path={jam / 'in'}", "--workers=1") == 0
    index = index_of(jam / "jamendo")
    assert index["classes"]["tags"] == [
        "genre---jazz", "genre---rock", "instrument---guitar", "mood/theme---happy"]
    assert classes_of(index, "tags")["15/215.mp3"] == [
        "genre---rock", "instrument---guitar", "mood/theme---happy"]
    assert {i["name"]: (i["split"], i["group"]) for i in index["items"]} == {
        "14/214.mp3": ("train", "artist_000014"), "15/215.mp3": ("train", "artist_000014"),
        "16/1000216.mp3": ("valid", "artist_000015"), "00/300.mp3": ("test", "artist_000016")}


def test_jamendo_subsets_share_decoded_audio(jam, capsys):
    for subset, count in (("all", 4), ("genre", 2)):
        assert prepare(jam, "jamendo", f"--path={jam / 'in'}", f"--subset={subset}") == 0
        assert len(index_of(jam / "jamendo")["classes"]["tags"]) == count
    assert "nothing new to decode" in capsys.readouterr().out


def test_jamendo_refuses_an_edited_table(jam):
    path = jam / "in" / "split-0" / "autotagging_genre-test.tsv"
    path.write_text(path.read_text().replace("00/300.mp3", "300.mp3"))
    with pytest.raises(ValueError, match="autotagging_genre-test.tsv: track track_0000300"):
        jamendo.listing(files.inventory(str(jam / "in")), "genre")
    path.write_text("TRACK_ID\tPATH\n")
    with pytest.raises(ValueError, match="columns TRACK_ID"):
        jamendo.listing(files.inventory(str(jam / "in")), "genre")


def test_urls_have_valid_checksums():
    tables = [*mtat.downloads()[1:], fma.TABLES, fma.SMALL, fma.MEDIUM]
    for url, checksum in sum(tables, []):
        algorithm, _, digest = checksum.partition(":")
        assert url.startswith("https://")
        assert len(digest) == 2 * hashlib.new(algorithm, usedforsecurity=False).digest_size
