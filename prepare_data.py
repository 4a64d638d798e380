"""
Turns datasets into the prepared format that training reads (see data.py).

    python prepare_data.py demo                     # synthetic songs and clips, made in seconds
    python prepare_data.py mtat                     # MagnaTagATune, downloaded to data/raw/mtat
    python prepare_data.py mtat --path=FOLDER       # the same from existing files
    python prepare_data.py musdb --hq=True          # MUSDB18-HQ; without --hq MUSDB18
    python prepare_data.py fma --subset=medium      # FMA
    python prepare_data.py gtzan --path=FOLDER      # GTZAN
    python prepare_data.py jamendo --path=FOLDER    # MTG-Jamendo
    python prepare_data.py folder --path=FOLDER     # your own clips: one folder per class, or --csv
    python prepare_data.py stems --path=FOLDER      # your own songs: a folder of stems each

It works like make: the same command resumes after an interruption, decodes only new and changed
files, and updates labels and splits. Exit status 3: some files were left out or are damaged.
"""
import importlib
import inspect
import os
import re
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from common import download, settings
from common.device import cores
from common.settings import die
from data import Prepared
from model import SAMPLE_RATE
from prepare import decode, files, store, summary

# -----------------------------------------------------------------------------
# settings of all datasets; those of a single dataset are in its file in prepare/
out = "data"            # prepared data is in OUT/NAME/, downloads in OUT/raw/
name = ""               # of the prepared folder; empty: the dataset's
path = ""               # folder of the dataset, packed or unpacked; empty: download it
overwrite = False       # delete the prepared folder's content and decode everything again
seed = 1                # for random splits and the demo
workers = 0             # decoder processes; 0: one per core
timeout = 120           # seconds per file before its decoder is stopped
memory = 4.0            # GB per decoder
min_seconds = 3.862     # shorter files are left out; the default is one crop
shares = [0.8, 0.1, 0.1]    # of train, valid and test, for data without splits
# -----------------------------------------------------------------------------

ELSEWHERE = ", or use existing files with --path=FOLDER"


def datasets():
    """{name: file} of the files in prepare/ with a function `listing`."""
    folder = Path(__file__).resolve().parent / "prepare"
    return {file.stem: str(file) for file in sorted(folder.glob("*.py"))
            if "\ndef listing(" in file.read_text(encoding="utf-8")}


def check_settings(config):
    settings.at_least(0, workers=config["workers"])
    settings.within(0, 3600, min_seconds=config["min_seconds"])     # above: the wrong unit
    settings.within(1, 1024, memory=config["memory"])
    settings.within(1, 1_000_000, timeout=config["timeout"])
    settings.within(0, 2 ** 32 - 1, seed=config["seed"])
    name, shares = config["name"], config["shares"]
    if len(shares) != 3 or not (min(shares) >= 0 and 0 < sum(shares) < 1e9):
        die(f"shares must be three numbers, of train, valid and test, got {shares}")
    if name and (not re.fullmatch(r"\w[\w .-]*", name) or name == "raw" or name.endswith(".lock")):
        die(f"name={name} must be a plain name other than raw: the folder is OUT/NAME")


def call(function, config, **more):
    """Calls a function of a dataset with those settings that are among its parameters."""
    known = {**config, **more}
    return function(**{key: known[key] for key in inspect.signature(function).parameters})


def list_dataset(dataset, config, folder):
    """The dataset's store.Listing; downloads what is neither on disk nor decoded yet."""
    path, csv = config["path"], config.get("csv")
    if path and not os.path.isdir(path):
        return list_again(folder, config, f"path={path} is not a folder")
    if csv and not os.path.isfile(csv):
        return list_again(folder, config, f"csv={csv} is not a file")
    if path or csv:     # a table names the files
        return call(dataset.listing, config, files={} if csv else files.inventory(path))
    if not hasattr(dataset, "downloads"):
        return list_again(folder, config, f"no --path=FOLDER ({dataset.__doc__.splitlines()[1]})")

    raw_name, tables, archives = call(dataset.downloads, config)
    raw = os.path.join(config["out"], "raw", raw_name)
    with store.locked(raw):  # protocols and subsets share their downloads
        # an archive is not needed once all of it is decoded, or if the user has unpacked it
        download.fetch(tables, raw, ELSEWHERE)
        packed = {re.sub(r"\.\d{3}$", "", url.rsplit("/", 1)[1]) for url, _ in archives}
        listed = call(dataset.listing, config, files=files.inventory(raw, skip=packed))
        known = {} if config["overwrite"] else store.read_journal(folder)
        if listed.sources or listed.items and all(i["name"] in known for i in listed.items):
            return listed
        if known and not listed.items:
            return list_again(folder, config, f"{raw} is empty")
        download.fetch(archives, raw, ELSEWHERE)
        return call(dataset.listing, config, files=files.inventory(raw))


