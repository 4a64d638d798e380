"""
Runs a whole table, rows x label fractions x folds x seeds, and says which row is better.

    python table.py config/table_v1.py                # all rows of the paper, seeds 1 to 5
    python table.py config/table_v1.py --jobs=4       # four runs at a time, the cores divided
    python table.py config/table_v1.py --print=True   # one line per run instead, for a cluster

Runs what is missing, and skips what is finished. Ctrl-C and SIGTERM let every run save first. The
same command goes on from there. Then, and with --jobs=0 at once, it writes OUT/table.md, .csv,
.json and .png from the results of the runs alone: mean and standard deviation over the runs, and
the paired difference to each baseline with a 95 % interval over test clips and runs.

OUT/runs/ holds the checkpoint, log, printed text and results of each run, under its name.
"""
import csv
import functools
import json
import os
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np

import metrics
import page
import runtime
import training
from data import Prepared
from report import draw, read_result
from runtime import die

say = print             # below, print is a setting

# -----------------------------------------------------------------------------
# settings
out = ""                # folder of the table; empty: results/<config>
separators = {}         # {name: arguments of pretrain_sep.py}
rows = {}               # {row: arguments of finetune_cls.py}; {NAME} is the checkpoint of a
                        # separator, or of another row with the same task, fold, labels and seed
tasks = {}              # {task: arguments of all its runs}
labels = {1.0: ""}      # {share of the labelled clips: arguments of all its runs}
folds = [-1]            # of a cross-validation; -1: the prepared split
seeds = [1, 2, 3, 4, 5]
baselines = ["scratch", "tail"]     # rows that the others are compared with
jobs = 1                # runs at a time; 0: only the table of what is finished
test_dtype = "float32"  # eval.py's dtype, for all runs
report = False          # also write a page with table and pictures
print = False           # print the commands that are left, one line per run, and run nothing
bootstrap = 1000        # resamples for the intervals
seed = 1                # of the resamples
# -----------------------------------------------------------------------------

HERE = os.path.dirname(os.path.abspath(__file__))
# settings that do not change what comes out; of data and .pt files the hash is compared instead
FREE = ("out", "resume", "overwrite", "data", "device", "compile", "log_every", "workers",
        "data_on_gpu", "cuda_graph", "report", "track")
HASHED = ("init", "tail")


class Job(NamedTuple):
    """One line of work: train, then evaluate. A separator has no row."""
    name: str
    script: str
    arguments: list
    needs: list                 # names of the jobs whose checkpoints it starts from
    row: str = ""
    cell: tuple = ()            # (task, share of labels, fold, seed)


# -----------------------------------------------------------------------------
# what there is to run

def checkpoint_of(name):
    return os.path.join(out, "runs", f"{name}.pt")


def result_of(name):
    return os.path.join(out, "runs", f"{name}.json")


def run_name(row, task, share, fold, number):
    of_fold = f"-fold{fold}" if fold >= 0 else ""
    of_labels = f"-labels{share:g}" if share < 1 else ""
    return f"{task}-{row}{of_labels}{of_fold}-seed{number}"


def plan():
    """All jobs, such that what one needs comes before it; whole cells one after the other."""
    found = [Job(name, "pretrain_sep.py", shlex.split(arguments), [])
             for name, arguments in separators.items()]
    for number in seeds:
        for fold in folds:
            for share, of_share in labels.items():
                for task, of_task in tasks.items():
                    of_all = [*shlex.split(of_task), *shlex.split(of_share)]
                    found += cell_jobs((task, share, fold, number), of_all)
    return found


def cell_jobs(cell, of_all):
    """The jobs of all rows in a cell of the table; what one needs comes before it."""
    task, share, fold, number = cell
    names = {row: run_name(row, *cell) for row in rows}
    known = names | {name: name for name in separators}     # a row may be called like a separator
    paths = {name: checkpoint_of(job) for name, job in known.items()}
    # these stand last: no row can leave its cell
    place = [f"--seed={number}", f"--label_fraction={share}", f"--fold={fold}"]
    found = []
    for row, of_row in rows.items():
        needs = [known[name] for name in known if f"{{{name}}}" in of_row]
        try:    # in this order: a path may have spaces
            arguments = [part.format(**paths) for part in shlex.split(of_row)]
        except (KeyError, IndexError, ValueError, AttributeError) as e:
            die(f"rows: {row}: {of_row!r} cannot be read ({e}): names in {{}} are those of "
                "separators and rows")
        arguments = of_all + arguments + place
        found.append(Job(names[row], "finetune_cls.py", arguments, needs, row, cell))

    # rows that start from others come behind them
    ordered = []
    while found:
        left = {job.name for job in found}
        ready = [job for job in found if not left & set(job.needs)]
        if not ready:
            die(f"rows that need each other can never begin: {', '.join(j.row for j in found)}")
        ordered += ready
        found = [job for job in found if job not in ready]
    return ordered


