"""
Train, valid and test for data that has no split of its own.
"""
import numpy as np

from data import SPLITS

SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test",
               "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid"}


def split_of_folder(path):
    """The split that a folder on the way names, as in "train/Artist - Title", or None."""
    for part in path.split("/")[:-1]:
        if part.lower() in SPLIT_NAMES:
            return SPLIT_NAMES[part.lower()]
    return None


def divide(items, task, shares, seed):
    """Gives the items without a split one: stratified by the classes of `task`, if there is one.

    Items of one group stay together.
    """
    free = [item for item in items if not item["split"]]
    labels = [item.get(task, []) for item in free]
    groups = [item.get("group", item["name"]) for item in free]
    for item, split in zip(free, split_evenly(labels, groups, shares, seed), strict=True):
        item["split"] = split


def split_evenly(labels, groups, shares, seed):
    """A split for each item, from its class numbers and its group.

    Every class is spread over train, valid and test in these shares, and no group is split up.
    No split with a share is left empty if there are as many groups as splits. The answer is the
    same for the same items and seed, in whatever order they come.

    Iterative stratification (Sechidis et al. 2011), whole groups at a time. The rarest class that
    is left comes first. Its groups go one by one to the split that lacks most of the class. Of
    splits that lack about as much, one with room is taken, and of these the emptiest.
    """
    names, counts, sizes = count_groups(labels, groups, seed)
    shares = np.array(shares) / sum(shares)
    asked = np.flatnonzero(shares)
    wanted = shares[:, None] * counts.sum(0)                                # (splits, classes)
    room = shares * sizes.sum()                                             # (splits,)
    totals, left = counts.sum(0), np.ones(len(names), bool)                 # (classes,), (groups,)
    chosen = np.zeros(len(names), int)                                      # (groups,)
    while left.any():
        if totals.any():
            rarest = np.argmin(np.where(totals > 0, totals, np.iinfo(int).max))
            amount, lack = counts[:, rarest], wanted[:, rarest]
        else:
            amount, lack = sizes, room  # what is left has no class
        for i in sorted(np.flatnonzero(left & (amount > 0)), key=lambda i: -sizes[i]):
            chosen[i] = neediest(lack, amount[i], sizes[i], room, shares, asked)
            wanted[chosen[i]] -= counts[i]
            room[chosen[i]] -= sizes[i]
            totals -= counts[i]
            left[i] = False
    fill_empty(chosen, sizes, asked)
    number = {name: i for i, name in enumerate(names)}
    return [SPLITS[chosen[number[group]]] for group in groups]


def count_groups(labels, groups, seed):
    """Names of the groups in a seeded order, (groups, classes) items of each, (groups,) sizes."""
    members = {}
    for item, group in enumerate(groups):
        members.setdefault(group, []).append(item)
    names = sorted(members)
    names = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    classes = 1 + max((c for its in labels for c in its), default=-1)
    counts = np.zeros((len(names), classes), int)
    for row, name in zip(counts, names, strict=True):
        for item in members[name]:
            row[labels[item]] += 1
    return names, counts, np.array([len(members[name]) for name in names])


def neediest(lack, amount, size, room, shares, asked):
    """The split that a group of `size` items, `amount` of them of the class, goes to."""
    enough = max(lack[asked]) - amount / 2
    about_as_needy = [split for split in asked if lack[split] >= enough]
    return max(about_as_needy, key=lambda split: (
        room[split] >= size, round(room[split] / shares[split], 9), shares[split]))


def fill_empty(chosen, sizes, asked):
    """Gives a split without groups the smallest group of the split that has most groups."""
    for split in asked:
        richest = np.bincount(chosen).argmax()
        if not (chosen == split).any() and (chosen == richest).sum() > 1:
            groups = np.flatnonzero(chosen == richest)
            chosen[groups[np.argmin(sizes[groups])]] = split
