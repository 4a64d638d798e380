"""
Turns datasets into the prepared format that training reads (see data.py).

    python prepare_data.py demo                     # synthetic songs and clips, made in seconds
    python prepare_data.py mtat                     # MagnaTagATune, downloaded to data/raw/mtat
    python prepare_data.py mtat --path=FOLDER       # the same from the files that lie there
    python prepare_data.py musdb --hq=True          # MUSDB18-HQ; without --hq MUSDB18
    python prepare_data.py fma --subset=medium      # FMA
    python prepare_data.py gtzan --path=FOLDER      # GTZAN
    python prepare_data.py jamendo --path=FOLDER    # MTG-Jamendo
    python prepare_data.py folder --path=FOLDER     # your own clips: one folder per class, or --csv
    python prepare_data.py stems --path=FOLDER      # your own songs: a folder of stems each

It works like make. The same command goes on where it was stopped, decodes files that are new or
changed, and writes labels and splits as they are today. What is decoded stays.

Exit status: 0 all as expected, 1 an error, 3 some files were left out or are damaged.
"""
import importlib
import inspect
import os
import re
import sys
from collections import Counter

from tqdm import tqdm

import download
import runtime
from data import Prepared
from model import SAMPLE_RATE
from prepare import decode, files, store, summary
from runtime import die

# -----------------------------------------------------------------------------
# settings of all datasets; each dataset's own are in its file in prepare/
out = "data"            # prepared data goes to OUT/NAME/, downloads to OUT/raw/
name = ""               # of the prepared folder; empty: the dataset's
path = ""               # where the dataset lies, packed or unpacked; empty: downloaded
overwrite = False       # delete what is prepared in that folder, and decode all again
seed = 1                # of everything that is random
workers = 0             # processes that decode; 0: one per core
timeout = 120           # seconds after which a decoder is stopped
memory = 4.0            # GB that a decoder may take
min_seconds = 3.862     # files with less audio are left out; the default is one crop
shares = [0.8, 0.1, 0.1]    # train, valid and test of data that has no split of its own
# -----------------------------------------------------------------------------

ELSEWHERE = ", or take the dataset from elsewhere with --path=FOLDER"
ROOMS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "prepare")


def datasets():
    """{name: file} of the files in prepare/ that have a function `listing`."""
    found = {}
    for file in sorted(os.listdir(ROOMS)):
        full = os.path.join(ROOMS, file)
        if file.endswith(".py"):
            with open(full, encoding="utf-8") as f:
                if "\ndef listing(" in f.read():
                    found[file[:-3]] = full
    return found


def check_settings(config):
    runtime.at_least(0, workers=config["workers"], min_seconds=config["min_seconds"])
    runtime.at_least(1, timeout=config["timeout"], memory=config["memory"])
    name, shares = config["name"], config["shares"]
    if not 0 <= config["seed"] < 2 ** 32:
        die(f"seed must be from 0 to {2 ** 32 - 1}, got {config['seed']}")
    if len(shares) != 3 or not (min(shares) >= 0 and 0 < sum(shares) < 1e9):
        die(f"shares must be three numbers, of train, valid and test, got {shares}")
    if config["memory"] > 1024 or config["min_seconds"] > 3600 or config["timeout"] > 1e6:
        die("memory is in GB, min_seconds and timeout in seconds: one of them is too large")
    if name and (not re.fullmatch(r"\w[\w .-]*", name) or name == "raw" or name.endswith(".lock")):
        die(f"name={name} must be a plain name, and not raw: the folder is OUT/NAME")


def call(function, config, **more):
    """Calls a function of a dataset with those of its settings that it asks for."""
    known = {**config, **more}
    return function(**{key: known[key] for key in inspect.signature(function).parameters})


# -----------------------------------------------------------------------------

def list_dataset(room, config, folder):
    """The dataset's store.Listing; what is neither there nor decoded yet is downloaded."""
    path, csv = config["path"], config.get("csv")
    if path and not os.path.isdir(path):
        return list_again(folder, f"path={path} is not a folder")
    if csv and not os.path.isfile(csv):
        return list_again(folder, f"csv={csv} is not a file")
    if csv:
        return call(room.listing, config, files={})  # the table names the files
    if path:
        return call(room.listing, config, files=files.inventory(path))
    if not hasattr(room, "downloads"):
        die(f"give --path=FOLDER: {room.__doc__.strip().splitlines()[0]}")

    raw, tables, archives = call(room.downloads, config)
    raw = os.path.join(config["out"], "raw", raw)
    with store.locked(raw):  # protocols and subsets share their downloads
        # an archive is not needed once all of it is decoded, or unpacked by hand
        download.fetch(tables, raw, ELSEWHERE)
        packed = {re.sub(r"\.\d{3}$", "", url.rsplit("/", 1)[1]) for url, _ in archives}
        listed = call(room.listing, config, files=files.inventory(raw, skip=packed))
        known = store.read_journal(folder)
        lacking = [item for item in listed.items if item["name"] not in known]
        if listed.sources or listed.items and not lacking:
            return listed
        if known and not listed.items:
            return list_again(folder, f"{raw} is empty")
        download.fetch(archives, raw, ELSEWHERE)
        return call(room.listing, config, files=files.inventory(raw))


