"""
The files of a run: nothing is overwritten unasked, and only equal runs are resumed.
"""
import importlib.util
import json
import os
import sys
import types

import pytest
import torch
from conftest import SEP, run

from common import run as runs

CONFIG = {"track": "", "log_every": 1, "seed": 1, "data": "data/a", "init": "a.pt", "steps": 4,
          "trained_on": "x", "started_from": {"init": "123", "tail": ""}}


@pytest.fixture(autouse=True)
def no_signal_handlers(monkeypatch):
    monkeypatch.setattr(runs.signal, "signal", lambda *_: None)


def write_state(folder, **more):
    state = {"config": CONFIG, "step": 4, "progress": {"best": float("inf")}, **more}
    torch.save(state, folder / "a.resume")
    return runs.Run(str(folder / "a.pt"), resume=True, overwrite=False)


# -----------------------------------------------------------------------------
# files that exist

@pytest.mark.parametrize("name", ["a.pt", "a.resume", "a.jsonl"])
def test_an_existing_run_is_not_overwritten(tmp_path, name):
    out = str(tmp_path / "a.pt")
    (tmp_path / name).write_text("")
    with pytest.raises(SystemExit, match=f"{name} exists.*--resume=True.*--overwrite=True"):
        runs.Run(out, resume=False, overwrite=False)
    runs.Run(out, resume=False, overwrite=True)


def test_a_broken_link_is_not_overwritten(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("nowhere")
    for overwrite in (False, True):
        with pytest.raises(SystemExit, match="a.jsonl is a broken link"):
            runs.Run(str(tmp_path / "a.pt"), False, overwrite)


def test_an_impossible_path_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        runs.Run(str(tmp_path / "file" / "a.pt"), False, False)


@pytest.mark.parametrize("name", ["a", "a.pth", ""])
def test_other_endings_of_a_checkpoint_are_refused(tmp_path, name):
    with pytest.raises(SystemExit, match=r"\.pt$"):
        runs.Run(f"{tmp_path}/{name}", False, False)
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_fails_is_one_line(tmp_path, monkeypatch):
    def init(**_):
        raise Exception("no login")
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(SystemExit, match="wandb.*no login"):
        runs.tracker("wandb", str(tmp_path / "a"), {}, 0)


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    for name in ("a.pt.123.tmp", "a.resume.9.tmp", "b.pt.123.tmp"):
        (tmp_path / name).write_text("half")
    runs.Run(str(tmp_path / "a.pt"), False, False).begin(CONFIG)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "b.pt.123.tmp"]


# -----------------------------------------------------------------------------
# resuming

@pytest.mark.parametrize("content", [None, b"", b"text"])
def test_resuming_without_a_state_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "a.resume").write_bytes(content)
    with pytest.raises(SystemExit, match="a.resume"):
        runs.Run(str(tmp_path / "a.pt"), resume=True, overwrite=False)


def test_resuming_from_a_network_alone_is_refused(tmp_path):
    torch.save({"kind": "separator", "model": {}, "args": {}}, tmp_path / "a.resume")
    with pytest.raises(SystemExit, match="a.resume"):
        runs.Run(str(tmp_path / "a.pt"), resume=True, overwrite=False)


def test_resuming_without_the_best_checkpoint_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="a.pt.*0.50000.*missing"):
        write_state(tmp_path, progress={"best": 0.5})


@pytest.mark.parametrize("key, value", [
    ("data", "moved"), ("init", "moved.pt"), ("steps", 9), ("log_every", 7)])
def test_these_settings_may_change_on_resume(tmp_path, key, value):
    write_state(tmp_path).check_same({**CONFIG, key: value})


@pytest.mark.parametrize("key, value, words", [
    ("seed", 2, "seed: 1 -> 2"), ("trained_on", "y", "data/a"),
    ("started_from", {"init": "124", "tail": ""}, "init or tail"), ("new", 1, "new: None -> 1"),
    ("tail", "released:x", "tail: None -> 'released:x'")])
def test_other_settings_data_or_weights_are_not_resumed(tmp_path, key, value, words):
    with pytest.raises(SystemExit) as e:
        write_state(tmp_path).check_same({**CONFIG, key: value})
    assert words in str(e.value) and "a.resume" in str(e.value)


@pytest.mark.parametrize("before", [None, False, True])
@pytest.mark.parametrize("now", [False, True])
def test_a_resumed_optimizer_is_fused_as_its_device_needs(before, now):
    net = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.ones_(net.weight)
    net.weight.grad = torch.ones(1, 3)
    old = torch.optim.Adam(net.parameters(), 0.1, fused=before)
    old.step()
    new, scaler = torch.optim.Adam(net.parameters(), 0.1, fused=now), torch.amp.GradScaler("cpu")
    saved = {"model": net.state_dict(), "optimizer": old.state_dict(), "scaler": {}}
    scaler.load_state_dict = lambda state: None
    runs.load_state(saved, net, new, scaler)
    assert new.param_groups[0]["fused"] is now
    new.step()
    # two steps with the same gradient: each of the size of the learning rate
    assert net.weight.detach() == pytest.approx(torch.full((1, 3), 0.8), abs=1e-6)


