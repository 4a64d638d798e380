"""
Measures checkpoints on the test split and draws what they do; says by itself what a checkpoint is.

    python eval.py ckpt/vocals.pt                                      # a separator: SDR, SI-SDR, new SDR, with floor and ceiling
    python eval.py ckpt/mtat.pt                                        # a classifier: per class and macro, with a bootstrap interval
    python eval.py ckpt/mtat-seed*.pt ckpt/mtat_tail-seed*.pt          # several: mean and standard deviation over -seedN
    python eval.py separators/vocals/checkpoint-1 --data=data/musdb --sources=vocals      # a released TensorFlow checkpoint

Writes results/<checkpoint>.json and .png pictures; with several checkpoints results/summary.json, .md and .png as well.
"""
import glob
import importlib.util
import json
import math
import os
import re

import matplotlib
import numpy as np
import torch
from sklearn import metrics
from tqdm import tqdm

import model
from data import TRACKS, Clips, Prepared
from runtime import configure, die, start, write_atomically

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first: there may be no display)

# -----------------------------------------------------------------------------
# settings
data = ""               # prepared data; empty: what the checkpoint was trained on
task = ""               # of classifiers: tags or genre; empty: what the checkpoint was trained on
sources = [""]          # of released separators: the names of their masks, such as vocals; empty: as the checkpoint says
split = "test"          # train, valid or test
out = "results"         # folder to write to
name = "summary"        # of the table over several checkpoints
overwrite = False       # replace results that are there
bootstrap = 200         # resamples of the test clips for the 95 % interval
seed = 1                # of the bootstrap
device = ""             # cpu, cuda, mps; empty: cuda if there is one
# -----------------------------------------------------------------------------

BLUE, ORANGE = "#2563a8", "#d97706"


def prepared_for(meta, path, kind):
    """The data named with --data=, else what the checkpoint was trained on."""
    folder = data or meta["config"].get("data")
    if not folder:
        die(f"{path} does not say what it was trained on: name a folder with --data=")
    prepared = Prepared(folder, kind)
    if not data and meta["config"].get("trained_on", prepared.trained_on()) != prepared.trained_on():
        die(f"{folder} has other splits or labels than when {path} was trained, so that it may have been trained on what is now the {split} split: "
            f"train anew, or say --data={folder} to evaluate it nonetheless")
    return prepared


# -----------------------------------------------------------------------------
# separation

