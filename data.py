"""
Prepared data: one memory-mapped file of int16 audio, 16 kHz mono, and an index; crops and random mixes drawn from it.

    data/<name>/audio.int16    all audio, one after another, little-endian int16
    data/<name>/index.json     format, kind, sample_rate, n_samples (of the whole file), items, left_out [{name, reason}]; and for the record
                               whether leaving out was expected, notes [{name, note}] on odd files, the settings of prepare_data.py
    data/<name>/audio.jsonl    what was decoded (see collect.py); training does not need it

An item has name, split (train, valid or test), offset and length, both in samples; it may have a title, and a group that is not split up.
kind "stems": an item is a song; its five tracks TRACKS lie one after another, each `length` samples long.
kind "clips": an item is a clip and also has the numbers of its classes under the name of each task, as in
{"name": "a", "split": "train", "offset": 0, "length": 96000, "tags": [0, 7], "genre": [2]}; the index also has classes, the names of the
classes of each task, as in {"tags": ["voice", ...], "genre": ["rock", ...]}, and multilabel, the tasks with several per clip, as in ["tags"].

Every random number is a function of the seed and the number of the crop, so neither the batch size, the number of threads or processes,
nor stopping and resuming changes what is drawn.
"""
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from model import CROP, SAMPLE_RATE
from runtime import write_atomically

FORMAT = 1
TRACKS = ("mixture", "drums", "bass", "other", "vocals")
SPLITS = ("train", "valid", "test")
SEGMENT, SEGMENT_HOP = 6 * SAMPLE_RATE, 3 * SAMPLE_RATE      # pre-training draws from segments of 6 s every 3 s
PARTS = {"vocals": 2, "other": 2, "drums": 2, "bass": 1}     # crops of each source in a multi-source mix


def to_float(samples):
    """int16 to float32 in [-1, 1): the inverse of decode.to_int16."""
    return samples.astype(np.float32) / 32768.0


class Prepared:
    """A prepared folder. items(split) are its index entries, read(item) the samples as float32 in [-1, 1].

    ValueError with what to do if the folder is missing, unfinished, of another kind or sample rate, or does not fit its index."""

    def __init__(self, path, kind):
        index = os.path.join(path, "index.json")
        if not os.path.isfile(index):
            raise ValueError(f"no prepared data in {path} (no index.json): make it with prepare_data.py, or name another folder with --data=")
        with open(index, encoding="utf-8") as f:
            try:
                self.index = dict(json.load(f))
            except (ValueError, TypeError) as e:
                raise ValueError(f"{index} is damaged ({e}): prepare it again with --overwrite=True") from e
        needed = {"format", "kind", "sample_rate", "n_samples", "items"} | ({"classes", "multilabel"} if kind == "clips" else set())
        missing = needed - self.index.keys() if self.index.get("kind") == kind else set()
        missing |= {k for item in self.index.get("items", []) for k in {"name", "split", "offset", "length"} - item.keys()}
        wrong = [i for i in self.index.get("items", []) if not missing and (
            i["split"] not in SPLITS or any(type(i[k]) is not int for k in ("offset", "length")))]
        if wrong:
            raise ValueError(f"{index}: {wrong[0]['name']} needs whole numbers as offset and length and one of {', '.join(SPLITS)} as split")
        if missing:
            raise ValueError(f"{index} lacks {', '.join(sorted(missing))}: data.py describes the format")
        if self.index.get("format") != FORMAT or self.index.get("kind") != kind:
            raise ValueError(f"{index} holds {self.index.get('kind')!r} in format {self.index.get('format')}, needed are {kind!r} in format "
                             f"{FORMAT}: " + ("separation needs songs with stems" if kind == "stems" else "classification needs labelled clips"))
        if self.index["sample_rate"] != SAMPLE_RATE:
            raise ValueError(f"{path} has audio at {self.index['sample_rate']} Hz, the networks need {SAMPLE_RATE} Hz: "
                             "prepare it again with prepare_data.py")
        self.path, self.audio_path, self._items = path, os.path.join(path, "audio.int16"), self.index["items"]
        size = os.path.getsize(self.audio_path) if os.path.exists(self.audio_path) else 0
        tracks = len(TRACKS) if kind == "stems" else 1
        if size != 2 * self.index["n_samples"] or any(
                i["offset"] < 0 or i["length"] <= 0 or i["offset"] + tracks * i["length"] > self.index["n_samples"] for i in self._items):
            raise ValueError(f"{self.audio_path} ({size} bytes) does not fit its index: prepare it again with --overwrite=True")
        self.audio = np.memmap(self.audio_path, "<i2", "r")

    def trained_on(self):
        """A hash of what training sees of the index: names, lengths, splits and labels in train and valid. Another one may have trained on what
        is now in test."""
        seen = [{k: v for k, v in i.items() if k not in ("offset", "title", "group")} for i in self._items if i["split"] != "test"]
        return hashlib.sha256(json.dumps([seen, self.index.get("classes")], sort_keys=True).encode()).hexdigest()[:16]

    def items(self, split):
        chosen = [i for i in self._items if i["split"] == split]
        if not chosen:
            raise ValueError(f"{self.path} has nothing in its {split} split")
        return chosen

    def read(self, item, track=None, start=0, length=None):
        """Samples start .. start + length of a clip, or of one track of a song: (length,) float32."""
        at = item["offset"] + (TRACKS.index(track) * item["length"] if track else 0) + start
        return to_float(self.audio[at:at + (length or item["length"] - start)])


