"""
Turns datasets into the prepared format that training reads (see data.py).

    python prepare_data.py demo              # data/demo_songs and data/demo_clips, synthesised from a seed in seconds
"""
import os
import shutil

import numpy as np
from tqdm import tqdm

import synth
from data import SPLITS, TRACKS, Prepared, to_int16, write_index
from model import SAMPLE_RATE
from runtime import configure, die

out = "data"                # prepared data goes to OUT/<name>/
seed = 1                    # of everything that is random
overwrite = False           # replace prepared data that is already there
songs = [40, 8, 6]          # demo: songs with stems for train, valid, test
song_seconds = 24           # demo: length of each
clips = [96, 40, 200]      # demo: labelled clips for train, valid, test; each from a song of its own
clip_seconds = 6            # demo: length of each


def write_folder(name, kind, make, n_items, settings, **more):
    """Writes out/<name>/ from make(i) -> (item, (tracks, length) float array), under another name until it is complete."""
    folder = os.path.join(out, name)
    if os.path.exists(folder) and not overwrite:  # an unfinished one stands under another name
        if Prepared(folder, kind).index.get("settings") != settings:
            die(f"{folder} was made with other settings: --overwrite=True makes it anew, --out=FOLDER writes elsewhere")
        print(f"{folder} is there already: nothing done (--overwrite=True makes it anew)")
        return
    temporary, items, written = f"{folder}.{os.getpid()}.tmp", [], 0
    try:
        os.makedirs(temporary)
        with open(os.path.join(temporary, "audio.int16"), "wb") as f:
            for i in tqdm(range(n_items), folder):
                item, tracks = make(i)
                items.append({**item, "offset": written, "length": tracks.shape[1]})
                f.write(to_int16(tracks).tobytes())
                written += tracks.size
        write_index(temporary, kind, items, written, [], settings=settings, **more)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if os.path.exists(folder):
        os.rename(folder, temporary + ".old")
    os.rename(temporary, folder)
    shutil.rmtree(temporary + ".old", ignore_errors=True)
    hours = written / SAMPLE_RATE / 3600
    counts = ", ".join(f"{sum(i['split'] == s for i in items)} {s}" for s in SPLITS)
    print(f"{folder}: {counts}, {hours:.2f} hours of tracks, {2 * written / 1e6:.0f} MB")


def split_of(i, counts):
    return SPLITS[int(np.searchsorted(np.cumsum(counts), i, "right"))]


def prepare_demo():
    """Songs with four stems to separate, and clips of other songs with tags and a genre; few labels, so that what separation taught can matter."""
    if len(songs) != 3 or len(clips) != 3 or min(*songs, *clips, song_seconds, clip_seconds) < 1:
        die("songs and clips are three positive numbers each, for train, valid and test, and the lengths are positive")
    classes = {"tags": list(synth.TAGS), "genre": list(synth.GENRES)}

    def make_song(i):
        rng = np.random.default_rng([seed, 0, i])
        tracks = synth.render(synth.sketch(rng, full=True), song_seconds * SAMPLE_RATE, rng)
        return {"name": f"song {i}", "split": split_of(i, songs)}, np.stack([tracks[t] for t in TRACKS])

    def make_clip(i):
        rng = np.random.default_rng([seed, 1, i])
        song = synth.sketch(rng)
        item = {"name": f"clip {i}", "split": split_of(i, clips), "genre": [classes["genre"].index(song["genre"])],
                "tags": sorted(classes["tags"].index(t) for t in synth.labels(song))}
        return item, synth.render(song, clip_seconds * SAMPLE_RATE, rng)["mixture"][None]

    write_folder("demo_songs", "stems", make_song, sum(songs), {"seed": seed, "songs": songs, "seconds": song_seconds})
    write_folder("demo_clips", "clips", make_clip, sum(clips), {"seed": seed, "clips": clips, "seconds": clip_seconds}, classes=classes,
                 multilabel=["tags"])


DATASETS = {"demo": prepare_demo}

if __name__ == "__main__":
    _, names = configure(globals(), configs=False)
    if len(names) != 1 or names[0] not in DATASETS:
        die(f"name one dataset: python prepare_data.py {'|'.join(DATASETS)}" + (f" ({' '.join(names)} cannot be prepared yet)" if names else ""))
    try:
        DATASETS[names[0]]()
    except (ValueError, OSError) as e:
        die(e)
