"""
Writes a prepared folder item by item, so that it can be killed at any moment and gone on with.

    data/<name>.partial/    audio.int16 and audio.jsonl grow; job.json says what for. Renamed to data/<name>/ with index.json, written last

audio.jsonl has one line per item: name, offset, length, silent (seconds without sound, per track) and notes, or name and reason. It stays,
so that splits and labels can be changed without decoding again. What it says has reached the disk before it is said.
"""
import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections import Counter

from filelock import FileLock, Timeout
from tqdm import tqdm

from data import SEGMENT, SEGMENT_HOP, SPLITS, TRACKS, prefetch, write_index
from labels import divide
from model import SAMPLE_RATE
from runtime import clock, die, write_atomically

SYNC_EVERY = 1.0            # seconds of work that a kill can cost
AHEAD = {1: 16, 5: 2}       # clips or songs per thread that may wait in memory for one before them, or for the disk


@contextlib.contextmanager
def locked(folder):
    """Holds the folder for one process; the lock goes with the process, however it ends."""
    os.makedirs(os.path.dirname(folder) or ".", exist_ok=True)
    lock = FileLock(os.path.join(os.path.dirname(folder), f".{os.path.basename(folder)}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        die(f"another process is preparing {folder} (it holds {lock.lock_file}): wait for it, or choose another --name")
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not os.path.exists(os.path.join(folder, "index.json")):
            raise  # what can only be read can still be listed
    try:
        yield
    finally:
        lock.release()


def read_index(folder):
    """The index of a complete folder, or None. Ends the script if it is not one of ours."""
    path = os.path.join(folder, "index.json")
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as f:
        try:
            found = json.load(f)
        except ValueError as e:
            die(f"{path} is damaged ({e}): move {folder} away, or choose another --name")
    if not isinstance(found, dict) or not {"kind", "items", "left_out", "settings"} <= found.keys():
        die(f"{path} was not written by prepare_data.py: move {folder} away, or choose another --name")
    return found


def read_journal(folder):
    """The whole lines of audio.jsonl: a kill can have torn the last one."""
    path = os.path.join(folder, "audio.jsonl")
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.endswith("\n")]  # each is ASCII, as json.dumps writes it


def replaced(folder):
    """Where the folder that is replaced lies for a moment."""
    return os.path.join(os.path.dirname(folder), f".{os.path.basename(folder)}.replaced")


def remove(folder):
    """Deletes a folder of ours; last the files by which we know it for ours, if this is killed."""
    for name in sorted(os.listdir(folder), key=lambda name: (name == "index.json", name == "job.json")):
        file = os.path.join(folder, name)
        shutil.rmtree(file) if os.path.isdir(file) and not os.path.islink(file) else os.remove(file)
    os.rmdir(folder)


def refuse_strange_folder(folder):
    """Only what was prepared by us is ever replaced."""
    if os.path.exists(folder) and not os.path.exists(os.path.join(folder, "index.json")) and (not os.path.isdir(folder) or os.listdir(folder)):
        die(f"{folder} is there, but is not prepared data: move it away, or choose another --name or --out")


def write_all(f, data):
    view = memoryview(data).cast("B")
    while view:
        view = view[f.write(view):]


def resume(partial, job, names, tracks, overwrite):
    """The journal of what an earlier process left in `partial`, with its files cut back to what the journal says; empty for a new folder.

    Ends the script if that was begun for another `job` (and not overwrite: then it is begun anew)."""
    text = json.dumps(job, indent=1, sort_keys=True)
    if os.path.exists(partial):
        begun = ""
        with contextlib.suppress(FileNotFoundError), open(os.path.join(partial, "job.json"), encoding="utf-8") as f:
            begun = f.read()
        if '"dataset"' not in begun and any(not name.endswith((".tmp", "index.json")) for name in os.listdir(partial)):
            die(f"{partial} is there, but was not begun by prepare_data.py: move it away, or choose another --name or --out")
        if begun != text and not overwrite:
            die(f"{partial} was begun with other settings or other files: --overwrite=True begins anew, --name=NAME writes elsewhere")
        if begun != text:
            remove(partial)
    os.makedirs(partial, exist_ok=True)
    write_atomically(text, os.path.join(partial, "job.json"))
    journal = read_journal(partial)
    sizes = {"audio.int16": 2 * sum(tracks * r["length"] for r in journal if "length" in r),
             "audio.jsonl": sum(len(json.dumps(r)) + 1 for r in journal)}
    for file, size in sizes.items():
        with open(os.path.join(partial, file), "ab") as f:
            if f.tell() < size or [r["name"] for r in journal] != names[:len(journal)]:
                die(f"{partial} is damaged: delete it")
            f.truncate(size)  # what comes after had not been synced
    return journal


def collect(folder, names, make, job, tracks, threads, overwrite):
    """Fills folder.partial with the audio of make(i) -> (info, int16 (tracks, length)) or ({"reason"}, None) for each of `names`, in order.

    Goes on with what an earlier process left there, if it had the same `job`. Returns the journal."""
    partial = folder + ".partial"
    journal = resume(partial, job, names, tracks, overwrite)
    done, pending, synced = len(journal), [], time.monotonic()
    written = sum(tracks * r["length"] for r in journal if "length" in r)
    with (open(os.path.join(partial, "audio.int16"), "ab", buffering=0) as audio,
          open(os.path.join(partial, "audio.jsonl"), "ab", buffering=0) as lines,
          tqdm(total=len(names), initial=done, desc=folder, unit="file" if tracks == 1 else "song", smoothing=0.05) as bar):
        for name, (info, samples) in zip(names[done:], prefetch(make, range(done, len(names)), threads, ahead=AHEAD[tracks])):
            record = {"name": name, **info}
            if samples is not None:
                record["offset"] = written
                write_all(audio, samples)
                written += samples.size
            journal.append(record)
            pending.append(record)
            bar.update()
            if time.monotonic() - synced > SYNC_EVERY:
                sync(audio, lines, pending)
                synced = time.monotonic()
        sync(audio, lines, pending)
    return journal


def sync(audio, lines, records):
    """Says what is done only once it is on the disk; empties `records`."""
    os.fsync(audio.fileno())
    if hasattr(os, "posix_fadvise"):  # a dataset of 24 GB should not push all else out of memory
        os.posix_fadvise(audio.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    write_all(lines, b"".join(json.dumps(r).encode() + b"\n" for r in records))
    os.fsync(lines.fileno())
    records.clear()


def index(folder, target, journal, kind, items, left_out, settings, **more):
    """Writes target/index.json: the items whose audio is there, in their order, and what was left out and why."""
    done = {r["name"]: r for r in journal}
    left_out = [{"expected": True, **entry} for entry in left_out]
    left_out += [{"name": i["name"], "reason": done[i["name"]]["reason"], "expected": False} for i in items if "reason" in done[i["name"]]]
    kept = [{**i, "offset": done[i["name"]]["offset"], "length": done[i["name"]]["length"]} for i in items if "reason" not in done[i["name"]]]
    if not kept:
        if target != folder:
            remove(target)  # nothing to go on from
        such = [f", such as {entry['name']} ({entry['reason']})" for entry in left_out if not entry["expected"]]
        die(f"{folder}: none of {len(items):,} files can be used{such[0] if such else ''}: is --path right, and all unpacked?")
    if not all(i["split"] for i in kept):
        divide(kept, next(iter(more.get("classes", [None]))), settings["shares"], settings["seed"])
    notes = [{"name": i["name"], "note": note} for i in items for note in done[i["name"]].get("notes", [])]
    n_samples = sum((len(TRACKS) if kind == "stems" else 1) * r["length"] for r in journal if "length" in r)
    write_index(target, kind, kept, n_samples, left_out, notes=notes, settings=settings, **more)


def put_in_place(folder):
    """Renames folder.partial, which is complete, to folder; what was there goes, for which collect() was asked to overwrite."""
    for name in os.listdir(folder + ".partial"):
        if name.endswith(".tmp"):  # of a process that was killed while it wrote the index
            os.remove(os.path.join(folder + ".partial", name))
    forget_replaced(folder)
    if os.path.exists(folder):
        os.rename(folder, replaced(folder))
    os.rename(folder + ".partial", folder)
    forget_replaced(folder)


def forget_replaced(folder):
    """Deletes what put_in_place replaced: it may have been killed before it was done with that."""
    refuse_strange_folder(replaced(folder))
    if os.path.exists(replaced(folder)):
        remove(replaced(folder))


def fingerprint(jobs):
    """A hash of the names and sizes of the files of all jobs."""
    return hashlib.sha256(json.dumps([[job["name"], job.get("sizes")] for job in jobs]).encode()).hexdigest()


# -----------------------------------------------------------------------------
# what came of it

def summarise(folder, seconds=None):
    """Prints what is in a prepared folder, to be compared with what should be; returns the exit status, 3 if a file is missing unexpectedly."""
    found = read_index(folder)
    journal = {r["name"]: r for r in read_journal(folder)}
    if not {i["name"] for i in found["items"]} <= journal.keys():
        die(f"{folder} has lost its audio.jsonl: training does without, but only --overwrite=True can list it again")
    items, left_out, stems = found["items"], found["left_out"], found["kind"] == "stems"
    unexpected = [entry for entry in left_out if not entry["expected"]]
    absent = sum(entry["reason"] == "is not there" for entry in unexpected)
    wanted = len(items) + len(unexpected)
    print(f"\n{folder}: {found['settings'].get('what', 'prepared data')}")
    print(f"found {wanted - absent:,} of {wanted:,} {'songs' if stems else 'files'} ({100 * (wanted - absent) / wanted:.1f} %), used {len(items):,}\n")
    tracks = TRACKS if stems else ("silent",)
    print(f"{'':8}{'songs' if stems else 'clips':>8}{'hours':>9}  " + ("silence in " if stems else "") + "".join(f"{t:>10}" for t in tracks))
    for split in SPLITS:
        chosen = [i for i in items if i["split"] == split]
        total = sum(i["length"] for i in chosen) / SAMPLE_RATE
        silent = [sum(journal[i["name"]]["silent"][k] for i in chosen) / max(total, 1) for k in range(len(tracks))]
        print(f"{split:8}{len(chosen):8,}{total / 3600:9.2f}  " + (" " * 11 if stems else "") + "".join(f"{100 * s:8.1f} %" for s in silent))
    print_classes(found)
    print_odd_files(folder, found)
    size = os.path.getsize(os.path.join(folder, "audio.int16"))
    print(f"\n{size / 1e9:.2f} GB" + (f", {clock(seconds)}" if seconds is not None else ""))
    counts = [sum(i["split"] == split for i in items) for split in SPLITS]
    whole, listed = found["settings"].get("songs", counts), found["settings"].get("listed", wanted)
    if counts != whole:
        print(f"NOT COMPLETE: {' / '.join(map(str, counts))} instead of {' / '.join(map(str, whole))} songs")
    if wanted != listed:
        print(f"NOT COMPLETE: {wanted:,} instead of {listed:,} " + ("songs" if stems else "clips in its table, which is cut off or edited: numbers will "
                                                                     "not compare with those of others"))
    print_gaps(found)
    damaged = [i["name"] for i in items if journal[i["name"]].get("damaged")]
    if damaged:
        print(f"DAMAGED: {len(damaged):,} {'songs' if stems else 'files'} are kept as far as they could be read, such as {damaged[0]}")
    return 3 if unexpected or damaged or counts != whole or wanted != listed else 0


def print_classes(found):
    """How many clips of each split have each class."""
    for task, names in found.get("classes", {}).items():
        counts = {split: [0] * len(names) for split in SPLITS}
        for item in found["items"]:
            for c in item.get(task, []):
                counts[item["split"]][c] += 1
        cells = [f"{name} {' / '.join(f'{counts[s][c]:,}' for s in SPLITS)}" for c, name in enumerate(names)]
        print(f"\n{task}, {len(names)} classes: clips in train / valid / test")
        width = max(map(len, cells)) + 3
        for row in range(0, len(cells), max(1, 132 // width)):
            print("  " + "".join(f"{cell:{width}}" for cell in cells[row:row + max(1, 132 // width)]).rstrip())


def print_odd_files(folder, found):
    """The first files that were left out or are odd, and why."""
    unexpected = [entry for entry in found["left_out"] if not entry["expected"]]
    for title, entries in (("left out, as expected", [e for e in found["left_out"] if e["expected"]]), ("LEFT OUT, UNEXPECTEDLY", unexpected),
                           ("kept, but odd", [{"name": n["name"], "reason": n["note"]} for n in found.get("notes", [])])):
        if entries:
            print(f"\n{title}: {len(entries):,}")
            for entry in entries[:8]:
                print(f"  {entry['name']}: {entry['reason']}")
            if len(entries) > 8:
                most = ", ".join(f"{count:,} x {reason}" for reason, count in Counter(e["reason"] for e in entries).most_common(3))
                print(f"  ... all of them in {os.path.join(folder, 'index.json')}; most often: {most}")
    if unexpected:
        print("\nonce these are mended or there, --overwrite=True decodes all anew; without it this folder stays as it is")


def print_gaps(found):
    """What training and evaluation will miss, or should not have."""
    homes = {}
    for item in found["items"]:
        homes.setdefault(item.get("group", item["name"]), set()).add(item["split"])
    torn = [group for group, splits in homes.items() if len(splits) > 1]
    if torn:
        print(f"note: {len(torn):,} groups (artists, albums) have clips in more than one split, as the table says, such as {torn[0]}")
    for split in SPLITS:
        chosen = [i for i in found["items"] if i["split"] == split]
        lack = [name for task, names in found.get("classes", {}).items() for c, name in enumerate(names) if not any(c in i[task] for i in chosen)]
        segments = sum(max(0, (i["length"] - SEGMENT) // SEGMENT_HOP + 1) for i in chosen)
        if not chosen:
            print(f"note: the {split} split is empty")
        elif lack:
            print(f"note: the {split} split has no clip of {', '.join(lack[:8])}" + (f" and {len(lack) - 8} more classes" if len(lack) > 8 else ""))
        elif found["kind"] == "stems" and split != "test" and segments < 7:
            print(f"note: the {split} split has {segments} segments of 6 s; a mix to pre-train on needs 4, of all sources 7")
