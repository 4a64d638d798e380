"""
FMA (Defferrard et al. 2017): tracks of 30 s with one of 16 genres.

    python prepare_data.py fma --subset=medium
"""
from common import settings
from prepare.files import by_name, contents, table
from prepare.splits import SPLIT_NAMES
from prepare.store import Listing
from weights.released import GENRES

subset = "medium_minus_small"   # fma: medium_minus_small (the paper's "medium"), medium or small

BASE = "https://os.unil.cloud.switch.ch/fma/"
TABLES = [(BASE + "fma_metadata.zip", "sha1:f0df49ffe5f2a6008d7dc83c6915b31835dfe733")]
SMALL = [(BASE + "fma_small.zip", "sha1:ade154f733639d52e35e32f5593efe5be76c6d70")]
MEDIUM = [(BASE + "fma_medium.zip", "sha1:c67b69ea232021025fca9231fc1c7c1a063ab50b")]

# name -> (description, values of "subset" in tracks.csv, number of usable tracks)
SUBSETS = {
    "medium_minus_small": ("medium without small (17,000 tracks; \"medium\" in the first version "
                           "of the paper)", {"medium"}, 16985),
    "medium": ("medium (25,000 tracks, including small)", {"small", "medium"}, 24979),
    "small": ("small (8,000 tracks)", {"small"}, 7994)}
UNUSABLE = set(
    "001486 005574 065753 080391 098558 098559 098560 098565 098566 098567 098568 098569 098571 "
    "099134 105247 108924 108925 126981 127336 133297 143992".split())


def downloads(subset="medium_minus_small"):
    return "fma", TABLES, SMALL if subset == "small" else MEDIUM


def listing(files, subset="medium_minus_small"):
    """Genres are in the order of the authors' models, without those that the subset lacks.

    Audio files may be in FMA's folders (fma_medium/000/000002.mp3) or in one folder.
    """
    settings.choose("subset", subset, SUBSETS)
    genres, items, left_out = labels(contents(files, "tracks.csv"), subset)
    sources = by_name(files, lambda file: file.split("/")[-1], items)
    title, _, count = SUBSETS[subset]
    return Listing(f"FMA, {title}", "FMA", "clips", items, sources, left_out, {"genre": genres},
                   count)


def labels(tracks, subset):
    """(genres, items, left_out) of a subset, from tracks.csv as bytes."""
    rows = [row for _, row in table(tracks, ",", "tracks.csv: ")]
    column = {head[:2]: i for i, head in enumerate(zip(*rows[:3], strict=True))}
    needed = (("set", "split"), ("set", "subset"), ("track", "genre_top"))
    missing = [f"({a}, {b})" for a, b in needed if (a, b) not in column]
    if missing:
        raise ValueError(f"tracks.csv has no {' and no '.join(missing)} in its three header rows: "
                         "is it FMA's, and unedited?")
    split, part, genre = (column[name] for name in needed)
    chosen = []
    for row in rows[3:]:
        wanted = row[part] in SUBSETS[subset][1]
        if not row[0].isdecimal() or wanted and row[split] not in SPLIT_NAMES:
            raise ValueError(f"tracks.csv: track {row[0]!r} has the split {row[split]!r}: is the "
                             "file unedited?")
        if wanted:
            chosen.append((f"{int(row[0]):06d}", row))
    genres = [name for name in GENRES if any(row[genre] == name for _, row in chosen)]
    items, left_out = [], []
    for number, row in sorted(chosen):
        name = f"{number}.mp3"
        if number in UNUSABLE:
            left_out.append({"name": name, "reason": "is known to be unusable"})
        elif row[genre] not in genres:
            left_out.append({"name": name, "reason": f"has no top genre, but {row[genre]!r}"})
        else:
            items.append({"name": name, "split": SPLIT_NAMES[row[split]],
                          "genre": [genres.index(row[genre])]})
    return genres, items, left_out
