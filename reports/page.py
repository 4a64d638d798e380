"""
Self-contained HTML pages of songs, results and training runs.

    python -m reports.page listened                     # all songs that listen.py has written
    python -m reports.page listened/song                # one of them
    python -m reports.page results/vocals.json results/table_demo/table.json
    python -m reports.page ckpt/vocals.jsonl            # a training run, also while it runs

Written next to the input: listened/song/song.html, results/vocals.html, ckpt/vocals_run.html. A
page needs no other file and no network. It plays at most the first five minutes of a song.
"""
import base64
import csv
import glob
import html
import io
import json
import os
import pathlib
import re
import shlex

import numpy as np
import torch

import model
import weights
from audio import files
from audio.resample import resample
from common import metrics, settings
from common.files import write_atomically
from reports import figures

HERE = pathlib.Path(__file__).resolve().parent
SHOWN = 300             # seconds of a song that are drawn and played
RATE, BIT_RATE = 24_000, 48_000     # of the players, Hz (the same in page.html) and bit/s
COLUMNS = 1000          # width of a spectrogram, pixels
POINTS = 500            # steps of a tag curve
MOST = 12               # tags with a curve


def escape(text):
    # file names may contain invalid UTF-8
    return html.escape(str(text).encode("utf-8", "replace").decode())


def table(heads, rows):
    lines = ["".join(f"<th>{escape(text)}</th>" for text in heads)]
    lines += ["".join(f"<td>{escape(text)}</td>" for text in row) for row in rows]
    return f'<div class="wide"><table><tr>{"</tr><tr>".join(lines)}</tr></table></div>'


def folded(title, body):
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def image(png, name, kind=""):
    return (f'<img class="{kind}" alt="{escape(name)}" '
            f'src="data:image/png;base64,{base64.b64encode(png).decode()}">')


def figure(path):
    """A figure drawn by reports.figures; empty if it does not exist."""
    png = pathlib.Path(path)
    return f"<figure>{image(png.read_bytes(), png.name)}</figure>" if png.exists() else ""


def heatmap(values, cmap, low, high, name, kind=""):
    """Values (rows, columns) as an image, the first row at the bottom."""
    from matplotlib.image import imsave
    with io.BytesIO() as f:
        imsave(f, values, cmap=cmap, vmin=low, vmax=high, origin="lower", format="png")
        return image(f.getvalue(), name, kind)


def mel_levels(wave):
    """Mono tensor (N,) at 16 kHz -> mel spectrogram in dB, (128, at most 1000)."""
    wave = torch.nn.functional.pad(wave, (0, max(0, model.WIN - len(wave))))
    mel = model.magnitudes(wave[None])[0] @ model.mel_filters()                 # (T, M)
    groups = torch.tensor_split(mel, min(COLUMNS, len(mel)))
    mel = torch.stack([group.mean(0) for group in groups], 1)                   # (M, columns)
    return (20 * torch.log10(mel + model.EPS)).numpy()


def players(waves, rate):
    """(HTML, sounds for the script) of {name: mono tensor (N,) at `rate` Hz}, mixture first."""
    levels = {name: mel_levels(resample(wave, rate, model.SAMPLE_RATE))
              for name, wave in waves.items()}
    mixture = next(iter(levels.values()))
    top, sounds, parts = float(mixture.max()), [], []
    for i, (name, wave) in enumerate(waves.items()):
        with io.BytesIO() as f:
            with files.writer(f, "mp3", RATE, 1, BIT_RATE) as write_block:
                write_block(files.to_int16(resample(wave, rate, RATE))[None])   # (1, N)
            sounds.append({"name": name, "mp3": base64.b64encode(f.getvalue()).decode()})
        pictures = heatmap(levels[name], "magma", top - 70, top, f"spectrogram of {name}")
        if i > 0:
            share = 10 ** ((levels[name] - mixture) / 20)
            pictures += heatmap(share, "gray", 0, 1, f"share of {name} in the mixture", "mask")
        parts.append(
            f'<div class="track" id="track{i}"><header><b>{escape(name)}</b>'
            '<button class="muted" aria-pressed="false">Mute</button>'
            '<button class="solo" aria-pressed="false">Solo</button></header>'
            f'<div class="strip" data-seconds="{len(wave) / rate}">{pictures}'
            '<div class="cursor"></div></div></div>')
    controls = ('<div class="controls"><button id="play" disabled>Loading</button>'
                '<span id="time"></span></div><p class="soft">Click a spectrogram to seek. Mel '
                'spectrograms, 0 to 8 kHz from bottom to top; below each source its share of the '
                'mixture, in white. Sound: 24 kHz mono, to keep the page small.</p>')
    return controls + "".join(parts), sounds


