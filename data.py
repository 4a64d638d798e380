"""
Reads prepared data: one memory-mapped file of int16 audio, 16 kHz mono, and an index.

    data/<name>/audio.int16     all audio, one piece behind the other, little-endian int16
    data/<name>/index.json      format, kind, sample_rate, n_samples, items, left_out, ...
    data/<name>/journal.jsonl   what was decoded from which file; training does not need it

An item has name, split (train, valid or test), offset and length, both in samples. It may have a
title, a group that is not split up (an artist, an album), and a fold of a cross-validation.

kind "stems": an item is a song. Its five TRACKS lie one behind the other, `length` samples each.
kind "clips": an item is a clip. It has the numbers of its classes under the name of each task:
{"name": "a", "split": "train", "offset": 0, "length": 96000, "tags": [0, 7], "genre": [2]}.
The index then has classes, the names per task: {"tags": ["voice", ...], "genre": ["rock", ...]}.
It also has multilabel, the tasks with several classes per clip: ["tags"].

prepare_data.py writes such folders, and so can you: `left_out` and all else is for the record.

Every random number follows from the seed and the number of the crop. So batch size, threads,
processes, stopping and resuming do not change what is drawn.
"""
import hashlib
import json
import os
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
PARTS = {"vocals": 2, "other": 2, "drums": 2, "bass": 1}    # crops of each in a mix of all sources


# -----------------------------------------------------------------------------
# a prepared folder

def read_index(path, kind):
    """The index of a prepared folder, checked. ValueError with what to do if it does not fit."""
    file = os.path.join(path, "index.json")
    if not os.path.isfile(file):
        raise ValueError(f"no prepared data in {path} (no index.json): make it with "
                         "prepare_data.py, or name another folder with --data=")
    with open(file, encoding="utf-8") as f:
        try:
            index = dict(json.load(f))
        except (ValueError, TypeError) as e:
            raise ValueError(f"{file} is damaged ({e}): run prepare_data.py again") from e
    found = index.get("kind"), index.get("format")
    if found != (kind, FORMAT):
        needs = {"stems": "separation needs songs with stems",
                 "clips": "classification needs labelled clips"}[kind]
        raise ValueError(f"{file} holds {found[0]!r} in format {found[1]}, needed are {kind!r} "
                         f"in format {FORMAT}: {needs}")
    needed = {"sample_rate", "n_samples", "items"}
    if kind == "clips":
        needed |= {"classes", "multilabel"}
    check_keys(index, needed, file)
    if index["sample_rate"] != SAMPLE_RATE:
        raise ValueError(f"{path} has audio at {index['sample_rate']} Hz, the networks need "
                         f"{SAMPLE_RATE} Hz: prepare it again with prepare_data.py")
    for item in index["items"]:
        check_keys(item, {"name", "split", "offset", "length"}, file)
        whole = type(item["offset"]) is int and type(item["length"]) is int
        if not whole or item["split"] not in SPLITS:
            raise ValueError(f"{file}: {item['name']} needs whole numbers as offset and length "
                             f"and one of {', '.join(SPLITS)} as split")
    return index


def check_keys(entry, needed, file):
    missing = sorted(needed - entry.keys())
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}: data.py describes the format")


def split_by_fold(items, fold, path):
    """Gives the items splits: this fold is test, the next or the first one valid, others train."""
    # as Python writes them: a list is no fold, and neither is the text "0"
    folds = {repr(item.get("fold")) for item in items}
    if folds != set(map(repr, range(len(folds)))) or len(folds) < 3 or repr(fold) not in folds:
        raise ValueError(f"fold={fold} needs clips with folds 0, 1, 2 and so on, {path} has "
                         f"{', '.join(sorted(folds))}: prepare it from a table with a "
                         "column fold (-1 is no fold)")
    for item in items:
        behind = (item["fold"] - fold) % len(folds)
        item["split"] = {0: "test", 1: "valid"}.get(behind, "train")


def to_float(samples):
    """int16 to float32 in [-1, 1): the inverse of audio.to_int16."""
    return samples.astype(np.float32) / 32768.0


