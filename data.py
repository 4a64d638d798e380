"""
Training data from a prepared folder: random mixes of stems, crops of labelled clips.

    data/<name>/audio.int16     all audio, contiguous, 16 kHz mono, little-endian int16
    data/<name>/index.json      format, kind, sample_rate, n_samples, items, left_out, ...
    data/<name>/journal.jsonl   what was decoded from which file; not needed for training

An item has name, split (train, valid or test), offset and length, both in samples. Optional are
title, group (artist or album, never divided between splits) and fold (of a cross-validation).

kind "stems": an item is a song. Its five TRACKS are contiguous, `length` samples each.
kind "clips": an item is a clip. Under the name of each task it has a list of class numbers:
{"name": "a", "split": "train", "offset": 0, "length": 96000, "tags": [0, 7], "genre": [2]}.
The index then has classes, the class names per task: {"tags": ["voice", ...], "genre": ["rock",
...]}, and multilabel, the list of the tasks with several classes per clip: ["tags"].

prepare_data.py writes such folders, and so can you; further keys are for the record.

All random numbers derive from the seed and the number of the crop, so batch size, threads, ranks
and resuming do not change the data.
"""
import hashlib
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F

from model import CROP, SAMPLE_RATE

FORMAT = 1
TRACKS = ("mixture", "drums", "bass", "other", "vocals")
SPLITS = ("train", "valid", "test")
SEGMENT = 6 * SAMPLE_RATE           # pre-training draws from segments of 6 s ...
SEGMENT_HOP = 3 * SAMPLE_RATE       # ... every 3 s
CROPS_PER_SOURCE = {"vocals": 2, "other": 2, "drums": 2, "bass": 1}     # in a mix of all sources


def read_index(path, kind):
    """The index of a prepared folder, checked. ValueError with what to do if it does not fit."""
    file = os.path.join(path, "index.json")
    try:
        with open(file, encoding="utf-8") as f:
            index = json.load(f)
        problem = problem_of(index, kind)
    except FileNotFoundError:
        problem = "is missing: run prepare_data.py, or choose another folder with --data="
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        problem = f"is damaged ({type(e).__name__}: {e}): run prepare_data.py again"
    if problem:
        raise ValueError(f"{file} {problem}")
    return index


def problem_of(index, kind):
    """What is wrong with an index, or None."""
    for key, needed in (("format", FORMAT), ("kind", kind), ("sample_rate", SAMPLE_RATE)):
        if index.get(key) != needed:
            return (f"has {key} {index.get(key)!r}, not {needed!r}: separation needs stems, "
                    f"classification clips, and all models take {SAMPLE_RATE} Hz")
    if kind == "clips" and not (isinstance(index["classes"], dict)
                                and isinstance(index["multilabel"], list)):
        return "needs classes (a dict of lists) and multilabel (a list), see data.py"
    tracks, end = len(TRACKS) if kind == "stems" else 1, index["n_samples"]
    for item in index["items"]:
        start, n = item.get("offset"), item.get("length")
        fits = type(start) is type(n) is int and 0 <= start < start + tracks * n <= end
        if not fits or "name" not in item or item.get("split") not in SPLITS:
            return (f"needs name, split ({', '.join(SPLITS)}) and integers offset and length "
                    f"within its {end} samples for every item, got {item}")
    return None


def apply_fold(items, fold, path):
    """Assigns splits for cross-validation: `fold` is test, the next one (cyclic) valid."""
    # compared by repr: neither a list nor the string "0" is a fold
    folds = {repr(item.get("fold")) for item in items}
    if folds != set(map(repr, range(len(folds)))) or len(folds) < 3 or repr(fold) not in folds:
        raise ValueError(f"fold={fold} needs clips with folds 0, 1, 2 and so on, {path} has "
                         f"{', '.join(sorted(folds))}: prepare it from a table with a column fold "
                         "(fold=-1 is no cross-validation)")
    for item in items:
        distance = (item["fold"] - fold) % len(folds)
        item["split"] = {0: "test", 1: "valid"}.get(distance, "train")


