"""
Listens to songs: their sources as sound files, their tags as tables.

    python listen.py song.mp3                       # the authors' own networks, fetched once
    python listen.py song.mp3 FOLDER --separator=ckpt/vocals.pt --tagger=ckpt/mtat.pt
    python listen.py song.mp3 --tagger=ckpt/mtat.pt,ckpt/fma.pt     # tags only, of two networks
    python listen.py song.mp3 --separator=released:multisource --format=flac

Any file that FFmpeg reads, of any rate, channels and length. Writes to listened/SONG/:
vocals.wav and so on at the song's own rate and channels; accompaniment.wav, which is the song
without vocals; remainder.wav, what no source has; and per tagger a .json and a .csv of the tags
along time. Sources and remainder add up to the song. With --report=True also song.html, a page to
look at and to listen to. What is finished is skipped, so the same command goes on after a stop.

In wav and flac this is true to the last of 16 bits. mp3 and opus lose something: opus is always at
48 kHz, and the encoder of mp3 makes sources 3 to 5 % quieter. A row of the tags is a crop of 3.86
seconds; what is left over at the end of a song has no row.
"""
import contextlib
import csv
import glob
import json
import math
import os
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

import audio
import eval
import model
import page
import runtime
import training
from model import SAMPLE_RATE
from prepare.files import is_audio, walk
from runtime import die

# -----------------------------------------------------------------------------
# settings
separator = ""          # checkpoint; without separator and tagger: released:vocals ...
tagger = [""]           # checkpoints, with commas between; ... and released:mtat_vocals
out = "listened"        # folder to write to
format = "wav"          # of the sources: wav, flac, mp3, opus
hop = 0.0               # seconds from one row of the tags to the next; 0: half a crop, 1.92
report = False          # also write a page to look at and to listen to
overwrite = False       # replace what is there
device = ""             # cpu, cuda, mps; empty: cuda if there is one
# -----------------------------------------------------------------------------

STEP = (model.WINDOW - model.OVERLAP) * model.HOP   # 153,600 samples at 16 kHz, 9.6 s
PIECE = 5 * STEP // SAMPLE_RATE         # 48 s: windows begin at whole samples of any rate
MOST = 1 << 24                          # samples of a piece, all channels
WITHOUT = " (without --overwrite)"
RESERVED = ("mixture", "accompaniment", "remainder")


# -----------------------------------------------------------------------------
# a song in pieces, so that the memory does not grow with it

def pieces(blocks, length, left, right):
    """Cuts blocks (C, n) into pieces of `length` samples, with what stands around them.

    Yields (samples, at, begin): samples (C, n) begin at sample `at` of the song, and the piece
    at sample `begin`. They have up to `left` samples in front and `right` behind it.
    """
    blocks, kept, at, begin = iter(blocks), [], 0, 0
    while True:
        held = sum(block.shape[1] for block in kept)
        while held < begin - at + length + right and (block := next(blocks, None)) is not None:
            kept.append(block)
            held += block.shape[1]
        if held <= begin - at:
            return
        samples = np.concatenate(kept, 1)
        yield samples[:, :begin - at + length + right], at, begin
        begin += length
        drop = max(0, begin - left - at)
        kept, at = [samples[:, drop:]], at + drop


