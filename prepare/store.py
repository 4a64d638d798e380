"""
A prepared folder: append-only audio, a journal of what is in it, and an index.

    audio.int16     the samples of all items, contiguous
    journal.jsonl   a header that identifies the source of the audio; then one line per item: where
                    its samples are, or why there are none
    index.json      the dataset's splits and labels joined with the journal, rewritten by every run

So splits and labels can change without decoding again, and a kill costs what one second decoded:
samples are on the disk before the journal mentions them. data.py describes the index.
"""
import contextlib
import errno
import json
import os
import time
from typing import NamedTuple

from common.files import UNWRITABLE, lock, write_atomically
from common.settings import die
from data import FORMAT
from model import SAMPLE_RATE
from prepare.files import stamp
from prepare.splits import divide

SYNC_EVERY = 1.0            # seconds of work that a kill can cost
SILENT = 3                  # int16: an item whose samples are all below -81 dBFS is silent


class Listing(NamedTuple):
    """The items of a dataset according to its files today."""
    title: str              # for the summary
    source_id: str          # identifies the source of the audio; a folder has audio of one source
    kind: str               # "clips" or "stems"
    items: list             # [{"name", "split" or None, task: [class numbers], ...}]
    sources: dict           # {name: [source of each track]} of the items whose files exist
    left_out: list = ()     # [{"name", "reason"}] that the dataset's protocol leaves out
    classes: dict = None    # {task: [names]} of clips
    count: int | list = None    # expected number of items, in total or per split
    published: bool = True  # a public benchmark: silent items are kept
    name: str = ""          # of the folder, if not the dataset's
    make: object = None     # function that makes the audio of synthetic items


# -----------------------------------------------------------------------------
# the folder

def locked(folder):
    """Exclusive lock on a folder. The lock file is next to it."""
    parent, name = os.path.split(os.path.abspath(folder))
    try:
        return lock(os.path.join(parent, f".{name}.lock"), folder)
    except OSError as e:
        # without write access a prepared folder can still be listed
        readable = os.path.exists(os.path.join(folder, "index.json"))
        if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not readable:
            raise
        return contextlib.nullcontext()


def claim(folder, source_id, overwrite):
    """Dies unless the folder is new or has audio of this source; `overwrite` empties it."""
    exists = os.path.exists(folder)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    header = read_header(folder)
    empty = all(name.endswith(".tmp") for name in names)
    if exists and not (header or os.path.isdir(folder) and empty):
        die(f"{folder} exists, but is not prepared data: move it away, or choose another --name or "
            "--out")
    if overwrite:
        # the journal last: it marks the folder as prepared data
        for name in ("index.json", "audio.int16", "journal.jsonl"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, name))
    elif header and header["of"] != source_id:
        die(f"{folder} has {header['of']}, not {source_id}: --name=NAME writes elsewhere, "
            "--overwrite=True deletes it and starts again")
    for name in names:
        if name.endswith(".tmp"):  # of a process that was killed
            os.remove(os.path.join(folder, name))


def read_header(folder):
    """The first line of the journal, or None."""
    for line in complete_lines(folder)[:1]:
        with contextlib.suppress(ValueError):
            header = json.loads(line)
            return header if isinstance(header, dict) and "of" in header else None
    return None


def complete_lines(folder):
    """The lines of the journal, as bytes, except one that a kill has truncated."""
    path = os.path.join(folder, "journal.jsonl")
    if not os.path.exists(path):
        return []
    with open(path, "rb") as f:
        return [line for line in f if line.endswith(b"\n")]


def read_journal(folder):
    """{name: record} of the items in the journal."""
    lines, path = complete_lines(folder)[1:], os.path.join(folder, "journal.jsonl")
    try:
        return {record["name"]: record for record in map(json.loads, lines)}
    except (ValueError, TypeError, KeyError) as e:
        die(f"{path} is damaged ({e}): --overwrite=True decodes everything again")


def read_index(folder):
    """The index, or None. Dies if it is damaged."""
    path = os.path.join(folder, "index.json")
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as f:
        try:
            return dict(json.load(f))
        except (ValueError, TypeError) as e:
            die(f"{path} is damaged ({e}): delete it, and the same command writes it again")


# -----------------------------------------------------------------------------
# the audio

def to_decode(items, sources, journal):
    """(new names, names that have changed or may succeed now) of the items whose files exist."""
    new, again = [], []
    for item in items:
        name = item["name"]
        files = sources.get(name, [])
        now = stamps(files)
        if not files or any(isinstance(s, dict) and not t for s, t in zip(files, now, strict=True)):
            continue
        if name not in journal:
            new.append(name)
        elif journal[name].get("again") or changed(journal[name]["stamps"], now):
            again.append(name)
    return new, again


def stamps(sources):
    """The stamp() of each source of an item, None for sources that are not files."""
    return [stamp(s) if isinstance(s, dict) else None for s in sources]


def changed(before, now):
    """Whether files differ in size or mtime; a file and its packed copy only in size."""
    return len(before) != len(now) or any(
        old[0] != new[0] if old and new and len(old) != len(new) else old != new
        for old, new in zip(before, now, strict=True))


