"""
Draws the pictures of results again, from the files that eval.py wrote.

    python report.py results/vocals.json results/mtat.json results/summary.json

Next to each file: a separator's spectrograms (.png), a tagger's scores per class (_classes.png),
a genre classifier's answers (_confusion.png), a run's losses (_curves.png), and the mean and
spread of several runs (summary.png). A picture that fails costs the picture and nothing else.
"""
import json
import os
import unicodedata

import numpy as np
import torch

import model
import runtime

BLUE, ORANGE = "#2563a8", "#d97706"
DPI = 110
MOST = 60               # classes or runs in a picture: more could not be read
LONGEST = 36            # columns of a name, of which Chinese letters take two
UNKNOWN = "\u25a1"      # stands for a letter that no font has


# -----------------------------------------------------------------------------
# files

def save_excerpt(path, song, waves):
    """What is shown of a separator: the waves (1 + 2 S, N) of a song and their decibels."""
    levels = model.stft(torch.from_numpy(waves)).abs().transpose(1, 2)          # (1 + 2 S, 257, T)
    levels = 20 * torch.log10(levels + 1e-4)
    heard = np.rint(np.clip(waves, -1, 1) * 32767).astype(np.int16)
    with runtime.atomic(path, "wb") as f:
        np.savez_compressed(f, song=song, seconds=waves.shape[1] / model.SAMPLE_RATE,
                            levels=levels.numpy().astype(np.float16), waves=heard)


def read_log(path):
    """{key: (steps, values)} of the losses in a training log.

    Damaged lines, as a crash of the machine leaves them, are told and left out.
    """
    curves, damaged = {"loss": ([], []), "val_loss": ([], [])}, []
    with open(path, encoding="utf-8", errors="replace") as f:
        for number, line in enumerate(f, 1):
            try:
                entry = json.loads(line)
                found = {key: (float(entry["step"]), float(entry[key]))
                         for key in curves if key in entry}
            except (ValueError, TypeError, KeyError):
                damaged.append(number)
                continue
            for key, (step, value) in found.items():
                curves[key][0].append(step)
                curves[key][1].append(value)
    if damaged:
        print(f"note: {path}: damaged lines are left out of the picture: {len(damaged)}, the "
              f"first is line {damaged[0]}")
    return curves


def picture(path, failed, draw, *arguments):
    """Writes the figure that draw(*arguments) makes.

    What goes wrong is told in one line, and the path is added to `failed`.
    """
    try:
        import matplotlib  # here: a broken one costs the pictures only

        # what users have in their names is text: "Ba$$in" is no formula
        with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
            save_figure(draw(*arguments), path)
        print(f"picture: {path}")
    except Exception as e:              # drawing has many ways to fail; none is worth a result
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        print(f"note: no picture {path}: {reason[:300]}")
        failed.append(path)


def save_figure(figure, path):
    with runtime.atomic(path, "wb") as f:
        figure.savefig(f, dpi=DPI, format="png", bbox_inches="tight")


