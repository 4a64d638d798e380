"""
Figures of results, from the files that eval.py and table.py write.

    python -m reports.figures results/vocals.json results/mtat.json

Written next to each file: spectrograms of a separator or rows of a table (.png), scores per class
of a tagger (_classes.png), confusion matrix of a genre classifier (_confusion.png), loss curves
(_curves.png). If one figure fails, the others are drawn.
"""
import json
import os
import pathlib
import unicodedata
import warnings

import numpy as np
import torch

import model
from common import settings
from common.files import atomic
from common.run import read_log

BLUE, ORANGE = "#2563a8", "#d97706"
DPI = 110
MOST = 60               # classes or rows in a figure; more would be unreadable
LONGEST = 36            # columns of a name
# tried in order for each character; DejaVu comes with matplotlib, the others with an OS
FONTS = ["DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "PingFang SC",
         "Hiragino Sans", "Apple SD Gothic Neo", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic",
         "WenQuanYi Zen Hei", "Nirmala UI", "Arial Unicode MS", "FreeSans", "Unifont"]


def spectrograms(song, waves):
    """Arrays of a separator's figure: waves (1 + 2 S, N) as int16, and their levels in dB."""
    levels = model.stft(torch.from_numpy(waves)).abs().transpose(1, 2)          # (1 + 2 S, 257, T)
    levels = 20 * torch.log10(levels + 1e-4)
    return {"song": song, "seconds": waves.shape[1] / model.SAMPLE_RATE,
            "levels": levels.numpy().astype(np.float16),
            "waves": np.rint(np.clip(waves, -1, 1) * 32767).astype(np.int16)}


def save(f, plot, *arguments):
    """Writes the figure plot(*arguments) to an open file, as PNG."""
    import matplotlib  # here: results are written even if it cannot be imported
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    # names are plain text: "Ba$$in" is not a formula
    style = {"text.parse_math": False, "text.usetex": False,
             "font.family": [font for font in FONTS if font in installed]}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")      # drawn as a box
        plot(*arguments).savefig(f, dpi=DPI, format="png", bbox_inches="tight")


def new_figure(inches, rows=1, columns=1, **options):
    """(figure, axes (rows, columns)) without pyplot, which needs a display and keeps figures."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=inches, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def shorten(text):
    """A name as one line of at most 36 columns; longer ones lose their middle."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())   # file names may be invalid
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)   # 2 columns, as in Chinese
    longest = LONGEST * len(text) // max(1, len(text) + wide)
    if len(text) <= longest:
        return text
    return f"{text[:longest * 2 // 3 - 1]}\u2026{text[-longest // 3:]}"


def draw_separation(sources, excerpt):
    """Spectrograms of an excerpt: the mixture; then mask, estimate and truth of each source.

    excerpt: the .npz file with the arrays of spectrograms().
    """
    with np.load(excerpt) as saved:
        levels, song, seconds = saved["levels"].astype(np.float32), saved["song"], saved["seconds"]
    mixture, pairs = levels[0], levels[1:].reshape(len(sources), 2, *levels.shape[1:])
    rows = len(sources) + 1
    figure, axes = new_figure((12, 2.1 * rows), rows, 3, sharex=True, sharey=True)
    place = dict(origin="lower", aspect="auto", extent=(0, float(seconds), 0, 8))
    level = dict(cmap="magma", vmin=-60, vmax=max(-50.0, mixture.max()), **place)
    share = dict(cmap="gray", vmin=0, vmax=1, **place)

    axes[0][0].axis("off")
    axes[0][2].axis("off")
    axes[0][1].imshow(mixture, **level)
    axes[0][1].set_title(f"mixture ({shorten(str(song))})", fontsize=9)
    for row, source, (estimate, truth) in zip(axes[1:], sources, pairs, strict=True):
        row[0].imshow(10 ** ((estimate - mixture) / 20), **share)
        row[1].imshow(estimate, **level)
        row[2].imshow(truth, **level)
        for ax, title in zip(row, ("estimate / mixture", "estimate", "truth"), strict=True):
            ax.set_title(f"{source}: {title}", fontsize=9)
        row[0].set_ylabel("kHz")
    for ax in axes[-1]:
        ax.set_xlabel("s")
    return figure