def curve(rows, i, seconds):
    """Step curve of tag i as SVG. rows: [(start, scores)]; seconds: length of the song."""
    groups = np.array_split(np.arange(len(rows)), min(POINTS, len(rows)))
    starts = [rows[group[0]][0] for group in groups] + [seconds]
    points = ["0,1"]                # y grows downwards
    for group, start, end in zip(groups, starts, starts[1:], strict=False):
        height = 1 - np.mean([rows[k][1][i] for k in group])
        points += [f"{start:.2f},{height:.3f}", f"{end:.2f},{height:.3f}"]
    points.append(f"{seconds:.2f},1")
    return (f'<svg viewBox="0 0 {seconds:.2f} 1" preserveAspectRatio="none">'
            f'<polygon points="{" ".join(points)}"/></svg>')


def tag_curves(classes, rows, seconds):
    """Curves of the tags with the highest means. rows: [(start, scores)]."""
    mean, html = np.mean([scores for _, scores in rows], 0), ""
    for i in np.argsort(-mean, kind="stable")[:MOST]:
        html += (f'<div class="tag"><span>{escape(classes[i])}</span><span>{mean[i]:.3f}</span>'
                 f'<div class="strip" data-seconds="{seconds}">{curve(rows, i, seconds)}'
                 '<div class="cursor"></div></div></div>')
    return html


def write(path, title, body, sounds=()):
    """Writes a page. sounds: from players()."""
    parts = {"title": escape(title), "body": body,
             "sound": json.dumps(list(sounds)).replace("<", "\\u003c")}
    template = (HERE / "page.html").read_text("utf-8")
    # in one pass, as a part may contain {{...}} itself
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    write_atomically(text, path)
    print(f"page: {path}")


def beginning(path):
    """(mono wave (N,), rate) of the first five minutes of a file."""
    kept, n = [], 0
    with files.Blocks(path) as song:
        for block in song:
            kept.append(block.mean(0))
            n += block.shape[1]
            if n >= SHOWN * song.rate:
                break
        return np.concatenate(kept)[:SHOWN * song.rate], song.rate


def tags_of(path):
    """(classes, [(start, scores)]) of a .csv file of tag scores over time."""
    with open(path, encoding="utf-8", newline="") as f:
        lines = csv.reader(f)
        classes = next(lines)[2:]
        return classes, [(float(line[0]), np.array(line[2:], float)) for line in lines]


def read_marker(folder):
    """The contents of listen.json in a folder; None if it does not exist. ValueError if damaged."""
    path = pathlib.Path(folder, "listen.json")
    if not path.exists():
        return None
    try:
        marker = json.loads(path.read_text("utf-8"))
        marker["provenance"], marker["finished"], marker["files"]
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{path} is damaged: delete {folder}, and run listen.py again") from e
    return marker


def song_players(folder, marker):
    """players() of a song and its sources."""
    codec, waves = marker["provenance"]["codec"], {}
    for name in ["mixture", *marker["sources"]]:
        source = os.path.join(folder, f"{name}.{codec}")
        wave, rate = beginning(marker["song"] if name == "mixture" else source)
        waves[name] = resample(torch.from_numpy(wave), rate, RATE)
    shortest = min(map(len, waves.values()))            # mp3 and opus append some samples
    return players({name: wave[:shortest] for name, wave in waves.items()}, RATE)


