"""
Measures checkpoints on the test split; each checkpoint says itself what it is.

    python eval.py ckpt/vocals.pt           # a separator: SDR, SI-SDR, new SDR, floor and ceiling
    python eval.py ckpt/mtat.pt             # a classifier: per class and mean, with an interval
    python eval.py ckpt/mtat-seed*.pt       # several: mean and standard deviation over -seedN
    python eval.py separators/vocals/checkpoint-20 --data=data/musdb --sources=vocals

Writes results/<checkpoint>.json and .npz (of a classifier: the scores of every clip). Several
classifiers also get results/summary.json and .md. Then report.py draws the pictures from these.
"""
import glob
import itertools
import json
import os
import re

import numpy as np
import torch
from tqdm import tqdm

import metrics
import model
import page
import runtime
from data import SPLITS, TRACKS, Clips, Prepared
from model import SAMPLE_RATE
from report import draw, save_excerpt
from runtime import die, write_atomically

# -----------------------------------------------------------------------------
# settings
data = ""               # prepared data; empty: what the checkpoint was trained on
task = ""               # of classifiers: tags or genre; empty: what the checkpoint was trained on
sources = []            # of released separators: what their masks are, such as vocals
split = "test"          # train, valid or test
out = "results"         # folder to write to
name = "summary"        # of the table over several checkpoints
overwrite = False       # replace results that are there
pictures = True         # draw them; report.py does so later
report = False          # also write a page with all of them; page.py does so later
bootstrap = 200         # resamples of the test clips for the 95 % interval; 0: no interval
seed = 1                # of the bootstrap
device = ""             # cpu, cuda, mps; empty: cuda if there is one
dtype = "float32"       # float32, bfloat16, float16: of the convolutions only
# -----------------------------------------------------------------------------

EXCERPT = 8 * SAMPLE_RATE           # what the picture of a separator shows


# -----------------------------------------------------------------------------
# separation

def measure_song(net, songs, item):
    """(metrics of the model, the floor and the ceiling, excerpt (1 + 2 S, N)) of one song.

    With fewer than four sources, "rest" is what they lack to the mixture.
    """
    mixture = songs.read(item, "mixture")
    separated = model.separate(net, torch.from_numpy(mixture)).numpy()          # (S, N)
    references = {s: songs.read(item, s) for s in net.sources}
    estimates = dict(zip(net.sources, separated, strict=True))
    excerpt = [mixture[:EXCERPT]]
    for s in net.sources:
        excerpt += [estimates[s][:EXCERPT], references[s][:EXCERPT]]
    excerpt = np.stack(excerpt)                                                 # (1 + 2 S, N)
    others = [t for t in TRACKS[1:] if t not in net.sources]
    if others:
        references["rest"] = sum(songs.read(item, t) for t in others)
        estimates["rest"] = mixture - sum(estimates.values())

    row, floor = {"song": item["name"]}, dict.fromkeys(references, mixture)
    row["model"] = metrics.song_metrics(references, estimates, net.sources)
    row["floor"] = metrics.song_metrics(references, floor, net.sources)
    del separated, estimates                # of a long song they are large
    ceiling = metrics.oracle(mixture, list(references.values()))
    ceiling = dict(zip(references, ceiling, strict=True))
    row["ceiling"] = metrics.song_metrics(references, ceiling, net.sources)
    return row, excerpt