class Prepared:
    """A prepared folder of one kind, "stems" or "clips".

    `fold` >= 0 replaces the splits, see apply_fold(). ValueError with what to do if the folder is
    missing, has another kind or sample rate, or does not match its index.
    """

    def __init__(self, path, kind, fold=-1):
        self.path = path
        self.index = read_index(path, kind)
        if fold >= 0:
            apply_fold(self.index["items"], fold, path)

        # the audio may be longer than the index declares, as prepare_data.py only appends
        file = os.path.join(path, "audio.int16")
        size = os.path.getsize(file) if os.path.exists(file) else 0
        if size < 2 * self.index["n_samples"]:
            raise ValueError(f"{file} ({size} bytes) does not match its index: prepare it again "
                             "with --overwrite=True")
        with warnings.catch_warnings():     # nothing writes to it; a writable map would use up RAM
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self.audio = torch.from_numpy(np.memmap(file, "<i2", "r"))          # (n,)

    def keep_on(self, device):
        """Moves the audio to a device, such as a GPU, where cutting crops is faster."""
        self.audio = self.audio.to(device)

    def cut(self, starts, length, valid=None):
        """K crops that start at these samples: (K, length) float32 in [-1, 1), on the same device.

        Crop k has valid[k] samples (default: length), then silence.
        """
        crops = [self.audio[start:start + n]
                 for start, n in zip(starts, valid or [length] * len(starts), strict=True)]
        if valid:
            crops = [F.pad(crop, (0, length - len(crop))) for crop in crops]
        return torch.stack(crops).float().div_(32768.0)                         # (K, length)

    def trained_on(self):
        """A hash that differs if a network may have been trained on what is now the test split."""
        return self.hash_of("train", "valid")

    def hash_of(self, *splits):
        """A hash of names, lengths, splits and labels of the items in these splits."""
        ignored = ("offset", "title", "group", "fold")
        hashed = [{k: v for k, v in item.items() if k not in ignored}
                  for item in self.index["items"] if item["split"] in splits]
        text = json.dumps([hashed, self.index.get("classes")], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def items(self, split):
        chosen = [i for i in self.index["items"] if i["split"] == split]
        if not chosen:
            raise ValueError(f"{self.path} has no items in its {split} split")
        return chosen

    def read(self, item, track=None):
        """A clip, or one track of a song, as a NumPy array: (length,) float32."""
        start = item["offset"] + (TRACKS.index(track) * item["length"] if track else 0)
        return self.cut([start], item["length"])[0].cpu().numpy()


class Mixes:
    """Random mixes of crops of stems from different segments, as the paper pre-trains.

    One source: 2 crops of it, and 2 crops of accompaniments (the sum of the other stems).
    Several sources: CROPS_PER_SOURCE of each. A crop is CROP samples of a segment of 6 s, at the
    same offset in all segments of a mix, with its original gain. ValueError if too few songs.
    """

    def __init__(self, data, split, sources, seed):
        self.data, self.sources = data, list(sources)
        self.seed = [seed, SPLITS.index(split)]
        unknown = set(self.sources) - set(TRACKS[1:])
        if unknown or len(set(self.sources)) < len(self.sources) or not self.sources:
            raise ValueError(f"sources must be some of {', '.join(TRACKS[1:])}, each once, got "
                             f"{', '.join(self.sources) or 'none'}")
        self.segments = [(song, at) for song in data.items(split)
                         for at in range(0, song["length"] - SEGMENT + 1, SEGMENT_HOP)]

        # per crop: the source it belongs to or None, and the tracks that are summed
        if len(self.sources) == 1:
            rest = [t for t in TRACKS[1:] if t not in self.sources]
            self.parts = [(self.sources[0], self.sources)] * 2 + [(None, rest)] * 2
        else:
            self.parts = [(s, [s]) for s in self.sources for _ in range(CROPS_PER_SOURCE[s])]
        if len(self.segments) < len(self.parts):
            raise ValueError(f"{data.path} has {len(self.segments)} segments of 6 s in its "
                             f"{split} split, a mix needs {len(self.parts)}")

    def starts(self, number):
        """The first sample of each track of each crop of mix `number` of the endless stream."""
        rng = np.random.default_rng([*self.seed, number])
        offset = int(rng.integers(SEGMENT - CROP + 1))
        segments = rng.choice(len(self.segments), len(self.parts), replace=False)
        starts = []
        for (_, tracks), segment in zip(self.parts, segments, strict=True):
            song, at = self.segments[segment]
            first = song["offset"] + at + offset
            starts += [first + TRACKS.index(track) * song["length"] for track in tracks]
        return starts

    def batch(self, first, size):
        """Mixes first .. first + size - 1 as tensors: mixture (B, N) and sources (B, S, N)."""
        starts_of_tracks = zip(*map(self.starts, range(first, first + size)), strict=True)
        # cuts one track of all mixes at a time: malloc would not reuse larger temporaries
        mixture, stems = 0, dict.fromkeys(self.sources, 0)
        for source, tracks in self.parts:
            crop = sum(self.data.cut(next(starts_of_tracks), CROP) for _ in tracks)     # (B, N)
            mixture = mixture + crop
            if source:
                stems[source] = stems[source] + crop
        return mixture, torch.stack(list(stems.values()), 1)                    # (B, S, N)


class Clips:
    """Labelled clips of one split: random crops for training, whole clips for evaluation.

    `task` names the labels, such as "tags" (several per clip) or "genre" (one per clip). targets is
    (clips, classes), 0 or 1. fraction < 1 keeps a stratified_subset() of the clips. ValueError if
    the folder lacks the task or its labels are invalid.

    `crop` is the length of a crop in samples: CROP, until set to that of a transformer.
    """

    def __init__(self, data, split, task, seed=0, fraction=1.0):
        tasks = data.index["classes"]
        self.data, self.seed, self.crop = data, seed, CROP
        self.classes, self.multilabel = tasks.get(task, []), task in data.index["multilabel"]
        self.items = [i for i in data.items(split) if task in i and task in tasks]
        if not self.items:
            raise ValueError(f"{data.path} has no {split} clips with {task!r}: choose one of "
                             f"{', '.join(tasks)} with --task=")
        self.targets = torch.zeros(len(self.items), len(self.classes))          # (clips, classes)
        for row, item in zip(self.targets, self.items, strict=True):
            labels, known = item[task], range(len(self.classes))
            valid = isinstance(labels, list) and all(type(c) is int and c in known for c in labels)
            if not valid or (not self.multilabel and len(set(labels)) != 1):
                count = "a list of numbers" if self.multilabel else "a list of exactly one number"
                raise ValueError(f"{data.path}: {task} of {item['name']} must be {count} from 0 to "
                                 f"{len(known) - 1}, got {labels}")
            row[labels] = 1.0
        if fraction < 1:
            kept = stratified_subset(self.targets.numpy(), fraction)
            self.items, self.targets = [self.items[n] for n in kept], self.targets[kept]

    def __len__(self):
        return len(self.items)

    def clip(self, number):
        """The whole clip: (1, length) float32."""
        item = self.items[number]
        return self.data.cut([item["offset"]], item["length"])

    def crops(self, number, most):
        """The first crops, without overlap, padded with silence if short: (K, crop), K <= most."""
        item = self.items[number]
        count = min(most, max(1, item["length"] // self.crop))
        valid = min(item["length"], count * self.crop)
        wave = self.data.cut([item["offset"]], count * self.crop, [valid])      # (1, K crop)
        return wave.view(count, self.crop)                                      # (K, crop)

    def order(self, epoch):
        """The clip numbers in the order of an epoch: a permutation."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.items))

    def batch(self, epoch, numbers):
        """A random crop per clip, padded with silence if short, and targets (B, classes)."""
        starts, valid = [], []
        for number in numbers:
            item = self.items[number]
            rng = np.random.default_rng([self.seed, epoch, int(number)])
            last = max(0, item["length"] - self.crop)
            starts.append(item["offset"] + int(rng.integers(last + 1)))
            valid.append(min(self.crop, item["length"]))
        return self.data.cut(starts, self.crop, valid), self.targets[numbers]   # (B, crop)


def stratified_subset(targets, fraction):
    """The sorted numbers of a random subset with `fraction` of the clips of every class.

    targets: (clips, classes), 0 or 1. At least one clip of each class is kept, so a subset of few
    clips may be larger than `fraction`. It does not depend on the seed of a run. Iterative
    stratification (Sechidis et al. 2011): the rarest class comes first.
    """
    order = np.random.default_rng(0).permutation(len(targets))
    chosen, free = np.zeros(len(targets), bool), np.ones(len(targets), bool)
    totals = targets.sum(0)                                                     # (classes,)
    for c in np.argsort(totals, kind="stable"):
        lacking = max(1, round(fraction * totals[c])) - targets[chosen, c].sum()
        candidates = [n for n in order if free[n] and targets[n, c]]
        chosen[candidates[:max(0, int(lacking))]] = True
        free[candidates] = False
    unlabelled = [n for n in order if free[n]]
    chosen[unlabelled[:round(fraction * len(unlabelled))]] = True
    return np.flatnonzero(chosen)


def prefetch(make, numbers, workers, pin=False):
    """Yields make(n) for n in numbers, in order, computed by `workers` threads.

    At most 2 results per thread are computed in advance; with 0 workers none. pin: pins memory.
    """
    def job(n):
        tensors = make(n)
        return tuple(t if t.is_cuda else t.pin_memory() for t in tensors) if pin else tensors

    if workers == 0:
        yield from map(job, numbers)
        return
    numbers = iter(numbers)
    # torch ops in loader threads would oversubscribe the cores, so these use one core each; this
    # thread keeps its own setting once it has read it
    torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting = [pool.submit(job, n) for n in islice(numbers, 2 * workers)]
        while waiting:
            ready = waiting.pop(0).result()
            waiting.extend(pool.submit(job, n) for n in islice(numbers, 1))
            yield ready
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a hanging read must not block the exit
