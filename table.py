"""
Trains and evaluates a whole table: rows x fractions of the labels x folds x seeds.

    python table.py config/table_v1.py                  # all rows of the paper, seeds 1 to 5
    python table.py config/table_v1.py --jobs=4         # four runs at a time share the cores
    python table.py config/table_v1.py --dry_run=True   # print the commands, for a cluster

Finished runs are skipped. Ctrl-C and SIGTERM let all runs save first; the same command resumes
them. Then, or at once with --jobs=0, it writes OUT/table.md, .csv, .json and .png from the results
in OUT/runs/: mean and standard deviation over runs, and the paired difference to each baseline with
a 95 % interval over test clips and runs. `python -m reports.page OUT/table.json` makes a page.
"""
import csv
import functools
import graphlib
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


class Job(NamedTuple):
    """One run: training, then evaluation. Separators have no row and no cell."""
    name: str
    script: str
    arguments: list
    needs: list                 # names of the jobs whose checkpoints it starts from
    row: str = ""
    cell: tuple = ()            # (task, fraction of the labels, fold, seed)


def path_of(name, ending):
    return os.path.join(out, "runs", name + ending)


def run_name(row, task, fraction, fold, number):
    of_fold = f"-fold{fold}" if fold >= 0 else ""
    of_labels = f"-labels{fraction:g}" if fraction < 1 else ""
    return f"{task}-{row}{of_labels}{of_fold}-seed{number}"


def parse(name, arguments, checkpoints=None):
    """Splits the arguments of a row, separator or task; {NAME} becomes a checkpoint."""
    try:    # split before formatting, as paths may contain spaces; + "" refuses None
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
    """The jobs of all rows in one cell, in the order of their needs; ValueError for a cycle."""
    names = {row: run_name(row, *cell) for row in rows}
    known = names | {name: name for name in separators}
    paths = {name: path_of(job, ".pt") for name, job in known.items()}
    # last on the command line, so that no row can override them
    place = [f"--seed={cell[3]}", f"--label_fraction={cell[1]}", f"--fold={cell[2]}"]
    found, graph = {}, graphlib.TopologicalSorter()
    for row, row_args in rows.items():
        arguments = [*shared, *parse(row, row_args, paths), *place]
        needs = [known[name] for name in known if f"{{{name}}}" in row_args]
        found[names[row]] = Job(names[row], "finetune_cls.py", arguments, needs, row, cell)
        graph.add(names[row], *(name for name in needs if name in names.values()))
    return [found[name] for name in graph.static_order()]


def commands(job):
    """The command lines that train and evaluate, as lists without the interpreter."""
    path, flags = path_of(job.name, ".pt"), []
    if os.path.exists(path_of(job.name, ".resume")):
        flags = ["--resume=True"]
    elif os.path.exists(path) or os.path.exists(path_of(job.name, ".jsonl")):
        flags = ["--overwrite=True"]        # stopped before it saved anything to resume from
    train = [job.script, *job.arguments, f"--out={path}", *flags]
    test = ["eval.py", path, f"--data={settings_of(job)['data']}",
            f"--out={os.path.dirname(path)}", f"--dtype={test_dtype}", "--pictures=False",
            "--overwrite=True"]
    return train, test


def settings_of(job):
    script = os.path.join(HERE, job.script)
    return settings.configure({"__file__": script, "__doc__": ""}, job.arguments)[0]


def finished(job):
    """The result of a job, or None. Exits if the result does not belong to this table."""
    path = path_of(job.name, ".json")
    if not os.path.exists(path):
        return None
    result = read_result(path)
    changed = changes(job, result)
    if changed:
        die(f"{path} does not belong to this table: {'; '.join(changed)}. Delete it to evaluate "
            "again, all files of that run to train again, or choose another --out")
    return result


