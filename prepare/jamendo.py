"""
MTG-Jamendo: 55,000 whole tracks under free licences, with tags (Bogdanov et al. 2019).

    python prepare_data.py jamendo --path=FOLDER --subset=genre

FOLDER must contain the tables of a published split, such as split-0/autotagging_genre-train.tsv,
and the audio, such as 14/214.mp3 or 14/214.low.mp3. The dataset's own script downloads both.
"""
import re

from common import settings
from data import SPLITS
from prepare.files import by_name, contents
from prepare.store import Listing

subset = "top50tags"    # jamendo: top50tags, genre, instrument, moodtheme or all

TABLES = {"top50tags": "autotagging_top50tags", "genre": "autotagging_genre", "all": "autotagging",
          "instrument": "autotagging_instrument", "moodtheme": "autotagging_moodtheme"}
COLUMNS = ["TRACK_ID", "ARTIST_ID", "ALBUM_ID", "PATH", "DURATION", "TAGS"]


def listing(files, subset="top50tags"):
    """The published split-0, in which artists do not cross splits. Tags are sorted."""
    settings.choose("subset", subset, TABLES)
    rows = []
    for split, name in zip(SPLITS, ("train", "validation", "test"), strict=True):
        table = f"{TABLES[subset]}-{name}.tsv"
        rows += [(split, row) for row in read_table(contents(files, table), table)]
    tags = sorted({tag for _, row in rows for tag in row[5:]})
    number = {tag: i for i, tag in enumerate(tags)}
    items = [{"name": row[3], "split": split, "group": row[1],
              "tags": sorted(number[tag] for tag in row[5:])} for split, row in rows]
    sources = by_name(files, track_of, items)
    return Listing(f"MTG-Jamendo, split-0, {subset}, {len(tags)} tags", "MTG-Jamendo", "clips",
                   items, sources, classes={"tags": tags})


def track_of(file):
    """"audio/14/214.low.mp3" -> "14/214.mp3", as in the tables."""
    return "/".join(file.split("/")[-2:]).replace(".low.mp3", ".mp3")


def read_table(raw, name):
    """The rows of a table: five cells, then one cell per tag."""
    lines = raw.decode("utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    if not rows or rows[0] != COLUMNS:
        raise ValueError(f"{name} must start with the columns {', '.join(COLUMNS)}, separated by "
                         "tabs: is the file unedited?")
    for row in rows[1:]:
        if len(row) < 6 or not re.fullmatch(r"\d\d/\d+\.mp3", row[3]):
            raise ValueError(f"{name}: track {row[0]} must have a path like 14/214.mp3 and tags: "
                             "is the file complete?")
    return rows[1:]