class Mixes:
    """Random mixes of crops of stems from different places, as the paper pre-trains (section "Random mixing").

    One source: 2 crops of it plus 2 crops of accompaniments (the sum of the other stems). Several sources: 2 vocals + 2 other + 2 drums
    + 1 bass. Each crop is 61,792 samples from a segment of 6 s, at the same offset for all segments of one mix; no gain change."""

    def __init__(self, data, split, sources, seed):
        self.data, self.sources, self.seed = data, list(sources), [seed, SPLITS.index(split)]
        unknown = [s for s in self.sources if s not in TRACKS[1:]]
        if unknown or len(set(self.sources)) < len(self.sources) or not self.sources:
            raise ValueError(f"sources must be some of {', '.join(TRACKS[1:])}, each once, got {', '.join(self.sources) or 'none'}")
        self.segments = [(song, at) for song in data.items(split) for at in range(0, song["length"] - SEGMENT + 1, SEGMENT_HOP)]
        self.parts = [(s, [s]) for s in self.sources for _ in range(PARTS[s])]
        if len(self.sources) == 1:
            rest = [t for t in TRACKS[1:] if t not in self.sources]
            self.parts = [(sources[0], [sources[0]])] * 2 + [(None, rest)] * 2
        if len(self.segments) < len(self.parts):
            raise ValueError(f"{data.path} has {len(self.segments)} segments of 6 s in its {split} split, a mix needs {len(self.parts)}")

    def mix(self, number):
        """(mixture (61792,), sources (S, 61792)) of mix `number` of the endless stream."""
        rng = np.random.default_rng([*self.seed, number])
        offset = int(rng.integers(SEGMENT - CROP + 1))
        stems, mixture = np.zeros((len(self.sources), CROP), np.float32), np.zeros(CROP, np.float32)
        places = rng.choice(len(self.segments), len(self.parts), replace=False)
        for (source, tracks), place in zip(self.parts, places):
            song, at = self.segments[place]
            crop = sum(self.data.read(song, t, at + offset, CROP) for t in tracks)
            mixture += crop
            if source:
                stems[self.sources.index(source)] += crop
        return mixture, stems

    def batch(self, first, size):
        """Mixes first .. first + size - 1: mixture (B, 61792) and sources (B, S, 61792) as tensors."""
        mixtures, stems = zip(*(self.mix(first + i) for i in range(size)))
        return torch.from_numpy(np.stack(mixtures)), torch.from_numpy(np.stack(stems))


