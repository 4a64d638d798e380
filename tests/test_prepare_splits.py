"""
Stratified splits by groups.
"""
from collections import Counter

import numpy as np
import pytest

from data import SPLITS
from prepare.splits import split_evenly, split_of_folder

SHARES = [0.8, 0.1, 0.1]


@pytest.fixture(scope="module")
def thousand():
    """Labels and groups of 1,020 clips by 300 artists, with one rare class."""
    rng = np.random.default_rng(0)
    labels = [sorted(set(rng.integers(0, 8, rng.integers(1, 4)).tolist())) for _ in range(1000)]
    return labels + [[8]] * 20, [f"artist {k}" for k in rng.integers(0, 300, 1020)]


def test_groups_are_not_divided(thousand):
    labels, groups = thousand
    splits = split_evenly(labels, groups, SHARES, 1)
    assert len(set(zip(groups, splits, strict=True))) == len(set(groups))


def test_shares_of_each_class(thousand):
    labels, groups = thousand
    splits = split_evenly(labels, groups, SHARES, 1)
    for c in range(9):
        counts = Counter(split for split, has in zip(splits, labels, strict=True) if c in has)
        tolerance = 0.05 if c < 8 else 0.11
        for split, share in zip(SPLITS, SHARES, strict=True):
            assert abs(counts[split] / sum(counts.values()) - share) < tolerance


def test_split_depends_on_the_seed_and_not_on_the_order(thousand):
    labels, groups = thousand
    splits = split_evenly(labels, groups, SHARES, 1)
    order = np.random.default_rng(1).permutation(len(labels))
    shuffled = split_evenly([labels[i] for i in order], [groups[i] for i in order], SHARES, 1)
    assert shuffled == [splits[i] for i in order]
    assert split_evenly(labels, groups, SHARES, 2) != splits


@pytest.mark.parametrize("labels, groups, counts", [
    ([[c] for c in range(200) for _ in range(3)], range(600), (480, 60, 60)),
    ([[0]] * 200, np.arange(200) // 50, (100, 50, 50)), ([[]] * 4, range(4), (2, 1, 1))])
def test_every_split_of_a_few_clips_is_filled(labels, groups, counts):
    few = Counter(split_evenly(labels, [str(g) for g in groups], SHARES, 1))
    assert tuple(few[split] for split in SPLITS) == counts


def test_large_groups_keep_the_shares():
    sizes = (250 / np.arange(1, 91) ** 1.1).astype(int) + 1
    artists = np.repeat(np.arange(90), sizes)
    labels = [[c] for c in np.random.default_rng(0).integers(0, 30, len(artists)).tolist()]
    splits = split_evenly(labels, [str(a) for a in artists], SHARES, 1)
    for split, share in zip(SPLITS, SHARES, strict=True):
        assert abs(splits.count(split) / len(artists) - share) < 0.04


def test_split_from_a_folder_name():
    assert split_of_folder("musdb/Train/A - B") == "train"
    assert split_of_folder("val/x") == "valid" and split_of_folder("train") is None
