"""
A prepared folder: audio that only grows, a journal of what is in it, and an index.

    audio.int16     the samples, one item behind the other
    journal.jsonl   first what the audio is made of; then a line per item: where its samples are,
                    or why there are none
    index.json      (who is in which split, with which labels) x (journal), written by every run

So labels and splits change without decoding, and a kill costs what one second decoded. What the
journal says has reached the disk before it is said. data.py describes the index.
"""
import contextlib
import errno
import json
import os
import time
from typing import NamedTuple

from filelock import FileLock, Timeout

import download
from data import FORMAT
from model import SAMPLE_RATE
from prepare import files
from prepare.splits import divide
from runtime import die, write_atomically

SYNC_EVERY = 1.0            # seconds of work that a kill can cost
SILENT = 3                  # int16: an item without a sample above -81 dB is silence
EARLIER = ("audio.jsonl", "job.json")   # what the first versions wrote instead of a journal


class Listing(NamedTuple):
    """Who is in a dataset, as its files say today."""
    what: str               # a line for the summary
    of: str                 # what the audio is made of; a folder holds audio of one such thing
    kind: str               # "clips" or "stems"
    items: list             # [{"name", "split" or None, task: [class numbers], ...}]
    sources: dict           # {name: [source of each track]} of those whose files are there
    left_out: list = ()     # [{"name", "reason"}] that the dataset's protocol leaves out
    classes: dict = None    # {task: [names]} of clips
    count: int | list = None    # how many items there should be, in all or per split
    published: bool = True  # others use it too: silent items stay in it
    name: str = ""          # of the folder, if not the dataset's
    make: object = None     # makes the audio of synthetic items


# -----------------------------------------------------------------------------
# the folder

@contextlib.contextmanager
def locked(folder):
    """Holds the folder for one process; the lock goes with the process, however it ends."""
    parent, name = os.path.split(os.path.abspath(folder))
    lock = FileLock(os.path.join(parent, f".{name}.lock"), timeout=0)
    try:
        os.makedirs(parent, exist_ok=True)
        lock.acquire()
    except Timeout:
        die(f"another process is preparing {folder} (it holds {lock.lock_file}): wait for it, or "
            "choose another --name")
    except OSError as e:
        readable = os.path.exists(os.path.join(folder, "index.json"))
        if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not readable:
            raise  # what can only be read can still be listed
    try:
        yield
    finally:
        lock.release()


def claim(folder, of, overwrite):
    """Ends the script unless the folder is ours to write to, and holds what is wanted.

    With overwrite, what we prepared there is deleted.
    """
    there = os.listdir(folder) if os.path.isdir(folder) else []
    if os.path.exists(folder) and not os.path.isdir(folder):
        die(f"{folder} is a file: move it away, or choose another --name or --out")
    begun, earlier = read_header(folder), is_earlier(folder)
    if not (begun or earlier or all(name.endswith(".tmp") for name in there)):
        die(f"{folder} is there, but is not prepared data: move it away, or choose another --name "
            "or --out")
    if overwrite:
        # the journal goes last: it is by this that we know the folder for ours
        for name in ("index.json", "audio.int16", *EARLIER, "journal.jsonl"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, name))
    elif earlier:
        die(f"{folder} was prepared by an earlier version: training reads it as it is, "
            "--overwrite=True decodes it again")
    elif begun and begun["of"] != of:
        die(f"{folder} holds {begun['of']}, not {of}: --name=NAME writes elsewhere, "
            "--overwrite=True deletes it and starts again")
    for name in there:
        if name.endswith(".tmp"):  # of a process that was killed while it wrote
            os.remove(os.path.join(folder, name))


def is_earlier(folder):
    there = os.path.join(folder, "audio.jsonl")
    return os.path.exists(there) and not os.path.exists(os.path.join(folder, "journal.jsonl"))


def read_header(folder):
    """The first line of the journal, or None."""
    path = os.path.join(folder, "journal.jsonl")
    if not os.path.exists(path):
        return None
    with open(path, "rb") as f:
        line = f.readline()
    if not line.endswith(b"\n"):
        return None
    try:
        header = json.loads(line)
    except ValueError:
        return None
    return header if isinstance(header, dict) and "of" in header else None


def read_journal(folder):
    """{name: record} of the whole lines behind the header; a kill can have torn the last one."""
    if not read_header(folder):
        return {}
    path = os.path.join(folder, "journal.jsonl")
    with open(path, "rb") as f:
        lines = [line for line in f if line.endswith(b"\n")][1:]
    try:
        return {record["name"]: record for record in map(json.loads, lines)}
    except (ValueError, TypeError, KeyError) as e:
        die(f"{path} is damaged ({e}): --overwrite=True decodes all again")


def read_index(folder):
    """The index, or None. Ends the script if it is damaged."""
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
    """(names that are new, names that changed or may succeed now) of what has its files."""
    new, again = [], []
    for item in items:
        name = item["name"]
        its = sources.get(name, [])
        now = stamps(its)
        lost = [s for s, time in zip(its, now, strict=True) if isinstance(s, dict) and not time]
        if not its or lost:
            continue  # not there, or a link to nowhere
        if name not in journal:
            new.append(name)
        elif journal[name].get("again") or changed(journal[name]["stamps"], now):
            again.append(name)
    return new, again


