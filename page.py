"""
Writes pages to look at and to listen to: one HTML file each, with all it needs inside.

    python page.py listened                             # all songs that listen.py has written
    python page.py listened/song                        # one of them
    python page.py results/vocals.json results/mtat.json results/table_demo/table.json
    python page.py ckpt/vocals.jsonl                    # a training run, while it runs too

Next to what it is made from: listened/song/song.html, results/vocals.html, and so on. A page
needs no network. It plays at most the first five minutes of a song.
"""
import base64
import csv
import glob
import html
import io
import json
import os
import re
import shlex

import numpy as np
import torch

import audio
import metrics
import model
import report
import runtime

HERE = os.path.dirname(os.path.abspath(__file__))
SHOWN = 300             # seconds of a song that are drawn and played
RATE, BITS = 24_000, 48_000     # of the players: Hz, as the template knows it, and bits a second
COLUMNS = 1000          # of a spectrogram
POINTS = 500            # of a curve of tags
MOST = 12               # tags with a curve


# -----------------------------------------------------------------------------
# parts of a page

def escape(text):
    # a file's name may hold bytes that are no letters
    return html.escape(str(text).encode("utf-8", "replace").decode())


def table(heads, rows):
    """A table of texts."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    lines = []
    for row in rows:
        lines.append("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def folded(title, body):
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def base64_of(content):
    return base64.b64encode(content).decode()


def image(png, name, kind=""):
    return (f'<img class="{kind}" alt="{escape(name)}" '
            f'src="data:image/png;base64,{base64_of(png)}">')


def figure(path):
    """A picture that report.py has drawn; nothing if there is none."""
    if not os.path.exists(path):
        return ""
    with open(path, "rb") as f:
        return f"<figure>{image(f.read(), os.path.basename(path))}</figure>"


def painted(values, cmap, low, high):
    """The PNG of values (rows, columns); the first row is at the bottom."""
    from matplotlib import image as images
    with io.BytesIO() as f:
        images.imsave(f, values, cmap=cmap, vmin=low, vmax=high, origin="lower", format="png")
        return f.getvalue()


def mel_levels(wave):
    """Mono (N,) at 16 kHz -> decibels of its mel spectrogram (128, at most 1000)."""
    wave = torch.from_numpy(wave)
    wave = torch.nn.functional.pad(wave, (0, max(0, model.WIN - len(wave))))
    mel = model.magnitudes(wave[None])[0] @ model.mel_filters()     # (T, M)
    groups = torch.tensor_split(mel, min(COLUMNS, len(mel)))
    mel = torch.stack([group.mean(0) for group in groups], 1)       # (M, columns)
    return (20 * torch.log10(mel + model.EPS)).numpy()


def players(waves, rate):
    """(HTML, sound for the script) of {name: mono wave (N,) at `rate` Hz}; the mixture is first."""
    levels = {name: mel_levels(audio.resample(wave, rate, model.SAMPLE_RATE))
              for name, wave in waves.items()}
    mixture = next(iter(levels.values()))
    top, sound, parts = float(mixture.max()), [], []
    for i, (name, wave) in enumerate(waves.items()):
        with io.BytesIO() as f:
            with audio.writer(f, "mp3", RATE, 1, BITS) as write:
                write(audio.to_int16(audio.resample(wave, rate, RATE))[None])
            sound.append({"name": name, "mp3": base64_of(f.getvalue())})
        pictures = image(painted(levels[name], "magma", top - 70, top), f"spectrogram of {name}")
        if i > 0:
            share = 10 ** ((levels[name] - mixture) / 20)
            mask = painted(share, "gray", 0, 1)
            pictures += image(mask, f"share of {name} in the mixture", "mask")
        parts.append(
            f'<div class="track" id="track{i}"><header><b>{escape(name)}</b>'
            '<button class="muted" aria-pressed="false">Mute</button>'
            '<button class="solo" aria-pressed="false">Solo</button></header>'
            f'<div class="strip" data-seconds="{len(wave) / rate}">{pictures}'
            '<div class="cursor"></div></div></div>')
    controls = ('<div class="controls"><button id="play" disabled>Loading</button>'
                '<span id="time"></span></div><p class="soft">Click into a picture to go there. '
                'Pictures show 0 to 8 kHz, low tones at the bottom. Under each source is its share '
                'of the mixture, in white. What plays here is mono at 24 kHz, to keep the page '
                'small.</p>')
    return controls + "".join(parts), sound


def curve(rows, i, seconds):
    """The scores of tag number i over the song, as steps. rows: [(start, scores)]."""
    groups = np.array_split(np.arange(len(rows)), min(POINTS, len(rows)))
    starts = [rows[group[0]][0] for group in groups] + [seconds]
    points = ["0,1"]
    for group, start, end in zip(groups, starts, starts[1:], strict=False):
        height = 1 - np.mean([rows[k][1][i] for k in group])
        points += [f"{start:.2f},{height:.3f}", f"{end:.2f},{height:.3f}"]
    points.append(f"{seconds:.2f},1")
    return (f'<svg viewBox="0 0 {seconds:.2f} 1" preserveAspectRatio="none">'
            f'<polygon points="{" ".join(points)}"/></svg>')


def tag_curves(classes, rows, seconds):
    """The tags with the highest mean over [(start, scores)], each with its curve."""
    mean = np.mean([scores for _, scores in rows], 0)
    parts = []
    for i in np.argsort(-mean, kind="stable")[:MOST]:
        parts.append(
            f'<div class="tag"><span>{escape(classes[i])}</span><span>{mean[i]:.3f}</span>'
            f'<div class="strip" data-seconds="{seconds}">{curve(rows, i, seconds)}'
            '<div class="cursor"></div></div></div>')
    return "".join(parts)


def write(path, title, body, sound=()):
    """Writes a page. sound: what players() returns."""
    with open(os.path.join(HERE, "assets", "page.html"), encoding="utf-8") as f:
        text = f.read()
    filled = {"title": escape(title), "body": body,
              "sound": json.dumps(list(sound)).replace("<", "\\u003c")}
    # at once: what is filled in may look like a place to fill
    text = re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], text)
    runtime.write_atomically(text, path)
    print(f"page: {path}")


# -----------------------------------------------------------------------------
# songs

def beginning(path):
    """(mono wave, rate) of the first five minutes of a file."""
    kept, n = [], 0
    with audio.Blocks(path) as song:
        for block in song:
            kept.append(block.mean(0))
            n += block.shape[1]
            if n >= SHOWN * song.rate:
                break
        return np.concatenate(kept)[:SHOWN * song.rate], song.rate


def tags_of(path):
    """(classes, [(start, scores)]) of a .csv of tags along time."""
    with open(path, encoding="utf-8", newline="") as f:
        lines = csv.reader(f)
        classes = next(lines)[2:]
        return classes, [(float(line[0]), np.array(line[2:], float)) for line in lines]


def read_marker(folder):
    """What listen.json of a folder says; None if there is none. ValueError if it is damaged."""
    path = os.path.join(folder, "listen.json")
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as f:
        try:
            told = json.load(f)
            told["made_with"], told["finished"], told["files"]
        except (ValueError, TypeError, KeyError) as e:
            raise ValueError(f"{path} is damaged: delete {folder}, and listen again") from e
    return told


def song_players(folder, told):
    """What players() returns of a song and its sources."""
    waves = {}
    for name in ("mixture", *told["sources"]):
        file = told["song"]
        if name != "mixture":
            file = os.path.join(folder, f"{name}.{told['made_with']['format']}")
        waves[name] = audio.resample(*beginning(file), RATE)
    shortest = min(map(len, waves.values()))            # mp3 and opus end a little later
    return players({name: wave[:shortest] for name, wave in waves.items()}, RATE)


def song_page(folder):
    """The page of what listen.py has written into a folder."""
    told = read_marker(folder)
    if not told["finished"]:
        raise ValueError(f"{folder} is not finished: run listen.py again")
    title, sound = os.path.basename(told["song"]), []
    facts = (f"{runtime.clock(told['seconds'])}, {told['rate']} Hz, channels: "
             f"{told['channels']}")
    if told["sources"] and told["seconds"] > SHOWN:
        facts += f". Here are the first {SHOWN // 60} minutes."
    body = f'<h1>{escape(title)}</h1><p class="soft">{facts}</p>'
    body += "".join(f"<p>Note: {escape(note)}</p>" for note in told["notes"])

    if told["sources"]:
        tracks, sound = song_players(folder, told)
        body += "<h2>Sources</h2>" + tracks
    for name, means in told["tags"].items():
        classes, rows = tags_of(os.path.join(folder, f"{name}.csv"))
        body += f"<h2>Tags: {escape(name)}</h2>" + tag_curves(classes, rows, told["seconds"])
        if len(classes) > MOST:
            body += folded("all tags", table(["tag", "mean score"], means.items()))
    settings = [(key, json.dumps(value)) for key, value in told["made_with"].items()
                if key in ("song", "networks", "format", "hop")]
    body += folded("how this was made", table(["", ""], settings))
    write(os.path.join(folder, "song.html"), title, body, sound)


# -----------------------------------------------------------------------------
# results and runs

def command_of(script, config):
    """The command line with the settings that are not the script's own."""
    known = runtime.defaults(os.path.join(HERE, script))
    changed = []
    for key, value in config.items():
        if key in known and value != known[key] and key not in ("resume", "overwrite"):
            value = ",".join(map(str, value)) if isinstance(value, list) else value
            changed.append(f"--{key}={value}")
    return "python " + shlex.join([script, *changed])