def most_frequent(counts):
    """(indices of the 60 classes with the most clips, in ascending order; a title if not all)."""
    shown = sorted(np.argsort(-np.asarray(counts), kind="stable")[:MOST].tolist())
    title = f"the {MOST} classes with the most clips, of {len(counts)}"
    return shown, title if len(counts) > MOST else ""


def draw_bars(rows):
    """ROC-AUC and PR-AUC of each class that has them, highest PR-AUC on top."""
    rows = [row for row in rows if row["PR-AUC"] is not None]
    indices, title = most_frequent([row["clips"] for row in rows])
    shown = sorted((rows[i] for i in indices), key=lambda row: row["PR-AUC"])
    figure, ((ax,),) = new_figure((7, 1.6 + 0.24 * len(shown)))
    y = np.arange(len(shown))
    roc, pr = [row["ROC-AUC"] for row in shown], [row["PR-AUC"] for row in shown]
    ax.barh(y + 0.2, roc, 0.38, color=BLUE, label="ROC-AUC")
    ax.barh(y - 0.2, pr, 0.38, color=ORANGE, label="PR-AUC")
    ax.set_yticks(y, [f"{shorten(row['class'])} ({row['clips']})" for row in shown])
    ax.set_ylim(-0.6, len(shown) - 0.4)
    ax.set_xlim(0, 1)
    ax.set_xlabel("area under the curve (clips with the tag in brackets)")
    ax.set_title(title, fontsize=10)
    # below the axes, where no bar can be
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_confusion(confusion, classes):
    """Confusion matrix; rows are true classes, and colours are fractions of the row."""
    share = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    shown, title = most_frequent(confusion.sum(1))
    confusion, share = confusion[np.ix_(shown, shown)], share[np.ix_(shown, shown)]
    names = [shorten(classes[i]) for i in shown]
    cell, size = (0.45, 8) if len(shown) <= 20 else (0.3, 6)
    figure, ((ax,),) = new_figure((2.5 + cell * len(shown),) * 2)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(confusion):
        if count:
            color = "white" if share[i, j] > 0.6 else "black"
            ax.text(j, i, count, ha="center", va="center", fontsize=size, color=color)
    ticks = range(len(shown))
    ax.set_xticks(ticks, names, rotation=60, ha="right", rotation_mode="anchor")
    ax.set_yticks(ticks, names)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    ax.set_title(title, fontsize=10)
    return figure


def draw_curves(log):
    """Training and validation loss by step, from a .jsonl log."""
    entries, damaged = read_log(log)
    if damaged:
        print(f"note: {log}: {damaged} malformed lines are left out of the figure")
    figure, ((ax,),) = new_figure((6, 3.5))
    for key, label, color in ("loss", "training", BLUE), ("val_loss", "validation", ORANGE):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        steps, values = zip(*points, strict=True) if points else ((), ())
        marker = "." if len(steps) <= 100 else None
        ax.plot(steps, values, label=label, color=color, marker=marker)
    ax.set_xlabel("step")
    ax.set_ylabel("loss")
    ax.legend(frameon=False)
    return figure


def draw_table(table):
    """One row of panels per task, for its first metric: all runs, differences, label curve.

    Each baseline has a panel of differences. The label curve needs several label fractions.
    """
    entries, baselines = table["entries"], table["baselines"]
    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    curve = len({entry["labels"] for entry in entries}) > 1
    wide = 1 + len(baselines) + curve
    figure, axes = new_figure((1 + 3.3 * wide, 0.6 + 2.9 * len(tasks)), len(tasks), wide)
    for line, task in zip(axes, tasks, strict=True):
        of_task = [entry for entry in entries if entry["task"] == task]
        most = max(entry["labels"] for entry in of_task)
        shown = [entry for entry in of_task if entry["labels"] == most][:MOST][::-1]
        metric = next(iter(shown[0]["metrics"]))
        for i, entry in enumerate(shown):
            values = entry["metrics"][metric]
            line[0].barh(i, np.mean(values), color=BLUE, alpha=0.35)
            line[0].plot(values, [i] * len(values), "o", color=BLUE, markersize=3)
        line[0].set_xlim(left=max(0, min(min(e["metrics"][metric]) for e in shown) - 0.05))
        line[0].set_xlabel(f"{metric}, {most:.0%} of the labels")
        line[0].set_yticks(range(len(shown)), [shorten(entry["row"]) for entry in shown])
        line[0].set_title(shorten(task), fontsize=10)
        for ax, base in zip(line[1:], baselines, strict=False):
            draw_differences(ax, base, of_task, [entry["row"] for entry in shown], metric)
            ax.set_ylim(line[0].get_ylim())
        if curve:
            draw_label_curve(line[-1], of_task, metric)
    return figure


