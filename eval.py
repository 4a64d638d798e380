"""
Stage 3: evaluates checkpoints on the test split.

    python eval.py ckpt/vocals.pt           # a separator: SDR, SI-SDR, ..., between two baselines
    python eval.py ckpt/mtat.pt             # a classifier: per class and mean, with an interval
    python eval.py ckpt/mtat-seed*.pt       # several: also mean and standard deviation over seeds
    python eval.py separators/vocals/checkpoint-20 --data=data/musdb --sources=vocals

Writes results/NAME.json, .npz, .png; then `python -m reports.page results/NAME.json` makes a page.
"""
import glob
import itertools
import json
import math
import os
import pathlib
import re

import numpy as np
import torch
from tqdm import tqdm

import model
import weights
from common import metrics, settings
from common.device import AMP_DTYPES, accelerate, setup_device
from common.files import atomic, write_atomically
from common.settings import die
from data import SPLITS, TRACKS, Clips, Prepared
from reports.figures import draw, spectrograms

# -----------------------------------------------------------------------------
# settings
data = ""               # prepared data; empty: what the checkpoint was trained on
task = ""               # of classifiers: tags or genre; empty: what the checkpoint was trained on
sources = []            # of released separators: what their masks are, such as vocals
split = "test"          # train, valid or test
out = "results"         # folder to write to
overwrite = False       # replace existing results
pictures = True         # draw figures; python -m reports.figures draws them later
bootstrap = 200         # resamples of the test clips for the 95 % interval; 0: no interval
seed = 1                # of the bootstrap
device = ""             # cpu, cuda, mps; empty: cuda if there is one
dtype = "float32"       # float32, bfloat16, float16: of the convolutions only
# -----------------------------------------------------------------------------

EXCERPT = 8 * model.SAMPLE_RATE     # length of the excerpt in a separator's figure


def oracle(mixture, references, block=10 * model.SAMPLE_RATE):
    """Ideal ratio masks |S| / sum |S| with the mixture's phase: K waves (N,) -> (K, N).

    With the model's STFT, in blocks that include all overlapping frames, for long songs.
    """
    waves, edge, hop = [mixture, *references], model.EDGE, model.HOP
    result = np.empty((len(references), len(mixture)), np.float32)
    for at in range(0, len(mixture), block):
        n = min(block, len(mixture) - at)
        length = (math.ceil(n / hop) + 2) * hop + model.WIN
        parts = [wave[max(0, at - edge):at - edge + length] for wave in waves]
        before = max(0, edge - at)                      # zeros before and after the song
        padding = before, length - before - len(parts[0])
        parts = np.stack([np.pad(part, padding) for part in parts])             # (1 + K, length)
        spec = model.stft(torch.from_numpy(parts))                              # (1 + K, T, 257)
        magnitude = spec[1:, :, :model.BINS].abs()                              # (K, T, 256)
        masks = magnitude / (magnitude.sum(0) + 1e-8)
        masks = torch.nn.functional.pad(masks, (0, 1), value=1.0)               # (K, T, 257)
        result[:, at:at + n] = model.istft(masks * spec[0])[:, edge:edge + n].numpy()
    return result


def measure_song(net, songs, item):
    """(metrics of model, mixture and oracle; waves of the figure (1 + 2 S, N)) of one song.

    With fewer than four sources, "rest" is the sum of the others.
    """
    mixture = songs.read(item, "mixture")                                       # (N,)
    separated = model.separate(net, torch.from_numpy(mixture)).numpy()          # (S, N)
    references = {s: songs.read(item, s) for s in net.sources}
    estimates = dict(zip(net.sources, separated, strict=True))
    waves = [mixture, *(wave for s in net.sources for wave in (estimates[s], references[s]))]
    waves = np.stack([wave[:EXCERPT] for wave in waves])                        # (1 + 2 S, N)
    others = [t for t in TRACKS[1:] if t not in net.sources]
    if others:
        references["rest"] = sum(songs.read(item, t) for t in others)
        estimates["rest"] = mixture - sum(estimates.values())

    row = {"song": item["name"], "model": metrics.song_metrics(references, estimates, net.sources)}
    del separated, estimates                # large for long songs
    ideal = oracle(mixture, list(references.values()))                          # (K, N)
    for kind, waves_of_kind in (("mixture", [mixture] * len(ideal)), ("oracle", ideal)):
        estimates = dict(zip(references, waves_of_kind, strict=True))
        row[kind] = metrics.song_metrics(references, estimates, net.sources)
    return row, waves