def made_by(commands, config):
    lines = escape("\n".join(commands))
    settings = [(key, json.dumps(value)) for key, value in config.items()]
    return (f"<h2>Commands</h2><pre>{lines}</pre>" +
            folded("all settings", table(["key", "value"], settings)))


def number(value):
    return "-" if value is None else f"{value:.4g}"


def scores_of(result):
    """The tables of a result of eval.py."""
    if result["kind"] == "separator":
        rows = []
        for source, kinds in result["median"].items():
            rows += [[f"{source}, {kind}", *map(number, values.values())]
                     for kind, values in kinds.items()]
        heads = list(next(iter(result["median"].values()))["model"])
        return "<h2>Median over songs, dB</h2>" + table(["", *heads], rows)
    rows = []
    for key, value in result["metrics"].items():
        between = result["interval"].get(key)
        rows.append([key, number(value), " to ".join(map(number, between)) if between else ""])
    body = "<h2>Scores</h2>" + table(["", "", "95 % interval over clips"], rows)
    rows = [[row["class"], row["clips"], *map(number, list(row.values())[2:])]
            for row in result["per_class"]]
    return body + folded("every class", table(list(result["per_class"][0]), rows))


def scores_of_table(result):
    """A table of table.py: per task and share of the labels, each metric with its differences."""
    body, baselines, entries = "", result["baselines"], result["entries"]
    for task, share in dict.fromkeys((entry["task"], entry["labels"]) for entry in entries):
        of_task = [e for e in entries if (e["task"], e["labels"]) == (task, share)]
        body += f"<h2>{escape(task)}, {100 * share:g} % of the labels</h2>"
        for metric in of_task[0]["metrics"]:
            rows = []
            for entry in of_task:
                row = [entry["row"], entry["runs"]]
                row.append(metrics.mean_and_spread(entry["metrics"][metric]))
                for base in baselines:
                    found = entry["differences"].get(base, {}).get(metric)
                    row.append(metrics.difference(found))
                rows.append(row)
            body += table(["row", "runs", metric, *(f"minus {base}" for base in baselines)], rows)
    return body + ('<p class="soft">Mean ± standard deviation over runs. Differences are paired, '
                   "with 95 % intervals over test clips and runs.</p>")