def commands(job):
    """The two command lines of a job, as lists, without Python itself."""
    path = checkpoint_of(job.name)
    begun = [path.removesuffix(".pt") + ending for ending in (".resume", ".jsonl", ".pt")]
    how = []
    if os.path.exists(begun[0]):
        how = ["--resume=True"]
    elif any(map(os.path.exists, begun)):
        how = ["--overwrite=True"]      # stopped before anything was saved
    train = [job.script, *job.arguments, f"--out={path}", *how]
    test = ["eval.py", path, f"--data={settings_of(job)['data']}",
            f"--out={os.path.dirname(path)}", "--pictures=False", "--overwrite=True"]
    if test_dtype != "float32":
        test.append(f"--dtype={test_dtype}")
    return train, test


def settings_of(job):
    script = os.path.join(HERE, job.script)
    return runtime.configure({"__file__": script, "__doc__": ""}, job.arguments)[0]


def finished(job):
    """Whether a job has its results. Ends the script if they do not belong in this table."""
    path = result_of(job.name)
    if not os.path.exists(path):
        return False
    result, kind = read_result(path), "classifier" if job.row else "separator"
    if not isinstance(result, dict) or (result["kind"], result.get("split")) != (kind, "test"):
        die(f"{path} is not what eval.py writes for the test split of a {kind}: delete it")
    then = runtime.defaults(os.path.join(HERE, job.script)) | result["config"]
    now = settings_of(job)
    wrong = other_settings(then, now) or other_contents(then, now, kind, result.get("tested_on"))
    tested_in = result.get("dtype", "float32")
    if not wrong and tested_in != test_dtype:
        die(f"{path} was tested in {tested_in}, not {test_dtype}: delete it, and the same command "
            "tests the run again")
    if wrong:
        die(f"{path} was made with other settings ({wrong}): delete the files of that run, and it "
            "is made again; or choose another --out")
    return True


def other_settings(then, now):
    """Which settings of a finished run are not those of today, in words."""
    changed = []
    for key in [key for key in now if key not in FREE]:
        old, new = then[key], now[key]
        if key in HASHED and new.endswith(".pt"):   # the folder of the table may have moved
            old, new = os.path.basename(old), os.path.basename(new)
        if old != new:
            changed.append(f"{key}: {old!r}, now {new!r}")
    return "; ".join(changed)


def other_contents(then, now, kind, tested_on):
    """Which files and data of a finished run are there, but are others today, in words."""
    for key, what in then.get("started_from", {}).items():
        if what and training.fingerprint(now[key]) not in ("", what):
            return f"{now[key]} is another file now"
    hashes = data_hashes(now["data"], kind, now.get("fold", -1))
    # older results do not say what they were tested on
    if hashes and hashes != (then.get("trained_on"), tested_on or hashes[1]):
        return f"the splits or labels in {now['data']} are others now"
    return ""


@functools.cache
def data_hashes(folder, kind, fold):
    """The hashes of what training and testing see in a prepared folder; None if it is not there."""
    if not os.path.exists(os.path.join(folder, "index.json")):
        return None
    prepared = Prepared(folder, "clips" if kind == "classifier" else "stems", fold)
    return prepared.trained_on(), prepared.hash_of("test")


# -----------------------------------------------------------------------------
# running

