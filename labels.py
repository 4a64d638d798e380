"""
Who is in which split and with which labels, from the datasets' own files. Nothing here decodes audio.

Each function returns (classes {task: [names]}, items [{"name", "split", task: [class numbers]}], left_out [{"name", "reason"}]), where left_out
are the files that the protocol itself leaves out. A split of None is decided by `divide` once it is known which files can be used.
"""
import csv
import io
import posixpath
import re
from collections import Counter

import numpy as np

from data import SPLITS, TRACKS

SPLIT_NAMES = {"train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test", "testing": "test"}

AUDIO = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64", ".m4a",
         ".mp4", ".aac", ".wma", ".webm", ".mka", ".wv", ".ape"}    # those libsndfile cannot read are reported, not passed over

MTAT_EMPTY = {"35644", "55753", "57881"}    # distributed as files of 0 bytes
MTAT_UNLISTED = {"29", "11268", "11269"}    # have top-50 tags, but are not in the published clean split
MTAT_FOLDERS = {**dict.fromkeys("0123456789ab", "train"), "c": "valid", **dict.fromkeys("def", "test")}

MTAT_CLIPS = {"clean": 21105, "full": 25860}  # that the published table lists, without those left out
FMA_TRACKS = {"small": 7994, "medium_minus_small": 16985, "medium": 24979}
FMA_GENRES = ["Electronic", "Instrumental", "Hip-Hop", "Country", "Spoken", "Old-Time / Historic", "Classical", "Blues", "International",
              "Pop", "Folk", "Jazz", "Experimental", "Easy Listening", "Rock", "Soul-RnB"]          # the order of the authors' models
FMA_SUBSETS = {"small": {"small"}, "medium_minus_small": {"medium"}, "medium": {"small", "medium"}}
FMA_UNUSABLE = set("001486 005574 065753 080391 098558 098559 098560 098565 098566 098567 098568 098569 098571 099134 105247 108924 108925 "
                   "126981 127336 133297 143992".split())


def table(raw, delimiter=",", name=""):
    """(line number, cells) of the rows of a CSV file given as bytes, without blank ones. ValueError if it is not UTF-8 text, or if a row
    has another number of cells than the first; it begins with `name`."""
    csv.field_size_limit(1 << 24)  # FMA's biographies are long
    try:
        rows, width = csv.reader(io.StringIO(raw.decode("utf-8-sig"), newline=""), delimiter=delimiter, strict=True), None
        for row in rows:
            if any(cell.strip() for cell in row):
                width = width or len(row)
                if len(row) != width:
                    raise ValueError(f"{name}line {rows.line_num} has {len(row)} cells instead of {width}: is the file complete?")
                yield rows.line_num, row
    except UnicodeDecodeError as e:
        raise ValueError(f"{name}not UTF-8 text ({e}): save it as UTF-8") from e
    except csv.Error as e:
        raise ValueError(f"{name}line {rows.line_num}: {e}: is the file complete?") from e


# -----------------------------------------------------------------------------
# MagnaTagATune