def evaluate_separator(net, path, songs, split, names):
    """(results, excerpt for the picture) of a separator; `names` says what its masks are."""
    if names and len(names) != len(net.sources):
        die(f"{path} has {len(net.sources)} masks, --sources names {len(names)}")
    net.sources = list(names or net.sources)
    if any(s not in TRACKS for s in net.sources):
        die(f"{path} does not say which source it separates: name it, such as --sources=vocals")
    items, rows, loudest = songs.items(split), [], -1.0
    for item in tqdm(items, "songs"):
        row, waves = measure_song(net, songs, item)
        rows.append(row)
        loudness = float(np.abs(waves[0]).mean())
        if loudness > loudest:              # this song is drawn
            loudest, excerpt = loudness, {"song": item["name"], "waves": waves}

    # the median over frames is taken; now the median over songs, as the tables of museval
    keys, summary = ("SDR", "SIR", "SAR", "SI-SDR", "new SDR"), {}
    print(f"{path}: separator of {', '.join(net.sources)} on {songs.path}, {split}: "
          f"{len(items)} songs")
    print("16 kHz mono and the mixture's phase: compare with the floor (mixture as estimate) and "
          "the ceiling (ideal ratio mask), not with 44.1 kHz tables")
    print(f"{'median over songs, dB':24}" + "".join(f"{key:>9}" for key in keys) + "   songs")
    for s, kind in itertools.product(net.sources, ("model", "floor", "ceiling")):
        found, middle = [r[kind][s] for r in rows if s in r[kind]], {}
        for key in keys:
            values = [f[key] for f in found if key in f]
            middle[key] = float(np.median(values)) if values else None
        summary.setdefault(s, {})[kind] = middle
        cells = [cell(value, "9.2f") for value in middle.values()]
        print(f"{s + ', ' + kind:24}" + "".join(cells) + f"{len(found):8d}")
    result = {"kind": "separator", "sources": net.sources, "median": summary, "songs": rows}
    return result, excerpt


def cell(value, form):
    """A number of a table, or - where there is none."""
    return f"{'-':>9}" if value is None else f"{value:{form}}"


# -----------------------------------------------------------------------------
# classification

@torch.no_grad()
def clip_scores(net, clips):
    """(clips, classes) in [0, 1]; one clip at a time, so that no batch size changes a score."""
    scores = np.zeros((len(clips), len(clips.classes)))
    device = next(net.parameters()).device
    for n in tqdm(range(len(clips)), "clips"):
        logits = net(clips.clip(n).to(device))[0]                               # (classes,)
        score = torch.sigmoid(logits) if net.multilabel else torch.softmax(logits, 0)
        scores[n] = score.cpu().double().numpy()
    return scores


def per_class(targets, scores, classes, multilabel):
    """One row per class: its clips, its AUCs or None, and its recall if a clip has one class."""
    rows, answers = [], scores.argmax(1)
    for i, class_name in enumerate(classes):
        truth = targets[:, i]
        row = {"class": class_name, "clips": int(truth.sum()), "ROC-AUC": None, "PR-AUC": None}
        if 0 < truth.sum() < len(truth):
            found = metrics.areas(truth, scores[:, i], np.ones((1, len(truth)), int))
            row["ROC-AUC"], row["PR-AUC"] = (float(value[0]) for value in found)
        if not multilabel:
            row["recall"] = float((answers == i)[truth == 1].mean()) if truth.any() else None
        rows.append(row)
    return rows


def check_classes(net, meta, path, clips):
    """Ends the script if the clips are labelled with other classes than the network's."""
    known, n = meta["classes"] or ["unnamed"], net.args["n_classes"]
    same_names = meta["classes"] in (None, [], clips.classes)
    if n == len(clips.classes) and same_names and clips.multilabel == net.multilabel:
        return
    die(f"{path} knows {n} classes ({', '.join(known[:3])}, ...), {clips.data.path} has "
        f"{len(clips.classes)} ({', '.join(clips.classes[:3])}, ...): evaluate it on the data it "
        "was trained for")


