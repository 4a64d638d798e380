"""
Your own clips: one folder per class, or a table of paths and labels.

    python prepare_data.py folder --path=FOLDER --name=mine
    python prepare_data.py folder --csv=FILE --separator="|" --name=mine
"""
import os
import posixpath

from data import apply_fold
from prepare.files import inventory, is_audio, nfc, table
from prepare.splits import SPLIT_NAMES
from prepare.store import Listing

csv = ""        # folder: a table with the columns path, label and, optionally, split, fold, artist
separator = ""  # folder: separates several labels in one cell of the table, such as |
label = "label"  # folder: the column of the labels
group = ""      # folder: the column whose values must not cross splits; empty: group, artist, album


def listing(files, path="", csv="", separator="", label="label", group=""):
    """One label per clip from folders or a table, or any number with a separator."""
    if csv:
        root, title = path or os.path.dirname(csv), f"clips of {csv}"
        task, items, found = from_table(csv, root, separator, label.lower(), group)
    elif separator or group or label != "label":
        raise ValueError("separator, label and group need a table: give --csv=FILE, or omit them")
    else:
        root, title = path, f"clips of {path}"
        task, items, found = from_folders(files, path)
    names = sorted({label for item in items for label in item[task]})
    if task == "genre" and len(names) == 1:
        raise ValueError(f"all {title} have the class {names[0]}: give one folder per class, or "
                         "several labels with --csv=FILE")
    check_distinct(found)
    number = {name: i for i, name in enumerate(names)}
    for item in items:
        item[task] = [number[label] for label in item[task]]
    sources = {name: [source] for name, source in found.items()}
    return Listing(title, f"clips of {os.path.abspath(root)}", "clips", items, sources,
                   classes={task: names}, published=False)


def check_distinct(found):
    """ValueError if two names are links to one file, which could end up in two splits."""
    first = {}
    for name, source in sorted(found.items()):
        other = first.setdefault(os.path.realpath(source["file"]), name)
        if other != name:
            raise ValueError(f"{other} and {name} are the same file, which could end up in two "
                             "splits: remove one")


# -----------------------------------------------------------------------------
# one folder per class

def from_folders(files, path):
    """(task, items with label names, {name: source})"""
    found = {name: source for name, source in files.items() if is_audio(name)}
    other = [name for name in files if name not in found]
    if other:
        print(f"skipped {len(other):,} files that are not audio, such as {other[0]}")
    if not found:
        raise ValueError(f"no audio files under {path}")
    return "genre", classes_of_folders(sorted(found)), found


def classes_of_folders(names):
    """Items of files. The class is the first folder, or the second inside train/, valid/, test/."""
    tops = {name.split("/")[0] for name in names}
    classes = sorted(top for top in tops if top.lower() not in SPLIT_NAMES)
    splits, depth = sorted(tops - set(classes)), 0 if classes else 1
    # a single folder with such a name may be a class, as in training/ and sleep/
    deep = all(name.count("/") > 1 for name in names)
    if classes and (len(splits) > 1 or splits and deep):
        raise ValueError(f"is {', '.join(splits)} a split, and {classes[0]} a class? Splits are "
                         "named train, valid and test, and contain all classes; rename a class of "
                         "such a name, or give --csv=FILE")
    items = []
    for name in names:
        parts = name.split("/")
        if len(parts) < 2 + depth:
            raise ValueError(f"{name} has no class: --path must have one folder per class, or give "
                             "the labels with --csv=FILE")
        split = SPLIT_NAMES[parts[0].lower()] if depth else None
        items.append({"name": name, "split": split, "genre": [parts[depth]]})
    return items


# -----------------------------------------------------------------------------
# a table

def from_table(csv, root, separator, label, group):
    """(task, items with label names, {name: source})"""
    with open(csv, "rb") as f:
        raw = f.read()
    try:
        task, items = read_csv(raw, separator, label, group)
    except ValueError as e:
        raise ValueError(f"{csv}: {e}") from e
    return task, items, find_files([item["name"] for item in items], root)


