"""
Turns datasets into the prepared format that training reads (see data.py).

    python prepare_data.py demo                            # synthetic songs and clips, made from a seed in seconds
    python prepare_data.py mtat                            # MagnaTagATune, downloaded to data/raw/mtat
    python prepare_data.py mtat --path=FOLDER              # the same from the zip parts or the mp3 files that lie there
    python prepare_data.py musdb --hq=True                 # MUSDB18-HQ; without --hq MUSDB18, with --download=True its 7-second previews
    python prepare_data.py fma --subset=medium             # FMA
    python prepare_data.py gtzan --path=FOLDER             # GTZAN
    python prepare_data.py folder --path=FOLDER            # your own clips: one folder per class, or --csv=FILE
    python prepare_data.py stems --path=FOLDER             # your own songs: a folder each, with vocals.wav, drums.wav, bass.wav, other.wav

Killed or out of disk, the same command goes on where it was. Once complete, it prints the summary again and does nothing else.
Exit status: 0 all as expected, 1 an error, 3 prepared, but some files were left out or cut off unexpectedly (index.json says which and why).
"""
import errno
import hashlib
import importlib.util
import os
import re
import shutil
import sys
import time
from collections import Counter

import numpy as np

import collect
import labels
import synth
from data import SPLITS, TRACKS
from decode import describe, to_int16
from download import SOURCES, contents, fetch_missing, inventory, size_of
from model import SAMPLE_RATE
from runtime import at_least, choose, configure, die, keep_freed_memory
from workers import Workers

out = "data"                # prepared data goes to OUT/NAME/, downloads to OUT/raw/
name = ""                   # of the prepared folder; empty: the dataset's
path = ""                   # where the dataset lies, packed or unpacked; empty: downloaded
overwrite = False           # replace prepared data that is already there
relabel = False             # change splits and labels of prepared data, without decoding again
seed = 1                    # of everything that is random
workers = 0                 # processes that decode; 0: one per core
timeout = 120               # seconds after which a decoder is stopped
memory = 4.0                # GB that a decoder may take
min_seconds = 3.862         # files with less audio are left out; the default is one crop
protocol = "clean"          # mtat: clean (at least one of 50 tags, the paper's) or full (every clip)
subset = "medium_minus_small"   # fma: medium_minus_small (what the paper's first version calls medium), medium, small
hq = False                  # musdb: download MUSDB18-HQ, wav files, 23 GB, no ffmpeg needed
download = False            # musdb: the 7-second previews, 0.15 GB, instead of the whole songs (with --path too)
csv = ""                    # folder: a CSV file with columns path, label and, if you like, split and group, artist or album
separator = ""              # folder: the character between several labels in one cell of the CSV, such as ;
group = ""                  # folder: the CSV's column of what must not be split up; empty: group, artist or album if there is one
shares = [0.8, 0.1, 0.1]    # folder, stems: of train, valid and test, where the data has no split of its own
songs = [40, 8, 6]          # demo: songs with stems for train, valid, test
song_seconds = 24           # demo: length of each
clips = [96, 40, 200]      # demo: labelled clips for train, valid, test; each from a song of its own
clip_seconds = 6            # demo: length of each

KEPT = {"path", "csv", "separator", "group", "shares", "seed", "min_seconds", "protocol", "subset", "hq", "download"}


def find(raw, sources, archives=True):
    """The inventory of --path, or of OUT/raw/RAW after downloading what is missing there."""
    if path and not os.path.isdir(path):
        die(f"path={path} is not a folder")
    if path:
        return inventory(path, archives)
    folder = os.path.join(out, "raw", raw)
    with collect.locked(folder):  # protocols and subsets share their downloads
        fetch_missing([s for s in sources if not relabel or s[0].endswith(("csv", "metadata.zip"))], folder)  # labels need no audio
    return inventory(folder)


# -----------------------------------------------------------------------------
# the same for every dataset

def settings_of(dataset):
    """What the prepared data depends on."""
    keys = {"mtat": ["protocol"], "fma": ["subset"], "musdb": ["hq", "download"], "folder": ["csv", "separator", "group", "shares", "seed"],
            "stems": ["shares", "seed"]}.get(dataset, [])
    settings = {"dataset": dataset, "path": os.path.abspath(path) if path else "", "min_seconds": min_seconds, **{k: globals()[k] for k in keys}}
    if settings.get("csv") and os.path.isfile(csv):
        with open(csv, "rb") as f:
            settings.update(csv=os.path.abspath(csv), csv_sha256=hashlib.sha256(f.read()).hexdigest())
    return settings