def evaluate_separator(net, meta, path, songs):
    """(result, arrays of the figure) of a separator."""
    n = len(net.sources)
    net.sources = list(sources or net.sources)
    if n != len(net.sources) or not set(net.sources) <= set(TRACKS):
        die(f"{path} has masks of {n} sources, not of {', '.join(net.sources)}: name the source of "
            "each mask, such as --sources=vocals")
    items, rows, table = songs.items(split), [], []
    loudest = max(items, key=lambda item: np.abs(songs.read(item, "mixture")[:EXCERPT]).mean())
    for item in tqdm(items, "songs"):
        row, waves = measure_song(net, songs, item)
        rows.append(row)
        if item is loudest:
            excerpt = spectrograms(item["name"], waves)

    # medians over frames (in song_metrics), then over songs, as museval reports them
    keys, medians = ("SDR", "SIR", "SAR", "SI-SDR", "new SDR"), {s: {} for s in net.sources}
    for s, kind in itertools.product(net.sources, ("model", "mixture", "oracle")):
        known = [row[kind][s] for row in rows if s in row[kind]]
        values = {key: [one[key] for one in known if key in one] for key in keys}
        medians[s][kind] = {k: float(np.median(v)) if v else None for k, v in values.items()}
        table.append([f"{s}, {kind}", *medians[s][kind].values(), len(known)])
    print(f"{path}: separator of {', '.join(net.sources)} on {songs.path}, {split}: "
          f"{len(items)} songs, 16 kHz mono. Not comparable with results at 44.1 kHz: compare with "
          "the mixture as estimate (mixture) and ideal ratio masks (oracle)")
    print_table(["median over songs, dB", *keys, "songs"], table, 2)
    return {"sources": net.sources, "median": medians, "songs": rows}, excerpt


@torch.no_grad()
def clip_scores(net, clips):
    """Scores (clips, classes) in [0, 1]. One clip at a time: batching would change last digits."""
    net_device, scores = next(net.parameters()).device, []
    for n in tqdm(range(len(clips)), "clips"):
        logits = net(clips.clip(n).to(net_device))[0]                           # (classes,)
        score = torch.sigmoid(logits) if net.multilabel else torch.softmax(logits, 0)
        scores.append(score.cpu().double().numpy())
    return np.stack(scores)


def per_class(targets, scores, classes, multilabel):
    """One row per class: number of clips, AUCs, recall if single-label; None if undefined."""
    rows, predictions = [], np.eye(len(classes))[scores.argmax(1)]              # (clips, classes)
    columns = zip(classes, targets.T, scores.T, predictions.T, strict=True)
    for name, truth, score, predicted in columns:
        roc, pr = metrics.areas(truth, score, np.ones((1, len(truth)), int))
        values = {"ROC-AUC": roc[0], "PR-AUC": pr[0]}
        if not multilabel:
            values["recall"] = predicted[truth == 1].mean() if truth.any() else np.nan
        values = {key: None if np.isnan(value) else float(value) for key, value in values.items()}
        rows.append({"class": name, "clips": int(truth.sum()), **values})
    return rows


def evaluate_classifier(net, meta, path, prepared):
    """(result, {clips, targets, scores}) of a classifier.

    result["chance"]: metrics of random scores (tags), or of the most frequent class (genre).
    """
    default = "tags" if net.multilabel else "genre"
    clips = Clips(prepared, split, task or meta.get("task") or default)
    n, known = net.args["n_classes"], meta["classes"] or clips.classes
    targets = clips.targets.numpy().astype(int)                                 # (clips, classes)
    counts = targets.sum(0)                                                     # (classes,)
    defined = (counts > 0) & (counts < len(clips))      # AUC needs clips with and without the class
    fits = (n, known, net.multilabel) == (len(clips.classes), clips.classes, clips.multilabel)
    if not fits or net.multilabel and not defined.any():
        die(f"{path} has {n} classes ({', '.join(known[:3])}, ...), {prepared.path} has "
            f"{len(clips.classes)} ({', '.join(clips.classes[:3])}, ...), {defined.sum()} of them "
            "with positive and negative clips: evaluate it on the data it was trained for")
    scores = clip_scores(net, clips)
    measure = metrics.tag_metrics if net.multilabel else metrics.genre_metrics
    values = {key: value[0].item() for key, value in measure(targets, scores).items()}
    result = {"classes": clips.classes, "clips": len(clips), "metrics": values,
              "interval": metrics.interval(measure, targets, scores, bootstrap, seed),
              "per_class": per_class(targets, scores, clips.classes, net.multilabel)}
    if net.multilabel:
        result["chance"] = {"ROC-AUC": 0.5, "PR-AUC": float(counts[defined].mean() / len(clips))}
    else:
        result["chance"] = {"accuracy": float(targets.mean(0).max()),
                            "balanced accuracy": 1 / int((counts > 0).sum())}
        predictions = np.eye(len(clips.classes), dtype=int)[scores.argmax(1)]   # (clips, classes)
        result["confusion"] = (targets.T @ predictions).tolist()    # rows are the true classes
    print(f"{path}: {net.args['variant']} classifier of {len(clips.classes)} classes on "
          f"{prepared.path}, {split}: {len(clips)} clips")
    print_table(result["per_class"][0], [row.values() for row in result["per_class"]], 3)
    rows = [[key, value, *result["interval"].get(key, "--"), result["chance"].get(key, "-")]
            for key, value in values.items()]
    print_table(["", "", "95 % from", "to", "chance"], rows, 4)
    return result, {"clips": [item["name"] for item in clips.items],
                    "targets": targets.astype(np.uint8), "scores": scores}


