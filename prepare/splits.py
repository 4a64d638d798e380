"""
Stratified train, valid and test splits for data that has none.
"""
import numpy as np

from data import SPLITS

SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test",
               "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid"}


def split_of_folder(path):
    """The split that a parent folder names, as in "train/Artist - Title", or None."""
    parents = [part.lower() for part in path.split("/")[:-1]]
    return next((SPLIT_NAMES[part] for part in parents if part in SPLIT_NAMES), None)


def divide(items, task, shares, seed):
    """Assigns a split to items without one, stratified by the classes of `task` if they have it."""
    free = [item for item in items if not item["split"]]
    labels = [item.get(task, []) for item in free]
    groups = [item.get("group", item["name"]) for item in free]
    for item, split in zip(free, split_evenly(labels, groups, shares, seed), strict=True):
        item["split"] = split


def split_evenly(labels, groups, shares, seed):
    """A split for each item, from its class numbers and its group.

    Every class is divided into train, valid and test by these shares, and no group is divided. No
    split with a share is left empty if there are as many groups as splits. The result depends on
    the items and the seed, not on the order of the items.

    Iterative stratification (Sechidis et al. 2011), by groups. The rarest remaining class comes
    first. Its groups go one by one to the split that lacks most of the class; among splits that
    lack about as much, to one with space for the group, and among these to the emptiest.
    """
    names, counts, sizes = count_groups(labels, groups, seed)
    shares = np.array(shares) / sum(shares)                                 # (splits,)
    wanted = shares[:, None] * counts.sum(0)                                # (splits, classes)
    space = shares * sizes.sum()                                            # (splits,)
    totals, left = counts.sum(0), np.ones(len(names), bool)                 # (classes,), (groups,)
    chosen = np.zeros(len(names), int)                                      # (groups,)
    while left.any():
        amount, lack = sizes, space     # if the remaining groups have no class
        if totals.any():
            rarest = np.argmin(np.where(totals > 0, totals, np.iinfo(int).max))
            amount, lack = counts[:, rarest], wanted[:, rarest]
        for i in sorted(np.flatnonzero(left & (amount > 0)), key=lambda i: -sizes[i]):
            chosen[i] = neediest(lack, amount[i], sizes[i], space, shares)
            wanted[chosen[i]] -= counts[i]
            space[chosen[i]] -= sizes[i]
            totals -= counts[i]
            left[i] = False

    # an empty split gets the smallest group of the split with most groups
    for split in np.flatnonzero(shares):
        largest = np.bincount(chosen).argmax()
        if not (chosen == split).any() and (chosen == largest).sum() > 1:
            chosen[np.argmin(np.where(chosen == largest, sizes, sizes.sum() + 1))] = split
    number = {name: i for i, name in enumerate(names)}
    return [SPLITS[chosen[number[group]]] for group in groups]


def count_groups(labels, groups, seed):
    """Group names in a seeded order, (groups, classes) items per class, (groups,) sizes."""
    members = {}
    for item, group in enumerate(groups):
        members.setdefault(group, []).append(item)
    names = sorted(members)
    names = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    classes = 1 + max((c for numbers in labels for c in numbers), default=-1)
    counts = np.zeros((len(names), classes), int)
    for row, name in zip(counts, names, strict=True):
        for item in members[name]:
            row[labels[item]] += 1
    return names, counts, np.array([len(members[name]) for name in names])


def neediest(lack, amount, size, space, shares):
    """The split for a group of `size` items, `amount` of them of the class."""
    splits = np.flatnonzero(shares)
    candidates = splits[lack[splits] >= max(lack[splits]) - amount / 2]
    return max(candidates, key=lambda split: (
        space[split] >= size, round(space[split] / shares[split], 9), shares[split]))