def standing(folder, settings):
    """True if the folder is complete and made with these settings: then there is nothing to do. Ends the script if with others."""
    collect.refuse_strange_folder(folder)
    found = collect.read_index(folder)
    if relabel and not found:
        die(f"relabel=True, but there is no {folder} to change")
    if found:
        collect.forget_replaced(folder)
    if not found or overwrite or relabel:
        return False
    old = found.get("settings", {})
    changed = {k: f"{k}: {old.get(k)!r} -> {v!r}" for k, v in settings.items() if old.get(k) != v and (k not in ("path", "csv") or v)}
    changed.update({k: "what the CSV says has changed" for k in changed if k == "csv_sha256"})
    if changed:
        labels_only = changed.keys() <= {"csv", "csv_sha256", "separator", "group", "shares", "seed"} or "full" == old.get("protocol")
        die(f"{folder} was made with other settings ({'; '.join(changed.values())}): --name=NAME writes elsewhere, --overwrite=True makes it anew"
            + (", --relabel=True changes splits and labels of the files that were decoded for it" if labels_only else ""))
    print(f"{folder} is there already: nothing done (--overwrite=True makes it anew)")
    return True


def change_labels(folder, kind, settings, items, left_out, **more):
    """Writes the index of a complete folder anew, for these items. Returns the exit status."""
    journal, old = collect.read_journal(folder), collect.read_index(folder)["settings"]
    fixed = [f"its {k} is {old.get(k)!r}" for k in ("dataset", "min_seconds", "hq", "download") if old.get(k) != settings.get(k)]
    unknown = sorted({i["name"] for i in items} - {r["name"] for r in journal})
    if unknown:
        fixed.append(f"{len(unknown):,} files have not been decoded, such as {unknown[0]}")
    if fixed:
        die(f"{folder} cannot be relabelled: {fixed[0]}; --overwrite=True makes it anew")
    collect.index(folder, folder, journal, kind, items, left_out, settings, **more)
    return collect.summarise(folder)


def prepare(folder, kind, settings, items, sources, left_out, **more):
    """Decodes items (index entries) from sources {name: [source per track]}, and writes their folder. Returns the exit status."""
    began = time.monotonic()
    keep_freed_memory()
    names = [i["name"] for i in items]
    if len(set(names)) < len(names):
        twice = [name for name, count in Counter(names).items() if count > 1]
        die(f"{len(twice):,} files are listed twice, such as {twice[0]}")
    if relabel:
        return change_labels(folder, kind, settings, items, left_out, **more)
    jobs = [{"name": i["name"], "tracks": sources.get(i["name"]), "least": min_seconds,
             "published": settings["dataset"] not in ("folder", "stems")} for i in items]
    for job in jobs:
        job["sizes"] = [size_of(s) if isinstance(s, dict) else "" for s in job["tracks"] or []]
        if None in job["sizes"]:
            job["tracks"] = None
    count = workers or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count()))
    pool = Workers(count, SAMPLE_RATE, int(memory * 2 ** 30), timeout)

    def make(i):
        return pool.decode(jobs[i]) if jobs[i]["tracks"] else ({"reason": "is not there"}, None)
    try:
        decoding = {k: settings[k] for k in ("dataset", "path", "min_seconds")}  # splits and labels may change between a stop and going on
        journal = collect.collect(folder, names, make, {**decoding, "files": collect.fingerprint(jobs)}, len(TRACKS) if kind == "stems" else 1,
                                  count, overwrite)
    finally:
        pool.close()
    collect.index(folder, folder + ".partial", journal, kind, items, left_out, settings, **more)
    collect.put_in_place(folder)
    return collect.summarise(folder, time.monotonic() - began)


def refuse_other(name, first, second):
    """Ends the script if two copies of what should be one file differ in size: one is cut off, or something else."""
    def place(source):
        return source["file"] + (f" in {source['zip'][0]}" if "zip" in source else "")
    same_kind = os.path.splitext(first["file"])[1] == os.path.splitext(second["file"])[1]
    if same_kind and (size_of(first) or [0])[0] != (size_of(second) or [0])[0]:
        die(f"two files that differ would be {name}: {place(first)} and {place(second)}: move the wrong one out of --path")


