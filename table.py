"""
Trains and evaluates a whole table: rows x fractions of the labels x folds x seeds.

    python table.py config/table_v1.py                  # all rows of the paper, seeds 1 to 5
    python table.py config/table_v1.py --jobs=4         # four runs at a time share the cores
    python table.py config/table_v1.py --dry_run=True   # print the commands, for a cluster

Finished runs are skipped. Ctrl-C and SIGTERM let all runs save first; the same command resumes
them. When all are finished, or at once with --jobs=0, it writes OUT/table.md, .csv, .json and .png
from the results in OUT/runs/: mean and standard deviation over runs, and the paired difference to
each baseline with a 95 % interval over test clips and runs. `python -m reports.page OUT/table.json`
makes a page of them.
"""
import csv
import functools
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np

from common import files, metrics, settings
from common.device import AMP_DTYPES, cores
from common.run import FREE_KEYS, Stop, fingerprint
from common.settings import die
from data import Prepared
from reports.figures import draw, read_result

# -----------------------------------------------------------------------------
# settings
out = ""                # folder of the table; empty: results/<config>
separators = {}         # {name: arguments of pretrain_sep.py}
rows = {}               # {row: arguments of finetune_cls.py}; {NAME} is the checkpoint of a
                        # separator, or of another row with the same task, fold, labels and seed
tasks = {}              # {task: arguments of all its runs}
labels = {1.0: ""}      # {fraction of the labelled clips: arguments of all its runs}
folds = [-1]            # of a cross-validation; -1: the prepared split
seeds = [1, 2, 3, 4, 5]
baselines = ["scratch", "tail"]     # rows that the others are compared with
jobs = 1                # runs at a time; 0: only write the table of the finished ones
test_dtype = "float32"  # eval.py's dtype, for all runs
dry_run = False         # print the remaining commands, one line per run, and run nothing
bootstrap = 1000        # resamples for the intervals
seed = 1                # of the resamples
# -----------------------------------------------------------------------------

HERE = os.path.dirname(os.path.abspath(__file__))
STARTS = ("init", "tail")       # checkpoints to start from: their contents are compared


class Job(NamedTuple):
    """One run: training, then evaluation. Separators have no row and no cell."""
    name: str
    script: str
    arguments: list
    needs: list                 # names of the jobs whose checkpoints it starts from
    row: str = ""
    cell: tuple = ()            # (task, fraction of the labels, fold, seed)


# -----------------------------------------------------------------------------
# jobs

def path_of(name, ending):
    return os.path.join(out, "runs", name + ending)


def run_name(row, task, fraction, fold, number):
    of_fold = f"-fold{fold}" if fold >= 0 else ""
    of_labels = f"-labels{fraction:g}" if fraction < 1 else ""
    return f"{task}-{row}{of_labels}{of_fold}-seed{number}"


def parse(name, arguments, checkpoints=None):
    """Splits the arguments of a row, separator or task; {NAME} becomes a checkpoint."""
    try:    # split before formatting: a path may contain spaces
        parts = shlex.split(arguments + "")
        return [part.format(**checkpoints) for part in parts] if checkpoints else parts
    except (TypeError, KeyError, IndexError, ValueError, AttributeError) as e:
        die(f"{name}: {arguments!r} must be the arguments as for a shell, with names of separators "
            f"and rows in {{}}: {type(e).__name__}: {e}")


def plan():
    """All jobs, in an order in which each comes after those that it needs."""
    planned = [Job(name, "pretrain_sep.py", parse(name, arguments), [])
               for name, arguments in separators.items()]
    cells = itertools.product(seeds, folds, labels.items(), tasks.items())
    for number, fold, (fraction, fraction_args), (task, task_args) in cells:
        shared = parse(task, task_args) + parse(fraction, fraction_args)
        planned += cell_jobs((task, fraction, fold, number), shared)
    return planned