def start(command, job):
    """A process that runs one command of a job, with its share of the cores."""
    threads = max(1, runtime.cores() // jobs)
    with open(checkpoint_of(job.name).removesuffix(".pt") + ".log", "a") as printed:
        # in a session of its own, or it would be told twice of a Ctrl-C
        return subprocess.Popen(
            [sys.executable, os.path.join(HERE, command[0]), *command[1:]],
            stdout=printed, stderr=printed, close_fds=False, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def run_all(left):
    """Runs jobs, several at a time; returns the names of those that failed."""
    waiting, running, failed, ended = list(left), [], [], 0
    stop, began = runtime.Stop(), time.time()
    while running or waiting:
        for job in list(waiting):           # each comes behind what it needs
            if set(job.needs) & set(failed):
                waiting.remove(job)
                failed.append(job.name)
            elif len(running) < jobs and all(os.path.exists(result_of(n)) for n in job.needs):
                waiting.remove(job)
                train, test = commands(job)
                running.append((job, start(train, job), [test]))
        time.sleep(0.2)
        if stop.asked:
            for _, process, _ in running:
                process.terminate()
            for _, process, _ in running:
                process.wait()
            die("stopped; the same command goes on from there")

        # what has ended goes on with its next command, or is done
        for entry in list(running):
            job, process, more = entry
            status = process.poll()
            if status is None:
                continue
            running.remove(entry)
            if status == 0 and more:
                running.append((job, start(more[0], job), more[1:]))
                continue
            ended += 1
            left_s = (time.time() - began) / ended * (len(left) - ended)
            what = f"failed, see {checkpoint_of(job.name).removesuffix('.pt')}.log"
            if status == 0:
                what = headline(read_result(result_of(job.name)))
            else:
                failed.append(job.name)
            say(f"[{ended}/{len(left)}] {job.name}: {what} | ETA {runtime.clock(left_s)}",
                flush=True)
    return failed


def headline(result):
    """The first number of a result, in words."""
    if result["kind"] == "classifier":
        key, value = next(iter(result["metrics"].items()))
        return f"{key} {value:.4f}"
    medians = {source: of["model"]["SI-SDR"] for source, of in result["median"].items()}
    known = [f"{source} {value:.2f}" for source, value in medians.items() if value is not None]
    return "SI-SDR in dB: " + ", ".join(known)


# -----------------------------------------------------------------------------
# the table, from the files of the runs alone

def load_run(name):
    """(result, {clips, targets, scores}) of a run."""
    path = result_of(name).removesuffix(".json") + ".npz"
    try:
        with np.load(path) as saved:
            scored = {key: saved[key] for key in ("clips", "targets", "scores")}
    except Exception as e:  # np.load has no error type of its own: zip, zlib, pickle
        die(f"{path} cannot be read ({type(e).__name__}: {e}): delete it and {result_of(name)}, "
            "and the same command makes them again")
    return read_result(result_of(name)), scored


def check_tests(runs):
    """Ends the script if two of {cell: (result, scores)} differ in the clips of the same fold."""
    seen = {}
    for cell, (_, scored) in runs:
        first_cell, first = seen.setdefault(cell[2], (cell, scored))
        for key in ("clips", "targets"):
            if not np.array_equal(first[key], scored[key]):
                die(f"the runs of {first_cell} and {cell} were tested on other clips or labels: "
                    "delete the older ones, and run them again")


def paired(runs, baseline):
    """The test set, targets and both runs' scores of each cell in which both have a run."""
    both = [(cell, scored, baseline[cell][1]) for cell, (_, scored) in runs.items()
            if cell in baseline]
    return [(cell[2], one["targets"], one["scores"], other["scores"]) for cell, one, other in both]


def summarise(done):
    """[{task, labels, row, runs, metrics, floor, differences}] of finished jobs."""
    groups = {}
    for job in done:
        task, share = job.cell[:2]
        groups.setdefault((task, share), {}).setdefault(job.row, {})[job.cell] = load_run(job.name)
    table = []
    for (task, share), of_rows in groups.items():
        check_tests([run for runs in of_rows.values() for run in runs.items()])
        for row, runs in of_rows.items():
            first = next(iter(runs.values()))[0]
            measure = metrics.genre_metrics
            if "ROC-AUC" in first["metrics"]:
                measure = metrics.tag_metrics
            found = [measure(scored["targets"], scored["scores"]) for _, scored in runs.values()]
            keys = [key for key in found[0] if key != "tags used"]
            entry = {"task": task, "labels": share, "row": row, "runs": len(runs),
                     "metrics": {key: [float(one[key][0]) for one in found] for key in keys},
                     "floor": first["floor"], "differences": {}}
            for base in baselines:
                pairs = paired(runs, of_rows.get(base, {}))
                if row != base and pairs:
                    entry["differences"][base] = metrics.paired_interval(
                        measure, pairs, bootstrap, seed)
            table.append(entry)
    return table


def as_text(table):
    """Markdown: one table per task and share of the labels."""
    lines = []
    for task, share in dict.fromkeys((entry["task"], entry["labels"]) for entry in table):
        entries = [e for e in table if (e["task"], e["labels"]) == (task, share)]
        keys = list(entries[0]["metrics"])[:2]
        heads = [f"{key} minus {base}" for base in baselines for key in keys]
        lines += [f"**{task}, {100 * share:g} % of the labels**", "",
                  "| row | runs | " + " | ".join(keys + heads) + " |",
                  "|---|" + "---|" * (1 + len(keys) + len(heads))]
        for entry in entries:
            cells = [metrics.mean_and_spread(entry["metrics"][key]) for key in keys]
            for base in baselines:
                for key in keys:
                    found = entry["differences"].get(base, {}).get(key)
                    cells.append(metrics.difference(found))
            lines.append(f"| {entry['row']} | {entry['runs']} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def write_csv(table, path):
    """One line per task, share of the labels, row and metric."""
    heads = ["task", "labels", "row", "metric", "runs", "mean", "std"]
    for base in baselines:
        heads += [f"minus {base}", f"minus {base}: low", f"minus {base}: high",
                  f"minus {base}: pairs"]
    with runtime.atomic(path, "w", encoding="utf-8", newline="") as f:
        lines = csv.writer(f)
        lines.writerow(heads)
        for entry in table:
            for key, values in entry["metrics"].items():
                spread = np.std(values, ddof=1) if len(values) > 1 else ""
                cells = [entry["task"], entry["labels"], entry["row"], key, len(values),
                         np.mean(values), spread]
                for base in baselines:
                    found = entry["differences"].get(base, {}).get(key)
                    cells += [*found[:3], len(found[3])] if found else [""] * 4
                lines.writerow(cells)


# -----------------------------------------------------------------------------

def check_arguments(what, arguments):
    if type(arguments) is not str:
        die(f"{what!r}: its arguments must be one text, as for a shell, got {arguments!r}")


def check_settings(config):
    if not rows or not tasks:
        die("a table needs rows and tasks: name a config file, such as config/table_v1.py")
    runtime.check_numbers(config)
    runtime.at_least(0, jobs=jobs)
    runtime.choose("test_dtype", test_dtype, runtime.AMP_DTYPES)
    runtime.at_least(1, bootstrap=bootstrap)
    runtime.at_least(-1, **{f"folds ({fold})": fold for fold in folds})
    for key, values in (("seeds", seeds), ("folds", folds)):
        if not values or len(set(values)) < len(values):
            die(f"{key} must be different numbers, got {values}")
    for base in baselines:
        if base not in rows and baselines != ["scratch", "tail"]:
            die(f"baselines: {base!r} is not one of the rows {', '.join(map(str, rows))}")
    for what, arguments in (separators | rows | tasks).items():
        if type(what) is not str or not what.replace("_", "").replace("+", "").isalnum():
            die(f"{what!r} becomes part of a file's name: use letters, digits and _")
        check_arguments(what, arguments)
    for share, arguments in labels.items():
        check_arguments(share, arguments)
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            die(f"labels must be {{share: arguments}} with shares above 0 and up to 1, got {share}")


def main():
    global out
    config, names = runtime.configure(globals())
    out = out or os.path.join("results", "_".join(names))
    check_settings(config)
    everything = plan()
    left = [job for job in everything if not finished(job)]
    if print:
        for job in left:
            say(" && ".join("python " + shlex.join(command) for command in commands(job)))
        return 0

    failed = []
    if jobs and left:
        os.makedirs(os.path.join(out, "runs"), exist_ok=True)
        runtime.hold(out)
        say(f"{len(everything)} runs, {len(everything) - len(left)} are finished; {jobs} at a time")
        failed = run_all(left)
    done = [job for job in everything if job.row and finished(job)]
    if not done:
        die(f"no run is finished in {out}")
    commits = {read_result(result_of(job.name)).get("commit") for job in done}
    if len(commits) > 1:
        say(f"note: these runs were made by {len(commits)} versions of this code")
    table = summarise(done)
    text, base = as_text(table), os.path.join(out, "table")
    whole = {"kind": "table", "checkpoint": "", "baselines": baselines, "entries": table}
    runtime.write_atomically(text, f"{base}.md")
    runtime.write_atomically(json.dumps(whole, indent=1), f"{base}.json")
    write_csv(table, f"{base}.csv")
    say(f"\n{text}\nmean ± standard deviation over runs; differences are paired, with a 95 % "
        f"interval over clips and runs; {base}.md, .csv, .json")
    draw(f"{base}.json")
    if report:
        page.result_page(f"{base}.json")
    if failed:
        more = ", ..." if len(failed) > 3 else ""
        die(f"{len(failed)} of {len(left)} runs failed: {', '.join(failed[:3])}{more}; the same "
            "command tries them again")
    return 0


if __name__ == "__main__":
    runtime.script(main)