def append(folder, source_id, made, sources):
    """Adds what `made` yields: (name, record, int16 (tracks, length) or None)."""
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, name) for name in ("audio.int16", "journal.jsonl")]
    if not read_header(folder):
        header = {"of": source_id, "format": FORMAT, "sample_rate": SAMPLE_RATE}
        write_atomically(json.dumps(header) + "\n", paths[1])
    end = cut_back(folder, *paths)
    try:
        with open(paths[0], "ab", buffering=0) as audio, open(paths[1], "ab", buffering=0) as lines:
            write(audio, lines, end, made, sources)
    except OSError as e:
        if e.errno not in UNWRITABLE or e.filename:
            raise
        problem = f"{e.strerror}: fix this and run the same command again, it resumes"
        raise OSError(e.errno, problem, folder) from e


def write(audio, lines, end, made, sources):
    """Appends samples to one file, then a line per item to the other, syncing both."""
    pending, synced = [], time.monotonic()
    for name, record, samples in made:
        record = {"name": name, "stamps": stamps(sources[name]), **record}
        if samples is not None:
            record["offset"] = end
            write_all(audio, samples)
            end += samples.size
        pending.append(record)
        if time.monotonic() - synced > SYNC_EVERY:
            sync(audio, lines, pending)
            synced = time.monotonic()
    sync(audio, lines, pending)


def cut_back(folder, audio, lines):
    """Truncates what a kill left unfinished; returns the number of samples."""
    os.truncate(lines, sum(map(len, complete_lines(folder))))
    end = check_audio(folder, read_journal(folder))
    with open(audio, "ab") as f:
        f.truncate(2 * end)
    return end


def check_audio(folder, journal):
    """Dies if audio is missing; returns the number of samples according to the journal."""
    path, end = os.path.join(folder, "audio.int16"), samples_in(journal)
    size = os.path.getsize(path) if os.path.exists(path) else 0
    if size < 2 * end:
        die(f"{path} is shorter than its journal says: --overwrite=True decodes everything again")
    return end


def samples_in(journal):
    """Where the audio of the journal's items ends."""
    ends = [r["offset"] + len(r["silent"]) * r["length"] for r in journal.values() if "offset" in r]
    return max(ends, default=0)


def write_all(f, data):
    view = memoryview(data).cast("B")
    while view:
        view = view[f.write(view):]


def sync(audio, lines, records):
    """Journals the records once their audio is on the disk; empties the list."""
    os.fsync(audio.fileno())
    if hasattr(os, "posix_fadvise"):  # or 24 GB of audio would evict everything else from memory
        os.posix_fadvise(audio.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    write_all(lines, b"".join(json.dumps(r).encode() + b"\n" for r in records))
    os.fsync(lines.fileno())
    records.clear()


# -----------------------------------------------------------------------------
# the index

def last_listing(folder):
    """The listing of the last run, for when its files are gone; None without one."""
    index, header = read_index(folder), read_header(folder)
    if not index or not header:
        return None
    items = [{k: v for k, v in item.items() if k not in ("offset", "length")}
             for item in index["items"]]
    if index["divided"]:
        items = [{**item, "split": None} for item in items]
    return Listing(index["what"], header["of"], index["kind"], items, {}, index["left_out"],
                   index.get("classes"), index["count"])


def build_index(listing, journal, settings):
    """The index of a folder: the listed items that have audio, and what was left out and why."""
    kept, notes, damaged = [], [], []
    left_out = [{"expected": True, **entry} for entry in listing.left_out]
    for item in listing.items:
        name = item["name"]
        record = journal.get(name, {"reason": "not found"})
        reason = record.get("reason") or unusable(record, listing.published, settings)
        if reason:
            left_out.append({"name": name, "reason": reason, "expected": False})
            continue
        kept.append({**item, "offset": record["offset"], "length": record["length"]})
        silent = ["is silent"] if record["peak"] <= SILENT else []
        notes += [{"name": name, "note": note}
                  for note in record["damage"] + record["notes"] + silent]
        if record["damage"]:
            damaged.append(name)
    divided = not all(item["split"] for item in kept)
    if divided:
        divide(kept, next(iter(listing.classes or [""])), settings["shares"], settings["seed"])
    index = dict(format=FORMAT, kind=listing.kind, sample_rate=SAMPLE_RATE)
    index["n_samples"] = samples_in(journal)
    if listing.kind == "clips":
        index["classes"] = listing.classes
        index["multilabel"] = [task for task in listing.classes if task == "tags"]
    return index | dict(what=listing.title, count=listing.count, settings=settings,
                        divided=divided, notes=notes, damaged=damaged, left_out=left_out,
                        items=kept)


def unusable(record, published, settings):
    """Why decoded audio is left out, or None."""
    least, length = settings["min_seconds"], record["length"]
    if length < max(1, least * SAMPLE_RATE):
        short = f"is too short: {length / SAMPLE_RATE:.3f} s, --min_seconds={least:g}"
        return "; ".join([short, *record["damage"]])
    if record["peak"] <= SILENT and not published:
        return "is silent"  # a published split keeps it, to be comparable
    return None


def write_index(folder, index):
    """Writes the index if it has changed: a read-only folder can still be listed."""
    text, path = json.dumps(index), os.path.join(folder, "index.json")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            if f.read() == text:
                return
    write_atomically(text, path)