def list_again(folder, config, problem):
    """The listing of the last run, for when its files are gone. Exits if there was none."""
    listed = None if config["overwrite"] else store.last_listing(folder)
    if not listed:
        die(f"{problem}: where is the dataset?")
    print(f"note: {problem}: {folder} keeps the clips and labels of the last run")
    return listed


def prepare(folder, listed, config):
    """Updates one folder to its listing, prints a summary and returns the exit status."""
    for name, count in Counter(item["name"] for item in listed.items).most_common(1):
        if count > 1:
            die(f"{name} is listed {count} times: every name must be unique")
    store.claim(folder, listed.source_id, config["overwrite"])
    journal = store.read_journal(folder)
    new, again = store.to_decode(listed.items, listed.sources, journal)
    if again:
        print(f"{folder}: {len(again):,} files have changed, or may succeed this time")
    if new or again:
        journal = make_audio(folder, listed, new + again, config)
    elif journal:
        print(f"{folder}: nothing new to decode")

    before = trained_on(folder, listed.kind)
    keys = ("min_seconds", "shares", "seed")
    index = store.build_index(listed, journal, {key: config[key] for key in keys})
    if not index["items"]:
        example = next((f", such as {entry['name']} ({entry['reason']})"
                        for entry in index["left_out"] if not entry["expected"]), "")
        die(f"{folder}: none of {len(listed.items):,} files is usable{example}: check --path, and "
            "unpack archives other than zip")
    store.write_index(folder, index)
    complete = summary.show(folder, index, journal)
    if before not in (None, trained_on(folder, listed.kind)):
        print(f"note: splits or labels of {folder} have changed since the last run. Networks "
              "trained on the old ones cannot be resumed or evaluated on this data: train again, "
              "or keep both with --name=NAME")
    return 0 if complete else 3


def trained_on(folder, kind):
    """Prepared.trained_on() of a folder; None if the folder is not complete."""
    try:
        return Prepared(folder, kind).trained_on()
    except ValueError:
        return None


def make_audio(folder, listed, names, config):
    """Decodes or synthesises the items of these names. Returns the journal."""
    jobs = [(name, listed.sources[name]) for name in names]
    if listed.make:
        made = ((name, *listed.make(source)) for name, source in jobs)
    else:
        workers = min(config["workers"] or cores(), len(jobs))
        made = decode.decode_all(jobs, SAMPLE_RATE, workers, config["timeout"],
                                 int(config["memory"] * 2 ** 30))
    bar = tqdm(made, folder, len(jobs), smoothing=0.05,
               unit="song" if listed.kind == "stems" else "file")
    try:
        store.append(folder, listed.source_id, bar, listed.sources)
    except KeyboardInterrupt:
        die("interrupted: run the same command again to resume")
    return store.read_journal(folder)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    known = datasets()
    names = [arg for arg in argv if not arg.startswith("-")]
    chosen = [known[name] for name in names if name in known]
    config, _ = settings.configure(globals(), argv, configs=False, more=chosen or known.values())
    settings.choose("the dataset", " ".join(names), known)
    check_settings(config)
    dataset = importlib.import_module(f"prepare.{names[0]}")
    if names == ["demo"]:  # two folders of synthetic music
        status = 0
        for listed in call(dataset.listing, config):
            folder = os.path.join(config["out"], listed.name)
            with store.locked(folder):
                status = max(status, prepare(folder, listed, config))
        return status
    folder = os.path.join(config["out"], config["name"] or names[0])
    with store.locked(folder):
        return prepare(folder, list_dataset(dataset, config, folder), config)


if __name__ == "__main__":
    settings.script(main)
