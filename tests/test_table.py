"""
The table over rows, label fractions and seeds: runs, goes on, and is made from files alone.

    python -m pytest -q tests/test_table.py
"""
import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import CLS, ROOT, SEP, run
from sklearn import metrics as sk

import runtime
import table

CONFIG = """
separators = {{"vocals": "config/vocals.py --data={demo}/demo_songs --steps=2 {sep}"}}
tasks = {{"tags": "config/mtat.py --data={demo}/demo_clips {cls}"}}
rows = {{
    "tail": "config/tail.py",
    "joined": "--init={{vocals}} --variant=v3 --tail={{tail}}",
}}
labels = {{0.5: "--epochs=1"}}
seeds = [1, 2]
bootstrap = 50
"""


@pytest.fixture(scope="module")
def config(demo, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "small.py"
    sep, cls = (" ".join(f"'{a}'" for a in args) for args in (SEP, CLS))
    path.write_text(CONFIG.format(demo=demo, sep=sep.replace('"', ""), cls=cls))
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of a table that ran through, and what was printed."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(["table.py"], config, f"--out={out}", "--jobs=2")


def results(out):
    return {path.stem: json.loads(path.read_text()) for path in (out / "runs").glob("*.json")}


def test_a_table_holds_every_row(whole):
    out, said = whole
    assert len(results(out)) == 1 + 2 * 2 and "[5/5]" in said
    text = (out / "table.md").read_text()
    assert text.count("\n| ") == 3 and text.strip() in said
    assert (out / "table.png").read_bytes()[:4] == b"\x89PNG"
    half = results(out)["tags-joined-labels0.5-seed2"]
    assert half["config"]["label_fraction"] == 0.5 and half["config"]["epochs"] == 1
    assert half["config"]["tail"].endswith("tags-tail-labels0.5-seed2.pt")


def test_its_numbers_are_those_of_the_clips(whole):
    out, _ = whole
    aucs = {}
    for row in ("joined", "tail"):
        for seed in (1, 2):
            saved = np.load(out / "runs" / f"tags-{row}-labels0.5-seed{seed}.npz")
            truth = saved["targets"]
            used = (truth.sum(0) > 0) & (truth.sum(0) < len(truth))
            aucs.setdefault(row, []).append(
                sk.roc_auc_score(truth[:, used], saved["scores"][:, used]))
    with open(out / "table.csv", newline="") as f:
        lines = [line for line in csv.DictReader(f) if line["row"] == "joined"
                 and line["metric"] == "ROC-AUC"]
    assert len(lines) == 1 and lines[0]["runs"] == lines[0]["minus tail: pairs"] == "2"
    assert float(lines[0]["mean"]) == pytest.approx(np.mean(aucs["joined"]))
    assert float(lines[0]["std"]) == pytest.approx(np.std(aucs["joined"], ddof=1))
    gain = np.mean(aucs["joined"]) - np.mean(aucs["tail"])
    assert float(lines[0]["minus tail"]) == pytest.approx(gain)
    assert float(lines[0]["minus tail: low"]) <= gain <= float(lines[0]["minus tail: high"])


def test_what_is_finished_is_not_run_again(whole, config):
    out, _ = whole
    before = {path: path.stat().st_mtime for path in (out / "runs").iterdir()}
    text = (out / "table.md").read_text()
    assert "[1/" not in run(["table.py"], config, f"--out={out}")
    assert before == {path: path.stat().st_mtime for path in (out / "runs").iterdir()}
    assert (out / "table.md").read_text() == text


def test_it_needs_the_results_of_the_runs_only(whole, config, tmp_path):
    (tmp_path / "runs").mkdir()
    for path in (whole[0] / "runs").iterdir():
        if path.suffix in (".json", ".npz"):
            (tmp_path / "runs" / path.name).write_bytes(path.read_bytes())
    run("table.py", config, f"--out={tmp_path}", "--jobs=0")
    assert (tmp_path / "table.csv").read_text() == (whole[0] / "table.csv").read_text()


def test_results_of_other_settings_are_refused(whole, config):
    said = run("table.py", config, f"--out={whole[0]}", "--labels={0.5: '--epochs=3'}", ok=False)
    assert "other settings (epochs: 1, now 3)" in said


def changed(path, change):
    result = json.loads(path.read_text())
    change(result)
    path.write_text(json.dumps(result))


def other_clips(path):
    saved = dict(np.load(path))
    np.savez(path, **{**saved, "clips": saved["clips"][::-1]})


NAME = "tags-joined-labels0.5-seed2"


@pytest.mark.parametrize("ending, change, message", [
    ("json", lambda r: r["config"].update(trained_on="x"), "splits or labels in"),
    ("json", lambda r: r.update(tested_on="x"), "splits or labels in"),
    ("json", lambda r: r["config"]["started_from"].update(init="x"), "is another file now"),
    ("json", lambda r: r.update(split="valid"), "is not what eval.py writes for the test split"),
    ("npz", lambda path: path.write_bytes(b"PK"), "cannot be read"),
    ("npz", other_clips, "were tested on other clips or labels")])
def test_results_that_do_not_belong_here_are_refused(
        whole, config, tmp_path, ending, change, message):
    (tmp_path / "runs").mkdir()
    for path in (whole[0] / "runs").iterdir():
        if path.suffix in (".json", ".npz", ".pt"):
            (tmp_path / "runs" / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "runs" / f"{NAME}.{ending}"
    if ending == "json":
        changed(path, change)
    else:
        change(path)
    assert message in run("table.py", config, f"--out={tmp_path}", "--jobs=0", ok=False)


def test_what_a_row_needs_comes_before_it(monkeypatch):
    monkeypatch.setattr(table, "out", "my folder")
    monkeypatch.setattr(table, "separators", {"a": ""})
    monkeypatch.setattr(table, "rows", {"a": "--init={a} --tail={b}", "b": "config/tail.py"})
    jobs = table.cell_jobs(("tags", 1.0, 0, 3), ["--task=tags"])
    assert [job.name for job in jobs] == ["tags-b-fold0-seed3", "tags-a-fold0-seed3"]
    assert sorted(jobs[1].needs) == ["a", "tags-b-fold0-seed3"]
    assert f"--init={os.path.join('my folder', 'runs', 'a.pt')}" in jobs[1].arguments
    assert jobs[1].arguments[-3:] == ["--seed=3", "--label_fraction=1.0", "--fold=0"]
    monkeypatch.setattr(table, "rows", {"b": "--tail={c}", "c": "--tail={b}"})
    with pytest.raises(SystemExit, match="rows that need each other can never begin: b, c"):
        table.cell_jobs(("tags", 1.0, 0, 3), [])


def test_a_separator_may_have_no_number():
    medians = {"bass": {"model": {"SI-SDR": None}}, "drums": {"model": {"SI-SDR": 1.5}}}
    said = table.headline({"kind": "separator", "median": medians})
    assert said == "SI-SDR in dB: drums 1.50"


def test_a_table_that_was_stopped_goes_on_to_the_same_scores(whole, config, tmp_path):
    arguments = [sys.executable, "table.py", config, f"--out={tmp_path}", "--jobs=2",
                 "--separators={}", "--rows={'tail': 'config/tail.py'}", "--seeds=[1]"]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.STDOUT)
    while not list(tmp_path.glob("runs/*.resume")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 1 and "the same command goes on" in said, said
    run(arguments[1:])
    ours, theirs = (np.load(out / "runs" / "tags-tail-labels0.5-seed1.npz")
                    for out in (tmp_path, whole[0]))
    np.testing.assert_array_equal(ours["scores"], theirs["scores"])


def test_two_tables_do_not_share_a_folder(config, tmp_path):
    process = subprocess.Popen([sys.executable, "table.py", config, f"--out={tmp_path}"],
                               cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("runs/*.log")):
        time.sleep(0.05)
    process.kill()          # its run goes on, and holds the folder
    process.wait()
    assert "another process is at work" in run("table.py", config, f"--out={tmp_path}", ok=False)


def test_commands_for_a_cluster_are_one_line_each(config, tmp_path):
    lines = run("table.py", config, f"--out={tmp_path}", "--print=True").splitlines()
    assert len(lines) == 5 and not list(tmp_path.glob("runs/*"))
    assert lines[0].startswith("python pretrain_sep.py config/vocals.py ")
    assert all(f"&& python eval.py {tmp_path}/runs/" in line for line in lines)


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "config").glob("table_*.py")))
def test_every_run_of_the_tables_here_has_known_settings(name, tmp_path):
    lines = run("table.py", f"config/{name}", f"--out={tmp_path}", "--seeds=[1]",
                "--print=True").splitlines()
    assert len(lines) >= 4
    for line in lines:
        _, script, *arguments = shlex.split(line.split(" && ")[0])
        config, _ = runtime.configure({"__file__": str(ROOT / script), "__doc__": ""}, arguments)
        assert config["out"].startswith(str(tmp_path))


