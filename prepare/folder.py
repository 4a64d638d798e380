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
    task = "tags" if separator else "genre"
    if csv:
        root = path or os.path.dirname(csv) or "."
        items = read_csv(csv, separator, label.lower(), group.lower())
        sources = find_files([item["name"] for item in items], root)
    elif separator or group or label != "label":
        raise ValueError("separator, label and group need a table: give --csv=FILE, or omit them")
    else:
        root = path
        items, sources = classes_of_folders(files)
    classes = sorted({label for item in items for label in item[task]})
    if task == "genre" and len(classes) < 2:
        raise ValueError(f"{csv or path} needs two classes, has {classes} in {len(sources):,} "
                         "audio files: give a folder per class, or several labels with --csv=FILE")
    names = {}
    for name, source in sorted(sources.items()):
        other = names.setdefault(os.path.realpath(source["file"]), name)
        if other != name:   # one of them is a link
            raise ValueError(f"{other} and {name} are the same file, which could end up in two "
                             "splits: remove one")
    for item in items:
        item[task] = [classes.index(label) for label in item[task]]
    return Listing(f"clips of {csv or path}", f"clips of {os.path.abspath(root)}", "clips", items,
                   {name: [source] for name, source in sources.items()}, classes={task: classes},
                   published=False)


def classes_of_folders(files):
    """(items with label names, {name: source}) of the audio files.

    The class is the first folder, or the second inside train/, valid/ and test/.
    """
    sources = {name: files[name] for name in sorted(files) if is_audio(name)}
    other = [name for name in files if name not in sources]
    if other:
        print(f"skipped {len(other):,} files that are not audio, such as {other[0]}")
    tops = {name.split("/")[0] for name in sources}
    classes = sorted(top for top in tops if top.lower() not in SPLIT_NAMES)
    splits, depth = sorted(tops - set(classes)), 0 if classes else 1
    # a single folder with such a name may be a class, as in training/ and sleep/
    nested = all(name.count("/") > 1 for name in sources)
    if classes and (len(splits) > 1 or (splits and nested)):
        raise ValueError(f"splits ({', '.join(splits)}) and classes (such as {classes[0]}) are "
                         "side by side: put all classes into train/, valid/ and test/, rename a "
                         "class that is named like a split, or give --csv=FILE")
    items = []
    for name in sources:
        parts = name.split("/")
        if len(parts) < 2 + depth:
            raise ValueError(f"{name} has no class: --path must have one folder per class, or give "
                             "the labels with --csv=FILE")
        split = SPLIT_NAMES[parts[0].lower()] if depth else None
        items.append({"name": name, "split": split, "genre": [parts[depth]]})
    return items, sources


def read_csv(csv, separator, label, group):
    """Items with label names. With a separator a label is any number of tags, else one genre.

    Required columns: path, label, and `group` if given. Optional: split, fold, and group, artist or
    album, which must not cross splits.
    """
    columns, rows = read_rows(csv, ["path", label, *([group] if group else [])])
    filled = [column for column in ("group", "artist", "album")
              if any(row.get(column) for _, row in rows)]
    group = group or (filled[0] if filled else "path")
    items = {}
    for line, row in rows:
        labels = [row[label]]
        if separator:
            labels = sorted({part.strip() for part in row[label].split(separator)} - {""})
        name = posixpath.normpath(row["path"])
        problem = row_problem(row, labels) or (f"names {name} twice" if name in items else "")
        if problem:
            raise ValueError(f"{csv}: line {line}: {problem}")
        items[name] = {"name": name, "split": SPLIT_NAMES.get(row.get("split", "").lower()),
                       "tags" if separator else "genre": labels, "group": row[group] or name}
        if "fold" in row:
            items[name]["fold"] = int(row["fold"])
    items = [items[name] for name in sorted(items)]
    if "fold" in columns and "split" not in columns:
        apply_fold(items, 0, csv)

    # a wrong separator would make "a|b" one class
    cells = [row[label] for _, row in rows]
    other = next((cell for cell in cells if set("|;") & set(cell)), "")
    if separator and other and not any(separator in cell for cell in cells):
        raise ValueError(f"{csv}: no label contains the separator {separator!r}, but there is "
                         f"{other!r}")
    if other and not separator:
        print(f"note: {other!r} is one class; set --separator if it is several labels")
    return items


def read_rows(csv, needed):
    """(column names, [(line, {column: cell})]) in composed Unicode."""
    with open(csv, "rb") as f:
        raw = f.read()
    first = raw.partition(b"\n")[0].decode("utf-8-sig", "replace")
    excel = first.startswith("sep=")    # Excel's way to declare the delimiter
    rows = iter(()) if excel else table(raw, max(",;\t", key=first.count), f"{csv}: ")
    header = [cell.strip().lower() for cell in next(rows, (0, []))[1]]
    named = [name for name in header if name]
    rows = [(line, dict(zip(header, (nfc(cell.strip()) for cell in cells), strict=True)))
            for line, cells in rows]
    if not set(needed) <= set(named) or len(set(named)) < len(named) or not rows:
        hint = ": delete the first line, sep=" if excel else ""
        raise ValueError(f"{csv}: needs the columns {' and '.join(needed)}, each once, and rows; "
                         f"it has {', '.join(header) or 'none'}{hint}")
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


def find_files(names, root):
    """{name: source} of the files that exist.

    A table from another system may spell a path with backslashes, in another case or in another
    Unicode form: such a file is used if only one matches.
    """
    sources = {name: {"file": os.path.join(root, name)} for name in names
               if os.path.isfile(os.path.join(root, name))}
    missing = [name for name in names if name not in sources and not os.path.isabs(name)]
    alike = {}
    for name, source in inventory(root).items() if missing else ():
        if "zip" not in source:
            alike.setdefault(name.casefold(), []).append(source)
    for name in missing:
        matches = alike.get(posixpath.normpath(name.replace("\\", "/")).casefold(), [])
        if len(matches) == 1:
            sources[name] = matches[0]
    return sources