def stamps(sources):
    """Size and time of each file of an item, None where there is none."""
    return [files.stamp(s) if isinstance(s, dict) else None for s in sources]


def changed(before, now):
    """Whether files differ in size or time; a file and its packed copy only in size."""
    if len(before) != len(now):
        return True
    for old, new in zip(before, now, strict=True):
        if old is None or new is None:
            if old != new:
                return True
        elif old[0] != new[0] or len(old) == len(new) and old != new:
            return True
    return False


def append(folder, of, made, sources):
    """Adds what `made` yields: (name, record, int16 (tracks, length) or None)."""
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, name) for name in ("audio.int16", "journal.jsonl")]
    if not read_header(folder):
        header = {"of": of, "format": FORMAT, "sample_rate": SAMPLE_RATE}
        write_atomically(json.dumps(header) + "\n", paths[1])
    end = cut_back(folder, *paths)
    try:
        with open(paths[0], "ab", buffering=0) as audio, open(paths[1], "ab", buffering=0) as lines:
            write(audio, lines, end, made, sources)
    except OSError as e:
        if e.errno not in download.FULL or e.filename:
            raise
        problem = f"{e.strerror}: mend that, and the same command goes on from here"
        raise OSError(e.errno, problem, folder) from e


def write(audio, lines, end, made, sources):
    """Samples to one file, then a line for each item to the other; both reach the disk."""
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
    """Cuts off what a kill left unfinished; returns the number of samples that are there."""
    with open(lines, "rb") as f:
        whole = sum(len(line) for line in f if line.endswith(b"\n"))
    os.truncate(lines, whole)
    end = check_audio(folder, read_journal(folder))
    with open(audio, "ab") as f:
        f.truncate(2 * end)
    return end


def check_audio(folder, journal):
    """Ends the script if audio is lost; returns the number of samples that there should be."""
    path, end = os.path.join(folder, "audio.int16"), samples_in(journal)
    size = os.path.getsize(path) if os.path.exists(path) else 0
    if size < 2 * end:
        die(f"{path} is shorter than its journal says: --overwrite=True decodes all again")
    return end


def samples_in(journal):
    """Where the audio that the journal tells of ends."""
    ends = [r["offset"] + len(r["silent"]) * r["length"] for r in journal.values() if "offset" in r]
    return max(ends, default=0)


def write_all(f, data):
    view = memoryview(data).cast("B")
    while view:
        view = view[f.write(view):]


def sync(audio, lines, records):
    """Says what is done only once it is on the disk; empties `records`."""
    os.fsync(audio.fileno())
    if hasattr(os, "posix_fadvise"):  # 24 GB should not push all else out of memory
        os.posix_fadvise(audio.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    write_all(lines, b"".join(json.dumps(r).encode() + b"\n" for r in records))
    os.fsync(lines.fileno())
    records.clear()


# -----------------------------------------------------------------------------
# the index

def last_listing(folder):
    """The listing of the last run, for when its files are gone; None if there was none."""
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
    """The index of a folder: the items of today whose audio is there, and what was left out."""
    kept, notes, damaged = [], [], []
    left_out = [{"expected": True, **entry} for entry in listing.left_out]
    for item in listing.items:
        record = journal.get(item["name"], {"reason": "is not there"})
        reason = record.get("reason") or unusable(record, listing.published, settings)
        if reason:
            left_out.append({"name": item["name"], "reason": reason, "expected": False})
            continue
        kept.append({**item, "offset": record["offset"], "length": record["length"]})
        said = record["damage"] + record["notes"]
        if record["peak"] <= SILENT:
            said.append("is silent")
        notes += [{"name": item["name"], "note": note} for note in said]
        if record["damage"]:
            damaged.append(item["name"])
    divided = not all(item["split"] for item in kept)
    if divided:
        divide(kept, next(iter(listing.classes or [""])), settings["shares"], settings["seed"])
    index = dict(format=FORMAT, kind=listing.kind, sample_rate=SAMPLE_RATE)
    index["n_samples"] = samples_in(journal)
    if listing.kind == "clips":
        index["classes"] = listing.classes
        index["multilabel"] = [task for task in listing.classes if task == "tags"]
    return index | dict(what=listing.what, count=listing.count, settings=settings,
                        divided=divided, notes=notes, damaged=damaged, left_out=left_out,
                        items=kept)


def unusable(record, published, settings):
    """Why decoded audio is left out, or None."""
    least, length = settings["min_seconds"], record["length"]
    if length < max(1, least * SAMPLE_RATE):
        text = f"is too short: {length / SAMPLE_RATE:.3f} s, --min_seconds={least:g}"
        return "; ".join([text, *record["damage"]])
    if record["peak"] <= SILENT and not published:
        return "is silent"  # a published split keeps it: numbers are compared with others'
    return None


def write_index(folder, index):
    """Writes the index if it says something new: a folder that can only be read can be listed."""
    text = json.dumps(index)
    path = os.path.join(folder, "index.json")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            if f.read() == text:
                return
    write_atomically(text, path)