def new_figure(inches, rows=1, columns=1, **options):
    """(figure, axes (rows, columns)), without a window and without a state that is kept."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=inches, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


# -----------------------------------------------------------------------------
# names that users gave

def columns(text):
    """The width of a text in columns, of which a Chinese letter or an emoji takes two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shorten(text):
    """A name in one line of at most 36 columns: the middle of a longer one is left out."""
    text = " ".join(text.split())
    if columns(text) <= LONGEST:
        return text
    start, end = text[:LONGEST], text[-LONGEST // 3:]
    while columns(end) > LONGEST // 3:
        end = end[1:]
    while columns(start) + columns(end) >= LONGEST:
        start = start[:-1]
    return f"{start}\u2026{end}"


def letters_of(family):
    """The code points that matplotlib can draw in a font; none if it cannot draw the font."""
    from matplotlib import font_manager, ft2font
    try:
        path = font_manager.findfont(font_manager.FontProperties(family=family))
        font = ft2font.FT2Font(path)
        return set(font.get_charmap()) if font.scalable else set()
    except (OSError, RuntimeError, ValueError):
        return set()                    # a font of colour pictures, or a damaged file


def readable(names):
    """(names as they can be drawn, the font families that have their letters).

    DejaVu Sans comes with matplotlib. Letters that it lacks are looked for in the fonts that are
    installed. What none of them has is drawn as an empty square.
    """
    from matplotlib import font_manager
    names = [shorten(name) for name in names]
    families, known = ["DejaVu Sans"], letters_of("DejaVu Sans")
    missing = {ord(c) for name in names for c in name} - known
    installed = sorted({font.name for font in font_manager.fontManager.ttflist})
    for family in installed if missing else []:
        # the last resort has a box for every letter
        new = set() if family.startswith("Last Resort") else letters_of(family) & missing
        if new:
            families.append(family)
            known, missing = known | new, missing - new
    drawn = []
    for name in names:
        drawn.append("".join(c if ord(c) in known else UNKNOWN for c in name))
    return drawn, families


# -----------------------------------------------------------------------------
# pictures

def draw_separation(sources, excerpt):
    """Mixture, then per source its mask, its estimate and the truth: spectrograms of some seconds.

    excerpt: the file of save_excerpt. Its levels are decibels (1 + 2 S, 257, T): mixture, then
    estimate and truth of each source.
    """
    with np.load(excerpt) as saved:
        levels, song, seconds = saved["levels"].astype(np.float32), saved["song"], saved["seconds"]
    mixture, pairs = levels[0], levels[1:].reshape(len(sources), 2, *levels.shape[1:])
    (song,), font = readable([str(song)])
    rows = len(sources) + 1
    figure, axes = new_figure((12, 2.1 * rows), rows, 3, sharex=True, sharey=True)
    place = dict(origin="lower", aspect="auto", extent=(0, float(seconds), 0, 8))
    level = dict(cmap="magma", vmin=-60, vmax=max(-50.0, mixture.max()), **place)
    share = dict(cmap="gray", vmin=0, vmax=1, **place)

    axes[0][0].axis("off")
    axes[0][2].axis("off")
    axes[0][1].imshow(mixture, **level)
    axes[0][1].set_title(f"mixture ({song})", fontsize=9, fontfamily=font)
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
    """The numbers of the 60 classes with the most clips, in their order."""
    order = np.argsort(-np.asarray(counts), kind="stable")[:MOST]
    return sorted(order.tolist())


def title_of_some(ax, shown, total):
    if shown < total:
        ax.set_title(f"the {shown} classes with the most clips, of {total}", fontsize=10)


def draw_bars(rows):
    """ROC-AUC and PR-AUC of every class that has them, the best on top."""
    rows = [row for row in rows if row["PR-AUC"] is not None]
    shown = [rows[i] for i in most_frequent([row["clips"] for row in rows])]
    shown.sort(key=lambda row: row["PR-AUC"])
    names, font = readable([row["class"] for row in shown])
    labels = [f"{label} ({row['clips']})" for label, row in zip(names, shown, strict=True)]
    figure, ((ax,),) = new_figure((7, 1.6 + 0.24 * len(shown)))
    where = np.arange(len(shown))
    roc, pr = [row["ROC-AUC"] for row in shown], [row["PR-AUC"] for row in shown]
    ax.barh(where + 0.2, roc, 0.38, color=BLUE, label="ROC-AUC")
    ax.barh(where - 0.2, pr, 0.38, color=ORANGE, label="PR-AUC")
    ax.set_yticks(where, labels, fontfamily=font)
    ax.set_ylim(-0.6, len(shown) - 0.4)
    ax.set_xlim(0, 1)
    ax.set_xlabel("area under the curve (clips with the tag in brackets)")
    title_of_some(ax, len(shown), len(rows))
    # under the axes, where no bar can be
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_confusion(confusion, classes):
    """Rows are true classes, columns what was answered; colours are shares of the row."""
    share = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    shown = most_frequent(confusion.sum(1))
    confusion, share = confusion[np.ix_(shown, shown)], share[np.ix_(shown, shown)]
    names, font = readable([classes[i] for i in shown])
    cell, size = (0.45, 8) if len(shown) <= 20 else (0.3, 6)
    figure, ((ax,),) = new_figure((2.5 + cell * len(shown),) * 2)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(confusion):
        if count:
            color = "white" if share[i, j] > 0.6 else "black"
            ax.text(j, i, count, ha="center", va="center", fontsize=size, color=color)
    ticks = range(len(shown))
    ax.set_xticks(ticks, names, rotation=60, ha="right", rotation_mode="anchor", fontfamily=font)
    ax.set_yticks(ticks, names, fontfamily=font)
    ax.set_xlabel("answered")
    ax.set_ylabel("true")
    title_of_some(ax, len(shown), len(classes))
    return figure


def draw_curves(log):
    """Training and validation loss by step, from a training log."""
    curves = read_log(log)
    figure, ((ax,),) = new_figure((6, 3.5))
    lines = ("loss", "training", BLUE), ("val_loss", "validation", ORANGE)
    for key, label, color in lines:
        steps, values = curves[key]
        marker = "." if len(steps) <= 100 else None
        ax.plot(steps, values, label=label, color=color, marker=marker)
    ax.set_xlabel("step")
    ax.set_ylabel("loss")
    ax.legend(frameon=False)
    return figure


def draw_table(table):
    """Per task, the first metric: every row's runs, its differences, and the curve over labels.

    The differences to each baseline have their intervals, one per share of the labels. The curve is
    drawn if there are several shares.
    """
    entries, baselines = table["entries"], table["baselines"]
    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    shares = sorted({entry["labels"] for entry in entries})
    wide = 1 + len(baselines) + (len(shares) > 1)
    figure, axes = new_figure((1 + 3.3 * wide, 0.6 + 2.9 * len(tasks)), len(tasks), wide)
    for line, task in zip(axes, tasks, strict=True):
        of_task = [entry for entry in entries if entry["task"] == task]
        most = max(entry["labels"] for entry in of_task)
        shown = [entry for entry in of_task if entry["labels"] == most][:MOST][::-1]
        names, font = readable([entry["row"] for entry in shown])
        metric = next(iter(shown[0]["metrics"]))
        for i, entry in enumerate(shown):
            values = entry["metrics"][metric]
            line[0].barh(i, np.mean(values), color=BLUE, alpha=0.35)
            line[0].plot(values, [i] * len(values), "o", color=BLUE, markersize=3)
        line[0].set_xlim(left=max(0, min(min(e["metrics"][metric]) for e in shown) - 0.05))
        line[0].set_xlabel(f"{metric}, {most:.0%} of the labels")
        line[0].set_yticks(range(len(shown)), names, fontfamily=font)
        line[0].set_title(shorten(task), fontsize=10)
        for ax, base in zip(line[1:], baselines, strict=False):
            draw_differences(ax, base, of_task, [entry["row"] for entry in shown], metric)
            ax.set_ylim(line[0].get_ylim())
        if len(shares) > 1:
            draw_label_curve(line[-1], of_task, metric)
    return figure


def draw_differences(ax, base, entries, rows, metric):
    """Differences of the rows to a baseline, the largest share of the labels on top."""
    shares = sorted({entry["labels"] for entry in entries}, reverse=True)
    for place, share in enumerate(shares):
        # a smaller share stands a little lower, and is paler
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
    """Mean of a metric over the share of the labels, one line per row."""
    rows = list(dict.fromkeys(entry["row"] for entry in entries))[:10]
    names, font = readable(rows)
    for row, name in zip(rows, names, strict=True):
        points = sorted((e["labels"], np.mean(e["metrics"][metric]))
                        for e in entries if e["row"] == row)
        ax.plot(*zip(*points, strict=True), ".-", label=name)
    ax.set_xscale("log")
    ticks = sorted({entry["labels"] for entry in entries})
    ax.set_xticks(ticks, [f"{share:.0%}" for share in ticks])
    ax.minorticks_off()
    ax.set_xlabel("share of the labels")
    ax.set_ylabel(metric)
    ax.legend(frameon=False, fontsize=7, prop={"family": font, "size": 7})


def draw_summary(table):
    """Mean, standard deviation and every single run."""
    keys, total = list(table[0]["values"]), len(table)
    table = table[:MOST][::-1]                  # the first one comes on top
    names, font = readable([row["run"] for row in table])
    inches = 1.2 + 3.2 * len(keys), 1.4 + 0.5 * len(table)
    figure, axes = new_figure(inches, 1, len(keys), sharey=True)
    for ax, key in zip(axes[0], keys, strict=True):
        shown = []
        for i, row in enumerate(table):
            values = row["values"][key]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0
            ax.barh(i, np.mean(values), color=BLUE, alpha=0.35, xerr=spread)
            ax.plot(values, [i] * len(values), "o", color=BLUE, markersize=4)
            shown += values
        if all(key in row["floor"] for row in table):
            floor = table[-1]["floor"][key]
            ax.axvline(floor, color=ORANGE, linestyle="--", label="floor")
            shown.append(floor)
        ax.set_xlim(max(0, min(shown) - 0.05), min(1, max(shown) + 0.05))
        ax.set_xlabel(key)
    axes[0][0].set_yticks(range(len(table)), names, fontfamily=font)
    if len(table) < total:
        axes[0][0].set_title(f"the first {len(table)} of {total} runs", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False)
    return figure


# -----------------------------------------------------------------------------

def read_result(path):
    """What eval.py wrote there: a dictionary, or the list of a table. ValueError if it did not."""
    with open(path, encoding="utf-8") as f:
        try:
            result = json.load(f)
        except ValueError as e:
            raise ValueError(f"{path} is damaged ({e}): run eval.py again") from e
    needed = {"kind", "checkpoint"}
    if isinstance(result, list) and result:
        needed, keys = {"run", "values", "floor"}, result[0]
    else:
        keys = result
    if not isinstance(keys, dict) or not needed <= keys.keys():
        raise ValueError(f"{path} is not a result of eval.py")
    return result


def draw(path):
    """Draws all pictures of a result file; returns the paths of those that failed."""
    base, failed = path.removesuffix(".json"), []
    result = read_result(path)
    if isinstance(result, list):                # the table over several checkpoints
        picture(f"{base}.png", failed, draw_summary, result)
        return failed

    if result["kind"] == "table":               # that of table.py
        picture(f"{base}.png", failed, draw_table, result)
        return failed

    if result["kind"] == "separator":
        picture(f"{base}.png", failed, draw_separation, result["sources"], f"{base}.npz")
    elif "confusion" in result:
        confusion = np.array(result["confusion"])
        picture(f"{base}_confusion.png", failed, draw_confusion, confusion, result["classes"])
    else:
        picture(f"{base}_classes.png", failed, draw_bars, result["per_class"])
    log = result["checkpoint"].removesuffix(".pt") + ".jsonl"
    if os.path.exists(log):                     # a released checkpoint has none
        picture(f"{base}_curves.png", failed, draw_curves, log)
    return failed


def main():
    _, paths = runtime.configure(globals(), configs=False)
    if not paths:
        runtime.die("name one or more result files: python report.py results/vocals.json")
    failed = []
    for path in paths:
        failed += draw(path)
    return 1 if failed else 0


if __name__ == "__main__":
    runtime.script(main)