def test_a_run_that_fails_costs_itself_and_what_needs_it(config, tmp_path):
    said = run(["table.py"], config, f"--out={tmp_path}", "--seeds=1", "--jobs=2",
               "--labels={1.0: ''}", "--separators={}",
               "--rows={'a': '--variant=no', 'tail': '--variant=tail', 'b': '--tail={a}'}",
               ok=False)
    assert "2 of 3 runs failed: tags-a-seed1, tags-b-seed1" in said
    assert "| tail | 1 |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("option, message", [
    ("--rows={}", "needs rows and tasks"), ("--jobs=-1", "jobs must be at least 0"),
    ("--rows={'a/b': ''}", "becomes part of a file's name"),
    ("--rows={'a': '--init={bass}'}", "names in {} are those of separators and rows"),
    ("--rows={'a': '\"'}", "cannot be read (No closing quotation)"),
    ("--rows={'a': None}", "must be one text"), ("--labels={0.5: None}", "must be one text"),
    ("--seeds=3,3", "must be different numbers"), ("--folds=-2", "must be at least -1"),
    ("--baselines=tial", "is not one of the rows"),
    ("--labels={2.0: ''}", "shares above 0"), ("--jobs=0", "no run is finished")])
def test_wrong_settings_are_told(config, tmp_path, option, message):
    assert message in run("table.py", config, f"--out={tmp_path}", option, ok=False)