# -----------------------------------------------------------------------------
# what is saved

def test_weights_that_are_not_finite_are_never_saved():
    net = torch.nn.BatchNorm1d(3)
    net.running_var[1] = float("nan")
    with pytest.raises(SystemExit, match="running_var"):
        runs.finite_weights(net)


def test_only_the_best_checkpoint_is_kept(tmp_path):
    run, progress = runs.Run(str(tmp_path / "a.pt"), False, False), {"best": 0.5, "best_step": 2}
    assert not run.save_if_best({"step": 4}, 0.5, progress) and not os.listdir(tmp_path)
    assert run.save_if_best({"step": 6}, 0.4, progress)
    assert progress == {"best": 0.4, "best_step": 6}
    assert torch.load(tmp_path / "a.pt") == {"step": 6, "val_loss": 0.4}
    with pytest.raises(SystemExit, match="nan at step 8"):
        run.save_if_best({"step": 8}, float("nan"), progress)


def test_a_meter_continues_from_its_state():
    meter = runs.Meter(peak=0.5)
    for loss in (1.0, 2.0):
        meter.add(torch.tensor(loss))
    meter.waited, meter.began = 1.0, meter.began - 4
    again = runs.Meter(meter.state(), peak=0.5)
    again.add(torch.tensor(6.0))
    values = again.read(step=3, batch_size=4)
    assert values["loss"] == 3.0 and values["clips_per_s"] == pytest.approx(3, rel=0.1)
    assert values["mfu"] == pytest.approx(1.5, rel=0.1)
    assert values["data_wait"] == pytest.approx(0.25, rel=0.1)
    assert (again.loss, again.count) == (0.0, 0)
    again.add(torch.tensor(float("inf")))
    with pytest.raises(SystemExit, match="inf at step 4"):
        again.read(step=4, batch_size=4)


# -----------------------------------------------------------------------------
# logs

def entries(*steps):
    return [{"step": step, "loss": 1.0} for step in steps]


def write_log(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))


def test_a_resumed_log_ends_at_the_saved_step(tmp_path):
    validation = {"step": 4, "val_loss": 1.0}
    write_log(tmp_path / "a.jsonl", *map(json.dumps, [*entries(1, 4), validation, *entries(5)]))
    write_state(tmp_path).begin(CONFIG)
    # saving comes before validating: the validation of step 4 is repeated
    assert runs.read_log(tmp_path / "a.jsonl") == (entries(1, 4), 0)


@pytest.mark.parametrize("damage", ['{"step": 2, "lo', "\0" * 80, '[1, 2]', '"text"', '{"a": 1}',
                                    '{"step": "2"}', "\udcff"])
def test_damaged_lines_of_a_log_are_dropped_and_counted(tmp_path, capsys, damage):
    path = tmp_path / "a.jsonl"
    one, two = map(json.dumps, entries(1, 2))
    path.write_bytes("\n".join([one, damage, two, ""]).encode(errors="surrogateescape"))
    assert runs.read_log(path) == (entries(1, 2), 1)
    write_state(tmp_path).begin(CONFIG)
    assert f"{path}: 1 damaged" in capsys.readouterr().out
    assert runs.read_log(path) == (entries(1, 2), 0)


def test_a_missing_log_is_noted(tmp_path, capsys):
    write_state(tmp_path).begin(CONFIG)
    assert "a.jsonl is missing" in capsys.readouterr().out
    assert (tmp_path / "a.jsonl").read_text() == ""


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="track must be one of"):
        runs.tracker("paper", str(tmp_path / "a.pt"), {}, 0)


# -----------------------------------------------------------------------------
# tensorboard and wandb

def test_missing_tracker_is_refused_before_training(demo, tmp_path):
    args = ["pretrain_sep.py", "config/vocals.py", *SEP, f"--data={demo}/demo_songs", "--steps=2",
            f"--out={tmp_path}/a.pt"]
    assert "track" in run(*args, "--track=paper", ok=False)
    if importlib.util.find_spec("wandb") is None:
        assert "pip install wandb" in run(*args, "--track=wandb", ok=False)
        assert not (tmp_path / "a.jsonl").exists()


def test_tensorboard_has_the_numbers_of_the_log(demo, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run("pretrain_sep.py", "config/vocals.py", *SEP, f"--data={demo}/demo_songs", "--steps=4",
        f"--out={tmp_path}/a.pt", "--track=tensorboard")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    board = EventAccumulator(str(tmp_path / "a")).Reload()
    for key in ("loss", "val_loss", "lr"):
        logged = [(line["step"], pytest.approx(line[key])) for line in lines if key in line]
        assert [(event.step, event.value) for event in board.Scalars(key)] == logged
