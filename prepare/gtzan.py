"""
GTZAN (Tzanetakis & Cook 2002): 930 of 1,000 clips of 30 s with one of 10 genres.

    python prepare_data.py gtzan --path=FOLDER      # there is no official download any more

The fault-filtered split of Kereliuk et al. 2015, with the lists of torchaudio.
"""
import os

from prepare.files import by_name
from prepare.store import Listing

TABLE = os.path.join(os.path.dirname(__file__), "gtzan.tsv")     # split, genre, numbers of clips


def listing(files):
    """443 / 197 / 290 clips with names like blues.00029."""
    with open(TABLE, encoding="ascii") as f:
        rows = [line.split() for line in f.readlines()[1:]]
    genres = sorted({genre for _, genre, _ in rows})
    items = [{"name": f"{genre}.{n:05d}", "split": split, "genre": [genres.index(genre)]}
             for split, genre, ranges in rows for n in expand(ranges)]
    sources = by_name(files, lambda file: os.path.splitext(file.split("/")[-1])[0], items)
    return Listing("GTZAN, fault-filtered split 443 / 197 / 290", "GTZAN", "clips", items, sources,
                   classes={"genre": genres}, count=930)


def expand(ranges):
    """ "0-2,5" -> 0, 1, 2, 5 """
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
