"""
Measures checkpoints on the test split; each checkpoint says itself what it is.

    python eval.py ckpt/vocals.pt           # a separator: SDR, SI-SDR, new SDR, floor and ceiling
    python eval.py ckpt/mtat.pt             # a classifier: per class and mean, with an interval
    python eval.py ckpt/mtat-seed*.pt       # several: mean and standard deviation over -seedN
    python eval.py separators/vocals/checkpoint-20 --data=data/musdb --sources=vocals

Writes results/<checkpoint>.json; several classifiers also get results/summary.json and .md.
Then report.py draws the pictures from these files.
"""
import glob
import itertools
import json
import math
import os
import re

import numpy as np
import torch
from sklearn import metrics
from tqdm import tqdm

import model
import report
import runtime
from data import SPLITS, TRACKS, Clips, Prepared
from model import SAMPLE_RATE
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
bootstrap = 200         # resamples of the test clips for the 95 % interval; 0: no interval
seed = 1                # of the bootstrap
device = ""             # cpu, cuda, mps; empty: cuda if there is one
# -----------------------------------------------------------------------------

TAPS = 512                          # length of the distortion filters of BSSEval
SIZE = 2 ** 15                      # of its Fourier transforms
BLOCK = SIZE - TAPS                 # samples that are worked on at a time: a long song is large
EXCERPT = 8 * SAMPLE_RATE           # what the picture of a separator shows


# -----------------------------------------------------------------------------
# separation

def blocks(*waves):
    """Yields the same piece of each wave (N,) as float64, piece after piece."""
    for at in range(0, len(waves[0]), BLOCK):
        yield [wave[at:at + BLOCK].astype(np.float64) for wave in waves]


def si_sdr(reference, estimate):
    """Scale-invariant SDR in dB of (N,), mean not removed (Le Roux et al. 2019)."""
    power = sum(np.dot(r, r) for r, _ in blocks(reference, estimate))
    scale = sum(np.dot(e, r) for r, e in blocks(reference, estimate)) / power
    error = sum(np.sum((e - scale * r) ** 2) for r, e in blocks(reference, estimate))
    return 10 * math.log10((scale ** 2 * power + 1e-12) / (error + 1e-12))


def new_sdr(reference, estimate, delta=1e-7):
    """SDR of the Music Demixing Challenge 2021 in dB of (N,): energies of the whole song."""
    power = sum(np.sum(r ** 2) for r, _ in blocks(reference, estimate))
    error = sum(np.sum((r - e) ** 2) for r, e in blocks(reference, estimate))
    return 10 * math.log10((power + delta) / (error + delta))


def correlations(left, right):
    """r[i, j, k] = sum over t of left[i][t] right[j][t + k] for the lags k = 0..511.

    left and right are lists of I and J waves (N,); the result is (I, J, 512) in float64.
    """
    total = 0.0
    for at in range(0, len(left[0]), BLOCK):
        short = np.stack([wave[at:at + BLOCK] for wave in left])                # (I, BLOCK)
        long = np.stack([wave[at:at + SIZE] for wave in right])                 # (J, BLOCK + 512)
        short = np.fft.rfft(short.astype(np.float64), SIZE)                     # (I, F)
        long = np.fft.rfft(long.astype(np.float64), SIZE)                       # (J, F)
        total = total + short.conj()[:, None] * long                            # (I, J, F)
    return np.fft.irfft(total, SIZE)[..., :TAPS]


def projection(among, onto):
    """The least-squares filters that make an estimate out of the sources: (E, I, 512).

    among (I, I, 512): correlations of the sources. onto (I, E, 512): those of the sources with
    the estimates.
    """
    both = np.concatenate([among.swapaxes(0, 1)[..., :0:-1], among], 2)         # (I, I, 1023)
    lag = np.arange(TAPS)[:, None] - np.arange(TAPS)                            # (512, 512)
    gram = both[:, :, lag + TAPS - 1].transpose(0, 2, 1, 3)                     # (I, 512, I, 512)
    n = len(among) * TAPS
    gram = gram.reshape(n, n) + np.finfo(float).eps * np.eye(n)
    wanted = onto.transpose(0, 2, 1).reshape(n, -1)                             # (I 512, E)
    try:
        found = np.linalg.solve(gram, wanted)
    except np.linalg.LinAlgError:   # one source is another one, filtered
        found = np.linalg.lstsq(gram, wanted)[0]
    return found.T.reshape(-1, len(among), TAPS)                                # (E, I, 512)


