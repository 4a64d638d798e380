"""
GTZAN: 10 genres, 930 of 1,000 clips of 30 s, the fault-filtered split of Kereliuk et al. 2015.

    python prepare_data.py gtzan --path=FOLDER      # it has no working official address any more
"""
import os

from data import SPLITS
from prepare.files import by_name
from prepare.store import Listing


def listing(files):
    """443 / 197 / 290 clips, from the lists in torchaudio; names are like blues.00029."""
    from torchaudio.datasets import gtzan as lists
    genres, items = list(lists.gtzan_genres), []
    filtered = lists.filtered_train, lists.filtered_valid, lists.filtered_test
    for split, names in zip(SPLITS, filtered, strict=True):
        for name in sorted(names):
            genre = genres.index(name.split(".")[0])
            items.append({"name": name, "split": split, "genre": [genre]})
    names = {item["name"] for item in items}
    sources = by_name(files, lambda file: os.path.splitext(file.split("/")[-1])[0], names)
    return Listing("GTZAN, fault-filtered split 443 / 197 / 290", "GTZAN", "clips", items, sources,
                   classes={"genre": genres}, count=930)
