"""
A prepared folder: append-only audio, a journal of what is in it, and an index.

    audio.int16     the samples of all items, contiguous
    journal.jsonl   a header that identifies the source of the audio; then one line per item: where
                    its samples are, or why there are none
    index.json      the dataset's splits and labels joined with the journal, rewritten by every run

So splits and labels can change without decoding again, and a killed run loses at most one second
of work: samples are on the disk before the journal mentions them. data.py describes the index.
"""
import contextlib
import errno
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

from common.files import UNWRITABLE, lock, write_atomically
from common.settings import die
from data import FORMAT
from model import SAMPLE_RATE
from prepare.files import stamp
from prepare.splits import divide

SYNC_EVERY = 1.0            # seconds of work that a killed run can lose
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
    published: bool = True  # a public benchmark, of which silent items are kept
    name: str = ""          # of the folder, if not the dataset's
    make: object = None     # function that makes the audio of synthetic items


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
    """Exits unless the folder is new or has audio of this source. `overwrite` empties it."""
    names = os.listdir(folder) if os.path.exists(folder) else []
    temporary = [name for name in names if name.endswith(".tmp")]   # of a process that was killed
    present = source_of(folder)
    if names != temporary and not present:
        die(f"{folder} exists, but is not prepared data: move it away, or choose another --name or "
            "--out")
    if present not in (None, source_id) and not overwrite:
        die(f"{folder} has {present}, not {source_id}: --name=NAME writes elsewhere, "
            "--overwrite=True deletes it and starts again")
    # the journal last: it marks the folder as prepared data
    old = ["index.json", "audio.int16", "journal.jsonl"] if overwrite else []
    for name in temporary + old:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))


def complete_lines(folder):
    """The lines of the journal, as bytes, without a last one that is truncated."""
    path = os.path.join(folder, "journal.jsonl")
    if not os.path.exists(path):
        return []
    with open(path, "rb") as f:
        return [line for line in f if line.endswith(b"\n")]


def source_of(folder):
    """The source_id in the header of the journal, or None."""
    with contextlib.suppress(IndexError, ValueError, TypeError, KeyError):
        return json.loads(complete_lines(folder)[0])["of"]
    return None


def read_journal(folder):
    """{name: record} of the items in the journal. Exits if it or the audio is damaged."""
    audio, path = (os.path.join(folder, name) for name in ("audio.int16", "journal.jsonl"))
    try:
        records = map(json.loads, complete_lines(folder)[1:])
        journal, problem = {record["name"]: record for record in records}, ""
        size = os.path.getsize(audio) if os.path.exists(audio) else 0
        if size < 2 * samples_in(journal):
            problem = f"{audio} is shorter than its journal declares"
    except (ValueError, TypeError, KeyError) as e:
        problem = f"{path} is damaged ({e})"
    if problem:
        die(f"{problem}: --overwrite=True decodes everything again")
    return journal


def samples_in(journal):
    """Number of samples of all tracks of all items in the journal."""
    ends = [record["offset"] + len(record["silent"]) * record["length"]     # `silent` is per track
            for record in journal.values() if "offset" in record]
    return max(ends, default=0)


def to_decode(items, sources, journal):
    """(new names, names to decode again) of the items whose files exist."""
    new, again = [], []
    for name in (item["name"] for item in items):
        now = list(map(stamp, sources.get(name, [])))
        if not now or [] in now:
            continue    # not found
        if name not in journal:
            new.append(name)
        elif journal[name].get("again") or changed(journal[name]["stamps"], now):
            again.append(name)
    return new, again


def changed(before, now):
    """Whether files differ in size or mtime; a file and its packed copy only in size."""
    def same(old, new):
        packed = old and new and len(old) != len(new)       # one of the two
        return old[0] == new[0] if packed else old == new

    return len(before) != len(now) or not all(map(same, before, now))


def append(folder, source_id, decoded, sources):
    """Appends what `decoded` yields: (name, record, int16 (tracks, length) or None)."""
    os.makedirs(folder, exist_ok=True)
    audio_path, path = (os.path.join(folder, name) for name in ("audio.int16", "journal.jsonl"))
    if not source_of(folder):
        header = {"of": source_id, "format": FORMAT, "sample_rate": SAMPLE_RATE}
        write_atomically(json.dumps(header) + "\n", path)
    end = samples_in(read_journal(folder))
    try:
        with open(audio_path, "ab") as audio, open(path, "ab") as lines:
            audio.truncate(2 * end)     # what a killed run left incomplete
            lines.truncate(sum(map(len, complete_lines(folder))))
            write(audio, lines, end, decoded, sources)
    except OSError as e:
        if e.errno not in UNWRITABLE or e.filename:
            raise
        problem = f"{e.strerror}: fix this and run the same command again, it resumes"
        raise OSError(e.errno, problem, folder) from e


def write(audio, lines, end, decoded, sources):
    """Appends samples to one file, then a line per item to the other, syncing both."""
    pending, synced = [], time.monotonic()
    for name, record, samples in decoded:
        record = {"name": name, "stamps": list(map(stamp, sources[name])), **record}
        if samples is not None:
            record["offset"] = end
            audio.write(samples)
            end += samples.size
        pending.append(record)
        if time.monotonic() - synced > SYNC_EVERY:
            sync(audio, lines, pending)
            pending, synced = [], time.monotonic()
    sync(audio, lines, pending)


def sync(audio, lines, records):
    """Journals the records once their audio is on the disk."""
    audio.flush()
    os.fsync(audio.fileno())
    if hasattr(os, "posix_fadvise"):  # 24 GB of audio would evict everything else from memory
        os.posix_fadvise(audio.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    lines.writelines(json.dumps(record).encode() + b"\n" for record in records)
    lines.flush()
    os.fsync(lines.fileno())


def last_listing(folder):
    """The listing of the last run, for when its files are gone; None without a readable index."""
    try:
        index = json.loads(Path(folder, "index.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    for item in index["items"]:
        del item["offset"], item["length"]
        item["split"] = None if index["divided"] else item["split"]
    return Listing(index["what"], source_of(folder), index["kind"], index["items"], {},
                   index["left_out"], index.get("classes"), index["count"])


def build_index(listing, journal, settings):
    """The index of a folder: the listed items that have audio, and those left out, with reasons."""
    kept, notes = [], []
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
    damaged = [item["name"] for item in kept if journal[item["name"]]["damage"]]
    divided = not all(item["split"] for item in kept)
    if divided:
        divide(kept, next(iter(listing.classes or [""])), settings["shares"], settings["seed"])
    index = dict(format=FORMAT, kind=listing.kind, sample_rate=SAMPLE_RATE,
                 n_samples=samples_in(journal))
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
        too_short = f"is too short: {length / SAMPLE_RATE:.3f} s, --min_seconds={least:g}"
        return "; ".join([too_short, *record["damage"]])
    if record["peak"] <= SILENT and not published:
        return "is silent"  # a published split keeps it, to be comparable
    return None


def write_index(folder, index):
    """Writes the index if it has changed, so that a read-only folder can be listed."""
    text, path = json.dumps(index), Path(folder, "index.json")
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomically(text, path)