def mtat(annotations, clip_info, protocol):
    """annotations_final.csv and clip_info_final.csv (bytes, the second may be None) by one of the two protocols in use.

    "clean" (Won et al. 2020 and the paper): clips with at least one of the 50 most frequent tags: 15,244 / 1,529 / 4,332.
    "full" (CLMR, MERT, ...): every clip, untagged ones with no tag at all: 18,706 / 1,825 / 5,329. Tags and clips are in the published
    clean split's order: tags by count, ties as in the file; clips by name."""
    rows = [row for _, row in table(annotations, "\t", "annotations_final.csv: ")]
    header = rows.pop(0) if rows else []
    if header[:1] != ["clip_id"] or header[-1:] != ["mp3_path"] or len(header) < 52 or not rows:
        raise ValueError("annotations_final.csv must have clips, and the columns clip_id, the tags, mp3_path, separated by tabs")
    odd = next((row for row in rows if not re.fullmatch(r"[0-9a-f]/[^/]+\.mp3", row[-1]) or not set(row[1:-1]) <= {"0", "1"}), None)
    if odd:
        raise ValueError(f"annotations_final.csv: clip {odd[0]} must have a path like a/name.mp3 and tags of 0 or 1: is the file unedited?")
    cells = np.array([row[1:-1] for row in rows]) == "1"                                 # (clips, tags)
    top = np.argsort(-cells.sum(0), kind="stable")[:50]
    cells = cells[:, top]                                                                # (clips, 50)
    titles = {}
    if clip_info:
        info = [row for _, row in table(clip_info, "\t", "clip_info_final.csv: ")]
        if not info or not {"clip_id", "title", "artist"} <= set(info[0]):
            raise ValueError("clip_info_final.csv must have the columns clip_id, title and artist, separated by tabs")
        clip_id, title, artist = (info[0].index(column) for column in ("clip_id", "title", "artist"))
        titles = {row[clip_id]: f"{row[artist]} - {row[title]}" for row in info}
    items, left_out = [], []
    for row, tags in sorted(zip(rows, cells), key=lambda both: both[0][-1].removesuffix(".mp3")):
        clip, name = row[0], row[-1]
        if protocol == "clean" and not tags.any():
            continue
        if clip in MTAT_EMPTY:
            left_out.append({"name": name, "reason": "is empty in the distribution"})
        elif protocol == "clean" and clip in MTAT_UNLISTED:
            left_out.append({"name": name, "reason": "is not in the published clean split"})
        else:
            items.append({"name": name, "split": MTAT_FOLDERS[name[0]], "tags": np.flatnonzero(tags).tolist(),
                          **({"title": titles[clip]} if clip in titles else {})})
    return {"tags": [header[1 + i] for i in top]}, items, left_out


# -----------------------------------------------------------------------------
# FMA

def fma(tracks, subset):
    """tracks.csv (bytes) of fma_metadata: "medium_minus_small" is what the paper's first version reports as medium, 17,000 tracks;
    "medium" all 25,000; "small" 8,000 of them. Genres are in the order of the authors' models, without those that the subset lacks."""
    rows = [row for _, row in table(tracks, ",", "tracks.csv: ")]
    heads = list(zip(*rows[:3]))
    columns = {head[:2]: i for i, head in enumerate(heads)}
    missing = [f"({a}, {b})" for a, b in (("set", "split"), ("set", "subset"), ("track", "genre_top")) if (a, b) not in columns]
    if missing:
        raise ValueError(f"tracks.csv has no {' and no '.join(missing)} in its three header rows: is it FMA's, and unedited?")
    split, its_subset, genre = columns["set", "split"], columns["set", "subset"], columns["track", "genre_top"]
    odd = next((row for row in rows[3:] if not row[0].isdecimal() or row[its_subset] in FMA_SUBSETS[subset] and row[split] not in SPLIT_NAMES), None)
    if odd:
        raise ValueError(f"tracks.csv: track {odd[0]!r} has the split {odd[split]!r}: is the file unedited?")
    chosen = sorted((f"{int(row[0]):06d}", row) for row in rows[3:] if row[its_subset] in FMA_SUBSETS[subset])
    genres = [g for g in FMA_GENRES if any(row[genre] == g for _, row in chosen)]
    items, left_out = [], []
    for name, row in chosen:
        if name in FMA_UNUSABLE:
            left_out.append({"name": f"{name}.mp3", "reason": "is known to be unusable"})
        elif row[genre] not in genres:
            left_out.append({"name": f"{name}.mp3", "reason": f"has no top genre, but {row[genre]!r}"})
        else:
            items.append({"name": f"{name}.mp3", "split": SPLIT_NAMES[row[split]], "genre": [genres.index(row[genre])]})
    return {"genre": genres}, items, left_out


# -----------------------------------------------------------------------------
# GTZAN

def gtzan():
    """The fault-filtered split (Kereliuk et al. 2015), 443 / 197 / 290, from the lists in torchaudio; names as in "blues.00029"."""
    from torchaudio.datasets import gtzan as lists
    items = [{"name": name, "split": split, "genre": [lists.gtzan_genres.index(name.split(".")[0])]}
             for split, names in zip(SPLITS, (lists.filtered_train, lists.filtered_valid, lists.filtered_test)) for name in sorted(names)]
    return {"genre": list(lists.gtzan_genres)}, items, []


# -----------------------------------------------------------------------------
# the user's own