def list_again(folder, problem):
    """The listing of the last run, where its files are gone. Ends the script if there was none."""
    listed = store.last_listing(folder)
    if not listed:
        die(f"{problem}: name the place where the dataset lies")
    print(f"note: {problem}: {folder} keeps the clips and labels of the last run")
    return listed


def prepare(folder, listed, config):
    """Brings one folder up to date with its listing, and prints what came of it.

    Returns the exit status.
    """
    counts = Counter(item["name"] for item in listed.items)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        die(f"{len(twice):,} files are listed twice, such as {twice[0]}")
    store.claim(folder, listed.of, config["overwrite"])
    journal = store.read_journal(folder)
    store.check_audio(folder, journal)
    new, again = store.to_decode(listed.items, listed.sources, journal)
    if new or again:
        if again:
            print(f"{folder}: {len(again):,} files have changed, or may succeed now")
        journal = make_audio(folder, listed, new + again, config)
    elif journal:
        print(f"{folder}: nothing new to decode")

    # what training has seen may change with the labels and splits of today
    before = trained_on(folder, listed.kind)
    keys = ("min_seconds", "shares", "seed")
    index = store.build_index(listed, journal, {key: config[key] for key in keys})
    if not index["items"]:
        unexpected = [entry for entry in index["left_out"] if not entry["expected"]]
        such = "".join(f", such as {e['name']} ({e['reason']})" for e in unexpected[:1])
        die(f"{folder}: none of {len(listed.items):,} files can be used{such}: is --path right, "
            "and all unpacked?")
    store.write_index(folder, index)
    size = os.path.getsize(os.path.join(folder, "audio.int16"))
    summary.show(folder, index, journal, size)
    if before not in (None, trained_on(folder, listed.kind)):
        print(f"note: splits or labels of {folder} are not those of the last run. What was trained "
              "on them is not resumed nor evaluated on this data: train again, or keep both with "
              "--name=NAME")
    return 3 if summary.problems(index) else 0


def trained_on(folder, kind):
    """The hash of what training sees of a folder, or None if nothing can be trained on it."""
    try:
        return Prepared(folder, kind).trained_on()
    except ValueError:
        return None


def make_audio(folder, listed, names, config):
    """Decodes the items of these names, or makes them. Returns the journal."""
    jobs = [(name, listed.sources[name]) for name in names]
    if listed.make:
        made = ((name, *listed.make(source)) for name, source in jobs)
    else:
        workers = min(config["workers"] or runtime.cores(), len(jobs))
        decoded = decode.decode_all(jobs, SAMPLE_RATE, workers, config["timeout"],
                                    int(config["memory"] * 2 ** 30))
        made = ((job[0], record, samples) for job, record, samples in decoded)
    unit = "song" if listed.kind == "stems" else "file"
    bar = tqdm(made, folder, len(jobs), unit=unit, smoothing=0.05)
    try:
        store.append(folder, listed.of, bar, listed.sources)
    except KeyboardInterrupt:
        die("interrupted: the same command goes on from here")
    return store.read_journal(folder)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    rooms = datasets()
    names = [arg for arg in argv if not arg.startswith("-")]
    chosen = [rooms[name] for name in names if name in rooms]
    config, _ = runtime.configure(globals(), argv, configs=False, more=chosen or rooms.values())
    if len(names) != 1 or not chosen:
        other = f", not {' '.join(names)}" if names else ""
        die(f"name one dataset: python prepare_data.py {'|'.join(rooms)}{other}")
    check_settings(config)
    room = importlib.import_module(f"prepare.{names[0]}")
    if names == ["demo"]:  # two folders, made from nothing
        status = 0
        for listed in call(room.listing, config):
            folder = os.path.join(config["out"], listed.name)
            with store.locked(folder):
                status = max(status, prepare(folder, listed, config))
        return status
    folder = os.path.join(config["out"], config["name"] or names[0])
    with store.locked(folder):
        return prepare(folder, list_dataset(room, config, folder), config)


if __name__ == "__main__":
    runtime.script(main)
