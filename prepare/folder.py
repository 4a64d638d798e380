"""
Your own clips: one folder per class, or a table of paths and labels.

    python prepare_data.py folder --path=FOLDER --name=mine
    python prepare_data.py folder --csv=FILE --separator="|" --name=mine
"""
import os
import posixpath

from data import split_by_fold
from prepare.files import inventory, is_audio, nfc, table
from prepare.splits import SPLIT_NAMES
from prepare.store import Listing

csv = ""        # folder: a table: columns path, label and, if you like, split, fold, artist
separator = ""  # folder: what stands between several labels in one cell of the table, such as |
label = "label"  # folder: the column of the labels
group = ""      # folder: the column of what must not be split up; empty: group, artist or album


def listing(files, path="", csv="", separator="", label="label", group=""):
    """One label per clip from folders or a table, or any number with a separator."""
    if csv:
        root, what = path or os.path.dirname(csv), f"clips of {csv}"
        task, items, found = from_table(csv, root, separator, label.lower(), group)
    elif separator or group or label != "label":
        raise ValueError("separator, label and group are for a table: give --csv=FILE, or leave "
                         "them away")
    else:
        root, what = path, f"clips of {path}"
        task, items, found = from_folders(files, path)
    names = sorted({label for item in items for label in item[task]})
    if task == "genre" and len(names) == 1:
        raise ValueError(f"all {what} are of one class, {names[0]}: give one folder per class, or "
                         "several labels with --csv=FILE")
    refuse_twins(found)
    number = {name: i for i, name in enumerate(names)}
    for item in items:
        item[task] = [number[label] for label in item[task]]
    sources = {name: [source] for name, source in found.items()}
    of = f"clips of {os.path.abspath(root)}"
    return Listing(what, of, "clips", items, sources, classes={task: names}, published=False)


def refuse_twins(found):
    """ValueError if two names are one file: it might come into two splits."""
    first = {}
    for name, source in sorted(found.items()):
        twin = first.setdefault(os.path.realpath(source["file"]), name)
        if twin != name:
            raise ValueError(f"{twin} and {name} are the same file: a clip has one place, or it "
                             "may come into two splits")


# -----------------------------------------------------------------------------
# one folder per class

def from_folders(files, path):
    """(task, items with names of labels, {name: source})"""
    found = {name: source for name, source in files.items() if is_audio(name)}
    other = [name for name in files if name not in found]
    if other:
        print(f"passed over {len(other):,} files that are not audio, such as {other[0]}")
    if not found:
        raise ValueError(f"no audio files under {path}")
    return "genre", classes_of_folders(sorted(found)), found


def classes_of_folders(names):
    """Items of files: the first folder is the class, or the second behind train/, valid/, test/."""
    tops = {name.split("/")[0] for name in names}
    strange = sorted(top for top in tops if top.lower() not in SPLIT_NAMES)
    named, depth = sorted(tops - set(strange)), 0 if strange else 1
    # a single one may be a class, as in training/ and sleep/
    deep = all(name.count("/") > 1 for name in names)
    if strange and (len(named) > 1 or named and deep):
        raise ValueError(f"is {', '.join(named)} a split, and {strange[0]} a class? Splits are "
                         "called train, valid and test, and hold all classes; a class of such a "
                         "name needs another one, or --csv=FILE")
    items = []
    for name in names:
        parts = name.split("/")
        if len(parts) < 2 + depth:
            raise ValueError(f"{name} is in no class: --path must hold one folder per class, or "
                             "give the labels with --csv=FILE")
        split = SPLIT_NAMES[parts[0].lower()] if depth else None
        items.append({"name": name, "split": split, "genre": [parts[depth]]})
    return items


# -----------------------------------------------------------------------------
# a table

def from_table(csv, root, separator, label, group):
    """(task, items with names of labels, {name: source})"""
    with open(csv, "rb") as f:
        raw = f.read()
    try:
        task, items = read_csv(raw, separator, label, group)
    except ValueError as e:
        raise ValueError(f"{csv}: {e}") from e
    return task, items, find_files([item["name"] for item in items], root)


