"""
Tables over rows, label fractions and seeds: runs, resumed runs, and tables from results alone.

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

import table
from common import settings

CONFIG = """
separators = {{"vocals": "config/vocals.py --data={demo}/demo_songs --steps=2 {sep}"}}
tasks = {{"tags": "config/mtat.py --data={demo}/demo_clips {cls}"}}
rows = {{
    "tail": "--variant=tail",
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
def finished(config, tmp_path_factory):
    """(folder of a finished table, output)."""
    out = tmp_path_factory.mktemp("finished")
    return out, run("table.py", config, f"--out={out}", "--jobs=2")


def results(out):
    return {path.stem: json.loads(path.read_text()) for path in (out / "runs").glob("*.json")}


def test_table_has_every_row(finished):
    out, output = finished
    assert len(results(out)) == 1 + 2 * 2 and "[5/5]" in output
    text = (out / "table.md").read_text()
    assert text.count("\n| ") == 3 and text.strip() in output
    assert (out / "table.png").read_bytes()[:4] == b"\x89PNG"
    half = results(out)["tags-joined-labels0.5-seed2"]
    assert half["config"]["label_fraction"] == 0.5 and half["config"]["epochs"] == 1
    assert half["config"]["tail"].endswith("tags-tail-labels0.5-seed2.pt")


def test_numbers_follow_from_the_scores_of_the_clips(finished):
    out, _ = finished
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


def test_finished_runs_are_skipped(finished, config):
    out, _ = finished
    before = {path: path.stat().st_mtime for path in (out / "runs").iterdir()}
    text = (out / "table.md").read_text()
    assert "[1/" not in run("table.py", config, f"--out={out}")
    assert before == {path: path.stat().st_mtime for path in (out / "runs").iterdir()}
    assert (out / "table.md").read_text() == text


def test_table_needs_only_the_results_of_the_runs(finished, config, tmp_path):
    (tmp_path / "runs").mkdir()
    for path in (finished[0] / "runs").iterdir():
        if path.suffix in (".json", ".npz"):
            (tmp_path / "runs" / path.name).write_bytes(path.read_bytes())
    run("table.py", config, f"--out={tmp_path}", "--jobs=0")
    assert (tmp_path / "table.csv").read_text() == (finished[0] / "table.csv").read_text()


@pytest.mark.parametrize("option, message", [
    ("--labels={0.5: '--epochs=3'}", "epochs: 1, now 3"), ("--test_dtype=bfloat16", "float32")])
def test_results_of_other_settings_are_refused(finished, config, option, message):
    assert message in run("table.py", config, f"--out={finished[0]}", option, ok=False)


def reverse_clips(path):
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "clips": arrays["clips"][::-1]})


@pytest.mark.parametrize("ending, change, message", [
    ("json", lambda r: r["config"].update(trained_on="x"), "demo_clips"),
    ("json", lambda r: r.update(tested_on="x"), "demo_clips"),
    ("json", lambda r: r["config"]["started_from"].update(init="x"), "vocals.pt"),
    ("json", lambda r: r.update(split="valid"), "'valid'"),
    ("npz", lambda path: path.write_bytes(b"PK"), "tags-joined-labels0.5-seed2.npz"),
    ("npz", reverse_clips, "clips or labels")])