def cell_jobs(cell, shared):
    """The jobs of all rows in one cell of the table, ordered by what they need."""
    names = {row: run_name(row, *cell) for row in rows}
    known = names | {name: name for name in separators}
    paths = {name: path_of(job, ".pt") for name, job in known.items()}
    # last on the command line, so that no row can override them
    place = [f"--seed={cell[3]}", f"--label_fraction={cell[1]}", f"--fold={cell[2]}"]
    pending = []
    for row, row_args in rows.items():
        arguments = [*shared, *parse(row, row_args, paths), *place]
        needs = [known[name] for name in known if f"{{{name}}}" in row_args]
        pending.append(Job(names[row], "finetune_cls.py", arguments, needs, row, cell))

    ordered = []
    while pending:
        left = {job.name for job in pending}
        ready = [job for job in pending if not left & set(job.needs)]
        if not ready:
            die(f"rows that need each other: {', '.join(job.row for job in pending)}")
        ordered += ready
        pending = [job for job in pending if job not in ready]
    return ordered


def commands(job):
    """The command lines that train and evaluate, as lists without the interpreter."""
    path, how = path_of(job.name, ".pt"), []
    if os.path.exists(path_of(job.name, ".resume")):
        how = ["--resume=True"]
    elif os.path.exists(path) or os.path.exists(path_of(job.name, ".jsonl")):
        how = ["--overwrite=True"]          # stopped before it saved anything to resume from
    train = [job.script, *job.arguments, f"--out={path}", *how]
    test = ["eval.py", path, f"--data={settings_of(job)['data']}",
            f"--out={os.path.dirname(path)}", f"--dtype={test_dtype}", "--pictures=False",
            "--overwrite=True"]
    return train, test


def settings_of(job):
    script = os.path.join(HERE, job.script)
    return settings.configure({"__file__": script, "__doc__": ""}, job.arguments)[0]


def finished(job):
    """Whether a job has a result. Ends the script if the result does not belong to this table."""
    path = path_of(job.name, ".json")
    if not os.path.exists(path):
        return False
    result, kind = read_result(path), "classifier" if job.row else "separator"
    if (result["kind"], result.get("split")) != (kind, "test"):
        reason = f"it is not eval.py's result for the test split of a {kind}"
    elif result["dtype"] != test_dtype:
        reason = f"it was tested in {result['dtype']}, not {test_dtype}"
    else:
        then, now = result["config"], settings_of(job)
        reason = (changed_settings(then, now) or
                  changed_contents(then, now, kind, result["tested_on"]))
    if reason:
        die(f"{path} does not belong to this table: {reason}. Delete it to evaluate again, all "
            "files of that run to train again, or choose another --out")
    return True


def changed_settings(then, now):
    """The settings that differ between a finished run and now, as text."""
    changed = []
    for key in sorted(now.keys() - {*FREE_KEYS}):
        old, new = then.get(key), now[key]
        if key in STARTS and new.endswith(".pt"):       # the folder of the table may have moved
            old, new = os.path.basename(str(old)), os.path.basename(new)
        if old != new:
            changed.append(f"{key}: {old!r}, now {new!r}")
    return "; ".join(changed)


def changed_contents(then, now, kind, tested_on):
    """The checkpoint or data that has changed since a run started from it, as text."""
    for key, old in then.get("started_from", {}).items():
        if old and fingerprint(now[key]) not in ("", old):
            return f"{now[key]} has changed since"
    hashes = data_hashes(now["data"], kind, now.get("fold", -1))
    if hashes and hashes != (then.get("trained_on"), tested_on):
        return f"the splits or labels in {now['data']} have changed since"
    return ""


@functools.cache
def data_hashes(folder, kind, fold):
    """Hashes of the train and valid splits, and of the test split; None if there is no data."""
    if not os.path.exists(os.path.join(folder, "index.json")):
        return None
    prepared = Prepared(folder, "clips" if kind == "classifier" else "stems", fold)
    return prepared.trained_on(), prepared.hash_of("test")


# -----------------------------------------------------------------------------
# running