def result_players(base, sources):
    """What players() returns of a separator's test song: the waves that eval.py has kept."""
    names = ["mixture"]
    for source in sources:
        names += [f"{source}, estimate", f"{source}, truth"]
    waves = excerpt(f"{base}.npz")                                          # (1 + 2 S, N)
    return players(dict(zip(names, waves, strict=True)), model.SAMPLE_RATE)


def excerpt(path):
    """The waves of a separator's test song, float32."""
    with np.load(path) as saved:
        if "waves" not in saved:
            raise ValueError(f"{path} has no sound, as older versions wrote it: run eval.py again")
        return saved["waves"].astype(np.float32) / 2 ** 15


def result_page(path):
    """The page of a .json file of eval.py or table.py, with the pictures next to it."""
    base, result, sound = path.removesuffix(".json"), report.read_result(path), []
    if isinstance(result, list):
        raise ValueError(f"{path} is a summary of several results: name one of them, or a table")
    title = result.get("checkpoint") or base
    body = f"<h1>{escape(title)}</h1>" + figure(f"{base}.png")
    if result["kind"] == "table":
        body += scores_of_table(result)
    else:
        body += f'<p class="soft">{escape(result["data"])}, {escape(result["split"])}</p>'
        body += scores_of(result)
    for ending in ("_classes", "_confusion", "_curves"):
        body += figure(f"{base}{ending}.png")
    if result["kind"] == "separator":
        tracks, sound = result_players(base, result["sources"])
        body += "<h2>A test song</h2>" + tracks
    # released weights do not say how they were made
    config = result.get("config", {})
    if "out" in config:
        script = "pretrain_sep.py" if result["kind"] == "separator" else "finetune_cls.py"
        test = shlex.join([result["checkpoint"], f"--data={result['data']}",
                           f"--split={result['split']}",
                           f"--dtype={result.get('dtype', 'float32')}"])
        body += made_by([command_of(script, config), f"python eval.py {test}"], config)
    write(f"{base}.html", title, body, sound)