def by_name(files, name_of, listed):
    """{name: source} of the audio files that are listed; of several copies the unpacked one."""
    wanted, found = {i["name"] for i in listed[1]}, {}
    for file, source in files.items():
        name = name_of(file)
        if name in wanted and os.path.splitext(file)[1].lower() in labels.AUDIO:
            refuse_other(name, found.setdefault(name, source), source)
    return found


def prepare_clips(folder, settings, listed, sources):
    classes, items, left_out = listed
    return prepare(folder, "clips", settings, items, {name: [source] for name, source in sources.items()}, left_out, classes=classes,
                   multilabel=[task for task in classes if task == "tags"])


# -----------------------------------------------------------------------------
# the datasets

def prepare_mtat(folder, settings):
    choose("protocol", protocol, ["clean", "full"])
    files = find("mtat", SOURCES["mtat"])
    listed = labels.mtat(contents(files, "annotations_final.csv"), contents(files, "clip_info_final.csv", needed=False), protocol)
    settings.update(what=f"MagnaTagATune, {protocol} protocol, 50 tags", listed=labels.MTAT_CLIPS[protocol])
    return prepare_clips(folder, settings, listed, by_name(files, lambda file: "/".join(file.split("/")[-2:]), listed))


def prepare_fma(folder, settings):
    choose("subset", subset, list(labels.FMA_SUBSETS))
    files = find("fma", SOURCES["fma_small" if subset == "small" else "fma_medium"])
    what = {"medium_minus_small": "FMA, medium without small (17,000 tracks; what the paper's first version calls medium)",
            "medium": "FMA, medium (25,000 tracks, small ones included)", "small": "FMA, small (8,000 tracks)"}[subset]
    settings.update(what=what, listed=labels.FMA_TRACKS[subset])
    listed = labels.fma(contents(files, "tracks.csv"), subset)
    return prepare_clips(folder, settings, listed, by_name(files, lambda file: file.split("/")[-1], listed))


def prepare_gtzan(folder, settings):
    if not path:
        die("GTZAN has no working official address any more: give --path=FOLDER, with genres/blues/blues.00000.wav (or .au) in it, unpacked")
    listed = labels.gtzan()
    sources = by_name(find("gtzan", []), lambda file: os.path.splitext(file.split("/")[-1])[0], listed)
    return prepare_clips(folder, {**settings, "what": "GTZAN, fault-filtered split 443 / 197 / 290"}, listed, sources)


def prepare_own(folder, settings, listed, files):
    classes, real = listed[0].get("genre", []), {}
    if len(classes) == 1:
        die(f"all {settings['what']} are of one class, {classes[0]}: give one folder per class, or several labels with --csv=FILE")
    for name, source in sorted(files.items()):
        if (first := real.setdefault(os.path.realpath(source["file"]), name)) != name:
            die(f"{first} and {name} are the same file: a clip has one place, or it may come into two splits")
    return prepare_clips(folder, settings, listed, files)


def prepare_folder(folder, settings):
    if csv:
        root = path or os.path.dirname(csv)
        with open(csv, "rb") as f:
            try:
                listed = labels.from_csv(f.read(), separator, group)
            except ValueError as e:
                die(f"{csv}: {e}")
        files = {i["name"]: {"file": os.path.join(root, i["name"])} for i in listed[1]}
        files = {name: source for name, source in files.items() if os.path.isfile(source["file"])}
        return prepare_own(folder, {**settings, "what": f"clips of {csv}"}, listed, files)
    if separator or group:
        die("separator and group are for a table: give --csv=FILE, or leave them away")
    if not path:
        die("give --path=FOLDER with one folder of audio files per class, or --csv=FILE")
    every = find("folder", [], archives=False) if not relabel or os.path.isdir(path) else {}
    if relabel:  # what was decoded stays, even if its file is gone
        every = {r["name"]: {"file": os.path.join(path, r["name"])} for r in collect.read_journal(folder)} | every
    files = {name: source for name, source in every.items() if os.path.splitext(name)[1].lower() in labels.AUDIO}
    if len(files) < len(every):
        print(f"passed over {len(every) - len(files):,} files that are not audio, such as {next(n for n in every if n not in files)}")
    if not files:
        die(f"no audio files under {path}")
    return prepare_own(folder, {**settings, "what": f"clips of {path}"}, labels.folder(sorted(files)), files)