def evaluate_classifier(net, path, clips, split, bootstrap, seed):
    """(results, what of each clip they are made of) of a classifier."""
    targets, scores = clips.targets.numpy().astype(int), clip_scores(net, clips)
    measure = metrics.tag_metrics if net.multilabel else metrics.genre_metrics
    found = {key: value[0].item() for key, value in measure(targets, scores).items()}
    if found.get("tags used") == 0:
        raise ValueError(f"{path}: no tag has both positive and negative clips: there is no AUC")
    result = {"kind": "classifier", "classes": clips.classes, "clips": len(clips),
              "metrics": found,
              "interval": metrics.interval(measure, targets, scores, bootstrap, seed),
              "per_class": per_class(targets, scores, clips.classes, net.multilabel)}
    if net.multilabel:
        shares = [r["clips"] for r in result["per_class"] if r["ROC-AUC"] is not None]
        result["floor"] = {"ROC-AUC": 0.5, "PR-AUC": float(np.mean(shares) / len(clips))}
    else:
        result["floor"] = {"accuracy": float(targets.mean(0).max()),
                           "balanced accuracy": 1 / int(targets.any(0).sum())}
        answers = np.eye(len(clips.classes), dtype=int)[scores.argmax(1)]       # (clips, classes)
        result["confusion"] = (targets.T @ answers).tolist()    # rows are the true classes
    print(f"{path}: {net.args['variant']} classifier of {len(clips.classes)} classes on "
          f"{clips.data.path}, {split}: {len(clips)} clips")
    keys = list(result["per_class"][0])[2:]
    print(f"{'class':24}{'clips':>7}" + "".join(f"{key:>9}" for key in keys))
    for row in result["per_class"]:
        cells = [cell(row[key], "9.3f") for key in keys]
        print(f"{row['class']:24}{row['clips']:7d}" + "".join(cells))
    for key, value in result["metrics"].items():
        low, high = result["interval"].get(key, (None, None))
        spread = "" if low is None else f"  95 % {low:.4f} to {high:.4f}"
        print(f"{key:24}{value:7.4g}{spread}")
    print("floor: " + ", ".join(f"{key} {value:.4f}" for key, value in result["floor"].items()))
    names = [item["name"] for item in clips.items]
    return result, {"clips": names, "targets": targets.astype(np.uint8), "scores": scores}


def summarise(results):
    """(table, its text as Markdown) of {run name: result}: mean and deviation over -seedN.

    None if they are not all classifiers of the same classes, measured on the same clips.
    """
    measured = []
    for result in results.values():
        counts = [(row["class"], row["clips"]) for row in result.get("per_class", [])]
        measured.append((result["kind"], result.get("clips"), counts))
    if measured[0][0] != "classifier" or any(m != measured[0] for m in measured):
        return None
    groups = {}
    for run, result in results.items():
        groups.setdefault(re.sub(r"-seed\d+$", "", run), []).append(result)
    keys = [key for key in next(iter(results.values()))["metrics"] if key != "tags used"]
    table = []
    for run, members in groups.items():
        values = {key: [r["metrics"][key] for r in members] for key in keys}
        table.append({"run": run, "floor": members[0]["floor"], "values": values})

    lines = ["| run | seeds | " + " | ".join(keys) + " |", "|---|---|" + "---|" * len(keys)]
    for row in table:
        runs = len(next(iter(row["values"].values())))
        cells = [metrics.mean_and_spread(values, ".4f") for values in row["values"].values()]
        lines.append(f"| {row['run']} | {runs} | " + " | ".join(cells) + " |")
    floor = table[0]["floor"]
    cells = [f"{floor[key]:.4f}" if key in floor else "" for key in keys]
    lines.append("| floor | | " + " | ".join(cells) + " |")
    return table, "\n".join(lines)


# -----------------------------------------------------------------------------

def checkpoints(patterns):
    """The paths of the checkpoints; what exists is taken literally before * and [ are patterns."""
    paths = []
    for pattern in patterns:
        literal = os.path.exists(pattern) or os.path.exists(f"{pattern}.index")
        paths += [pattern] if literal else sorted(glob.glob(pattern)) or [pattern]
    return paths


def run_name(path):
    """What results are called; those of a TensorFlow prefix begin with the name of its folder."""
    if path.startswith("released:"):
        return path.replace(":", "_")
    stem, ending = os.path.splitext(os.path.basename(path))
    if ending in (".pt", ".safetensors"):
        return stem
    return f"{os.path.basename(os.path.dirname(os.path.abspath(path)))}_{stem}"


def check_results(paths, out, name, overwrite):
    """Ends the script if the results cannot be written, or would replace any."""
    if not name or re.search(r"[/\\]", name):
        die(f"name={name!r} must be the name of a file in {out}, without / and \\")
    folder = os.path.abspath(out)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        die(f"out={out}: {folder} is not a folder that can be written to")
    names = [run_name(path) for path in paths] + [name] * (len(paths) > 1)
    if len(set(names)) < len(names):
        die("two of these checkpoints would write the same results: evaluate them one by one "
            "with --out=FOLDER")
    for target in names:
        target = os.path.join(out, f"{target}.json")
        if os.path.exists(target) and not overwrite:
            die(f"{target} exists: --overwrite=True replaces it, --out=FOLDER writes elsewhere")


