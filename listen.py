"""
Separates and tags songs: stems as audio files, tags over time as tables.

    python listen.py song.mp3                       # the authors' weights, downloaded once
    python listen.py song.mp3 FOLDER --separator=ckpt/vocals.pt --tagger=ckpt/mtat.pt
    python listen.py song.mp3 --tagger=ckpt/mtat.pt,ckpt/fma.pt     # two taggers, no separator
    python listen.py song.mp3 --separator=released:multisource --codec=flac

Reads any format, sample rate, number of channels and length. Writes to listened/SONG/: the sources
with the song's sample rate and channels; accompaniment.wav, the song minus vocals; remainder.wav,
the song minus all sources; per tagger a .json and a .csv with one row per crop of 3.86 seconds.
--report=True adds song.html, a page with players and spectrograms. Finished songs are skipped, so
the same command resumes after a stop. Sources and remainder sum to the song, exactly in wav and
flac. mp3 and opus are lossy: opus is at 48 kHz, and the mp3 encoder attenuates by 3 to 5 %.
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
import torch.nn.functional as F
from tqdm import tqdm

import model
import weights
from audio import files as audio
from audio.resample import resample
from common import device as devices
from common import files, settings
from common.run import Stop, fingerprint
from common.settings import die
from model import SAMPLE_RATE
from prepare.files import is_audio, walk
from reports import page

# -----------------------------------------------------------------------------
# settings
separator = ""          # checkpoint; default without a tagger: released:vocals
tagger = [""]           # checkpoints, comma-separated; default: released:mtat_vocals
out = "listened"        # output folder
codec = "wav"           # of the stems: wav, flac, mp3, opus
hop = 0.0               # seconds between rows of tags; 0: half a crop, 1.92
report = False          # also write an HTML page per song
overwrite = False       # replace existing output
device = ""             # cpu, cuda, mps; default: cuda if available
# -----------------------------------------------------------------------------

STEP = (model.WINDOW - model.OVERLAP) * model.HOP   # between windows: 153,600 samples, 9.6 s
PIECE = 5 * STEP // SAMPLE_RATE         # 48 s: a whole number of samples at any rate
MAX_SAMPLES = 1 << 24                   # per piece, all channels


# -----------------------------------------------------------------------------
# songs in pieces: memory does not grow with their length

def pieces(blocks, length, left, right):
    """Cuts blocks (C, n) into pieces of `length` samples.

    Yields (samples (C, n), at, begin). They start at sample `at` of the song, the piece itself at
    `begin`: up to `left` samples of context precede it, up to `right` follow.
    """
    blocks, kept, at, begin = iter(blocks), [], 0, 0
    while True:
        available = sum(block.shape[1] for block in kept)
        needed = begin - at + length + right
        while available < needed and (block := next(blocks, None)) is not None:
            kept.append(block)
            available += block.shape[1]
        if available <= begin - at:
            return
        samples = np.concatenate(kept, 1)
        yield samples[:, :needed], at, begin
        begin += length
        drop = max(0, begin - left - at)
        kept, at = [samples[:, drop:]], at + drop


def piece_sizes(rate, channels, taggers):
    """(length, left context, right context) of the pieces of a song, in samples.

    Masks depend on a window to either side, tags on a crop and the resampling kernel. All three
    are whole window steps and resampling blocks, so pieces give the same as the whole song.
    """
    second = rate * PIECE
    crops = [net.crop + SAMPLE_RATE for net, _ in taggers.values()]
    left, right = 1, max(1, math.ceil(max(crops, default=0) / STEP))    # window steps
    if rate % 5:        # a window step is no whole number of samples: use whole pieces
        left, right = 5, 5 * math.ceil(right / 5)
    length = second * min(4, max(1, MAX_SAMPLES // (second * channels)))
    return length, left * STEP * rate // SAMPLE_RATE, right * STEP * rate // SAMPLE_RATE


def tag_piece(net, wave, at, begin, length):
    """Scores (K, classes) of the crops that start in a piece, as from pieces(). All at 16 kHz."""
    step = hop_samples(net)
    if begin == 0:
        wave = F.pad(wave, (0, max(0, net.crop - len(wave))))       # a song shorter than a crop
    first, end = -(-begin // step), -(-(begin + length) // step)
    end = min(end, (at + len(wave) - net.crop) // step + 1)
    if end <= first:
        return torch.zeros(0, net.args["n_classes"])
    wave = wave[first * step - at:(end - 1) * step - at + net.crop]
    return model.tag(net, wave, hop=step / SAMPLE_RATE)


def hop_samples(net):
    """Samples at 16 kHz between rows of tags."""
    return round(hop * SAMPLE_RATE) or net.frames // 2 * model.HOP


def process(song, net, taggers, writers, bar, stop):
    """Writes the stems of a song; returns ({tagger: scores (K, classes)}, samples, notes)."""
    scores, clipped, n = {name: [] for name in taggers}, 0, 0
    length, left, right = piece_sizes(song.rate, song.channels, taggers)
    for samples, at, begin in pieces(song, length, left, right):
        exit_if_asked(stop)
        if not np.isfinite(samples).all():
            raise audio.Broken("contains samples that are NaN or infinite")
        inner = slice(begin - at, begin - at + length)
        piece = samples[:, inner]
        clipped += int((np.abs(piece) > 1).sum())
        n += piece.shape[1]
        if net:
            stems = model.separate(net, torch.from_numpy(samples), song.rate)
            stems = audio.to_int16(stems[:, :, inner].numpy())      # (S, C, n)
            write_stems(net.sources, stems, audio.to_int16(piece), writers)
        if taggers:
            wave = resample(torch.from_numpy(samples.mean(0)), song.rate, SAMPLE_RATE)
            position = [x * SAMPLE_RATE // song.rate for x in (at, begin, length)]
            for name, (classifier, _) in taggers.items():
                scores[name].append(tag_piece(classifier, wave, *position))
        seconds = round(piece.shape[1] / song.rate)
        bar.total = bar.total and max(bar.total, bar.n + seconds)   # a header may be wrong
        bar.update(seconds)
    notes = [*song.damage]
    if clipped:
        notes.append(f"{clipped:,} of {n * song.channels:,} samples clipped at full scale")
    return {name: torch.cat(rows).numpy() for name, rows in scores.items()}, n, notes


def write_stems(sources, stems, mixture, writers):
    """Writes int16 stems (S, C, n), and what is left of the mixture (C, n)."""
    stems, mixture = stems.astype(np.int32), mixture.astype(np.int32)
    subtracted = {"remainder": stems}
    if "vocals" in sources:
        vocals = sources.index("vocals")
        subtracted["accompaniment"] = stems[vocals:vocals + 1]      # a view
        limit_residual(subtracted["accompaniment"], mixture)
    limit_residual(stems, mixture)
    for source, stem in zip(sources, stems, strict=True):
        writers[source](stem.astype("<i2"))
    for name, parts in subtracted.items():
        if name in writers:
            writers[name]((mixture - parts.sum(0)).astype("<i2"))


def limit_residual(stems, mixture):
    """Reduces int32 stems (S, C, n), in place, where mixture - stems.sum(0) overflows int16."""
    for stem in stems:
        residual = mixture - stems.sum(0)
        excess = residual - np.clip(residual, -32768, 32767)
        stem += np.clip(excess, np.minimum(0, -stem), np.maximum(0, -stem))


def stem_names(net):
    """The stems to write. With vocals alone, the remainder is the accompaniment."""
    sources = net.sources if net else []
    more = {"accompaniment": "vocals" in sources, "remainder": sources not in ([], ["vocals"])}
    return [*sources, *(name for name, is_written in more.items() if is_written)]


# -----------------------------------------------------------------------------
# tables

def write_tags(base, net, classes, scores, seconds):
    """Scores (K, classes) as BASE.json, highest first, and as BASE.csv. Times are in seconds."""
    table, rows = [["start", "end", *classes]], []
    for k, row in enumerate(scores):
        start = k * hop_samples(net) / SAMPLE_RATE
        end = min(start + net.crop / SAMPLE_RATE, seconds)
        start, end, order = round(start, 3), round(end, 3), np.argsort(-row, kind="stable")
        tags = [{"tag": classes[i], "score": round(float(row[i]), 4)} for i in order]
        rows.append(json.dumps({"start": start, "end": end, "tags": tags}))
        table.append([start, end, *(f"{value:.4f}" for value in row)])
    files.write_atomically("[" + ",\n".join(rows) + "]\n", f"{base}.json")
    with files.atomic(f"{base}.csv", "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows(table)


# -----------------------------------------------------------------------------
# files

def find_songs(paths):
    """{output folder: file} of files and of the audio files in folders, except our own output."""
    songs = {}
    for path in paths:
        if not os.path.exists(path):
            die(f"{path} does not exist")
        found, root = [path], os.path.dirname(path) or "."
        if os.path.isdir(path):
            found, root = songs_in(path), path
        bases = [os.path.splitext(os.path.relpath(file, root))[0] for file in found]
        counts = Counter(bases)
        for file, base in zip(found, bases, strict=True):
            if counts[base] > 1:                # song.mp3 and song.wav
                base = os.path.relpath(file, root)
            folder = os.path.join(out, base)
            if os.path.realpath(songs.setdefault(folder, file)) != os.path.realpath(file):
                die(f"{songs[folder]} and {file} have the same output folder {folder}: run them "
                    "separately, with different --out")
    return songs


def songs_in(folder):
    """The audio files in a folder, except our own output."""
    output_root = os.path.realpath(out) + os.sep
    songs, skipped = [], 0
    for file in filter(is_audio, walk(folder)):
        marker = os.path.join(os.path.dirname(file), "listen.json")
        if not os.path.exists(file):
            print(f"skipped {file}: broken link")
        elif os.path.realpath(file).startswith(output_root) or os.path.exists(marker):
            skipped += 1
        else:
            songs.append(file)
    if not songs:
        die(f"{folder} contains no audio files" + f" except output (--out={out})" * bool(skipped))
    return songs


def is_done(file, folder, provenance):
    """Whether a song is finished. Exits if the folder contains anything else."""
    if overwrite:
        return False
    marker = page.read_marker(folder)
    if marker is None:
        if os.path.isdir(folder) and any(entry.is_file() for entry in os.scandir(folder)):
            die(f"{folder} contains files that this script did not write: --overwrite=True writes "
                "there anyway, --out=FOLDER elsewhere")
        return False
    if marker["finished"] and marker["provenance"] != provenance:
        changed = [key for key in provenance if marker["provenance"].get(key) != provenance[key]]
        die(f"{file}: {folder} was made with different {', '.join(changed)}: --overwrite=True "
            "replaces it, --out=FOLDER keeps it")
    return marker["finished"]


def write_marker(file, folder, provenance, names):
    """Deletes the output of an earlier attempt and writes the marker, which is returned."""
    old = page.read_marker(folder)
    for name in old["files"] if old else []:
        leftovers = glob.glob(glob.escape(os.path.join(folder, name)) + ".*.tmp")
        for path in (os.path.join(folder, name), *leftovers):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
    os.makedirs(folder, exist_ok=True)
    marker = {"song": os.path.abspath(file), "provenance": provenance, "finished": False,
              "files": names}
    files.write_atomically(json.dumps(marker, indent=1), os.path.join(folder, "listen.json"))
    return marker


def listen(file, folder, net, taggers, provenance, stop):
    """Writes all output of one song into its folder."""
    stems = stem_names(net)
    names = [f"{name}.{codec}" for name in stems] + ["song.html"]
    names += [f"{name}.{ending}" for name in taggers for ending in ("json", "csv")]
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        song = enter(audio.Blocks(file))
        marker, writers = write_marker(file, folder, provenance, names), {}
        for name in stems:
            f = enter(files.atomic(os.path.join(folder, f"{name}.{codec}"), "wb"))
            writers[name] = enter(audio.writer(f, codec, song.rate, song.channels))
        bar = enter(tqdm(
            total=round(song.declared) or None, desc=os.path.basename(file),
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} s [{elapsed}<{remaining}]"))
        scores, n, notes = process(song, net, taggers, writers, bar, stop)

    marker |= {"seconds": n / song.rate, "rate": song.rate, "channels": song.channels,
               "notes": notes, "sources": stems, "tags": {}}
    for note in notes:
        print(f"note: {file}: {note}")
    for name, rows in scores.items():
        classifier, classes = taggers[name]
        write_tags(os.path.join(folder, name), classifier, classes, rows, marker["seconds"])
        mean = rows.mean(0)
        best = np.argsort(-mean, kind="stable")
        marker["tags"][name] = {classes[i]: round(float(mean[i]), 4) for i in best}
        print(f"{name}:\n" + "\n".join(f"  {classes[i]:24}{mean[i]:.3f}" for i in best[:10]))
    marker["finished"] = True
    files.write_atomically(json.dumps(marker, indent=1), os.path.join(folder, "listen.json"))
    print(f"{file}: {settings.clock(marker['seconds'])}, {song.rate} Hz, channels: "
          f"{song.channels} -> {folder}")


def load(path, kind, on):
    """(net, meta) of a checkpoint of a kind, accelerated."""
    net, meta = weights.load(path, on)
    if meta["kind"] != kind:
        die(f"{path} is a {meta['kind']}, not a {kind}")
    devices.accelerate(net, on)
    if meta.get("as_published"):
        print(f"{path}: published weights, trained with {meta['as_published']}")
    if meta.get("source") == "tensorflow":
        print(f"note: {path} names no sources or classes, they are numbered: see released:NAME")
    return net, meta


def check_names(origin, names, reserved):
    """Names in checkpoints become file names: they must be valid, unique and not reserved."""
    for name in names:
        invalid = not name or name.startswith(".") or set(name) & set("/\\:\0")
        if invalid or name in reserved or names.count(name) > 1:
            die(f"{origin}: {name!r} cannot be used as a file name: it is "
                f"{'invalid' if invalid else 'taken'}, rename it")


def exit_if_asked(stop):
    if stop.asked:
        die("stopped; the same command" + " (without --overwrite)" * overwrite + " resumes")


def main():
    config, paths = settings.configure(globals(), configs=False)
    settings.check_numbers(config)
    settings.choose("codec", codec, list(audio.ENCODERS))
    if hop:
        settings.at_least(1 / SAMPLE_RATE, hop=hop)
    if not paths:
        die("name one or more songs or folders: python listen.py song.mp3")
    songs = find_songs(paths)
    separator_path, tagger_paths = separator, [path for path in tagger if path]
    if not separator_path and not tagger_paths:
        separator_path, tagger_paths = "released:vocals", ["released:mtat_vocals"]
    on, *_ = devices.setup_device(device)
    net, taggers = None, {}
    if separator_path:
        net = load(separator_path, "separator", on)[0]
        check_names(separator_path, net.sources, ["mixture", "accompaniment", "remainder"])
    for path in tagger_paths:
        classifier, meta = load(path, "classifier", on)
        classes = meta["classes"] or [f"class {i}" for i in range(classifier.args["n_classes"])]
        name = weights.name_of(path)
        check_names("--tagger", [*taggers, name], ["listen"])
        taggers[name] = classifier, classes

    # refuse songs before the first one is processed
    networks = {path: fingerprint(path) for path in [separator_path, *tagger_paths] if path}
    provenance = {folder: {
        "networks": networks, "codec": codec, "hop": hop, "song": os.path.abspath(file),
        "size": os.path.getsize(file), "modified": os.stat(file).st_mtime_ns}
        for folder, file in songs.items()}
    files.lock(os.path.join(out, ".lock"), out)
    done = {folder for folder, file in songs.items() if is_done(file, folder, provenance[folder])}

    stop, failed = Stop(), 0
    for folder, file in songs.items():
        exit_if_asked(stop)
        try:
            if folder in done:
                print(f"{file}: already finished, in {folder}")
            else:
                listen(file, folder, net, taggers, provenance[folder], stop)
            has_page = folder in done and os.path.exists(os.path.join(folder, "song.html"))
            if report and not has_page:
                exit_if_asked(stop)
                page.song_page(folder)
        except (ValueError, OSError) as e:
            # a bad song is skipped, a full disk ends the run
            if getattr(e, "errno", None) in files.FULL:
                raise
            print(f"error: {file}: {e}")
            failed += 1
    if failed:
        die(f"{failed} of {len(songs)} songs failed, see above")


if __name__ == "__main__":
    settings.script(main)
