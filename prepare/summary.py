"""
The summary of a prepared folder: numbers to compare with published ones, and what is missing.
"""
from collections import Counter

from data import SEGMENT, SEGMENT_HOP, SPLITS, TRACKS
from model import SAMPLE_RATE

WIDTH = 132     # columns of the table of classes


def problems(index):
    """Sentences on what differs from the expected data set; empty if nothing does."""
    found, expected = [], index["count"]
    unit = "songs" if index["kind"] == "stems" else "files"
    unexpected = [entry for entry in index["left_out"] if not entry["expected"]]
    if unexpected:
        found.append(f"LEFT OUT: {len(unexpected):,} {unit}, such as {unexpected[0]['name']}: fix "
                     "them, and the same command adds them")
    if index["damaged"]:
        found.append(f"DAMAGED: {len(index['damaged']):,} {unit} are used as far as they could be "
                     f"read, such as {index['damaged'][0]}")
    counts = [sum(item["split"] == split for item in index["items"]) for split in SPLITS]
    if isinstance(expected, list) and counts != expected:
        found.append(f"NOT COMPLETE: {' / '.join(map(str, counts))} instead of "
                     f"{' / '.join(map(str, expected))} {unit}")
    listed = len(index["items"]) + len(unexpected)
    if isinstance(expected, int) and listed != expected:
        found.append(f"NOT COMPLETE: {listed:,} instead of {expected:,} {unit} in its table, which "
                     "is truncated or edited: results will not be comparable")
    return found


def show(folder, index, journal, size):
    """Prints the summary; size is that of the audio in bytes."""
    items, stems = index["items"], index["kind"] == "stems"
    expected = [entry for entry in index["left_out"] if entry["expected"]]
    unexpected = [entry for entry in index["left_out"] if not entry["expected"]]
    listed = len(items) + len(unexpected)
    found = listed - sum(entry["reason"] == "not found" for entry in unexpected)
    unit = "songs" if stems else "files"
    print(f"\n{folder}: {index['what']}")
    print(f"found {found:,} of {listed:,} {unit} ({100 * found / listed:.1f} %), used "
          f"{len(items):,}\n")
    show_splits(items, journal, stems)
    show_classes(index)
    show_entries(folder, "left out, as expected", expected)
    show_entries(folder, "LEFT OUT, UNEXPECTEDLY", unexpected)
    notes = [{"name": note["name"], "reason": note["note"]} for note in index["notes"]]
    show_entries(folder, "used, but noteworthy", notes)
    print(f"\n{size / 1e9:.2f} GB")
    for line in gaps(index) + problems(index):
        print(line)


def show_splits(items, journal, stems):
    unit, head, columns = ("songs", "silence in ", TRACKS) if stems else ("clips", "", ("silent",))
    titles = "".join(f"{title:>10}" for title in columns)
    print(f"{'':8}{unit:>8}{'hours':>9}  {head}{titles}")
    for split in SPLITS:
        chosen = [item for item in items if item["split"] == split]
        seconds = sum(item["length"] for item in chosen) / SAMPLE_RATE
        line = f"{split:8}{len(chosen):8,}{seconds / 3600:9.2f}  " + " " * len(head)
        for k in range(len(columns)):
            silent = sum(journal[item["name"]]["silent"][k] for item in chosen)
            line += f"{100 * silent / max(seconds, 1):8.1f} %"
        print(line)


def show_classes(index):
    """The number of clips per split and class."""
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
        print(f"  ... see {folder}/index.json for all; most frequent: {most}")


def gaps(index):
    """Notes on what training and evaluation will lack, and on groups that cross splits."""
    notes, homes = [], {}
    for item in index["items"]:
        home = item["split"], item.get("fold")
        homes.setdefault(item.get("group", item["name"]), set()).add(home)
    divided = [group for group, places in homes.items() if len(places) > 1]
    if divided:
        notes.append(f"note: {len(divided):,} groups (artists, albums) have clips in more than one "
                     f"split or fold, according to the table, such as {divided[0]}")
    for split in SPLITS:
        chosen = [item for item in index["items"] if item["split"] == split]
        missing = classes_without(chosen, index.get("classes") or {})
        segments = sum(max(0, (i["length"] - SEGMENT) // SEGMENT_HOP + 1) for i in chosen)
        if not chosen:
            notes.append(f"note: the {split} split is empty")
        elif missing:
            more = f" and {len(missing) - 8} more classes" if len(missing) > 8 else ""
            notes.append(f"note: the {split} split has no clip of {', '.join(missing[:8])}{more}")
        elif index["kind"] == "stems" and split != "test" and segments < 7:
            notes.append(f"note: the {split} split has {segments} segments of 6 s; a mix for "
                         "pre-training needs 4, of all sources 7")
    return notes


def classes_without(items, classes):
    """The names of the classes that none of these items has."""
    missing = []
    for task, names in classes.items():
        present = {c for item in items for c in item.get(task, [])}
        missing += [name for c, name in enumerate(names) if c not in present]
    return missing