def changes(job, result):
    """What differs between a result and what this table would compute now, as a list of texts."""
    kind = "classifier" if job.row else "separator"
    expected = kind, "test", test_dtype
    actual = result["kind"], result.get("split"), result.get("dtype")
    if actual != expected:
        return [f"kind, split and dtype are {actual}, now {expected}"]
    then, now, changed = result["config"], settings_of(job), []
    for key in sorted(now.keys() - {*FREE_KEYS}):
        old, new = then.get(key), now[key]
        if key in ("init", "tail") and new.endswith(".pt"):  # may have moved
            old, new = os.path.basename(str(old)), os.path.basename(new)
        if old != new:
            changed.append(f"{key}: {old!r}, now {new!r}")
    for key, old in then.get("started_from", {}).items():
        if old and fingerprint(now[key]) not in ("", old):
            changed.append(f"{now[key]} has changed since")
    hashes = data_hashes(now["data"], kind, now.get("fold", -1))
    if hashes and hashes != (then.get("trained_on"), result["tested_on"]):
        changed.append(f"the splits or labels in {now['data']} have changed since")
    return changed


@functools.cache
def data_hashes(folder, kind, fold):
    """Hashes of the train and valid splits, and of the test split; None if there is no data."""
    if not os.path.exists(os.path.join(folder, "index.json")):
        return None
    prepared = Prepared(folder, "clips" if kind == "classifier" else "stems", fold)
    return prepared.trained_on(), prepared.hash_of("test")


def start(command, job):
    """A process that runs one command of a job, on its share of the cores."""
    with open(path_of(job.name, ".log"), "a") as log:
        # in a new session, so that Ctrl-C reaches the process only once, through run_all()
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
                running.append((job, start(train, job), test))
        time.sleep(0.2)
        if stop.asked:
            for _, process, _ in running:
                process.terminate()
            for _, process, _ in running:
                process.wait()
            die("stopped; the same command resumes")

        for job, process, test in [entry for entry in running if entry[1].poll() is not None]:
            running.remove((job, process, test))
            if process.returncode == 0 and test:
                running.append((job, start(test, job), None))
                continue
            ended += 1
            left_s = (time.time() - began) / ended * (len(left) - ended)
            if process.returncode == 0:
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


def load_scores(name):
    """{clips, targets, scores} of a run."""
    path = path_of(name, ".npz")
    try:
        with np.load(path) as saved:
            return {key: saved[key] for key in ("clips", "targets", "scores")}
    except Exception as e:  # np.load raises errors of zipfile, zlib, pickle and its own
        die(f"{path} cannot be read ({type(e).__name__}: {e}): delete it and {name}.json to "
            "evaluate again")


def summarise(done):
    """[{task, labels, row, runs, metrics, chance, differences}] of [(finished job, result)]."""
    groups, tests = {}, {}
    for job, result in done:
        arrays = load_scores(job.name)
        first, expected = tests.setdefault(job.cell[:3], (job.name, arrays))
        if any(not np.array_equal(expected[key], arrays[key]) for key in ("clips", "targets")):
            die(f"{first} and {job.name} were tested on different clips or labels: delete the "
                "results of the older one to evaluate again")
        group = groups.setdefault(job.cell[:2], {})
        group.setdefault(job.row, {})[job.cell] = result, arrays
    table = []
    for (task, fraction), by_row in groups.items():
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
                others = by_row.get(base, {})
                pairs = [(cell[2], a["targets"], a["scores"], others[cell][1]["scores"])
                         for cell, (_, a) in runs.items() if cell in others]
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


def check_settings(config):
    settings.check_numbers(config | {"labels": list(labels)}, "labels")
    settings.within(0, 1, labels=max(labels, default=1))
    settings.at_least(0, jobs=jobs)
    settings.choose("test_dtype", test_dtype, AMP_DTYPES)
    settings.at_least(1, bootstrap=bootstrap)
    settings.at_least(-1, folds=min(folds, default=-1))
    for base in baselines if baselines != ["scratch", "tail"] else []:
        settings.choose("baselines", base, rows)
    for key, values in (("seeds", seeds), ("folds", folds)):
        if not values or len(set(values)) < len(values):
            die(f"{key} must be different numbers, got {values}")
    wrong = [name for name in separators | rows | tasks     # they are parts of file names
             if type(name) is not str or not name.replace("_", "").replace("+", "").isalnum()]
    if wrong or not rows or not tasks:
        die(f"a table needs rows and tasks, named by letters, digits, + and _ (not {wrong}): name "
            "a config file, such as config/table_v1.py")


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
    done = [(job, result) for job in planned if job.row and (result := finished(job))]
    if not done:
        die(f"no run is finished in {out}")
    commits = {result["commit"] for _, result in done}
    if len(commits) > 1:
        print(f"note: these runs come from {len(commits)} commits of this repository")
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
