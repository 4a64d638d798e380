"""
Separates and tags songs: stems as audio files, tags over time as tables.

    python listen.py song.mp3                       # the authors' weights, downloaded once
    python listen.py song.mp3 FOLDER --separator=ckpt/vocals.pt --tagger=ckpt/mtat.pt
    python listen.py song.mp3 --tagger=ckpt/mtat.pt,ckpt/fma.pt     # two taggers, no separator
    python listen.py song.mp3 --separator=released:multisource --codec=flac

Reads any format. Writes to listened/SONG/: the sources at the song's rate and channels;
accompaniment (the song minus vocals) or remainder (minus all sources): the sum is the song, exactly
in wav and flac; per tagger a .json and a .csv with one row per crop of 3.86 seconds. --report=True
adds song.html, a page with players. Finished songs are skipped: the same command resumes. mp3 and
opus are lossy: opus is at 48 kHz, and the mp3 encoder attenuates by 3 to 5 %.
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
from common import device as devices, files, settings
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


def pieces(blocks, length, left, right):
    """Cuts blocks (C, n) into pieces of `length` samples.

    Yields (samples (C, n), at, begin). `samples` starts at sample `at` of the song, the piece in it
    at `begin`: up to `left` samples of context precede the piece, up to `right` follow.
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

    Masks depend on one window to either side, tags on a crop and the resampling kernel. All three
    are multiples of the window step and of the resampling block: results equal the whole song's.
    """
    second = rate * PIECE
    crops = [net.crop + SAMPLE_RATE for net in taggers.values()]
    left, right = 1, max(1, math.ceil(max(crops, default=0) / STEP))    # window steps
    if rate % 5:        # 9.6 s are not a whole number of samples: use multiples of 48 s
        left, right = 5, 5 * math.ceil(right / 5)
    length = second * min(4, max(1, MAX_SAMPLES // (second * channels)))
    return length, left * STEP * rate // SAMPLE_RATE, right * STEP * rate // SAMPLE_RATE


def tag_piece(net, wave, at, begin, length):
    """Scores (K, classes) of the crops that start in a piece, as from pieces(). All at 16 kHz."""
    step = hop_samples(net)
    if begin == 0:      # the song may be shorter than a crop
        wave = F.pad(wave, (0, max(0, net.crop - len(wave))))       # (n,)
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
    """Writes the stems of a song; returns ({tagger: scores (K, classes)}, samples)."""
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
            stems = model.separate(net, torch.from_numpy(samples), song.rate)   # (S, C, n)
            stems = audio.to_int16(stems[:, :, inner].numpy())
            write_stems(net.sources, stems, audio.to_int16(piece), writers)
        if taggers:
            mono = torch.from_numpy(samples.mean(0))                            # (n,)
            wave = resample(mono, song.rate, SAMPLE_RATE)
            position = [x * SAMPLE_RATE // song.rate for x in (at, begin, length)]
            for name, tagger_net in taggers.items():
                scores[name].append(tag_piece(tagger_net, wave, *position))
        bar.update(round(piece.shape[1] / song.rate))
    if clipped:
        song.damage.append(f"{clipped:,} of {n * song.channels:,} samples clipped at full scale")
    return {name: torch.cat(rows).numpy() for name, rows in scores.items()}, n


def write_stems(sources, stems, mixture, writers):
    """Writes int16 stems (S, C, n), and the mixture (C, n) minus stems."""
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
    """Reduces int32 stems (S, C, n) in place where mixture - stems.sum(0) would overflow int16."""
    for stem in stems:
        residual = mixture - stems.sum(0)
        excess = residual - np.clip(residual, -32768, 32767)
        stem += np.clip(excess, np.minimum(0, -stem), np.maximum(0, -stem))


def stem_names(net):
    """The stems to write. With vocals alone, the remainder is the accompaniment."""
    sources = net.sources if net else []
    names = list(sources)
    if "vocals" in sources:
        names.append("accompaniment")
    if sources not in ([], ["vocals"]):
        names.append("remainder")
    return names


def write_tags(base, net, scores, seconds):
    """Scores (K, classes) as BASE.json, highest first, and as BASE.csv. Times are in seconds."""
    table, rows = [["start", "end", *net.classes]], []
    for k, row in enumerate(scores):
        start = k * hop_samples(net) / SAMPLE_RATE
        end = min(start + net.crop / SAMPLE_RATE, seconds)
        start, end, order = round(start, 3), round(end, 3), np.argsort(-row, kind="stable")
        tags = [{"tag": net.classes[i], "score": round(float(row[i]), 4)} for i in order]
        rows.append(json.dumps({"start": start, "end": end, "tags": tags}))
        table.append([start, end, *(f"{value:.4f}" for value in row)])
    files.write_atomically("[" + ",\n".join(rows) + "]\n", f"{base}.json")
    with files.atomic(f"{base}.csv", "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows(table)


def find_songs(paths):
    """{output folder: file} of files and of the audio files in folders, except our own output."""
    songs = {}
    for path in paths:
        audio_files, root = [path], os.path.dirname(path) or "."
        if os.path.isdir(path):
            audio_files, root = songs_in(path), path
        bases = [os.path.splitext(os.path.relpath(file, root))[0] for file in audio_files]
        counts = Counter(bases)
        for file, base in zip(audio_files, bases, strict=True):
            if counts[base] > 1:                # song.mp3 and song.wav
                base = os.path.relpath(file, root)
            folder = os.path.join(out, base)
            first = songs.setdefault(folder, file)
            if os.path.realpath(first) != os.path.realpath(file):
                die(f"{first} and {file} have the same output folder {folder}: run them "
                    "separately, with different --out")
    return songs


def songs_in(folder):
    """The audio files in a folder, except our own output."""
    songs = []
    for file in filter(is_audio, walk(folder)):
        if not os.path.exists(file):
            print(f"skipped {file}: broken link")
        elif not os.path.exists(os.path.join(os.path.dirname(file), "listen.json")):
            songs.append(file)
    if not songs:
        die(f"{folder} contains no audio files, except output of listen.py if any")
    return songs


def is_done(file, folder, provenance):
    """Whether a song is finished. Exits if the folder contains anything else."""
    marker, problem = page.read_marker(folder), ""
    if marker is None:
        if os.path.isdir(folder) and any(entry.is_file() for entry in os.scandir(folder)):
            problem = "contains files that this script did not write"
    elif marker["finished"] and marker["provenance"] != provenance:
        changed = [key for key in provenance if marker["provenance"].get(key) != provenance[key]]
        problem = f"was made with different {', '.join(changed)}"
    if problem:
        die(f"{file}: {folder} {problem}: --overwrite=True writes there anyway, --out=FOLDER "
            "elsewhere")
    return marker is not None and marker["finished"]


def write_marker(file, folder, provenance, names):
    """Deletes the output of an earlier attempt; writes a marker (listen.json) and returns it."""
    old = page.read_marker(folder)
    for name in old["files"] if old else []:
        path = glob.escape(os.path.join(folder, name))
        for leftover in glob.glob(path) + glob.glob(f"{path}.*.tmp"):
            os.remove(leftover)
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
        scores, n = process(song, net, taggers, writers, bar, stop)

    marker |= {"seconds": n / song.rate, "rate": song.rate, "channels": song.channels,
               "notes": song.damage, "sources": stems, "tags": {}}
    for note in song.damage:
        print(f"note: {file}: {note}")
    for name, rows in scores.items():
        write_tags(os.path.join(folder, name), taggers[name], rows, marker["seconds"])
        classes, mean = taggers[name].classes, rows.mean(0)
        best = np.argsort(-mean, kind="stable")
        marker["tags"][name] = {classes[i]: round(float(mean[i]), 4) for i in best}
        print(f"{name}:\n" + "\n".join(f"  {classes[i]:24}{mean[i]:.3f}" for i in best[:10]))
    marker["finished"] = True
    files.write_atomically(json.dumps(marker, indent=1), os.path.join(folder, "listen.json"))
    print(f"{file}: {settings.clock(marker['seconds'])}, {song.rate} Hz, channels: "
          f"{song.channels} -> {folder}")


def load(path, kind, on):
    """A network of this kind, accelerated; a classifier with the names of its `classes`."""
    net, meta = weights.load(path, on)
    if meta["kind"] != kind:
        die(f"{path} is a {meta['kind']}, not a {kind}")
    devices.accelerate(net, on)
    if meta.get("as_published"):
        print(f"{path}: published weights, trained with {meta['as_published']}")
    if meta.get("source") == "tensorflow":
        print(f"note: {path} names no sources or classes, they are numbered: see released:NAME")
    if kind == "classifier":
        net.classes = meta["classes"] or [f"class {i}" for i in range(net.args["n_classes"])]
    return net


def check_names(origin, names, reserved):
    """Exits unless names from checkpoints are valid as file names, unique and not reserved."""
    for name in names:
        invalid = not name or name.startswith(".") or set(name) & set("/\\:\0")
        if invalid or name in reserved or names.count(name) > 1:
            die(f"{origin}: {name!r} is invalid as a file name, or taken: rename it")


def exit_if_asked(stop):
    if stop.asked:
        without = " (without --overwrite)" if overwrite else ""
        die(f"stopped; the same command{without} resumes")


def main():
    config, paths = settings.configure(globals(), configs=False)
    settings.check_numbers(config)
    settings.choose("codec", codec, list(audio.ENCODERS))
    settings.at_least(1 / SAMPLE_RATE if hop else 0, hop=hop)
    if not paths:
        die("name one or more songs or folders: python listen.py song.mp3")
    songs = find_songs(paths)
    separator_path, tagger_paths = separator, [path for path in tagger if path]
    if not separator_path and not tagger_paths:
        separator_path, tagger_paths = "released:vocals", ["released:mtat_vocals"]
    networks = {path: fingerprint(path) for path in [separator_path, *tagger_paths] if path}
    provenance = {folder: {
        "networks": networks, "codec": codec, "hop": hop, "song": os.path.abspath(file),
        "size": os.path.getsize(file), "modified": os.stat(file).st_mtime_ns}
        for folder, file in songs.items()}
    on, *_ = devices.setup_device(device)
    net, taggers = None, {}
    if separator_path:
        net = load(separator_path, "separator", on)
        check_names(separator_path, net.sources, ["mixture", "accompaniment", "remainder"])
    for path in tagger_paths:
        name = weights.name_of(path)
        check_names("--tagger", [*taggers, name], ["listen"])
        taggers[name] = load(path, "classifier", on)

    # check all songs before processing the first one
    files.lock(os.path.join(out, ".lock"), out)
    done = {folder for folder, file in songs.items()
            if not overwrite and is_done(file, folder, provenance[folder])}

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
