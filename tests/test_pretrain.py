"""
Stage 1: training, resuming to the same bits, several processes.

    python -m pytest -q tests/test_pretrain.py
"""
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ROOT,
    SEP,
    TORCHRUN,
    log_of,
    log_values,
    run,
    same_weights,
    stopped_by,
    weights_of,
)


def pretrain(demo, out, *args, **options):
    return run("pretrain_sep.py", "config/vocals.py", *SEP, f"--data={demo}/demo_songs",
               f"--out={out}", *args, **options)


def resume_of(path):
    return str(path).replace(".pt", ".resume")


# -----------------------------------------------------------------------------
# the same bits

def test_loader_threads_change_nothing_and_a_run_is_not_overwritten(demo, separator, tmp_path):
    pretrain(demo, tmp_path / "a.pt", "--steps=4", "--workers=0")
    assert same_weights(tmp_path / "a.resume", resume_of(separator))
    assert "exists: --resume=True" in pretrain(demo, tmp_path / "a.pt", "--steps=4", ok=False)


def test_more_steps_resume_to_the_same_bits(demo, separator, tmp_path):
    pretrain(demo, tmp_path / "a.pt", "--steps=2")
    pretrain(demo, tmp_path / "a.pt", "--steps=4", "--resume=True")
    assert same_weights(tmp_path / "a.resume", resume_of(separator))
    assert same_weights(tmp_path / "a.pt", separator)
    assert log_values(tmp_path / "a.pt") == log_values(separator)


def test_other_settings_are_not_resumed(separator, demo, tmp_path):
    for name in ("sep.pt", "sep.resume", "sep.jsonl"):
        shutil.copy(separator.with_name(name), tmp_path)
    errors = pretrain(demo, tmp_path / "sep.pt", "--resume=True", "--seed=2", ok=False)
    assert "seed: 1 -> 2" in errors


def test_ctrl_c_saves_and_the_run_resumes_to_the_same_bits(demo, tmp_path):
    arguments = ["config/vocals.py", *SEP, f"--data={demo}/demo_songs", "--steps=14",
                 "--val_every=10", "--log_every=2"]
    run("pretrain_sep.py", *arguments, f"--out={tmp_path}/a.pt")
    output, status = stopped_by(signal.SIGINT, "pretrain_sep.py", 3, tmp_path / "b.pt", *arguments)
    assert "error: stopped at step" in output and status == 1 and "Traceback" not in output
    step = torch.load(tmp_path / "b.resume", weights_only=True)["step"]
    assert 4 <= step < 14
    run("pretrain_sep.py", *arguments, f"--out={tmp_path}/b.pt", "--resume=True")
    assert same_weights(tmp_path / "a.resume", tmp_path / "b.resume")
    assert same_weights(tmp_path / "a.pt", tmp_path / "b.pt")
    assert log_values(tmp_path / "a.pt") == log_values(tmp_path / "b.pt")


def test_a_second_signal_quits_at_once(demo, tmp_path):
    code = """
import os, signal, sys, time, pretrain_sep
from common import run, settings
def slow(obj, path):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
run.save_atomically = slow
sys.argv[0] = "pretrain_sep.py"
settings.script(pretrain_sep.main)"""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "config/vocals.py", *SEP, f"--data={demo}/demo_songs",
         f"--out={tmp_path}/a.pt"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGTERM and time.monotonic() - began < 40
    assert "Ctrl-C again" in done.stderr


# -----------------------------------------------------------------------------
# training

def test_the_loss_falls(demo, tmp_path):
    run("pretrain_sep.py", "config/multisource.py", *SEP, "--learning_rate=1e-2",
        "--bn_momentum=0.5", "--val_every=100", "--val_mixes=8", f"--data={demo}/demo_songs",
        f"--out={tmp_path}/a.pt", "--steps=25", "--grad_clip=1.0")
    losses = [entry["val_loss"] for entry in log_of(tmp_path / "a.pt") if "val_loss" in entry]
    assert losses[-1] < 0.85 * losses[0]


def test_accumulation_and_processes_divide_the_same_batch(demo, tmp_path):
    """The same parts give the same gradients; BatchNorm makes the whole batch differ a little."""
    training, validation = {}, {}
    for name, script, more in (("whole", ["pretrain_sep.py"], []),
                               ("accumulate", ["pretrain_sep.py"], ["--accumulate=2"]),
                               ("processes", [*TORCHRUN, "pretrain_sep.py"], [])):
        run(script, "config/vocals.py", *SEP, *more, "--batch_size=4", "--steps=3",
            f"--data={demo}/demo_songs", f"--out={tmp_path}/{name}.pt")
        entries = log_of(tmp_path / f"{name}.pt")
        training[name] = [entry["loss"] for entry in entries if "loss" in entry]
        validation[name] = [entry["val_loss"] for entry in entries if "val_loss" in entry]
    assert len(training["processes"]) == 3
    assert training["processes"] == pytest.approx(training["accumulate"], rel=1e-5)
    assert training["processes"] == pytest.approx(training["whole"], rel=0.2)
    assert training["processes"] != pytest.approx(training["whole"], rel=1e-4)
    first = [values[0] for values in validation.values()]
    assert first == pytest.approx([first[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision_trains(demo, separator, tmp_path, dtype):
    pretrain(demo, tmp_path / "a.pt", "--steps=2", f"--dtype={dtype}", "--grad_clip=1")
    exact, reduced = ([entry["loss"] for entry in log_of(path) if "loss" in entry][:2]
                      for path in (separator, tmp_path / "a.pt"))
    assert reduced == pytest.approx(exact, rel=0.05) and reduced != exact


def test_an_infinite_loss_stops_the_run_and_is_not_saved(demo, tmp_path):
    errors = pretrain(demo, tmp_path / "a.pt", "--steps=6", "--learning_rate=1e30", ok=False)
    assert "lower learning_rate" in errors
    assert all(torch.isfinite(w).all() for w in weights_of(tmp_path / "a.resume").values())


def test_a_torn_log_does_not_stop_a_resumed_run(separator, demo, tmp_path):
    for name in ("sep.pt", "sep.resume", "sep.jsonl"):
        shutil.copy(separator.with_name(name), tmp_path)
    with open(tmp_path / "sep.jsonl", "a") as f:
        f.write("\0" * 100)
    text = pretrain(demo, tmp_path / "sep.pt", "--steps=5", "--resume=True")
    assert f"{tmp_path}/sep.jsonl: 1 damaged" in text
    assert [json.dumps(entry) for entry in log_of(tmp_path / "sep.pt")][-1].count('"step": 5')
