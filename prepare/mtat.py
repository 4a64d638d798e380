"""
MagnaTagATune (Law et al. 2009): 25,863 clips of 29 s with the 50 most frequent tags.

    python prepare_data.py mtat
"""
import re

import numpy as np

from common import settings
from prepare.files import by_name, contents, table
from prepare.store import Listing

protocol = "clean"  # mtat: clean (at least one of the 50 tags, the paper's) or full (every clip)

BASE = "https://mirg.city.ac.uk/datasets/magnatagatune/"
TABLES = {  # SHA-256 of each file
    "annotations_final.csv": "99b94e95825d4fa576386a5367b9c96e0ec636e9f9c240aceb492f4728f68c3c",
    "clip_info_final.csv": "cb6108a10d3a91f0bfd7d2fbec2382559d15f20c8d28093f14e12162a47a3e78"}
ARCHIVES = {
    "mp3.zip.001": "f857fe185968773058cc71662c2ef5d8f2d4b7338e3c122cfd52f82dcb9760b9",
    "mp3.zip.002": "fc2e1ec441755556ed1398b1808f1b08b6034372f8bc27394510c0c58cdb52ce",
    "mp3.zip.003": "83a689824c17e82f6eb81cdbc4e4ca239a4cfc1fb41f1a5c80b861caec90450f"}

COUNTS = {"clean": 21105, "full": 25860}    # clips of the published table, by protocol
EMPTY = dict.fromkeys(("35644", "55753", "57881"), "is empty in the distribution")
UNLISTED = dict.fromkeys(("29", "11268", "11269"), "is not in the published clean split")
FOLDERS = {**dict.fromkeys("0123456789ab", "train"), "c": "valid", **dict.fromkeys("def", "test")}


def downloads():
    tables, archives = ([(BASE + name, f"sha256:{digest}") for name, digest in files.items()]
                        for files in (TABLES, ARCHIVES))
    return "mtat", tables, archives


def listing(files, protocol="clean"):
    """One of the two protocols in use; tags and clips in the order of the published clean split.

    clean (Won et al. 2020, and the paper): clips with at least one of the 50 most frequent tags:
    15,244 / 1,529 / 4,332. full (CLMR, MERT, ...): every clip: 18,706 / 1,825 / 5,329.
    """
    settings.choose("protocol", protocol, COUNTS)
    tags, items, left_out = labels(contents(files, "annotations_final.csv"),
                                   contents(files, "clip_info_final.csv", needed=False), protocol)
    sources = by_name(files, lambda file: "/".join(file.split("/")[-2:]), items)
    return Listing(f"MagnaTagATune, {protocol} protocol, 50 tags", "MagnaTagATune", "clips", items,
                   sources, left_out, {"tags": tags}, COUNTS[protocol])


def labels(annotations, clip_info, protocol):
    """(tag names, items, left_out) from the two tables; the second may be None."""
    tags, clips = read_annotations(annotations)
    titles = read_titles(clip_info) if clip_info else {}
    reasons = EMPTY | UNLISTED if protocol == "clean" else EMPTY
    items, left_out = [], []
    for clip, name, numbers in clips:
        if protocol == "clean" and not numbers:
            continue
        if clip in reasons:
            left_out.append({"name": name, "reason": reasons[clip]})
        else:
            title = {"title": titles[clip]} if clip in titles else {}
            items.append({"name": name, "split": FOLDERS[name[0]], "tags": numbers, **title})
    return tags, items, left_out


def read_annotations(raw):
    """(names of the 50 most frequent tags, [(clip, name, tag numbers)] sorted by name)."""
    rows = [row for _, row in table(raw, "\t", "annotations_final.csv: ")]
    header = rows.pop(0) if rows else []
    if not rows or header[0] != "clip_id" or header[-1] != "mp3_path" or len(header) < 52:
        raise ValueError("annotations_final.csv must have the columns clip_id, the tags, "
                         "mp3_path, separated by tabs, and at least one clip")
    for row in rows:
        path_fits = re.fullmatch(r"[0-9a-f]/[^/]+\.mp3", row[-1])
        if not path_fits or not set(row[1:-1]) <= {"0", "1"}:
            raise ValueError(f"annotations_final.csv: clip {row[0]} must have a path like "
                             "a/name.mp3 and tags of 0 or 1: is the file unedited?")
    rows.sort(key=lambda row: row[-1].removesuffix(".mp3"))
    cells = np.array([row[1:-1] for row in rows]) == "1"                # (clips, tags)
    top = np.argsort(-cells.sum(0), kind="stable")[:50]                 # ties: order of the file
    clips = [(row[0], row[-1], np.flatnonzero(present).tolist())
             for row, present in zip(rows, cells[:, top], strict=True)]
    return [header[1 + i] for i in top], clips


def read_titles(raw):
    """{clip: "artist - title"}"""
    rows = [row for _, row in table(raw, "\t", "clip_info_final.csv: ")]
    if not rows or not {"clip_id", "title", "artist"} <= set(rows[0]):
        raise ValueError("clip_info_final.csv must have the columns clip_id, title and artist, "
                         "separated by tabs")
    clip, title, artist = (rows[0].index(name) for name in ("clip_id", "title", "artist"))
    return {row[clip]: f"{row[artist]} - {row[title]}" for row in rows}