class Clips:
    """Labelled clips of one split: random crops to train on, whole clips to evaluate.

    task is the label set, such as "tags" (several per clip: multi-hot targets) or "genre" (one per clip: class numbers)."""

    def __init__(self, data, split, task, seed=0):
        tasks = data.index["classes"]
        if not isinstance(tasks, dict) or not isinstance(data.index["multilabel"], list):
            raise ValueError(f"{data.path}: classes must be a dictionary of lists and multilabel a list of tasks, as data.py describes")
        if task not in tasks:
            raise ValueError(f"{data.path} has no task {task!r}, only {', '.join(tasks)}")
        self.data, self.seed, self.classes, self.multilabel = data, seed, tasks[task], task in data.index["multilabel"]
        self.items = [i for i in data.items(split) if task in i]
        if not self.items:
            raise ValueError(f"{data.path}: no {split} clip has {task}")
        for item in self.items:
            if not isinstance(item[task], list) or any(type(c) is not int or not 0 <= c < len(self.classes) for c in item[task]):
                raise ValueError(f"{data.path}: {task} of {item['name']} must be a list of numbers from 0 to {len(self.classes) - 1}, got {item[task]}")
        self.targets = torch.zeros(len(self.items), len(self.classes))                             # (clips, classes)
        for row, item in zip(self.targets, self.items):
            row[item[task]] = 1.0
        if not self.multilabel and not (self.targets.sum(1) == 1).all():
            raise ValueError(f"{data.path}: {task} must be exactly one class per clip")

    def __len__(self):
        return len(self.items)

    def clip(self, number):
        """(1, length) float32 tensor: the whole clip."""
        return torch.from_numpy(self.data.read(self.items[number]))[None]

    def crops(self, number, most):
        """(K, 61792): the first crops of a clip, end to end, at most `most` of them; a clip shorter than one ends in silence."""
        wave = self.clip(number)[0]
        wave = torch.nn.functional.pad(wave, (0, max(0, CROP - len(wave))))
        return wave.unfold(0, CROP, CROP)[:most]

    def order(self, epoch):
        """The clips in the order of an epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.items))

    def batch(self, epoch, numbers):
        """One random crop of each clip of `numbers`: (B, 61792) and targets (B, classes). Clips shorter than a crop end in silence."""
        waves = np.zeros((len(numbers), CROP), np.float32)
        for wave, number in zip(waves, numbers):
            item = self.items[number]
            room = max(0, item["length"] - CROP)
            start = int(np.random.default_rng([self.seed, epoch, int(number)]).integers(room + 1))
            crop = self.data.read(item, None, start, min(CROP, item["length"]))
            wave[:len(crop)] = crop
        return torch.from_numpy(waves), self.targets[numbers]


def prefetch(make, numbers, workers, pin=False, ahead=2):
    """Yields make(n) for n in numbers, in order, at most `ahead` per thread computed before they are asked for (0 workers: here and now)."""
    def job(n):
        return tuple(t.pin_memory() for t in make(n)) if pin else make(n)
    if workers == 0:
        yield from map(job, numbers)
        return
    numbers = iter(numbers)
    pool = ThreadPoolExecutor(workers)
    try:
        waiting = [pool.submit(job, n) for _, n in zip(range(ahead * workers), numbers)]
        while waiting:
            ready = waiting.pop(0).result()
            waiting.extend(pool.submit(job, n) for _, n in zip(range(1), numbers))
            yield ready
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # what still runs may hang


def write_index(path, kind, items, n_samples, left_out, **more):
    """The index, written last: its presence means that the folder is complete."""
    index = dict(format=FORMAT, kind=kind, sample_rate=SAMPLE_RATE, n_samples=n_samples, **more, left_out=left_out, items=items)
    write_atomically(json.dumps(index), os.path.join(path, "index.json"))
