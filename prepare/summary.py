"""
The summary of a prepared folder: numbers to compare with published ones, and what is missing.
"""
from collections import Counter

from data import SEGMENT, SEGMENT_HOP, SPLITS, TRACKS
from model import SAMPLE_RATE

WIDTH = 132     # columns of the table of classes


def show(folder, index, journal):
    """Prints the summary; returns whether the folder is complete."""
    items, stems = index["items"], index["kind"] == "stems"
    expected, unexpected = ([(entry["name"], entry["reason"]) for entry in index["left_out"]
                             if entry["expected"] == whether] for whether in (True, False))
    listed = len(items) + len(unexpected)
    present = listed - sum(reason == "not found" for _, reason in unexpected)
    unit = "songs" if stems else "files"
    print(f"\n{folder}: {index['what']}")
    print(f"found {present:,} of {listed:,} {unit} ({100 * present / listed:.1f} %), used "
          f"{len(items):,}\n")
    show_splits(items, journal, stems)
    show_classes(items, index.get("classes") or {})
    show_entries(folder, "left out, as expected", expected)
    show_entries(folder, "LEFT OUT, UNEXPECTEDLY", unexpected)
    notes = [(note["name"], note["note"]) for note in index["notes"]]
    show_entries(folder, "used, but noteworthy", notes)
    print(f"\n{2 * index['n_samples'] / 1e9:.2f} GB")
    differences = problems(index, unexpected, unit)
    for line in gaps(index) + differences:
        print(line)
    return not differences


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


def show_classes(items, classes):
    """The number of clips per split and class."""
    for task, names in classes.items():
        counts = Counter((item["split"], c) for item in items for c in item.get(task, []))
        cells = [f"{name} " + " / ".join(f"{counts[split, c]:,}" for split in SPLITS)
                 for c, name in enumerate(names)]
        print(f"\n{task}, {len(names)} classes: clips in train / valid / test")
        width = max(map(len, cells)) + 3
        per_row = max(1, WIDTH // width)
        for row in range(0, len(cells), per_row):
            line = "".join(f"{cell:{width}}" for cell in cells[row:row + per_row])
            print("  " + line.rstrip())


def show_entries(folder, title, entries):
    """Prints the first (name, reason), and the most frequent reasons."""
    if not entries:
        return
    print(f"\n{title}: {len(entries):,}")
    for name, reason in entries[:8]:
        print(f"  {name}: {reason}")
    if len(entries) > 8:
        common = Counter(reason for _, reason in entries).most_common(3)
        most = ", ".join(f"{count:,} x {reason}" for reason, count in common)
        print(f"  ... see {folder}/index.json for all; most frequent: {most}")


def gaps(index):
    """Notes on what training and evaluation will lack, and on groups that cross splits."""
    notes, splits_of_group = [], {}
    for item in index["items"]:
        group = item.get("group", item["name"])
        splits_of_group.setdefault(group, set()).add((item["split"], item.get("fold")))
    divided = [group for group, splits in splits_of_group.items() if len(splits) > 1]
    if divided:
        notes.append(f"note: {len(divided):,} groups (artists, albums) have clips in more than one "
                     f"split or fold, according to the table, such as {divided[0]}")
    for split in SPLITS:
        chosen = [item for item in index["items"] if item["split"] == split]
        missing = [f"{name} ({task})" for task, names in (index.get("classes") or {}).items()
                   for c, name in enumerate(names) if not any(c in i.get(task, []) for i in chosen)]
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


def problems(index, unexpected, unit):
    """Lines about differences from the complete dataset; empty if there are none."""
    lines, expected, damaged = [], index["count"], index["damaged"]
    if unexpected:
        lines.append(f"LEFT OUT: {len(unexpected):,} {unit}, such as {unexpected[0][0]}: fix them, "
                     "and the same command adds them")
    if damaged:
        lines.append(f"DAMAGED: {len(damaged):,} {unit} are used as far as they could be read, "
                     f"such as {damaged[0]}")
    counts = [sum(item["split"] == split for item in index["items"]) for split in SPLITS]
    if isinstance(expected, list) and counts != expected:
        lines.append(f"NOT COMPLETE: {' / '.join(map(str, counts))} instead of "
                     f"{' / '.join(map(str, expected))} {unit}")
    listed = len(index["items"]) + len(unexpected)
    if isinstance(expected, int) and listed != expected:
        lines.append(f"NOT COMPLETE: {listed:,} instead of {expected:,} {unit} in its table, which "
                     "is truncated or edited: results will not be comparable")
    return lines