def draw_differences(ax, base, entries, rows, metric):
    """Differences of the rows to a baseline, with the largest fraction of the labels on top."""
    shares = sorted({entry["labels"] for entry in entries}, reverse=True)
    for place, share in enumerate(shares):
        # smaller fractions are lower and paler
        down = 0.6 * place / len(shares)
        style = {"color": BLUE, "alpha": 1 - down}
        ax.plot([], [], "o-", label=f"{share:.0%}", **style)
        for entry in entries:
            mean, low, high, _ = entry["differences"].get(base, {}).get(metric, [None] * 4)
            if mean is None or entry["row"] not in rows or entry["labels"] != share:
                continue
            y = rows.index(entry["row"]) - down
            ax.plot([low, high], [y, y], **style)
            ax.plot([mean], [y], "o", **style)
    if len(shares) > 1:
        ax.legend(frameon=False, fontsize=7)
    ax.axvline(0, color=ORANGE, linestyle="--")
    ax.locator_params(axis="x", nbins=5)
    ax.set_yticks(range(len(rows)), [])
    ax.set_xlabel(f"minus {shorten(base)}: {metric}, 95 %")


def draw_label_curve(ax, entries, metric):
    """Mean of a metric by fraction of the labels, one line per row."""
    for row in list(dict.fromkeys(entry["row"] for entry in entries))[:10]:
        points = sorted((e["labels"], np.mean(e["metrics"][metric]))
                        for e in entries if e["row"] == row)
        ax.plot(*zip(*points, strict=True), ".-", label=shorten(row))
    ax.set_xscale("log")
    ticks = sorted({entry["labels"] for entry in entries})
    ax.set_xticks(ticks, [f"{share:.0%}" for share in ticks])
    ax.minorticks_off()
    ax.set_xlabel("fraction of the labels")
    ax.set_ylabel(metric)
    ax.legend(frameon=False, fontsize=7)


def read_result(path):
    """The dictionary that eval.py or table.py wrote. ValueError if it is anything else."""
    try:
        result = json.loads(pathlib.Path(path).read_text("utf-8"))
        result["kind"], result["checkpoint"]
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{path} is damaged, or not a result of eval.py or table.py "
                         f"({type(e).__name__}: {e})") from e
    return result


def draw(path):
    """Draws all figures of a result file. Returns the paths of those that failed."""
    base, failed, result = path.removesuffix(".json"), [], read_result(path)
    if result["kind"] == "table":
        plots = [(f"{base}.png", draw_table, result)]
    elif result["kind"] == "separator":
        plots = [(f"{base}.png", draw_separation, result["sources"], f"{base}.npz")]
    elif "confusion" in result:
        confusion = np.array(result["confusion"])
        plots = [(f"{base}_confusion.png", draw_confusion, confusion, result["classes"])]
    else:
        plots = [(f"{base}_classes.png", draw_bars, result["per_class"])]
    log = result["checkpoint"].removesuffix(".pt") + ".jsonl"
    if os.path.exists(log):                     # released checkpoints have none
        plots.append((f"{base}_curves.png", draw_curves, log))
    for target, *plot in plots:
        try:
            with atomic(target, "wb") as f:
                save(f, *plot)
            print(f"figure: {target}")
        except Exception as e:  # matplotlib raises many types, none of which may cost a result
            reason = " ".join(f"{type(e).__name__}: {e}".split())
            print(f"note: no figure {target}: {reason[:300]}")
            failed.append(target)
    return failed


def main():
    _, paths = settings.configure(globals(), configs=False)
    if not paths:
        settings.die("name result files: python -m reports.figures results/vocals.json")
    return int(any([draw(path) for path in paths]))         # a list: draw all of them


if __name__ == "__main__":
    settings.script(main)