def song_page(folder):
    """The page of a folder that listen.py has written."""
    marker = read_marker(folder)
    if not marker["finished"]:
        raise ValueError(f"{folder} is not finished: run listen.py again")
    title, sounds = os.path.basename(marker["song"]), []
    body = (f'<h1>{escape(title)}</h1><p class="soft">{settings.clock(marker["seconds"])}, '
            f'{marker["rate"]} Hz, channels: {marker["channels"]}</p>')
    body += "".join(f"<p>Note: {escape(note)}</p>" for note in marker["notes"])
    if marker["sources"]:
        if marker["seconds"] > SHOWN:
            body += f"<p>Note: this page has the first {SHOWN // 60} minutes.</p>"
        tracks, sounds = song_players(folder, marker)
        body += "<h2>Sources</h2>" + tracks
    for name, means in marker["tags"].items():
        classes, rows = tags_of(os.path.join(folder, f"{name}.csv"))
        body += f"<h2>Tags: {escape(name)}</h2>" + tag_curves(classes, rows, marker["seconds"])
        if len(classes) > MOST:
            body += folded("all tags", table(["tag", "mean score"], means.items()))
    provenance = [(key, json.dumps(value)) for key, value in marker["provenance"].items()
                  if key in ("song", "networks", "codec", "hop")]
    body += folded("provenance", table(["", ""], provenance))
    write(os.path.join(folder, "song.html"), title, body, sounds)


def commands_of(config, kind, *others):
    """The command that trained a checkpoint, further ones, and all settings."""
    script = "pretrain_sep.py" if kind == "separator" else "finetune_cls.py"
    defaults, changed = settings.defaults(HERE.parent / script), []
    for key, value in config.items():
        if key in defaults and value != defaults[key] and key not in ("resume", "overwrite"):
            value = ",".join(map(str, value)) if isinstance(value, list) else value
            changed.append(f"--{key}={value}")
    lines = escape("\n".join(["python " + shlex.join([script, *changed]), *others]))
    rows = [(key, json.dumps(value)) for key, value in config.items()]
    return f"<h2>Commands</h2><pre>{lines}</pre>" + folded(
        "all settings", table(["key", "value"], rows))


def number(value):
    return "-" if value is None else f"{value:.4g}"


def scores_of(result):
    """Tables of a result of eval.py."""
    if result["kind"] == "separator":
        rows = [[f"{source}, {kind}", *map(number, values.values())]
                for source, kinds in result["median"].items() for kind, values in kinds.items()]
        heads = list(next(iter(result["median"].values()))["model"])
        return "<h2>Median over songs, dB</h2>" + table(["", *heads], rows)
    interval, chance = result["interval"], result["chance"]
    rows = [[key, number(value), " to ".join(map(number, interval.get(key, ()))),
             number(chance.get(key))] for key, value in result["metrics"].items()]
    body = "<h2>Scores</h2>" + table(["", "", "95 % interval over clips", "chance"], rows)
    rows = [[row["class"], row["clips"], *map(number, list(row.values())[2:])]
            for row in result["per_class"]]
    return body + folded("every class", table(list(result["per_class"][0]), rows))


def scores_of_table(result):
    """Tables of a result of table.py: per task and fraction of the labels, one per metric."""
    body, baselines, entries = "", result["baselines"], result["entries"]
    for task, share in dict.fromkeys((entry["task"], entry["labels"]) for entry in entries):
        of_task = [e for e in entries if (e["task"], e["labels"]) == (task, share)]
        body += f"<h2>{escape(task)}, {100 * share:g} % of the labels</h2>"
        for metric in of_task[0]["metrics"]:
            rows = [[entry["row"], entry["runs"], metrics.mean_and_std(entry["metrics"][metric]),
                     *(metrics.difference(entry["differences"].get(base, {}).get(metric))
                       for base in baselines)] for entry in of_task]
            body += table(["row", "runs", metric, *(f"minus {base}" for base in baselines)], rows)
    return body + ('<p class="soft">Mean ± standard deviation over runs. Differences are paired, '
                   "with 95 % intervals over test clips and runs.</p>")