def prepared_for(meta, path, kind, folder, split):
    """The data in `folder`, else what the checkpoint was trained on; split by its fold, if any."""
    fold = meta["config"].get("fold", -1)
    if folder:
        prepared = Prepared(folder, kind)
        if fold >= 0 and any("fold" in item for item in prepared.index["items"]):
            return Prepared(folder, kind, fold)
        if fold >= 0:
            print(f"note: {path} was trained for fold {fold}; {folder} has no folds, so its own "
                  f"{split} split is measured")
        return prepared
    folder = meta["config"].get("data")
    if not folder:
        die(f"{path} does not say what it was trained on: name a folder with --data=")
    prepared = Prepared(folder, kind, fold)
    now = prepared.trained_on()
    if meta["config"].get("trained_on", now) != now:
        die(f"{folder} has other splits or labels than when {path} was trained, so that it may "
            f"have been trained on what is now the {split} split: train again, or say "
            f"--data={folder} to evaluate it all the same")
    return prepared


def main():
    config, patterns = runtime.configure(globals(), configs=False)
    runtime.check_numbers(config)
    runtime.choose("split", split, SPLITS)
    runtime.choose("dtype", dtype, runtime.AMP_DTYPES)
    runtime.at_least(0, bootstrap=bootstrap)
    if not patterns:
        die("name one or more checkpoints: python eval.py ckpt/vocals.pt")
    paths = checkpoints(patterns)
    check_results(paths, out, name, overwrite)
    on, *_ = runtime.start(device)
    torch.backends.cudnn.allow_tf32 = False         # the same numbers as on a CPU

    results = {}
    for path in paths:
        net, meta = model.load(path, on)
        net.amp_dtype = runtime.AMP_DTYPES[dtype]
        if meta.get("as_published"):
            print(f"{path}: published weights, trained with {meta['as_published']}")
        if meta["kind"] == "separator":
            prepared = prepared_for(meta, path, "stems", data, split)
            result, excerpt = evaluate_separator(net, path, prepared, split, sources)
        else:
            prepared = prepared_for(meta, path, "clips", data, split)
            trained_for = meta.get("task") or ("tags" if net.multilabel else "genre")
            clips = Clips(prepared, split, task or trained_for)
            check_classes(net, meta, path, clips)
            result, scored = evaluate_classifier(net, path, clips, split, bootstrap, seed)

        # what the numbers are made of comes first: a .json file says that all is there
        target = os.path.join(out, run_name(path))
        os.makedirs(out, exist_ok=True)
        if result["kind"] == "separator":
            save_excerpt(f"{target}.npz", **excerpt)
        else:
            with runtime.atomic(f"{target}.npz", "wb") as f:
                np.savez_compressed(f, **scored)
        result = {"checkpoint": path, "step": meta["step"], "commit": meta.get("commit"),
                  "config": meta["config"], "data": prepared.path, "split": split, "dtype": dtype,
                  "trained_on": prepared.trained_on(), "tested_on": prepared.hash_of(split),
                  **result}
        write_atomically(json.dumps(result, indent=1), f"{target}.json")
        print(f"details: {target}*\n")
        results[run_name(path)] = result

    written, summary = list(results), summarise(results)
    if len(paths) > 1 and summary:
        table, text = summary
        target = os.path.join(out, name)
        write_atomically(json.dumps(table, indent=1), f"{target}.json")
        write_atomically(text + "\n", f"{target}.md")
        print(f"\n{text}\n\nmean ± standard deviation over seeds; {target}.md, .json")
        written.append(name)
    elif len(paths) > 1:
        print("no common table: these checkpoints are not all classifiers of the same classes, "
              "measured on the same clips")
    for result_name in written:
        path = os.path.join(out, f"{result_name}.json")
        if pictures or report:
            draw(path)
        if report and result_name in results:
            page.result_page(path)


if __name__ == "__main__":
    runtime.script(main)