def run_page(path):
    """The page of a training run, from its .jsonl log as far as it is written."""
    base = path.removesuffix(".jsonl")
    with io.BytesIO() as f:
        report.draw_curves(path).savefig(f, dpi=report.DPI, format="png")
        body = f"<h1>{escape(base)}</h1><figure>{image(f.getvalue(), 'losses')}</figure>"
    with open(path, encoding="utf-8", errors="replace") as f:
        last = f.readlines()[-5:]
    body += f"<h2>Last lines of the log</h2><pre>{escape(''.join(last))}</pre>"
    for ending in (".pt", ".resume"):
        if os.path.exists(base + ending):
            saved = model.read_checkpoint(base + ending)
            script = "pretrain_sep.py" if saved["kind"] == "separator" else "finetune_cls.py"
            body += made_by([command_of(script, saved["config"])], saved["config"])
            break
    write(f"{base}_run.html", base, body)


# -----------------------------------------------------------------------------

def make(path):
    """The page of a folder of listen.py, of results, or of a log."""
    if os.path.isdir(path):
        found = glob.glob(os.path.join(glob.escape(path), "**", "listen.json"), recursive=True)
        if not found:
            raise ValueError(f"{path} holds no listen.json: it is not by listen.py")
        failed = []
        for marker in sorted(found):
            try:
                song_page(os.path.dirname(marker))
            except (ValueError, OSError) as e:      # one song must not stop the others
                failed.append(str(e))
        if failed:
            raise ValueError(f"{len(failed)} of {len(found)} songs have no page: {failed[0]}")
    elif path.endswith(".jsonl"):
        run_page(path)
    elif path.endswith(".json"):
        result_page(path)
    else:
        raise ValueError(f"{path} is not a folder of listen.py, a .json of results or a .jsonl log")


def main():
    _, paths = runtime.configure(globals(), configs=False)
    if not paths:
        runtime.die("name folders of listen.py, results or logs: python page.py listened/song")
    for path in paths:
        make(path)


if __name__ == "__main__":
    runtime.script(main)