def sizes(rate, channels, taggers):
    """(samples of a piece, in front of it, behind it) at a rate.

    Masks reach a window to either side, tags a crop and a moment. All three are whole samples,
    whole steps of windows and whole units of the resampling, so that pieces give what the whole
    song gives.
    """
    second = rate * PIECE
    crops = [net.crop + SAMPLE_RATE for net, _ in taggers.values()]
    around = 1, max(1, math.ceil(max(crops, default=0) / STEP))
    if rate % 5:        # only whole pieces are whole samples at such a rate
        around = 5, 5 * math.ceil(around[1] / 5)
    length = second * min(4, max(1, MOST // (second * channels)))
    return length, *(count * STEP * rate // SAMPLE_RATE for count in around)


def tag_rows(net, wave, at, begin, length):
    """Scores (K, classes) of the crops that begin in wave[begin - at:begin - at + length].

    wave: (N,) at 16 kHz, from sample `at` of the song on.
    """
    step = step_of(net)
    if begin == 0:
        wave = np.pad(wave, (0, max(0, net.crop - len(wave))))      # of a very short song
    first, end = -(-begin // step), -(-(begin + length) // step)
    end = min(end, (at + len(wave) - net.crop) // step + 1)
    if end <= first:
        return torch.zeros(0, net.args["n_classes"])
    some = wave[first * step - at:(end - 1) * step - at + net.crop]
    return model.tag(net, torch.from_numpy(some), hop=step / SAMPLE_RATE)


def step_of(net):
    """Samples at 16 kHz from one row of the tags to the next."""
    return round(hop * SAMPLE_RATE) or net.frames // 2 * model.HOP


def listen(song, net, taggers, writers, bar, stop):
    """({tagger: scores (K, classes)}, samples, notes) of a song; its sources go to the writers."""
    scores, beyond, n = {name: [] for name in taggers}, 0, 0
    length, left, right = sizes(song.rate, song.channels, taggers)
    for samples, at, begin in pieces(song, length, left, right):
        if stop.asked:
            die("stopped; the same command goes on with this song" + WITHOUT * overwrite)
        if not np.isfinite(samples).all():
            raise audio.Broken("holds samples that are not numbers")
        mine = slice(begin - at, begin - at + length)
        whole = samples[:, mine]
        beyond += int((np.abs(whole) > 1).sum())
        n += whole.shape[1]

        if net:
            stems = model.separate(net, torch.from_numpy(samples), song.rate)
            stems = audio.to_int16(stems[:, :, mine].numpy())       # (S, C, n)
            write_sources(net.sources, stems, audio.to_int16(whole), writers)
        if taggers:
            wave = audio.resample(samples.mean(0), song.rate, SAMPLE_RATE)
            where = [x * SAMPLE_RATE // song.rate for x in (at, begin, length)]
            for name, (other, _) in taggers.items():
                scores[name].append(tag_rows(other, wave, *where))
        seconds = whole.shape[1] / song.rate
        bar.total = bar.total and max(bar.total, bar.n + seconds)   # headers are wrong at times
        bar.update(seconds)
    notes = [*song.damage]
    if beyond:
        notes.append(f"{beyond:,} of its {n * song.channels:,} samples are beyond full scale, and "
                     "are clipped")
    return {name: torch.cat(rows).numpy() for name, rows in scores.items()}, n, notes


def write_sources(sources, stems, whole, writers):
    """Sources (S, C, n), and what is left of the song (C, n), in int16."""
    stems, whole = stems.astype(np.int32), whole.astype(np.int32)
    rest = {"remainder": stems}
    if "vocals" in sources:
        vocals = sources.index("vocals")
        rest["accompaniment"] = stems[vocals:vocals + 1]        # a view
        make_room(rest["accompaniment"], whole)
    make_room(stems, whole)
    for source, stem in zip(sources, stems, strict=True):
        writers[source](stem.astype("<i2"))
    for name, taken in rest.items():
        if name in writers:
            writers[name]((whole - taken.sum(0)).astype("<i2"))


def make_room(stems, whole):
    """Moves int32 stems (S, C, n) towards zero where the rest of the song exceeds 16 bits.

    The loudest samples of a song leave no room for a rest that has the other sign.
    """
    for stem in stems:
        rest = whole - stems.sum(0)
        excess = rest - np.clip(rest, -32768, 32767)
        stem += np.clip(excess, np.minimum(0, -stem), np.maximum(0, -stem))


def names_of_stems(net):
    """The files of a separator. With vocals alone, what is left is the accompaniment."""
    if net is None:
        return []
    if net.sources == ["vocals"]:
        return ["vocals", "accompaniment"]
    more = ["accompaniment"] if "vocals" in net.sources else []
    return [*net.sources, *more, "remainder"]


# -----------------------------------------------------------------------------
# tables

def write_tags(base, net, classes, scores, seconds):
    """Scores (K, classes) as BASE.json, [{start, end, tags: [{tag, score}]}] with the highest
    first, and as BASE.csv, one column per tag. Times are in seconds, of which the song has so many.
    """
    starts = np.arange(len(scores)) * step_of(net) / SAMPLE_RATE
    ends = np.minimum(starts + net.crop / SAMPLE_RATE, seconds)
    times = [(round(start, 3), round(end, 3)) for start, end in zip(starts, ends, strict=True)]
    with runtime.atomic(f"{base}.json", "w", encoding="utf-8") as f:
        for k, ((start, end), row) in enumerate(zip(times, scores, strict=True)):
            order = np.argsort(-row, kind="stable")
            tags = [{"tag": classes[i], "score": round(float(row[i]), 4)} for i in order]
            line = json.dumps({"start": start, "end": end, "tags": tags})
            f.write(("[" if k == 0 else ",\n") + line)
        f.write("]\n")
    with runtime.atomic(f"{base}.csv", "w", encoding="utf-8", newline="") as f:
        lines = csv.writer(f)
        lines.writerow(["start", "end", *classes])
        for (start, end), row in zip(times, scores, strict=True):
            lines.writerow([start, end, *(f"{value:.4f}" for value in row)])


# -----------------------------------------------------------------------------
# files

def find_songs(paths):
    """{folder to write to: file} of files, and of all audio in folders but what was written."""
    found = {}
    for path in paths:
        if not os.path.exists(path):
            die(f"{path} does not exist")
        files, root = [path], os.path.dirname(path) or "."
        if os.path.isdir(path):
            files, root = songs_in(path), path
        bases = [os.path.splitext(os.path.relpath(file, root))[0] for file in files]
        times = Counter(bases)
        for file, base in zip(files, bases, strict=True):
            if times[base] > 1:                 # song.mp3 and song.wav
                base = os.path.relpath(file, root)
            target = os.path.join(out, base)
            if os.path.realpath(found.setdefault(target, file)) != os.path.realpath(file):
                die(f"{found[target]} and {file} would both be written to {target}: listen to one "
                    "after the other, with another --out")
    return found


def songs_in(folder):
    """The audio files in a folder, but for what was written there."""
    written = os.path.realpath(out) + os.sep
    files = [file for file in walk(folder) if is_audio(file)]
    songs, made = [], 0
    for file in files:
        beside = os.path.join(os.path.dirname(file), "listen.json")
        if not os.path.exists(file):
            print(f"passed over {file}: it is a link to nowhere")
        elif os.path.realpath(file).startswith(written) or os.path.exists(beside):
            made += 1
        else:
            songs.append(file)
    if not songs:
        die(f"{folder} holds no audio" + f" but what is written there (--out={out})" * bool(made))
    return songs


def is_done(file, folder, made_with):
    """Whether a song is finished. Ends the script if the folder holds anything else."""
    told = page.read_marker(folder)
    if told is None:
        mine = os.path.isdir(folder) and any(entry.is_file() for entry in os.scandir(folder))
        if mine and not overwrite:
            die(f"{folder} holds files, and this script has not made them: --overwrite=True writes "
                "into it, --out=ELSEWHERE keeps them")
        return False
    if told["finished"] and told["made_with"] != made_with and not overwrite:
        names = {"song": "from another file", "bytes": "from an older version of the file",
                 "changed": "from an older version of the file", "networks": "by other networks",
                 "format": "in another format", "hop": "with another hop"}
        ways = [way for key, way in names.items() if told["made_with"].get(key) != made_with[key]]
        die(f"{file}: {folder} was made {', '.join(dict.fromkeys(ways))}: --overwrite=True "
            "replaces it, --out=ELSEWHERE keeps it")
    return told["finished"] and told["made_with"] == made_with and not overwrite


def note_begun(file, folder, made_with, files):
    """Notes that a song is begun, after deleting what an earlier attempt has left."""
    old = page.read_marker(folder)
    for name in old["files"] if old else []:
        leftovers = glob.glob(glob.escape(os.path.join(folder, name)) + ".*.tmp")
        for path in (os.path.join(folder, name), *leftovers):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
    os.makedirs(folder, exist_ok=True)
    told = {"song": os.path.abspath(file), "made_with": made_with, "finished": False,
            "files": files}
    runtime.write_atomically(json.dumps(told, indent=1), os.path.join(folder, "listen.json"))
    return told


def listen_to(file, folder, net, taggers, made_with, stop):
    """Writes all that is to be known of one song into its folder."""
    sources = names_of_stems(net)
    files = [f"{name}.{format}" for name in sources] + ["song.html"]
    files += [f"{name}.{ending}" for name in taggers for ending in ("json", "csv")]
    with contextlib.ExitStack() as stack:
        song = stack.enter_context(audio.Blocks(file))
        told, writers = note_begun(file, folder, made_with, files), {}
        for name in sources:
            path = os.path.join(folder, f"{name}.{format}")
            f = stack.enter_context(runtime.atomic(path, "wb"))
            writers[name] = stack.enter_context(
                audio.writer(f, format, song.rate, song.channels))
        form = "{desc}: {n:.0f} s"
        if song.declared:
            form = "{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]"
        bar = stack.enter_context(tqdm(total=song.declared or None, bar_format=form,
                                       desc=os.path.basename(file)))
        scores, n, notes = listen(song, net, taggers, writers, bar, stop)

    told |= {"seconds": n / song.rate, "rate": song.rate, "channels": song.channels,
             "notes": notes, "sources": sources, "tags": {}}
    for note in notes:
        print(f"note: {file}: {note}")
    for name, rows in scores.items():
        other, classes = taggers[name]
        write_tags(os.path.join(folder, name), other, classes, rows, told["seconds"])
        mean = rows.mean(0)
        best = np.argsort(-mean, kind="stable")
        told["tags"][name] = {classes[i]: round(float(mean[i]), 4) for i in best}
        print(f"{name}:\n" + "\n".join(f"  {classes[i]:24}{mean[i]:.3f}" for i in best[:10]))
    told["finished"] = True
    runtime.write_atomically(json.dumps(told, indent=1), os.path.join(folder, "listen.json"))
    print(f"{file}: {runtime.clock(told['seconds'])}, {song.rate} Hz, channels: {song.channels} "
          f"-> {folder}")


def load(path, kind, on):
    """(network, meta) of a checkpoint of a kind."""
    net, meta = model.load(path, on)
    if meta["kind"] != kind:
        die(f"{path} is a {meta['kind']}, not a {kind}")
    if meta.get("as_published"):
        print(f"{path}: published weights, trained with {meta['as_published']}")
    if meta.get("source") == "tensorflow":
        print(f"note: {path} does not say what its sources or classes are called, so they have "
              "numbers: released:NAME knows the names")
    return net, meta


def check_names(what, names, reserved):
    """What a checkpoint calls itself or its sources becomes part of files' names."""
    for name in names:
        if not name or name.startswith(".") or set(name) & set("/\\:\0"):
            die(f"{what}: {name!r} cannot be the name of a file")
        if name in reserved or names.count(name) > 1:
            die(f"{what}: the name {name!r} is taken: rename it, or listen with one after the "
                "other")


def facts(file):
    """By which a song is known again."""
    stat = os.stat(file)
    return {"song": os.path.abspath(file), "bytes": stat.st_size, "changed": stat.st_mtime_ns}


def main():
    config, paths = runtime.configure(globals(), configs=False)
    runtime.check_numbers(config)
    runtime.choose("format", format, list(audio.WRITTEN))
    if hop and hop < 1 / SAMPLE_RATE:
        die(f"hop must be seconds above 0, or 0 for half a crop, got {hop}")
    if not paths:
        die("name one or more songs or folders: python listen.py song.mp3")
    songs = find_songs(paths)

    # the networks: those that are named, or both of the authors'
    chosen, heard = separator, [path for path in tagger if path]
    if not chosen and not heard:
        chosen, heard = "released:vocals", ["released:mtat_vocals"]
    on, *_ = runtime.start(device)
    net, taggers = None, {}
    if chosen:
        net = load(chosen, "separator", on)[0]
        check_names(chosen, net.sources, RESERVED)
    for path in heard:
        other, meta = load(path, "classifier", on)
        classes = meta["classes"] or [f"class {i}" for i in range(other.args["n_classes"])]
        check_names("--tagger", [*taggers, eval.run_name(path)], ["listen"])
        taggers[eval.run_name(path)] = other, classes

    # what would end the script does so before the first song
    hashes = {path: training.fingerprint(path) for path in [chosen, *heard] if path}
    made = {folder: {"networks": hashes, "format": format, "hop": hop, **facts(file)}
            for folder, file in songs.items()}
    runtime.hold(out)
    done = {folder for folder, file in songs.items() if is_done(file, folder, made[folder])}

    stop, failed = runtime.Stop(), 0
    for folder, file in songs.items():
        if stop.asked:
            die("stopped; the same command goes on from there" + WITHOUT * overwrite)
        try:
            if folder in done:
                print(f"{file}: is finished, in {folder}")
            else:
                listen_to(file, folder, net, taggers, made[folder], stop)
            has_page = folder in done and os.path.exists(os.path.join(folder, "song.html"))
            if report and not has_page:
                if stop.asked:
                    die("stopped before the page; the same command goes on from there")
                page.song_page(folder)
        except (ValueError, OSError) as e:
            # one song must not stop the others, a full disk must
            if isinstance(e, OSError) and e.errno in runtime.FULL:
                raise
            print(f"error: {file}: {e}")
            failed += 1
    if failed:
        die(f"{failed} of {len(songs)} songs failed, as said above")
    return 0


if __name__ == "__main__":
    runtime.script(main)