def read_csv(raw, separator, label="label", group=""):
    """(task, items with names of labels) of a table given as bytes.

    Columns are path and label; if there are more: split, fold, and group, artist or album, which
    must not be split up. With a separator a label is any number of tags, else it is one genre.
    """
    header, rows = read_rows(raw, label)
    if group and group.lower() not in header:
        raise ValueError(f"has no column {group!r} to group by, only {', '.join(header)}")
    filled = [g for g in ("group", "artist", "album") if any(row.get(g) for _, row in rows)]
    group = group.lower() or next(iter(filled), "path")
    task = "tags" if separator else "genre"
    items, seen = [], set()
    for line, row in rows:
        labels = [row[label]]
        if separator:
            labels = sorted({part.strip() for part in row[label].split(separator)} - {""})
        name = posixpath.normpath(row["path"])
        check_row(line, row, labels, seen, name)
        seen.add(name)
        split = SPLIT_NAMES.get(row.get("split", "").lower())
        items.append({"name": name, "split": split, task: labels, "group": row[group] or name})
        if "fold" in row:
            items[-1]["fold"] = int(row["fold"])
    if not items:
        raise ValueError("has no rows")
    check_separator([row[label] for _, row in rows], separator)
    if "fold" in header and "split" not in header:
        split_by_fold(items, 0, "the table")
    return task, sorted(items, key=lambda item: item["name"])


def read_rows(raw, label):
    """(names of the columns, [(line, {column: cell})]) in composed Unicode."""
    first = raw.partition(b"\n")[0].decode("utf-8-sig", "replace")
    if first.startswith("sep="):  # Excel's way to name it
        raise ValueError("begins with sep=: delete that line")
    rows = table(raw, max(",;\t", key=first.count))
    header = [cell.strip().lower() for cell in next(rows, (0, []))[1]]
    named = [name for name in header if name]
    if not {"path", label} <= set(named) or len(set(named)) < len(named):
        raise ValueError(f"needs the columns path and {label}, has {', '.join(header) or 'none'}")
    found = []
    for line, cells in rows:
        cells = [nfc(cell.strip()) for cell in cells]
        found.append((line, dict(zip(header, cells, strict=True))))
    return header, found


def check_row(line, row, labels, seen, name):
    if "\0" in row["path"]:
        raise ValueError(f"line {line}: the path has a zero byte in it: save the table as text")
    if not row["path"]:
        raise ValueError(f"line {line}: no path")
    if labels == [""]:
        raise ValueError(f"line {line}: no label (only with --separator may there be none)")
    if "split" in row and row["split"].lower() not in SPLIT_NAMES:
        raise ValueError(f"line {line}: split is {row['split']!r} instead of train, valid or test")
    if "fold" in row and not row["fold"].isdecimal():
        raise ValueError(f"line {line}: fold is {row['fold']!r} instead of a number from 0")
    if name in seen:
        raise ValueError(f"names {name} twice")


def check_separator(labels, separator):
    """A wrong separator makes one class of "a|b"."""
    other = next((label for label in labels if set("|;") & set(label)), "")
    if separator and other and not any(separator in label for label in labels):
        raise ValueError(f"no label has the separator {separator!r} in it, but there is {other!r}")
    if other and not separator:
        print(f"note: {other!r} is taken for one class; if it is several, name what is between "
              "them with --separator")


def find_files(names, root):
    """{name: source} of the files that are there.

    A table from another system may spell a path with backslashes, in another case, or in another
    form of Unicode: such a file is taken if only one fits.
    """
    found = {}
    for name in names:
        if os.path.isfile(os.path.join(root, name)):
            found[name] = {"file": os.path.join(root, name)}
    missing = [name for name in names if name not in found and not os.path.isabs(name)]
    if not missing or not os.path.isdir(root or "."):
        return found
    alike = {}
    for name, source in inventory(root or ".").items():
        if "zip" not in source:
            alike.setdefault(name.casefold(), []).append(source)
    for name in missing:
        fitting = alike.get(posixpath.normpath(name.replace("\\", "/")).casefold(), [])
        if len(fitting) == 1:
            found[name] = fitting[0]
    return found