def start(command, job):
    """A process that runs one command of a job, on its share of the cores."""
    with open(path_of(job.name, ".log"), "a") as log:
        # in a new session: Ctrl-C reaches the process only once, through us
        return subprocess.Popen(
            [sys.executable, os.path.join(HERE, command[0]), *command[1:]],
            stdout=log, stderr=log, close_fds=False, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // jobs))})


def run_all(left):
    """Runs jobs, several at a time; returns the names of the failed ones."""
    waiting, running, failed, ended = list(left), [], [], 0
    stop, began = Stop(), time.time()
    while running or waiting:
        for job in list(waiting):           # in the order of plan()
            ready = all(os.path.exists(path_of(name, ".json")) for name in job.needs)
            if set(job.needs) & set(failed):
                waiting.remove(job)
                failed.append(job.name)
            elif ready and len(running) < jobs:
                waiting.remove(job)
                train, test = commands(job)
                running.append((job, start(train, job), [test]))
        time.sleep(0.2)
        if stop.asked:
            for _, process, _ in running:
                process.terminate()
            for _, process, _ in running:
                process.wait()
            die("stopped; the same command resumes")

        for entry in list(running):
            job, process, remaining = entry
            if (status := process.poll()) is None:
                continue
            running.remove(entry)
            if status == 0 and remaining:
                running.append((job, start(remaining[0], job), remaining[1:]))
                continue
            ended += 1
            left_s = (time.time() - began) / ended * (len(left) - ended)
            if status == 0:
                summary = headline(read_result(path_of(job.name, ".json")))
            else:
                summary = f"failed, see {path_of(job.name, '.log')}"
                failed.append(job.name)
            print(f"[{ended}/{len(left)}] {job.name}: {summary} | ETA {settings.clock(left_s)}",
                  flush=True)
    return failed


def headline(result):
    """The first metric of a result, as text."""
    if result["kind"] == "classifier":
        key, value = next(iter(result["metrics"].items()))
        return f"{key} {value:.4f}"
    medians = {source: kinds["model"]["SI-SDR"] for source, kinds in result["median"].items()}
    return "SI-SDR in dB: " + ", ".join(
        f"{source} {value:.2f}" for source, value in medians.items() if value is not None)


# -----------------------------------------------------------------------------
# the table, from the results of the runs

def load_run(name):
    """(result, {clips, targets, scores}) of a run."""
    path = path_of(name, ".json")
    try:
        with np.load(path_of(name, ".npz")) as saved:
            arrays = {key: saved[key] for key in ("clips", "targets", "scores")}
    except Exception as e:  # np.load raises errors of zipfile, zlib, pickle and its own
        die(f"{path_of(name, '.npz')} cannot be read ({type(e).__name__}: {e}): delete it and "
            f"{path} to evaluate again")
    return read_result(path), arrays


def check_tests(runs):
    """Ends the script if two runs on the same fold were tested on different clips or labels.

    runs: [(cell, (result, arrays))].
    """
    first = {}
    for cell, (_, arrays) in runs:
        first_cell, expected = first.setdefault(cell[2], (cell, arrays))
        if any(not np.array_equal(expected[key], arrays[key]) for key in ("clips", "targets")):
            die(f"the runs of {first_cell} and {cell} were tested on different clips or labels: "
                "delete the results of the older one to evaluate again")


def paired(runs, baseline):
    """[(fold, targets, scores, scores of the baseline)] of the cells that both have a run for."""
    both = [(cell, arrays, baseline[cell][1]) for cell, (_, arrays) in runs.items()
            if cell in baseline]
    return [(cell[2], a["targets"], a["scores"], b["scores"]) for cell, a, b in both]


def summarise(done):
    """[{task, labels, row, runs, metrics, chance, differences}] of finished jobs."""
    groups = {}
    for job in done:
        group = groups.setdefault(job.cell[:2], {})
        group.setdefault(job.row, {})[job.cell] = load_run(job.name)
    table = []
    for (task, fraction), by_row in groups.items():
        check_tests([run for runs in by_row.values() for run in runs.items()])
        for row, runs in by_row.items():
            first = next(iter(runs.values()))[0]
            tags = "ROC-AUC" in first["metrics"]
            measure = metrics.tag_metrics if tags else metrics.genre_metrics
            values = [measure(arrays["targets"], arrays["scores"]) for _, arrays in runs.values()]
            keys = [key for key in values[0] if key != "tags used"]
            entry = {"task": task, "labels": fraction, "row": row, "runs": len(runs),
                     "metrics": {key: [float(one[key][0]) for one in values] for key in keys},
                     "chance": first["chance"], "differences": {}}
            for base in [base for base in baselines if base != row]:
                pairs = paired(runs, by_row.get(base, {}))
                if pairs:
                    entry["differences"][base] = metrics.paired_interval(
                        measure, pairs, bootstrap, seed)
            table.append(entry)
    return table


def as_text(table):
    """Markdown: one table per task and fraction of the labels."""
    lines = []
    for task, fraction in dict.fromkeys((entry["task"], entry["labels"]) for entry in table):
        entries = [e for e in table if (e["task"], e["labels"]) == (task, fraction)]
        keys = list(entries[0]["metrics"])[:2]
        columns = [(base, key) for base in baselines for key in keys]
        heads = ["row", "runs", *keys, *(f"{key} minus {base}" for base, key in columns)]
        lines += [f"**{task}, {100 * fraction:g} % of the labels**", "",
                  "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for entry in entries:
            cells = [metrics.mean_and_std(entry["metrics"][key]) for key in keys]
            cells += [metrics.difference(entry["differences"].get(base, {}).get(key))
                      for base, key in columns]
            lines.append(f"| {entry['row']} | {entry['runs']} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def write_csv(table, path):
    """One line per task, fraction of the labels, row and metric."""
    heads = ["task", "labels", "row", "metric", "runs", "mean", "std"]
    for base in baselines:
        heads += [f"minus {base}{what}" for what in ("", ": low", ": high", ": pairs")]
    with files.atomic(path, "w", encoding="utf-8", newline="") as f:
        lines = csv.writer(f)
        lines.writerow(heads)
        for entry in table:
            for key, values in entry["metrics"].items():
                spread = np.std(values, ddof=1) if len(values) > 1 else ""
                cells = [entry["task"], entry["labels"], entry["row"], key, len(values),
                         np.mean(values), spread]
                for base in baselines:
                    interval = entry["differences"].get(base, {}).get(key)
                    cells += [*interval[:3], len(interval[3])] if interval else [""] * 4
                lines.writerow(cells)


# -----------------------------------------------------------------------------

def check_settings(config):
    if not rows or not tasks:
        die("a table needs rows and tasks: name a config file, such as config/table_v1.py")
    settings.check_numbers(config | {"labels": list(labels)}, "labels")
    settings.within(0, 1, labels=max(labels, default=1))
    settings.at_least(0, jobs=jobs)
    settings.choose("test_dtype", test_dtype, AMP_DTYPES)
    settings.at_least(1, bootstrap=bootstrap)
    settings.at_least(-1, folds=min(folds, default=-1))
    for key, values in (("seeds", seeds), ("folds", folds)):
        if not values or len(set(values)) < len(values):
            die(f"{key} must be different numbers, got {values}")
    if not set(baselines) <= {*rows, "scratch", "tail"}:
        die(f"baselines {', '.join(baselines)} must be some of the rows {', '.join(rows)}")
    for name in separators | rows | tasks:
        if type(name) is not str or not name.replace("_", "").replace("+", "").isalnum():
            die(f"{name!r} becomes part of a file name: use letters, digits and _")


def main():
    global out
    config, names = settings.configure(globals())
    out = out or os.path.join("results", "_".join(names))
    check_settings(config)
    planned = plan()
    left = [job for job in planned if not finished(job)]
    if dry_run:
        for job in left:
            print(" && ".join("python " + shlex.join(command) for command in commands(job)))
        return

    failed = []
    if jobs and left:
        os.makedirs(os.path.join(out, "runs"), exist_ok=True)
        files.lock(os.path.join(out, ".lock"), out)         # the runs inherit it
        print(f"{len(planned)} runs, {len(planned) - len(left)} are finished; {jobs} at a time")
        failed = run_all(left)
    done = [job for job in planned if job.row and finished(job)]
    if not done:
        die(f"no run is finished in {out}")
    commits = {read_result(path_of(job.name, ".json"))["commit"] for job in done}
    if len(commits) > 1:
        print(f"note: these runs were made by {len(commits)} versions of this code")
    table, base = summarise(done), os.path.join(out, "table")
    text = as_text(table)
    result = {"kind": "table", "checkpoint": "", "baselines": baselines, "entries": table}
    files.write_atomically(text, f"{base}.md")
    files.write_atomically(json.dumps(result, indent=1), f"{base}.json")
    write_csv(table, f"{base}.csv")
    print(f"\n{text}\nmean ± standard deviation over runs; differences are paired, with 95 % "
          f"intervals over test clips and runs; {base}.md, .csv, .json")
    draw(f"{base}.json")
    if failed:
        die(f"{len(failed)} of {len(left)} runs failed: {', '.join(failed[:9])}; the same command "
            "tries them again")


if __name__ == "__main__":
    settings.script(main)