def print_table(heads, rows, digits):
    for name, *row in (heads, *rows):
        row = [f"{v:.{digits}f}" if isinstance(v, float) else "-" if v is None else v for v in row]
        print(f"{name:24}" + "".join(f"{cell:>10}" for cell in row))


def print_means(results):
    """Means over the seeds of classifiers, {NAME-seedN: result}, that have the same test clips."""
    groups = {}
    for name, result in results.items():
        if values := result.get("metrics"):
            group = re.sub(r"-seed\d+$", "", name), result["tested_on"], *values
            groups.setdefault(group, []).append(values)
    for (name, *_), runs in groups.items():
        means = [f"{key} {metrics.mean_and_std([run[key] for run in runs], '.4f')}"
                 for key in runs[0] if key != "tags used"]
        print(f"{name}, n = {len(runs)}: " + ", ".join(means))


def check_results(targets):
    """Exits before the evaluation if the results could not be written."""
    path = pathlib.Path(out).absolute()
    folder = next(folder for folder in (path, *path.parents) if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        die(f"out={out}: {folder} is not a writable folder")
    for n, target in enumerate(targets):
        if target in targets[:n] or os.path.exists(f"{target}.json") and not overwrite:
            die(f"{target}.json exists, or is the result of two of these checkpoints: "
                "--overwrite=True replaces existing results, --out=FOLDER writes elsewhere")


def prepared_for(meta, path):
    """Data in the folder `data`, else what the checkpoint was trained on, with its fold if any."""
    kind = "stems" if meta["kind"] == "separator" else "clips"
    fold, folder = meta["config"].get("fold", -1), data or meta["config"].get("data")
    if not folder:
        die(f"{path} does not name its training data: name a prepared folder with --data=")
    if data and fold >= 0 and not any("fold" in i for i in Prepared(data, kind).index["items"]):
        print(f"note: {path} was trained for fold {fold}, but {data} has no folds: evaluating its "
              f"{split} split")
        fold = -1
    prepared = Prepared(folder, kind, fold)
    if not data and meta["config"].get("trained_on") not in (None, prepared.trained_on()):
        die(f"the splits or labels in {folder} have changed since {path} was trained, so its "
            f"training clips may now be in the {split} split: train again, or evaluate it anyway "
            f"with --data={folder}")
    return prepared


def main():
    config, patterns = settings.configure(globals(), configs=False)
    settings.check_numbers(config)
    settings.choose("split", split, SPLITS)
    settings.choose("dtype", dtype, AMP_DTYPES)
    settings.at_least(0, bootstrap=bootstrap)
    if not patterns:
        die("name one or more checkpoints: python eval.py ckpt/vocals.pt")
    targets = {}
    for pattern in patterns:    # an existing path is not a pattern, even with [ in its name
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern)) or [pattern]
        targets |= {path: os.path.join(out, weights.name_of(path)) for path in paths}
    check_results(list(targets.values()))
    torch_device, *_ = setup_device(device)
    torch.backends.cudnn.allow_tf32 = False         # the same numbers as on a CPU

    results = {}
    for path, target in targets.items():
        net, meta = weights.load(path, torch_device)
        accelerate(net, torch_device)
        net.amp_dtype = AMP_DTYPES[dtype]
        if meta.get("as_published"):
            print(f"{path}: published weights, trained with {meta['as_published']}")
        prepared = prepared_for(meta, path)
        evaluate = evaluate_separator if meta["kind"] == "separator" else evaluate_classifier
        result, arrays = evaluate(net, meta, path, prepared)

        # .npz first: a .json file means that the result is complete
        os.makedirs(out, exist_ok=True)
        with atomic(f"{target}.npz", "wb") as f:
            np.savez_compressed(f, **arrays)
        result = {"checkpoint": path, "step": meta["step"], "commit": meta.get("commit"),
                  "config": meta["config"], "data": prepared.path, "split": split, "dtype": dtype,
                  "trained_on": prepared.trained_on(), "tested_on": prepared.hash_of(split),
                  "kind": meta["kind"], **result}
        write_atomically(json.dumps(result, indent=1), f"{target}.json")
        print(f"details: {target}*\n")
        results[weights.name_of(path)] = result

    if len(results) > 1:
        print_means(results)
    for target in targets.values() if pictures else []:
        draw(f"{target}.json")


if __name__ == "__main__":
    settings.script(main)