def bss_eval(references, estimates, frame=SAMPLE_RATE):
    """SDR, SIR and SAR in dB of BSSEval v4, each (I, frames), from lists of I waves (N,).

    The numbers are those of museval.metrics.bss_eval (Stöter et al. 2018), which needs memory for
    dozens of such waves. One pass over the song finds the filters of 512 samples that turn the
    references into each estimate; a second one compares frame by frame. A frame in which any
    reference or estimate is silent has no value (NaN).
    """
    among, onto = correlations(references, references), correlations(references, estimates)
    every = np.fft.rfft(projection(among, onto), SIZE)                          # (I, I, F)
    alone = [projection(among[i:i + 1, i:i + 1], onto[i:i + 1, i:i + 1])[0, 0]
             for i in range(len(references))]
    alone = np.fft.rfft(alone, SIZE)                                            # (I, F)

    starts = range(0, max(1, len(references[0]) - frame + 1), frame)
    result = np.full((3, len(references), len(starts)), np.nan)
    for column, at in enumerate(starts):
        truth = np.stack([wave[at:at + frame] for wave in references]).astype(np.float64)
        guess = np.stack([wave[at:at + frame] for wave in estimates]).astype(np.float64)
        if not (truth.any(1).all() and guess.any(1).all()):
            continue
        # what of an estimate can be made out of its own source, and out of all sources
        spectra, end = np.fft.rfft(truth, SIZE), truth.shape[1] + TAPS - 1      # (I, F)
        own = np.fft.irfft(alone * spectra, SIZE)[:, :end]                      # (I, frame + 511)
        mixed = np.fft.irfft((every * spectra).sum(1), SIZE)[:, :end]           # (I, frame + 511)
        artifacts = mixed.copy()
        artifacts[:, :truth.shape[1]] -= guess
        pairs = (truth, guess - truth), (own, mixed - own), (mixed, artifacts)
        for row, (good, bad) in zip(result, pairs, strict=True):
            with np.errstate(divide="ignore"):                                  # no error: infinite
                row[:, column] = 10 * np.log10((good ** 2).sum(1) / (bad ** 2).sum(1))
    return result


def song_metrics(references, estimates, wanted):
    """{source: {SDR, SIR, SAR, SI-SDR, new SDR}} of a song, from {source: wave (N,)}.

    Frames of 1 s and their median, as the tables of museval. Sources that are silent all through
    the song are left out. Frames in which any source is silent do not count.
    """
    sounding = [s for s in references if np.any(references[s])]
    result = {}
    for s in [s for s in sounding if s in wanted]:
        result[s] = {"SI-SDR": si_sdr(references[s], estimates[s]),
                     "new SDR": new_sdr(references[s], estimates[s])}
    if len(sounding) < 2:
        return result
    frames = bss_eval([references[s] for s in sounding], [estimates[s] for s in sounding])
    for key, rows in zip(("SDR", "SIR", "SAR"), frames, strict=True):
        for s, values in zip(sounding, rows, strict=True):
            if s in wanted and np.isfinite(values).any():
                result[s][key] = float(np.median(values[np.isfinite(values)]))
    return result


def oracle(mixture, references, piece=10 * SAMPLE_RATE):
    """Ideal ratio masks |S| / sum |S| with the mixture's phase: K waves (N,) -> (K, N).

    The spectrogram is the network's own. It is made piece by piece, each with all frames that
    touch it, so a long song needs no more memory than a short one.
    """
    waves, edge, hop = [mixture, *references], model.EDGE, model.HOP
    result = np.empty((len(references), len(mixture)), np.float32)
    for at in range(0, len(mixture), piece):
        n = min(piece, len(mixture) - at)
        length = (math.ceil(n / hop) + 2) * hop + model.WIN
        parts = [wave[max(0, at - edge):at - edge + length] for wave in waves]
        silence = max(0, edge - at)                     # before the song, and below: after it
        silence = silence, length - silence - len(parts[0])
        some = np.stack([np.pad(part, silence) for part in parts])              # (1 + K, length)
        spec = model.stft(torch.from_numpy(some))                               # (1 + K, T, 257)
        size = spec[1:, :, :model.BINS].abs()                                   # (K, T, 256)
        masks = torch.nn.functional.pad(size / (size.sum(0) + 1e-8), (0, 1), value=1.0)
        result[:, at:at + n] = model.istft(masks * spec[0])[:, edge:edge + n].numpy()
    return result


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
    row["model"] = song_metrics(references, estimates, net.sources)
    row["floor"] = song_metrics(references, floor, net.sources)
    del separated, estimates                # of a long song they are large
    ceiling = oracle(mixture, list(references.values()))
    ceiling = dict(zip(references, ceiling, strict=True))
    row["ceiling"] = song_metrics(references, ceiling, net.sources)
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


def tag_metrics(targets, scores):
    """Macro ROC-AUC and PR-AUC (average precision) of (clips, classes), and the tags used.

    Tags that no clip has, or every clip, have no AUC and are left out. ValueError if all are.
    """
    used = np.flatnonzero((targets.sum(0) > 0) & (targets.sum(0) < len(targets)))
    if len(used) == 0:
        raise ValueError("no tag has both positive and negative clips: there is no AUC")
    truth, guess = targets[:, used], scores[:, used]
    return {"ROC-AUC": metrics.roc_auc_score(truth, guess, average="macro"),
            "PR-AUC": metrics.average_precision_score(truth, guess, average="macro"),
            "tags used": len(used)}