class Prepared:
    """A prepared folder of one kind, "stems" or "clips".

    items(split) are its index entries, read(item) their samples as float32 in [-1, 1).
    With a fold of a cross-validation that fold is the test split, the next one valid, and the
    rest train. ValueError with what to do if the folder is missing, of another kind or sample
    rate, or does not fit its index.
    """

    def __init__(self, path, kind, fold=-1):
        self.path = path
        self.index = read_index(path, kind)
        if fold >= 0:
            split_by_fold(self.index["items"], fold, path)
        self.audio_path = os.path.join(path, "audio.int16")

        # the audio may be longer than the index says: preparing only ever adds to it
        size = os.path.getsize(self.audio_path) if os.path.exists(self.audio_path) else 0
        fits = size >= 2 * self.index["n_samples"]
        tracks = len(TRACKS) if kind == "stems" else 1
        for item in self.index["items"]:
            end = item["offset"] + tracks * item["length"]
            fits = fits and item["offset"] >= 0 < item["length"] and end <= self.index["n_samples"]
        if not fits:
            raise ValueError(f"{self.audio_path} ({size} bytes) does not fit its index: prepare "
                             "it again with --overwrite=True")
        self.audio, self.on_device = np.memmap(self.audio_path, "<i2", "r"), None

    def keep_on(self, device):
        """Copies the audio to a device, such as a GPU: crops are cut there from now on."""
        copy, some = torch.empty(len(self.audio), dtype=torch.int16, device=device), 1 << 26
        for at in range(0, len(copy), some):        # or the CPU would have to hold all of it too
            copy[at:at + some] = torch.from_numpy(np.array(self.audio[at:at + some]))
        self.on_device = copy                                                   # (n,)

    def cut(self, starts, length, valid=None):
        """K crops that begin at these samples of the audio: (K, length) float32 in [-1, 1).

        Behind the first valid[k] samples, crop k is silent. An array of NumPy, or a tensor on the
        device of keep_on(), with the same bits.
        """
        valid = np.full(len(starts), length) if valid is None else np.asarray(valid)
        if self.on_device is None:
            crops = np.zeros((len(starts), length), np.float32)
            for crop, at, most in zip(crops, starts, valid, strict=True):
                crop[:most] = to_float(self.audio[at:at + most])
            return crops
        device = self.on_device.device
        # without waiting for what the device has to do still
        starts, valid = (torch.as_tensor(x).to(device, non_blocking=True)[:, None]
                         for x in (starts, valid))                              # (K, 1)
        steps = torch.arange(length, device=device)
        where = (starts + steps).clamp(max=len(self.on_device) - 1)             # (K, length)
        return torch.where(steps < valid, self.on_device[where].float() / 32768.0, 0.0)

    def trained_on(self):
        """A hash of what training sees: names, lengths, splits and labels of train and valid.

        With another hash, a network may have been trained on what is now in the test split.
        """
        return self.hash_of("train", "valid")

    def hash_of(self, *splits):
        """A hash of names, lengths, splits and labels of the items in these splits."""
        unseen = ("offset", "title", "group", "fold")
        seen = [{k: v for k, v in item.items() if k not in unseen}
                for item in self.index["items"] if item["split"] in splits]
        text = json.dumps([seen, self.index.get("classes")], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def items(self, split):
        chosen = [i for i in self.index["items"] if i["split"] == split]
        if not chosen:
            raise ValueError(f"{self.path} has nothing in its {split} split")
        return chosen

    def read(self, item, track=None, start=0, length=None):
        """Samples start .. start + length of a clip, or of one track of a song: (length,)."""
        at = item["offset"] + start
        if track:
            at += TRACKS.index(track) * item["length"]
        return to_float(self.audio[at:at + (length or item["length"] - start)])


# -----------------------------------------------------------------------------
# songs to learn separation from

class Mixes:
    """Random mixes of crops of stems from different places, as the paper pre-trains.

    One source: 2 crops of it, and 2 crops of accompaniments (the sum of the other stems).
    Several sources: 2 vocals, 2 other, 2 drums and 1 bass, of those that are wanted.
    Each crop is 61,792 samples of a segment of 6 s. The offset in the segment is the same for all
    crops of one mix. The gain is not changed. ValueError for unknown sources or too few songs.
    """

    def __init__(self, data, split, sources, seed):
        self.data, self.sources = data, list(sources)
        self.seed = [seed, SPLITS.index(split)]
        unknown = [s for s in self.sources if s not in TRACKS[1:]]
        if unknown or len(set(self.sources)) < len(self.sources) or not self.sources:
            raise ValueError(f"sources must be some of {', '.join(TRACKS[1:])}, each once, got "
                             f"{', '.join(self.sources) or 'none'}")
        self.segments = [(song, at) for song in data.items(split)
                         for at in range(0, song["length"] - SEGMENT + 1, SEGMENT_HOP)]

        # (source that the crop counts for or None, tracks that are added up) of each crop
        if len(self.sources) == 1:
            rest = [t for t in TRACKS[1:] if t not in self.sources]
            self.parts = [(self.sources[0], self.sources)] * 2 + [(None, rest)] * 2
        else:
            self.parts = [(s, [s]) for s in self.sources for _ in range(PARTS[s])]
        if len(self.segments) < len(self.parts):
            raise ValueError(f"{data.path} has {len(self.segments)} segments of 6 s in its "
                             f"{split} split, a mix needs {len(self.parts)}")

    def starts(self, number):
        """Where the crops of mix `number` of the endless stream begin, of each of their tracks."""
        rng = np.random.default_rng([*self.seed, number])
        offset = int(rng.integers(SEGMENT - CROP + 1))
        places = rng.choice(len(self.segments), len(self.parts), replace=False)
        found = []
        for (_, tracks), place in zip(self.parts, places, strict=True):
            song, at = self.segments[place]
            first = song["offset"] + at + offset
            found += [first + TRACKS.index(track) * song["length"] for track in tracks]
        return found

    def batch(self, first, size):
        """Mixes first .. first + size - 1 as tensors: mixture (B, N) and sources (B, S, N)."""
        starts = np.array([self.starts(first + i) for i in range(size)])        # (B, R)
        crops = self.data.cut(starts.flatten(), CROP)                           # (B R, N)
        crops = crops.reshape(*starts.shape, CROP)                              # (B, R, N)

        # by NumPy on a CPU: threads of PyTorch's would be in the way of those that train
        mixture, stems, at = 0, dict.fromkeys(self.sources, 0), 0
        for source, tracks in self.parts:
            crop = sum(crops[:, at + i] for i in range(len(tracks)))            # (B, N)
            mixture, at = mixture + crop, at + len(tracks)
            if source:
                stems[source] = stems[source] + crop
        stems = list(stems.values())
        if isinstance(crops, torch.Tensor):
            return mixture, torch.stack(stems, 1)                               # (B, S, N)
        return torch.from_numpy(mixture), torch.from_numpy(np.stack(stems, 1))


# -----------------------------------------------------------------------------
# clips to learn labels from

class Clips:
    """Labelled clips of one split: random crops to train on, whole clips to evaluate.

    `task` is the label set: "tags" (several per clip) or "genre" (one per clip), or what the index
    has. targets is (clips, classes), 0 or 1. With a fraction below 1 only such a share of the clips
    is there, see some_of(). ValueError if the task or its labels do not fit.

    A crop has `crop` samples, which may be changed: transformers see more than convolutions.
    """

    def __init__(self, data, split, task, seed=0, fraction=1.0):
        tasks, multilabel = data.index["classes"], data.index["multilabel"]
        if not isinstance(tasks, dict) or not isinstance(multilabel, list):
            raise ValueError(f"{data.path}: classes must be a dictionary of lists and multilabel "
                             "a list of tasks, as data.py describes")
        if task not in tasks:
            raise ValueError(f"{data.path} has no task {task!r}, only {', '.join(tasks)}: choose "
                             "with --task=")
        self.data, self.seed, self.crop = data, seed, CROP
        self.classes, self.multilabel = tasks[task], task in multilabel
        self.items = [i for i in data.items(split) if task in i]
        if not self.items:
            raise ValueError(f"{data.path}: no {split} clip has {task}")

        self.targets = torch.zeros(len(self.items), len(self.classes))          # (clips, classes)
        for row, item in zip(self.targets, self.items, strict=True):
            self.check_labels(item, task)
            row[item[task]] = 1.0
        if not self.multilabel and not (self.targets.sum(1) == 1).all():
            raise ValueError(f"{data.path}: {task} must be exactly one class per clip")
        if fraction < 1:
            kept = some_of(self.targets.numpy(), fraction)
            self.items, self.targets = [self.items[n] for n in kept], self.targets[kept]

    def check_labels(self, item, task):
        labels, numbers = item[task], range(len(self.classes))
        if not isinstance(labels, list) or any(type(c) is not int or c not in numbers
                                               for c in labels):
            raise ValueError(f"{self.data.path}: {task} of {item['name']} must be a list of "
                             f"numbers from 0 to {len(self.classes) - 1}, got {labels}")

    def __len__(self):
        return len(self.items)

    def clip(self, number):
        """The whole clip: (1, length) float32."""
        return torch.from_numpy(self.data.read(self.items[number]))[None]

    def crops(self, number, most):
        """The first crops of a clip, end to end: (K, 61792), K at most `most`.

        A clip that is shorter than one crop ends in silence.
        """
        item = self.items[number]
        length = min(item["length"], most * self.crop)
        wave = torch.from_numpy(self.data.read(item, length=length))            # (length,)
        wave = F.pad(wave, (0, max(0, self.crop - length)))
        return wave.unfold(0, self.crop, self.crop)[:most]                      # (K, 61792)

    def order(self, epoch):
        """The numbers of the clips in the order of an epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.items))

    def batch(self, epoch, numbers):
        """One random crop of each clip of `numbers`: waves (B, 61792), targets (B, classes).

        Clips that are shorter than a crop end in silence.
        """
        starts, lengths = [], []
        for number in numbers:
            item = self.items[number]
            room = max(0, item["length"] - self.crop)
            rng = np.random.default_rng([self.seed, epoch, int(number)])
            starts.append(item["offset"] + int(rng.integers(room + 1)))
            lengths.append(min(self.crop, item["length"]))
        waves = torch.as_tensor(self.data.cut(starts, self.crop, lengths))      # (B, 61792)
        return waves, self.targets[numbers]


def some_of(targets, fraction):
    """The numbers of a share of the clips, in which every class of (clips, classes) has its share.

    At least one clip of each class is among them, so a small share of few clips is larger than it
    says. The same clips are chosen for any seed of a training run. Iterative stratification
    (Sechidis et al. 2011): the rarest class comes first.
    """
    order = np.random.default_rng(0).permutation(len(targets))
    chosen, free = np.zeros(len(targets), bool), np.ones(len(targets), bool)
    totals = targets.sum(0)                                                     # (classes,)
    for c in np.argsort(totals, kind="stable"):
        lacking = max(1, round(fraction * totals[c])) - targets[chosen, c].sum()
        having = [n for n in order if free[n] and targets[n, c]]
        chosen[having[:max(0, int(lacking))]] = True
        free[having] = False
    rest = [n for n in order if free[n]]                                        # without a class
    chosen[rest[:round(fraction * len(rest))]] = True
    return np.flatnonzero(chosen)


# -----------------------------------------------------------------------------

def prefetch(make, numbers, workers, pin=False, ahead=2):
    """Yields make(n) for n in numbers, in order, computed by `workers` threads.

    At most `ahead` results per thread are made before they are asked for. With 0 workers each is
    made when it is asked for. pin: tensors in pinned memory, which reach a GPU faster.
    """
    def job(n):
        made = make(n)
        return tuple(t if t.is_cuda else t.pin_memory() for t in made) if pin else made

    if workers == 0:
        yield from map(job, numbers)
        return
    numbers = iter(numbers)
    pool = ThreadPoolExecutor(workers)
    try:
        waiting = [pool.submit(job, n) for n in islice(numbers, ahead * workers)]
        while waiting:
            ready = waiting.pop(0).result()
            waiting.extend(pool.submit(job, n) for n in islice(numbers, 1))
            yield ready
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # what still runs may hang