def prepare_stems(folder, settings):
    if not path:
        die("give --path=FOLDER with one folder per song, each with vocals.wav, drums.wav, bass.wav, other.wav and, if there is one, mixture.wav")
    if not relabel or os.path.isdir(path):
        sources, left_out = labels.song_sources(find("stems", [], archives=False), whole=False)
    else:
        sources, left_out = {}, collect.read_index(folder)["left_out"]
    if relabel:  # what was decoded stays, even if its files are gone
        sources = dict(sorted((dict.fromkeys(r["name"] for r in collect.read_journal(folder)) | sources).items()))
        left_out = [entry for entry in left_out if entry["name"] not in sources]
    if not sources:
        such = f": {left_out[0]['name']} {left_out[0]['reason']}" if left_out else ""
        die(f"no song folders with vocals.wav, drums.wav, bass.wav or other.wav under {path}{such}")
    return prepare(folder, "stems", {**settings, "what": f"songs of {path}"}, labels.stems(list(sources)), sources, left_out)


def prepare_musdb(folder, settings):
    import yaml
    ffmpeg = all(shutil.which(program) for program in ("ffmpeg", "ffprobe"))
    no_ffmpeg = ("the .stem.mp4 files of MUSDB18 need ffmpeg and ffprobe (apt install ffmpeg, brew install ffmpeg, conda install ffmpeg); "
                 "MUSDB18-HQ does without: --hq=True")
    if not (path or hq or ffmpeg):
        die(no_ffmpeg)
    package = importlib.util.find_spec("musdb").submodule_search_locations[0]  # not imported: that fails without ffmpeg
    with open(os.path.join(package, "configs", "mus.yaml"), encoding="utf-8") as f:
        setup = yaml.safe_load(f)
    key = "musdb_7s" if download else "musdb_hq" if hq else "musdb"
    files = find(key, [(setup["sample-url"], "size:147209385")] if download else SOURCES[key])
    mp4 = {name.removesuffix(".stem.mp4"): source for name, source in files.items() if name.endswith(".stem.mp4")}
    wav = {name: source for name, source in files.items() if name.endswith(".wav") and labels.split_of_folder(os.path.dirname(name))}
    wav, left_out = labels.song_sources(wav, whole=True)
    songs = wav or {song: [{**source, "stream": k, "of": 5} for k in range(5)] for song, source in mp4.items()}
    copies = {}
    for song in sorted(songs, key=lambda song: "zip" in next(t for t in songs[song] if isinstance(t, dict))):
        if labels.split_of_folder(song):  # of a song that lies there packed and unpacked, the unpacked one
            first = copies.setdefault((labels.split_of_folder(song), song.split("/")[-1]), song)
            for ours, other in zip(songs[first], songs[song]):
                refuse_other(song.split("/")[-1], ours, other)
    songs = {song: songs[song] for song in sorted(copies.values())}
    if not songs:
        die(f"no train/*/mixture.wav nor train/*.stem.mp4 under {path or os.path.join(out, 'raw', key)}: --path must be the folder that holds train and test")
    if any("stream" in t for tracks in songs.values() for t in tracks if isinstance(t, dict)) and not ffmpeg:
        die(no_ffmpeg)
    items = labels.musdb(songs, setup["validation_tracks"])
    whole = {"listed": 144} if download else {"songs": [86, 14, 50]}
    what = "MUSDB18" + (", previews of 7 seconds" if download else "-HQ" if wav else "")
    sources = {song.split("/")[-1]: tracks for song, tracks in songs.items()}
    left_out = [{**entry, "name": entry["name"].split("/")[-1]} for entry in left_out if entry["name"].split("/")[-1] not in sources]
    return prepare(folder, "stems", {**settings, "what": what, **whole}, items, sources, left_out if wav else [])