def genre_metrics(targets, scores):
    """Accuracy, macro F1 and balanced accuracy of (clips, classes), over the classes that occur."""
    truth, guess = targets.argmax(1), scores.argmax(1)
    options = dict(labels=np.unique(truth), average="macro", zero_division=0)
    return {"accuracy": metrics.accuracy_score(truth, guess),
            "macro F1": metrics.f1_score(truth, guess, **options),
            "balanced accuracy": metrics.recall_score(truth, guess, **options)}


def interval(measure, targets, scores, resamples, seed):
    """{metric: (low, high)}: 95 % bootstrap interval over clips, {} if there is none."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(resamples):
        chosen = rng.integers(len(targets), size=len(targets))
        try:
            rows.append(measure(targets[chosen], scores[chosen]))
        except ValueError:
            continue                        # a resample in which no tag has an AUC
    if not rows:
        return {}
    return {key: np.percentile([row[key] for row in rows], [2.5, 97.5]).tolist()
            for key in rows[0] if key != "tags used"}


def per_class(targets, scores, classes, multilabel):
    """One row per class: its clips, its AUCs or None, and its recall if a clip has one class."""
    rows, answers = [], scores.argmax(1)
    for i, class_name in enumerate(classes):
        truth, score = targets[:, i], scores[:, i]
        row = {"class": class_name, "clips": int(truth.sum()), "ROC-AUC": None, "PR-AUC": None}
        if 0 < truth.sum() < len(truth):
            row["ROC-AUC"] = metrics.roc_auc_score(truth, score)
            row["PR-AUC"] = metrics.average_precision_score(truth, score)
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


def evaluate_classifier(net, path, clips, split, resamples, seed):
    """The results of a classifier."""
    targets, scores = clips.targets.numpy().astype(int), clip_scores(net, clips)
    measure = tag_metrics if net.multilabel else genre_metrics
    result = {"kind": "classifier", "classes": clips.classes, "clips": len(clips),
              "metrics": measure(targets, scores),
              "interval": interval(measure, targets, scores, resamples, seed),
              "per_class": per_class(targets, scores, clips.classes, net.multilabel)}
    if net.multilabel:
        shares = [r["clips"] for r in result["per_class"] if r["ROC-AUC"] is not None]
        result["floor"] = {"ROC-AUC": 0.5, "PR-AUC": float(np.mean(shares) / len(clips))}
    else:
        truth, labels = targets.argmax(1), range(len(clips.classes))
        result["floor"] = {"accuracy": float(targets.mean(0).max()),
                           "balanced accuracy": 1 / len(np.unique(truth))}
        confusion = metrics.confusion_matrix(truth, scores.argmax(1), labels=labels)
        result["confusion"] = confusion.tolist()                # rows are the true classes
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
    return result


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
        cells = []
        for values in row["values"].values():
            spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4f}{spread}")
        lines.append(f"| {row['run']} | {len(values)} | " + " | ".join(cells) + " |")
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
    stem, ending = os.path.splitext(os.path.basename(path))
    if ending == ".pt":
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
    """The data in `folder`, else what the checkpoint was trained on."""
    if folder:
        return Prepared(folder, kind)
    folder = meta["config"].get("data")
    if not folder:
        die(f"{path} does not say what it was trained on: name a folder with --data=")
    prepared = Prepared(folder, kind)
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
        if meta["kind"] == "separator":
            songs = prepared_for(meta, path, "stems", data, split)
            result, excerpt = evaluate_separator(net, path, songs, split, sources)
        else:
            prepared = prepared_for(meta, path, "clips", data, split)
            trained_for = meta.get("task") or ("tags" if net.multilabel else "genre")
            clips = Clips(prepared, split, task or trained_for)
            check_classes(net, meta, path, clips)
            result, excerpt = evaluate_classifier(net, path, clips, split, bootstrap, seed), None
        result = {"checkpoint": path, "step": meta["step"], "split": split, **result}
        target = os.path.join(out, run_name(path))
        os.makedirs(out, exist_ok=True)
        write_atomically(json.dumps(result, indent=1), f"{target}.json")
        if excerpt:
            report.save_excerpt(f"{target}.npz", **excerpt)
        print(f"details and pictures: {target}*\n")
        results[run_name(path)] = result

    written, summary = list(results), summarise(results)
    if len(paths) > 1 and summary:
        table, text = summary
        target = os.path.join(out, name)
        write_atomically(json.dumps(table, indent=1), f"{target}.json")
        write_atomically(text + "\n", f"{target}.md")
        print(f"\n{text}\n\nmean ± standard deviation over seeds; {target}.md, .json, .png")
        written.append(name)
    elif len(paths) > 1:
        print("no common table: these checkpoints are not all classifiers of the same classes, "
              "measured on the same clips")
    for result_name in written:
        report.draw(os.path.join(out, f"{result_name}.json"))


if __name__ == "__main__":
    runtime.script(main)