def read_csv(raw, separator, label="label", group=""):
    """(task, items with label names) of a table given as bytes.

    Required columns: path and label. Optional: split, fold, and group, artist or album, which must
    not cross splits. With a separator a label is any number of tags, else one genre.
    """
    header, rows = read_rows(raw, label)
    if group and group.lower() not in header:
        raise ValueError(f"has no column {group!r} to group by, only {', '.join(header)}")
    filled = [g for g in ("group", "artist", "album") if any(row.get(g) for _, row in rows)]
    group = group.lower() or next(iter(filled), "path")
    task = "tags" if separator else "genre"
    items, names = [], set()
    for line, row in rows:
        labels = [row[label]]
        if separator:
            labels = sorted({part.strip() for part in row[label].split(separator)} - {""})
        name = posixpath.normpath(row["path"])
        problem = row_problem(row, labels) or (f"names {name} twice" if name in names else "")
        if problem:
            raise ValueError(f"line {line}: {problem}")
        names.add(name)
        split = SPLIT_NAMES.get(row.get("split", "").lower())
        items.append({"name": name, "split": split, task: labels, "group": row[group] or name})
        if "fold" in row:
            items[-1]["fold"] = int(row["fold"])
    check_separator([row[label] for _, row in rows], separator)
    if "fold" in header and "split" not in header:
        apply_fold(items, 0, "the table")
    return task, sorted(items, key=lambda item: item["name"])


def read_rows(raw, label):
    """(column names, [(line, {column: cell})]) in composed Unicode."""
    first = raw.partition(b"\n")[0].decode("utf-8-sig", "replace")
    separated = first.startswith("sep=")    # Excel's way to name the delimiter
    rows = iter(()) if separated else table(raw, max(",;\t", key=first.count))
    header = [cell.strip().lower() for cell in next(rows, (0, []))[1]]
    named = [name for name in header if name]
    rows = [(line, dict(zip(header, (nfc(cell.strip()) for cell in cells), strict=True)))
            for line, cells in rows]
    if not {"path", label} <= set(named) or len(set(named)) < len(named) or not rows:
        hint = ": delete the first line, sep=" if separated else ""
        raise ValueError(f"needs the columns path and {label}, each once, and rows; it has "
                         f"{', '.join(header) or 'none'}{hint}")
    return header, rows


def row_problem(row, labels):
    """What is wrong with a row of the table, or ""."""
    if not row["path"] or "\0" in row["path"]:
        return "path is empty or has a zero byte: save the table as text"
    if labels == [""]:
        return "no label (allowed only with --separator)"
    if "split" in row and row["split"].lower() not in SPLIT_NAMES:
        return f"split is {row['split']!r}, not train, valid or test"
    if "fold" in row and not row["fold"].isdecimal():
        return f"fold is {row['fold']!r}, not an integer from 0"
    return ""


def check_separator(labels, separator):
    """A wrong separator would make one class of "a|b"."""
    other = next((label for label in labels if set("|;") & set(label)), "")
    if separator and other and not any(separator in label for label in labels):
        raise ValueError(f"no label contains the separator {separator!r}, but there is {other!r}")
    if other and not separator:
        print(f"note: {other!r} is one class; if it is several, set --separator")


def find_files(names, root):
    """{name: source} of the files that exist.

    A table from another system may spell a path with backslashes, in another case or in another
    Unicode form: such a file is used if only one matches.
    """
    found = {name: {"file": os.path.join(root, name)} for name in names
             if os.path.isfile(os.path.join(root, name))}
    missing = [name for name in names if name not in found and not os.path.isabs(name)]
    if not missing or not os.path.isdir(root or "."):
        return found
    alike = {}
    for name, source in inventory(root or ".").items():
        if "zip" not in source:
            alike.setdefault(name.casefold(), []).append(source)
    for name in missing:
        matches = alike.get(posixpath.normpath(name.replace("\\", "/")).casefold(), [])
        if len(matches) == 1:
            found[name] = matches[0]
    return found