def folder(names):
    """One folder per class: the first part of each name is its class, or the second if all lie in train/, valid/ and test/."""
    tops = {n.split("/")[0] for n in names}
    strange = sorted(top for top in tops if top.lower() not in SPLIT_NAMES)
    split, named = not strange, sorted(tops - set(strange))
    if strange and (len(named) > 1 or named and all(n.count("/") > 1 for n in names)):  # a single one may be a class, as in training/ beside sleep/
        raise ValueError(f"is {', '.join(named)} a split, beside {strange[0]}? Splits are called train, valid and test, and hold all classes; a class of "
                         "such a name needs another one, or --csv=FILE")
    flat = [n for n in names if n.count("/") < 1 + split]
    if flat:
        raise ValueError(f"{flat[0]} is in no class: --path must hold one folder per class, or give the labels with --csv=FILE")
    classes = sorted({n.split("/")[split] for n in names})
    return {"genre": classes}, [{"name": n, "split": SPLIT_NAMES[n.split("/")[0].lower()] if split else None,
                                 "genre": [classes.index(n.split("/")[split])]} for n in names], []


def from_csv(raw, separator, group):
    """A CSV file with the columns path and label, and optionally split, and group (or artist, or album): what must not be split up.

    With a separator, such as ;, a label is any number of tags, else one genre."""
    first = raw.partition(b"\n")[0].decode("utf-8-sig", "replace")
    if first.startswith("sep="):  # Excel's way to name it
        raise ValueError("begins with sep=: delete that line")
    rows = table(raw, max(",;\t", key=first.count))
    header = [h.strip().lower() for h in next(rows, (0, []))[1]]
    named = [h for h in header if h]
    if not {"path", "label"} <= set(named) or len(set(named)) < len(named):
        raise ValueError(f"needs the columns path and label, has {', '.join(header) or 'none'}")
    if group and group.lower() not in header:
        raise ValueError(f"has no column {group!r} to group by, only {', '.join(header)}")
    rows = [(line, dict(zip(header, (cell.strip() for cell in row)))) for line, row in rows]
    group = group.lower() or next((g for g in ("group", "artist", "album") if g in header and any(row[g] for _, row in rows)), "path")
    items, task = [], "tags" if separator else "genre"
    for line, row in rows:
        labels = sorted({l.strip() for l in row["label"].split(separator)} - {""}) if separator else [row["label"]]
        if "\0" in row["path"]:
            raise ValueError(f"line {line}: the path has a zero byte in it: save the table as text")
        if not row["path"] or labels == [""]:
            raise ValueError(f"line {line}: no {'label (only with --separator may there be none)' if row['path'] else 'path'}")
        if "split" in row and row["split"].lower() not in SPLIT_NAMES:
            raise ValueError(f"line {line}: split is {row['split']!r} instead of train, valid or test")
        row["path"] = posixpath.normpath(row["path"])
        items.append({"name": row["path"], "split": SPLIT_NAMES.get(row.get("split", "").lower()), task: labels, "group": row[group] or row["path"]})
    twice = [name for name, count in Counter(i["name"] for i in items).items() if count > 1]
    if twice or not items:
        raise ValueError(f"names {twice[0]} twice" if twice else "has no rows")
    other = next((row["label"] for _, row in rows if set("|;") & set(row["label"])), "")
    if separator and other and not any(separator in row["label"] for _, row in rows):
        raise ValueError(f"no label has the separator {separator!r} in it, but there is {other!r}")
    if other and not separator:
        print(f"note: {other!r} is taken for one class; if it is several, name what is between them with --separator")
    classes = sorted({label for item in items for label in item[task]})
    for item in items:
        item[task] = [classes.index(label) for label in item[task]]
    return {task: classes}, sorted(items, key=lambda i: i["name"]), []


def divide(items, task, shares, seed):
    """Gives the items without a split one: stratified by the classes of the task (None: songs), and without splitting up a group."""
    free = [i for i in items if not i["split"]]
    for item, split in zip(free, split_evenly([i.get(task, []) for i in free], [i.get("group", i["name"]) for i in free], shares, seed)):
        item["split"] = split


