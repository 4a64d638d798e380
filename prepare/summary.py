"""
What came of preparing: numbers to compare with those of others, and what is missing.
"""
from collections import Counter

from data import SEGMENT, SEGMENT_HOP, SPLITS, TRACKS
from model import SAMPLE_RATE

WIDTH = 132     # columns of the table of classes


def counts_of(index):
    return [sum(item["split"] == split for item in index["items"]) for split in SPLITS]


def problems(index):
    """Sentences on what is not as it should be; empty if all is."""
    found, wanted = [], index["count"]
    what = "songs" if index["kind"] == "stems" else "files"
    unexpected = [entry for entry in index["left_out"] if not entry["expected"]]
    if unexpected:
        found.append(f"LEFT OUT: {len(unexpected):,} {what}, such as {unexpected[0]['name']}: "
                     "mend them, and the same command adds them")
    if index["damaged"]:
        found.append(f"DAMAGED: {len(index['damaged']):,} {what} are kept as far as they could be "
                     f"read, such as {index['damaged'][0]}")
    if isinstance(wanted, list) and counts_of(index) != wanted:
        counts = " / ".join(map(str, counts_of(index)))
        found.append(f"NOT COMPLETE: {counts} instead of {' / '.join(map(str, wanted))} {what}")
    listed = len(index["items"]) + len(unexpected)
    if isinstance(wanted, int) and listed != wanted:
        found.append(f"NOT COMPLETE: {listed:,} instead of {wanted:,} {what} in its table, which "
                     "is cut off or edited: numbers will not compare with those of others")
    return found


def show(folder, index, journal, size):
    """Prints all of it; size is that of the audio in bytes."""
    items, stems = index["items"], index["kind"] == "stems"
    unexpected = [entry for entry in index["left_out"] if not entry["expected"]]
    listed = len(items) + len(unexpected)
    there = listed - sum(entry["reason"] == "is not there" for entry in unexpected)
    what = "songs" if stems else "files"
    print(f"\n{folder}: {index['what']}")
    print(f"found {there:,} of {listed:,} {what} ({100 * there / listed:.1f} %), used "
          f"{len(items):,}\n")
    show_splits(items, journal, stems)
    show_classes(index)
    show_entries(folder, "left out, as expected",
                 [entry for entry in index["left_out"] if entry["expected"]])
    show_entries(folder, "LEFT OUT, UNEXPECTEDLY", unexpected)
    notes = [{"name": note["name"], "reason": note["note"]} for note in index["notes"]]
    show_entries(folder, "kept, but odd", notes)
    print(f"\n{size / 1e9:.2f} GB")
    for line in gaps(index) + problems(index):
        print(line)


def show_splits(items, journal, stems):
    what, head, columns = "clips", "", ("silent",)
    if stems:
        what, head, columns = "songs", "silence in ", TRACKS
    titles = "".join(f"{title:>10}" for title in columns)
    print(f"{'':8}{what:>8}{'hours':>9}  {head}{titles}")
    for split in SPLITS:
        chosen = [item for item in items if item["split"] == split]
        seconds = sum(item["length"] for item in chosen) / SAMPLE_RATE
        line = f"{split:8}{len(chosen):8,}{seconds / 3600:9.2f}  " + " " * len(head)
        for k in range(len(columns)):
            silent = sum(journal[item["name"]]["silent"][k] for item in chosen)
            line += f"{100 * silent / max(seconds, 1):8.1f} %"
        print(line)


def show_classes(index):
    """How many clips of each split have each class."""
    for task, names in (index.get("classes") or {}).items():
        counts = {split: Counter() for split in SPLITS}
        for item in index["items"]:
            counts[item["split"]].update(item.get(task, []))
        cells = []
        for c, name in enumerate(names):
            numbers = " / ".join(f"{counts[split][c]:,}" for split in SPLITS)
            cells.append(f"{name} {numbers}")
        print(f"\n{task}, {len(names)} classes: clips in train / valid / test")
        width = max(map(len, cells)) + 3
        per_row = max(1, WIDTH // width)
        for row in range(0, len(cells), per_row):
            line = "".join(f"{cell:{width}}" for cell in cells[row:row + per_row])
            print("  " + line.rstrip())


def show_entries(folder, title, entries):
    if not entries:
        return
    print(f"\n{title}: {len(entries):,}")
    for entry in entries[:8]:
        print(f"  {entry['name']}: {entry['reason']}")
    if len(entries) > 8:
        common = Counter(entry["reason"] for entry in entries).most_common(3)
        most = ", ".join(f"{count:,} x {reason}" for reason, count in common)
        print(f"  ... all of them in {folder}/index.json; most often: {most}")


def gaps(index):
    """Notes on what training and evaluation will miss, or should not have."""
    notes, homes = [], {}
    for item in index["items"]:
        home = item["split"], item.get("fold")
        homes.setdefault(item.get("group", item["name"]), set()).add(home)
    torn = [group for group, its_homes in homes.items() if len(its_homes) > 1]
    if torn:
        notes.append(f"note: {len(torn):,} groups (artists, albums) have clips in more than one "
                     f"split or fold, as the table says, such as {torn[0]}")
    for split in SPLITS:
        chosen = [item for item in index["items"] if item["split"] == split]
        lack = classes_without(chosen, index.get("classes") or {})
        segments = sum(max(0, (i["length"] - SEGMENT) // SEGMENT_HOP + 1) for i in chosen)
        if not chosen:
            notes.append(f"note: the {split} split is empty")
        elif lack:
            more = f" and {len(lack) - 8} more classes" if len(lack) > 8 else ""
            notes.append(f"note: the {split} split has no clip of {', '.join(lack[:8])}{more}")
        elif index["kind"] == "stems" and split != "test" and segments < 7:
            notes.append(f"note: the {split} split has {segments} segments of 6 s; a mix to "
                         "pre-train on needs 4, of all sources 7")
    return notes


def classes_without(items, classes):
    """The names of the classes that none of these items has."""
    lack = []
    for task, names in classes.items():
        heard = {c for item in items for c in item.get(task, [])}
        lack += [name for c, name in enumerate(names) if c not in heard]
    return lack