def prepare_demo():
    """Songs with four stems to separate, and clips of other songs with tags and a genre; few labels, so that what separation taught can matter."""
    if len(songs) != 3 or len(clips) != 3 or min(*songs, *clips, song_seconds, clip_seconds) < 1:
        die("songs and clips are three positive numbers each, for train, valid and test, and the lengths are positive")
    classes = {"tags": list(synth.TAGS), "genre": list(synth.GENRES)}

    def sketch(kind, i):
        rng = np.random.default_rng([seed, ("stems", "clips").index(kind), i])
        return synth.sketch(rng, full=kind == "stems"), rng

    def write(name, kind, counts, seconds, **more):
        folder, tracks = os.path.join(out, name), TRACKS if kind == "stems" else TRACKS[:1]
        settings = {"dataset": name, "what": "synthetic music", "seed": seed, "counts": counts, "seconds": seconds}
        splits = [split for split, count in zip(SPLITS, counts) for _ in range(count)]
        items = [{"name": f"{name[5:-1]} {i}", "split": split} for i, split in enumerate(splits)]
        for i, item in enumerate(items if kind == "clips" else []):
            song, _ = sketch(kind, i)
            item.update(genre=[classes["genre"].index(song["genre"])], tags=sorted(classes["tags"].index(t) for t in synth.labels(song)))

        def make(i):
            song, rng = sketch(kind, i)
            waves = synth.render(song, seconds * SAMPLE_RATE, rng)
            return describe(to_int16(np.stack([waves[t] for t in tracks])), SAMPLE_RATE)
        with collect.locked(folder):
            if not standing(folder, settings):
                journal = collect.collect(folder, [i["name"] for i in items], make, settings, len(tracks), 1, overwrite)
                collect.index(folder, folder + ".partial", journal, kind, items, [], settings, **more)
                collect.put_in_place(folder)
            return collect.summarise(folder)
    return max(write("demo_songs", "stems", songs, song_seconds),
               write("demo_clips", "clips", clips, clip_seconds, classes=classes, multilabel=["tags"]))


DATASETS = {"demo": prepare_demo, "musdb": prepare_musdb, "mtat": prepare_mtat, "fma": prepare_fma, "gtzan": prepare_gtzan,
            "folder": prepare_folder, "stems": prepare_stems}


def main(argv=None):
    global path, csv, out
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file's name is not a reason to stop
    _, names = configure(globals(), argv, configs=False)
    if len(names) != 1 or names[0] not in DATASETS:
        die(f"name one dataset: python prepare_data.py {'|'.join(DATASETS)}" + (f", not {' '.join(names)}" if names else ""))
    path, csv, out = os.path.expanduser(path), os.path.expanduser(csv), os.path.expanduser(out)
    at_least(0, workers=workers, min_seconds=min_seconds, seed=seed)
    at_least(1, timeout=timeout, memory=memory)
    if len(shares) != 3 or not (min(shares) >= 0 and 0 < sum(shares) < 1e9):
        die(f"shares must be three numbers, of train, valid and test, got {shares}")
    if memory > 1024 or min_seconds > 3600:
        die(f"memory is in GB and min_seconds in seconds, got {memory:g} and {min_seconds:g}")
    if name and (not re.fullmatch(r"\w[\w .-]*", name) or name == "raw" or name.endswith((".partial", ".lock"))):
        die(f"name={name} must be a plain name, and not raw: the folder is OUT/NAME")
    if overwrite and relabel:
        die("relabel=True keeps the audio, overwrite=True decodes it again: give one of the two")
    if names == ["demo"]:
        return prepare_demo()
    folder = os.path.join(out, name or names[0])
    old, listing = (collect.read_index(folder) or {"settings": {}})["settings"], False
    moved = csv and not os.path.isfile(csv) and os.path.abspath(csv) == old.get("csv")  # as it is complete, it is not needed
    if old.get("dataset") == names[0] and (relabel or names[0] in ("folder", "stems") and (moved or not (path or csv))):  # what is not given stays
        given = {a.removeprefix("--").partition("=")[0] for a in (sys.argv[1:] if argv is None else argv)}
        globals().update({k: old[k] for k in KEPT & old.keys() - given})
        listing = not (relabel or overwrite)
    if csv and not listing and not os.path.isfile(csv):
        die(f"csv={csv} is not a file")
    settings = settings_of(names[0])
    if listing:
        settings.update({k: old[k] for k in ("csv", "csv_sha256") if k in old})  # as it was then
    with collect.locked(folder):
        return collect.summarise(folder) if standing(folder, settings) else DATASETS[names[0]](folder, settings)


def run():
    try:
        sys.exit(main())
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        die(f"{e}" + (f": make room where {out}/ lies, and the same command goes on from here" if full else ""))
    except ValueError as e:
        die(e)
    except KeyboardInterrupt:
        die("interrupted: the same command goes on from here")


if __name__ == "__main__":
    run()