def split_evenly(labels, groups, shares, seed):
    """A split for each item such that every class is spread over train, valid and test in these shares, and no group is split up.

    Iterative stratification (Sechidis et al. 2011), whole groups at a time: the rarest class that is left first, its groups one by one to
    the split that lacks most of it; of those that lack about as much, to the one with room that lacks most of its clips. No split with a share is left
    empty if there are as many groups. The same for the same items and seed, whatever their order."""
    members = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    names = sorted(members)
    names = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    counts = np.zeros((len(names), 1 + max((c for l in labels for c in l), default=-1)), int)   # (groups, classes)
    for row, name in zip(counts, names):
        for number in members[name]:
            row[labels[number]] += 1
    sizes = np.array([len(members[name]) for name in names])
    shares = np.array(shares) / sum(shares)
    wanted, room = shares[:, None] * counts.sum(0), shares * sizes.sum()                 # (splits, classes), (splits,)
    left, chosen, totals, asked = np.ones(len(names), bool), np.zeros(len(names), int), counts.sum(0), np.flatnonzero(shares)
    while left.any():
        rarest = int(np.argmin(np.where(totals > 0, totals, np.iinfo(int).max))) if totals.any() else None
        these = np.flatnonzero(left & (counts[:, rarest] > 0)) if rarest is not None else np.flatnonzero(left)
        for i in sorted(these, key=lambda i: -sizes[i]):                                 # large groups while there is room
            lack = wanted[:, rarest] if rarest is not None else room
            most = max(lack[asked]) - (counts[i, rarest] if rarest is not None else sizes[i]) / 2
            chosen[i] = split = max((s for s in asked if lack[s] >= most), key=lambda s: (room[s] >= sizes[i], round(room[s] / shares[s], 9), shares[s]))
            wanted[split] -= counts[i]
            room[split] -= sizes[i]
            totals -= counts[i]
            left[i] = False
    for split in asked:
        largest = np.bincount(chosen).argmax()                                           # the split with the most groups gives its smallest
        if not (chosen == split).any() and (chosen == largest).sum() > 1:
            chosen[min(np.flatnonzero(chosen == largest), key=lambda i: sizes[i])] = split
    return [SPLITS[chosen[row]] for row in map({name: i for i, name in enumerate(names)}.get, groups)]


# -----------------------------------------------------------------------------
# songs with stems

def songs_of(files):
    """{song: {track: [files]}} of folders, by the names of the files in them: mixture, drums, bass, other, vocals, or whatever they are."""
    songs = {}
    for name in files:
        song, _, file = name.rpartition("/")
        if song:
            songs.setdefault(song, {}).setdefault(file.rpartition(".")[0].lower(), []).append(name)
    return songs


def song_sources(files, whole):
    """{song: [source of each of TRACKS]} of song folders, and left_out for folders of audio that are none. If they need not be `whole`, a stem
    that is not there is silence, unless another file may be it; a mixture that is not there is the stems' sum."""
    found, left_out = {}, []
    for song, tracks in sorted(songs_of(n for n in files if posixpath.splitext(n)[1].lower() in AUDIO).items()):
        known = [t for t in TRACKS if t in tracks]
        double = [t for t in known if len(tracks[t]) > 1]
        lacking = [t for t in TRACKS if t not in tracks and (whole or t != "mixture")]
        other = sorted(file.split("/")[-1] for track in tracks.keys() - set(TRACKS) for file in tracks[track])
        if double or lacking and (whole or other or known == ["mixture"]):
            left_out.append({"name": song, "expected": False, "reason": f"has two files for {double[0]}" if double else
                             "has a mixture, but no stems" if known == ["mixture"] and not other else f"has no {', '.join(lacking)}"
                             + (f", but {other[0]}: give it its name, or move it away" if other else "")})
        else:
            found[song] = [files[tracks[t][0]] if t in tracks else "sum" if t == "mixture" else None for t in TRACKS]
    return found, left_out


def split_of_folder(song):
    """The split that a song's folder names, as in "train/Artist - Title", or None."""
    return next((SPLIT_NAMES[part.lower()] for part in song.split("/")[:-1] if part.lower() in SPLIT_NAMES), None)


def stems(songs):
    """Any songs: the split of their folder (train/, valid/, test/) if all of them lie in one, else None."""
    splits = [split_of_folder(song) for song in songs]
    if None in splits and any(splits):
        raise ValueError(f"some songs lie in train/, valid/ or test/, but {songs[splits.index(None)]} does not")
    return [{"name": song, "split": split} for song, split in zip(songs, splits)]


def musdb(songs, validation):
    """MUSDB18: train/ without the package's 14 validation songs, those, and test/: 86 / 14 / 50."""
    items = []
    for song in songs:
        split = split_of_folder(song)
        title = song.split("/")[-1]
        items.append({"name": title, "split": "valid" if split == "train" and title in validation else split})
    return items