def test_results_that_do_not_match_are_refused(
        finished, config, tmp_path, ending, change, message):
    (tmp_path / "runs").mkdir()
    for path in (finished[0] / "runs").iterdir():
        if path.suffix in (".json", ".npz", ".pt"):
            (tmp_path / "runs" / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "runs" / f"tags-joined-labels0.5-seed2.{ending}"
    if ending == "json":
        result = json.loads(path.read_text())
        change(result)
        path.write_text(json.dumps(result))
    else:
        change(path)
    assert message in run("table.py", config, f"--out={tmp_path}", "--jobs=0", ok=False)


def test_jobs_are_ordered_by_what_they_need(monkeypatch):
    monkeypatch.setattr(table, "out", "my folder")
    monkeypatch.setattr(table, "separators", {"a": ""})
    monkeypatch.setattr(table, "rows", {"a": "--init={a} --tail={b}", "b": "--variant=tail"})
    jobs = table.cell_jobs(("tags", 1.0, 0, 3), ["--task=tags"])
    assert [job.name for job in jobs] == ["tags-b-fold0-seed3", "tags-a-fold0-seed3"]
    assert sorted(jobs[1].needs) == ["a", "tags-b-fold0-seed3"]
    assert f"--init={os.path.join('my folder', 'runs', 'a.pt')}" in jobs[1].arguments
    assert jobs[1].arguments[-3:] == ["--seed=3", "--label_fraction=1.0", "--fold=0"]
    monkeypatch.setattr(table, "rows", {"b": "--tail={c}", "c": "--tail={b}"})
    with pytest.raises(ValueError, match="cycle.*tags-b-fold0-seed3"):
        table.cell_jobs(("tags", 1.0, 0, 3), [])


def test_sources_without_a_metric_are_left_out_of_the_headline():
    medians = {"bass": {"model": {"SI-SDR": None}}, "drums": {"model": {"SI-SDR": 1.5}}}
    headline = table.headline({"kind": "separator", "median": medians})
    assert headline == "SI-SDR in dB: drums 1.50"


def test_stopped_table_resumes_to_the_same_scores(finished, config, tmp_path):
    arguments = [sys.executable, "table.py", config, f"--out={tmp_path}", "--jobs=2",
                 "--separators={}", "--rows={'tail': '--variant=tail'}", "--seeds=[1]"]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.STDOUT)
    while not list(tmp_path.glob("runs/*.resume")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1 and "\nerror: stopped" in output, output
    run(*arguments[1:])
    ours, theirs = (np.load(out / "runs" / "tags-tail-labels0.5-seed1.npz")
                    for out in (tmp_path, finished[0]))
    np.testing.assert_array_equal(ours["scores"], theirs["scores"])


def test_folder_is_locked_while_a_run_of_a_killed_table_is_alive(config, tmp_path):
    process = subprocess.Popen([sys.executable, "table.py", config, f"--out={tmp_path}"],
                               cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("runs/*.log")):
        time.sleep(0.05)
    process.kill()          # its run goes on and inherits the lock
    process.wait()
    errors = run("table.py", config, f"--out={tmp_path}", ok=False)
    assert str(tmp_path / ".lock") in errors


def test_dry_run_prints_one_line_per_run(config, tmp_path):
    lines = run("table.py", config, f"--out={tmp_path}", "--dry_run=True").splitlines()
    assert len(lines) == 5 and not list(tmp_path.glob("runs/*"))
    assert lines[0].startswith("python pretrain_sep.py config/vocals.py ")
    assert all(f"&& python eval.py {tmp_path}/runs/" in line for line in lines)


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "config").glob("table_*.py")))
def test_all_runs_of_the_tables_in_config_have_valid_settings(name, tmp_path):
    lines = run("table.py", f"config/{name}", f"--out={tmp_path}", "--seeds=[1]",
                "--dry_run=True").splitlines()
    assert len(lines) >= 4
    for line in lines:
        _, script, *arguments = shlex.split(line.split(" && ")[0])
        config, _ = settings.configure({"__file__": str(ROOT / script), "__doc__": ""}, arguments)
        assert config["out"].startswith(str(tmp_path))


def test_failed_run_stops_only_those_that_need_it(config, tmp_path):
    errors = run("table.py", config, f"--out={tmp_path}", "--seeds=1", "--jobs=2",
                 "--labels={1.0: ''}", "--separators={}",
                 "--rows={'a': '--variant=no', 'tail': '--variant=tail', 'b': '--tail={a}'}",
                 ok=False)
    assert "2 of 3 runs failed: tags-a-seed1, tags-b-seed1" in errors
    assert "| tail | 1 |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("option, message", [
    ("--rows={}", "rows"), ("--jobs=-1", "jobs"), ("--rows={'a/b': ''}", "'a/b'"),
    ("--rows={1: ''}", "letters"), ("--rows={'a': '--init={bass}'}", "'bass'"),
    ("--rows={'a': '\"'}", "No closing quotation"), ("--rows={'a': None}", "a: None"),
    ("--labels={0.5: None}", "0.5: None"), ("--labels={2.0: ''}", "labels must be"),
    ("--labels={0.0: ''}", "labels must be"), ("--seeds=3,3", "seeds must be"),
    ("--folds=-2", "folds must be"), ("--baselines=tial", "tial"), ("--jobs=0", "no run")])
def test_wrong_settings_are_refused(config, tmp_path, option, message):
    assert message in run("table.py", config, f"--out={tmp_path}", option, ok=False)