def load_museval():
    """museval.metrics without museval: its package imports musdb and stempeg, which refuse to load without ffmpeg; the metrics need neither."""
    package = importlib.util.find_spec("museval")
    if package is None:
        die("museval is not installed: pip install -r requirements.txt")
    spec = importlib.util.spec_from_file_location("museval_metrics", os.path.join(package.submodule_search_locations[0], "metrics.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def si_sdr(reference, estimate):
    """Scale-invariant SDR in dB of (N,) float64 arrays (Le Roux et al. 2019, without removing the mean). The reference must not be silent."""
    target = np.dot(estimate, reference) / np.dot(reference, reference) * reference
    return 10 * math.log10((np.sum(target ** 2) + 1e-12) / (np.sum((estimate - target) ** 2) + 1e-12))


def new_sdr(reference, estimate, delta=1e-7):
    """The SDR of the Music Demixing Challenge 2021 in dB: energy of the reference over energy of the error, whole song."""
    return 10 * math.log10((np.sum(reference ** 2) + delta) / (np.sum((reference - estimate) ** 2) + delta))


def song_metrics(bss_eval, references, estimates, wanted):
    """{source: {SDR, SIR, SAR, SI-SDR, new SDR}} of one song from {source: (N,)} references and estimates.

    BSSEval v4 with 1 s frames, median over frames. Sources silent all through the song are left out; frames in which any source is
    silent have no value and do not count."""
    sounding = [s for s in references if np.any(references[s])]
    frame = model.SAMPLE_RATE
    if len(sounding) > 1:
        stacked = [np.stack([waves[s] for s in sounding])[..., None] for waves in (references, estimates)]                # (S, N, 1)
        sdr, _, sir, sar, _ = bss_eval(*stacked, window=frame, hop=frame, compute_permutation=False)                      # (S, frames)
    result = {}
    for s in [s for s in sounding if s in wanted]:
        result[s] = {"SI-SDR": si_sdr(references[s], estimates[s]), "new SDR": new_sdr(references[s], estimates[s])}
        if len(sounding) > 1:
            for key, frames in (("SDR", sdr), ("SIR", sir), ("SAR", sar)):
                frames = frames[sounding.index(s)]
                if np.isfinite(frames).any():
                    result[s][key] = float(np.median(frames[np.isfinite(frames)]))
    return result


def oracle(mixture, references):
    """Ideal ratio masks |S| / sum |S| on the network's own spectrogram, with the mixture's phase: (K, N) -> (K, N)."""
    n, edge = len(mixture), model.EDGE
    padding = (edge, edge + -(n + 2 * edge - model.WIN) % model.HOP)
    spec = model.stft(torch.nn.functional.pad(torch.from_numpy(np.stack([mixture, *references])), padding))     # (1 + K, T, 257)
    magnitudes = spec[1:, :, :model.BINS].abs()
    masks = torch.nn.functional.pad(magnitudes / (magnitudes.sum(0) + 1e-8), (0, 1), value=1.0)
    return model.istft(masks * spec[0])[:, edge:edge + n].numpy()


@torch.no_grad()
def separate_song(net, songs, item):
    """Mixture (N,), {source: (N,)} references and estimates of a song; with fewer than four sources "rest" makes up the difference."""
    mixture = songs.read(item, "mixture")
    estimates = dict(zip(net.sources, net(torch.from_numpy(mixture)[None].to(device))[0].cpu().numpy()))
    references = {s: songs.read(item, s) for s in net.sources}
    others = [t for t in TRACKS[1:] if t not in net.sources]
    if others:
        references["rest"] = sum(songs.read(item, t) for t in others)
        estimates["rest"] = mixture - sum(estimates.values())
    return mixture, references, estimates


def evaluate_separator(net, meta, path):
    songs = prepared_for(meta, path, "stems")
    if sources != [""]:
        if len(sources) != len(net.sources):
            die(f"{path} has {len(net.sources)} masks, --sources names {len(sources)}")
        net.sources = list(sources)
    unknown = [s for s in net.sources if s not in TRACKS]
    if unknown:
        die(f"{path} does not say which source it separates: name it, such as --sources=vocals")
    bss_eval, items, rows = load_museval().bss_eval, songs.items(split), []
    for item in tqdm(items, "songs"):
        mixture, references, estimates = separate_song(net, songs, item)
        double = {s: r.astype(np.float64) for s, r in references.items()}
        ceiling = dict(zip(references, oracle(mixture, list(references.values()))))
        row = {"song": item["name"]}
        for kind, guess in (("model", estimates), ("floor", {s: mixture for s in references}), ("ceiling", ceiling)):
            row[kind] = song_metrics(bss_eval, double, {s: g.astype(np.float64) for s, g in guess.items()}, net.sources)
        rows.append(row)

    # median over frames is taken, now median over songs, as museval's tables do
    keys, summary = ("SDR", "SIR", "SAR", "SI-SDR", "new SDR"), {}
    print(f"{path}: separator of {', '.join(net.sources)} on {songs.path}, {split}: {len(items)} songs\n"
          "16 kHz mono and the mixture's phase: compare with the floor (mixture as estimate) and the ceiling (ideal ratio mask), not with 44.1 kHz tables")
    print(f"{'median over songs, dB':24}" + "".join(f"{k:>9}" for k in keys) + "   songs")
    for s in net.sources:
        for kind in ("model", "floor", "ceiling"):
            values = {k: [r[kind][s][k] for r in rows if k in r[kind].get(s, {})] for k in keys}
            summary.setdefault(s, {})[kind] = {k: float(np.median(v)) if v else None for k, v in values.items()}
            count = len(values["SI-SDR"])
            print(f"{s + ', ' + kind:24}" + "".join(f"{m:9.2f}" if m is not None else f"{'-':>9}" for m in summary[s][kind].values()) + f"{count:8d}")
    draw_separation(net, songs, items, base(path) + ".png")
    return {"kind": "separator", "sources": net.sources, "median": summary, "songs": rows}


# -----------------------------------------------------------------------------
# classification

@torch.no_grad()
def clip_scores(net, clips):
    """(clips, classes) in [0, 1]: the mean over crops with 50 % overlap. One clip at a time, so that no batch size can change a score."""
    scores = np.zeros((len(clips), len(clips.classes)))
    for n in tqdm(range(len(clips)), "clips"):
        logits = net(clips.clip(n).to(device))[0]
        scores[n] = (torch.sigmoid(logits) if net.multilabel else torch.softmax(logits, 0)).cpu().double().numpy()
    return scores


def tag_metrics(targets, scores):
    """Macro ROC-AUC and PR-AUC (average precision) over the tags that occur and do not always occur; the number of those tags."""
    used = np.flatnonzero((targets.sum(0) > 0) & (targets.sum(0) < len(targets)))
    if len(used) == 0:
        raise ValueError("no tag has both positive and negative clips: there is no AUC")
    return {"ROC-AUC": metrics.roc_auc_score(targets[:, used], scores[:, used], average="macro"),
            "PR-AUC": metrics.average_precision_score(targets[:, used], scores[:, used], average="macro"), "tags used": len(used)}


def genre_metrics(targets, scores):
    """Accuracy, macro F1 and balanced accuracy over the classes that occur."""
    truth, guess = targets.argmax(1), scores.argmax(1)
    present = np.unique(truth)
    return {"accuracy": metrics.accuracy_score(truth, guess),
            "macro F1": metrics.f1_score(truth, guess, labels=present, average="macro", zero_division=0),
            "balanced accuracy": metrics.recall_score(truth, guess, labels=present, average="macro", zero_division=0)}


def interval(measure, targets, scores):
    """{metric: (low, high)}: 95 % bootstrap interval over clips, {} if there is none."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(bootstrap):
        chosen = rng.integers(len(targets), size=len(targets))
        try:
            rows.append(measure(targets[chosen], scores[chosen]))
        except ValueError:
            continue  # a resample in which no tag has an AUC
    return {k: np.percentile([r[k] for r in rows], [2.5, 97.5]).tolist() for k in rows[0] if k != "tags used"} if rows else {}


def evaluate_classifier(net, meta, path):
    prepared = prepared_for(meta, path, "clips")
    clips = Clips(prepared, split, task or meta.get("task") or ("tags" if net.multilabel else "genre"))
    if len(clips.classes) != net.args["n_classes"] or (meta["classes"] and meta["classes"] != clips.classes) or clips.multilabel != net.multilabel:
        die(f"{path} knows {net.args['n_classes']} classes ({', '.join((meta['classes'] or ['unnamed'])[:3])}, ...), {prepared.path} has "
            f"{len(clips.classes)} ({', '.join(clips.classes[:3])}, ...): evaluate it on the data it was trained for")
    targets, scores = clips.targets.numpy().astype(int), clip_scores(net, clips)
    measure = tag_metrics if net.multilabel else genre_metrics
    overall, spread = measure(targets, scores), interval(measure, targets, scores)
    result = {"kind": "classifier", "classes": clips.classes, "clips": len(clips), "metrics": overall, "interval": spread,
              "per_class": per_class(targets, scores, clips.classes, net.multilabel)}
    print(f"{path}: {net.args['variant']} classifier of {len(clips.classes)} classes on {prepared.path}, {split}: {len(clips)} clips")
    print(f"{'class':24}{'clips':>7}{'ROC-AUC':>9}{'PR-AUC':>9}" + ("" if net.multilabel else f"{'recall':>9}"))
    for row in result["per_class"]:
        print(f"{row['class']:24}{row['clips']:7d}" + "".join(f"{row[k]:9.3f}" if row[k] is not None else f"{'-':>9}" for k in list(row)[2:]))
    for key, value in overall.items():
        print(f"{key:24}{value:7.4g}" + (f"  95 % {spread[key][0]:.4f} to {spread[key][1]:.4f}" if key in spread else ""))
    if net.multilabel:
        result["floor"] = {"ROC-AUC": 0.5, "PR-AUC": float(np.mean([r["clips"] for r in result["per_class"] if r["ROC-AUC"] is not None]) / len(clips))}
        draw_bars(result["per_class"], base(path) + "_classes.png")
    else:
        truth = targets.argmax(1)
        result["floor"] = {"accuracy": float(targets.mean(0).max()), "balanced accuracy": 1 / len(np.unique(truth))}
        result["confusion"] = metrics.confusion_matrix(truth, scores.argmax(1), labels=range(len(clips.classes))).tolist()
        draw_confusion(np.array(result["confusion"]), clips.classes, base(path) + "_confusion.png")
    print("floor: " + ", ".join(f"{k} {v:.4f}" for k, v in result["floor"].items()))
    return result


def per_class(targets, scores, classes, multilabel):
    rows = []
    for i, c in enumerate(classes):
        both = 0 < targets[:, i].sum() < len(targets)
        rows.append({"class": c, "clips": int(targets[:, i].sum()), "ROC-AUC": metrics.roc_auc_score(targets[:, i], scores[:, i]) if both else None,
                     "PR-AUC": metrics.average_precision_score(targets[:, i], scores[:, i]) if both else None})
        if not multilabel:
            chosen = targets[:, i] == 1
            rows[-1]["recall"] = float((scores.argmax(1) == i)[chosen].mean()) if chosen.any() else None
    return rows


# -----------------------------------------------------------------------------
# pictures

def save_figure(figure, path):
    figure.savefig(path + ".tmp", dpi=110, format="png", bbox_inches="tight")
    os.replace(path + ".tmp", path)
    plt.close(figure)


def draw_separation(net, songs, items, path):
    """The first 8 s of the test song that is loudest there: mixture, then per source its mask, estimate and truth."""
    most = 8 * model.SAMPLE_RATE
    item = max(items, key=lambda i: np.abs(songs.read(i, "mixture", 0, min(i["length"], most))).mean())
    n = min(item["length"], most)
    mixture, references, estimates = separate_song(net, songs, item)

    def level(wave):
        return 20 * np.log10(model.stft(torch.from_numpy(wave[None, :n]))[0].abs().numpy().T + 1e-4)                      # (257, T) dB

    names = net.sources
    figure, axes = plt.subplots(len(names) + 1, 3, figsize=(12, 2.1 * (len(names) + 1)), squeeze=False, sharex=True, sharey=True)
    show = dict(origin="lower", aspect="auto", extent=(0, n / model.SAMPLE_RATE, 0, 8), cmap="magma")
    top = level(mixture)
    for ax, title in zip(axes[0], ("", f"mixture ({item['name']})", "")):
        ax.axis("off") if not title else (ax.imshow(top, vmin=-60, vmax=top.max(), **show), ax.set_title(title, fontsize=9))
    for row, s in zip(axes[1:], names):
        estimate, truth = level(estimates[s]), level(references[s])
        for ax, image, title, limits in zip(row, (10 ** ((estimate - top) / 20), estimate, truth), ("estimate / mixture", "estimate", "truth"),
                                            ((0, 1), (-60, top.max()), (-60, top.max()))):
            ax.imshow(image, vmin=limits[0], vmax=limits[1], **{**show, "cmap": "gray" if limits[0] == 0 else "magma"})
            ax.set_title(f"{s}: {title}", fontsize=9)
        row[0].set_ylabel("kHz")
    for ax in axes[-1]:
        ax.set_xlabel("s")
    figure.tight_layout()
    save_figure(figure, path)


def draw_bars(rows, path):
    rows = sorted((r for r in rows if r["PR-AUC"] is not None), key=lambda r: r["PR-AUC"])
    figure, ax = plt.subplots(figsize=(7, 1.2 + 0.24 * len(rows)))
    where = np.arange(len(rows))
    ax.barh(where + 0.2, [r["ROC-AUC"] for r in rows], 0.38, color=BLUE, label="ROC-AUC")
    ax.barh(where - 0.2, [r["PR-AUC"] for r in rows], 0.38, color=ORANGE, label="PR-AUC")
    ax.set_yticks(where, [f"{r['class']} ({r['clips']})" for r in rows])
    ax.set_xlim(0, 1)
    ax.set_xlabel("area under the curve (clips with the tag in brackets)")
    ax.legend(loc="lower right", frameon=False)
    save_figure(figure, path)


def draw_confusion(confusion, classes, path):
    """Rows are true classes, columns what was answered, as shares of each row."""
    share = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    figure, ax = plt.subplots(figsize=(2.5 + 0.45 * len(classes),) * 2)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(confusion):
        if count:
            ax.text(j, i, count, ha="center", va="center", fontsize=8, color="white" if share[i, j] > 0.6 else "black")
    ax.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
    ax.set_yticks(range(len(classes)), classes)
    ax.set_xlabel("answered")
    ax.set_ylabel("true")
    save_figure(figure, path)


def draw_curves(path, picture):
    """Training and validation loss from the log beside a checkpoint, if it is there."""
    log = path.removesuffix(".pt") + ".jsonl"
    if not os.path.exists(log):
        return
    with open(log, encoding="utf-8") as f:
        entries = [json.loads(line) for line in f]
    figure, ax = plt.subplots(figsize=(6, 3.5))
    for key, label, color in (("loss", "training", BLUE), ("val_loss", "validation", ORANGE)):
        ax.plot([e["step"] for e in entries if key in e], [e[key] for e in entries if key in e], label=label, color=color, marker=".")
    ax.set_xlabel("step")
    ax.set_ylabel("loss")
    ax.legend(frameon=False)
    save_figure(figure, picture)


def draw_summary(table, keys, path):
    """Mean, standard deviation and every single run."""
    figure, axes = plt.subplots(1, len(keys), figsize=(1.2 + 3.2 * len(keys), 1.2 + 0.5 * len(table)), squeeze=False, sharey=True)
    for ax, key in zip(axes[0], keys):
        for i, row in enumerate(reversed(table)):
            values = row["values"][key]
            ax.barh(i, np.mean(values), color=BLUE, alpha=0.35, xerr=np.std(values, ddof=1) if len(values) > 1 else 0)
            ax.plot(values, [i] * len(values), "o", color=BLUE, markersize=4)
        if all(key in row["floor"] for row in table):
            ax.axvline(table[0]["floor"][key], color=ORANGE, linestyle="--", label="floor")
            ax.legend(frameon=False, fontsize=8)
        everything = [v for row in table for v in row["values"][key]] + [row["floor"][key] for row in table if key in row["floor"]]
        ax.set_xlim(max(0, min(everything) - 0.05), min(1, max(everything) + 0.05))
        ax.set_xlabel(key)
    axes[0][0].set_yticks(range(len(table)), [r["run"] for r in reversed(table)])
    save_figure(figure, path)


# -----------------------------------------------------------------------------

def base(path):
    """results/<checkpoint>, where everything about a checkpoint is written; a TensorFlow prefix is named after its folder."""
    stem = os.path.splitext(os.path.basename(path))[0]
    return os.path.join(out, stem if path.endswith(".pt") else f"{os.path.basename(os.path.dirname(os.path.abspath(path)))}_{stem}")


def summarise(results):
    """One table of classifiers: mean and standard deviation over checkpoints whose names differ in -seedN only."""
    groups = {}
    for path, result in results.items():
        groups.setdefault(re.sub(r"-seed\d+$", "", os.path.basename(base(path))), []).append(result)
    keys = [k for k in next(iter(results.values()))["metrics"] if k != "tags used"]
    table = [{"run": run, "floor": rs[0]["floor"], "values": {k: [r["metrics"][k] for r in rs] for k in keys}} for run, rs in groups.items()]
    lines = ["| run | seeds | " + " | ".join(keys) + " |", "|---|---|" + "---|" * len(keys)]
    for row in table:
        cells = [f"{np.mean(v):.4f}" + (f" ± {np.std(v, ddof=1):.4f}" if len(v) > 1 else "") for v in row["values"].values()]
        lines.append(f"| {row['run']} | {len(row['values'][keys[0]])} | " + " | ".join(cells) + " |")
    lines.append("| floor | | " + " | ".join(f"{table[0]['floor'][k]:.4f}" if k in table[0]["floor"] else "" for k in keys) + " |")
    write_atomically("\n".join(lines) + "\n", os.path.join(out, f"{name}.md"))
    write_atomically(json.dumps(table, indent=1), os.path.join(out, f"{name}.json"))
    draw_summary(table, keys, os.path.join(out, f"{name}.png"))
    print("\n" + "\n".join(lines) + f"\n\nmean ± standard deviation over seeds; {out}/{name}.md, .json, .png")


def main(paths):
    if not paths:
        die("name one or more checkpoints: python eval.py ckpt/vocals.pt")
    paths = [found for path in paths for found in (sorted(glob.glob(path)) or [path])]  # for shells that leave * and ? as they are
    if len({base(p) for p in paths}) < len(paths):
        die("two of these checkpoints would write the same results: evaluate them one by one with --out=FOLDER")
    targets = [base(p) + ".json" for p in paths] + [os.path.join(out, f"{name}.json")] * (len(paths) > 1)
    taken = [p for p in targets if os.path.exists(p)]
    if taken and not overwrite:
        die(f"{taken[0]} exists: --overwrite=True replaces it, --out=FOLDER writes elsewhere")
    os.makedirs(out, exist_ok=True)
    results = {}
    for path in paths:
        net, meta = model.load(path, device)
        evaluate = evaluate_separator if meta["kind"] == "separator" else evaluate_classifier
        result = {"checkpoint": path, "step": meta["step"], "split": split, **evaluate(net, meta, path)}
        write_atomically(json.dumps(result, indent=1), base(path) + ".json")
        draw_curves(path, base(path) + "_curves.png")
        print(f"details and pictures: {base(path)}*\n")
        results[path] = result
    measured = [[r.get("clips"), [(c["class"], c["clips"]) for c in r.get("per_class", [])]] for r in results.values()]
    if len(results) > 1 and result["kind"] == "classifier" and measured == measured[:1] * len(results):  # one test split, so one table
        summarise(results)
    elif len(results) > 1:
        print("no common table: these checkpoints are not all classifiers of the same classes, measured on the same clips")


if __name__ == "__main__":
    _, checkpoints = configure(globals(), configs=False)
    device, *_ = start(device)
    torch.backends.cudnn.allow_tf32 = False  # the same numbers as on a CPU
    try:
        main(checkpoints)
    except (ValueError, OSError) as e:
        die(e)