def result_players(base, sources):
    """players() of the excerpt that eval.py keeps of a separator's loudest test song."""
    names = ["mixture", *(f"{s}, {kind}" for s in sources for kind in ("estimate", "truth"))]
    with np.load(f"{base}.npz") as saved:
        waves = torch.from_numpy(saved["waves"].astype(np.float32) / 2 ** 15)   # (1 + 2 S, N)
    return players(dict(zip(names, waves, strict=True)), model.SAMPLE_RATE)


def result_page(path):
    """The page of a .json file of eval.py or table.py, with the figures next to it."""
    base, result, sounds = path.removesuffix(".json"), figures.read_result(path), []
    title = result["checkpoint"] or base
    body = f"<h1>{escape(title)}</h1>" + figure(f"{base}.png")
    if result["kind"] == "table":
        return write(f"{base}.html", title, body + scores_of_table(result))
    body += f'<p class="soft">{escape(result["data"])}, {escape(result["split"])}</p>'
    body += scores_of(result)
    for ending in ("_classes", "_confusion", "_curves"):
        body += figure(f"{base}{ending}.png")
    if result["kind"] == "separator":
        tracks, sounds = result_players(base, result["sources"])
        body += "<h2>A test song</h2>" + tracks
    if "out" in result["config"]:       # released weights have no training settings
        test = shlex.join(["eval.py", result["checkpoint"], f"--data={result['data']}",
                           f"--split={result['split']}", f"--dtype={result['dtype']}"])
        body += commands_of(result["config"], result["kind"], f"python {test}")
    write(f"{base}.html", title, body, sounds)


def run_page(path):
    """The page of a training run, from what its .jsonl log has so far."""
    base = path.removesuffix(".jsonl")
    with io.BytesIO() as f:
        figures.save(f, figures.draw_curves, path)
        body = f"<h1>{escape(base)}</h1><figure>{image(f.getvalue(), 'losses')}</figure>"
    lines = pathlib.Path(path).read_text("utf-8", "replace").splitlines(True)
    body += f"<h2>Last lines of the log</h2><pre>{escape(''.join(lines[-5:]))}</pre>"
    saved = [base + ending for ending in (".pt", ".resume") if os.path.exists(base + ending)]
    if saved:
        checkpoint = weights.read_checkpoint(saved[0])
        body += commands_of(checkpoint["config"], checkpoint["kind"])
    write(f"{base}_run.html", base, body)


def make(path):
    """Writes the page of a folder of listen.py, a result, or a log."""
    pattern = os.path.join(glob.escape(path), "**", "listen.json")
    folders = sorted(map(os.path.dirname, glob.glob(pattern, recursive=True)))
    if path.endswith(".jsonl") and not folders:
        return run_page(path)
    if path.endswith(".json") and not folders:
        return result_page(path)
    if not folders:
        raise ValueError(f"{path} has no listen.json, and is not a .json result or .jsonl log")
    failed = []
    for folder in folders:
        try:
            song_page(folder)
        except (ValueError, OSError) as e:      # go on with the other songs
            failed.append(str(e))
    if failed:
        raise ValueError(f"{len(failed)} of {len(folders)} songs have no page: {failed[0]}")


def main():
    _, paths = settings.configure(globals(), configs=False)
    if not paths:
        settings.die("name folders of listen.py, results or logs, such as listened/song")
    for path in paths:
        make(path)


if __name__ == "__main__":
    settings.script(main)
