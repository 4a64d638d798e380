"""
Stage 2: initial weights, the recipes, resuming within an epoch, wrong settings.

    python -m pytest -q tests/test_finetune.py
"""
import json
import shutil
import signal

import pytest
import torch
from conftest import (
    CLS,
    NARROW,
    ROOT,
    TORCHRUN,
    log_of,
    log_values,
    randomise,
    run,
    same_weights,
    stopped_by,
    weights_of,
    write_tensorflow,
)
from test_weights import fake_vit

import model
import weights


def finetune(demo, out, *args, **options):
    return run("finetune_cls.py", *CLS, f"--data={demo}/demo_clips", f"--out={out}", *args,
               **options)


# -----------------------------------------------------------------------------
# initial weights

def test_init_copies_the_separator(demo, separator, tmp_path):
    text = finetune(demo, tmp_path / "a.pt", f"--init={separator}", "--epochs=0")
    ours, theirs = weights_of(tmp_path / "a.pt"), weights_of(separator)
    assert "196 of 196 tensors" in text and len(theirs) == 196
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_init_reads_tensorflow(demo, tmp_path):
    net = randomise(model.Separator(["vocals"], NARROW))
    write_tensorflow(net, tmp_path / "checkpoint-1")
    finetune(demo, tmp_path / "a.pt", f"--init={tmp_path}/checkpoint-1", "--epochs=0")
    ours = weights_of(tmp_path / "a.pt")["unet.head.1.weight"]
    assert torch.equal(ours, net.unet.head[1].weight)


def test_joining_keeps_the_weights_of_the_tail(demo, separator, tail_only, tmp_path):
    finetune(demo, tmp_path / "a.pt", "--variant=v3", f"--init={separator}",
             f"--tail={tail_only}", "--epochs=0")
    joined, tail = weights_of(tmp_path / "a.pt"), weights_of(tail_only)
    kernel = "tail.blocks.0.convs.0.weight"
    assert joined[kernel].shape[1] == 2
    torch.testing.assert_close(joined[kernel].sum(1, keepdim=True), tail[kernel])
    assert all(torch.equal(joined[name], tail[name]) for name in tail if name != kernel)


def test_a_tail_keeps_its_front_end_but_not_its_classes(demo, separator, tmp_path):
    finetune(demo, tmp_path / "t.pt", "--variant=tail", "--epochs=0", "--mel_of_log=True")
    finetune(demo, tmp_path / "a.pt", "--variant=v3", f"--init={separator}", "--task=genre",
             f"--tail={tmp_path}/t.pt", "--epochs=0")
    net, meta = weights.load(tmp_path / "a.pt")
    assert net.args["mel_of_log"] and net.tail.out.out_features == len(meta["classes"]) == 4
    dense = weights_of(tmp_path / "t.pt")["tail.dense.weight"]
    assert torch.equal(net.tail.dense.weight, dense)


def test_initial_weights_may_move_but_not_change(demo, separator, tmp_path):
    shutil.copy(separator, tmp_path / "one.pt")
    arguments = ["--epochs=1", f"--init={tmp_path}/two.pt", "--resume=True"]
    finetune(demo, tmp_path / "a.pt", "--epochs=1", f"--init={tmp_path}/one.pt")
    (tmp_path / "one.pt").rename(tmp_path / "two.pt")
    finetune(demo, tmp_path / "a.pt", *arguments)
    saved = torch.load(tmp_path / "two.pt", weights_only=True)
    torch.save({**saved, "step": 5}, tmp_path / "two.pt")
    errors = finetune(demo, tmp_path / "a.pt", *arguments, ok=False)
    assert "init or tail" in errors


def test_a_frozen_unet_keeps_weights_and_statistics(demo, separator, tmp_path):
    finetune(demo, tmp_path / "a.pt", "--freeze=unet", f"--init={separator}", "--recipe=modern")
    after, before = weights_of(tmp_path / "a.resume"), weights_of(separator)
    assert all(torch.equal(after[name], before[name]) for name in before)  # statistics too
    losses = [entry["val_loss"] for entry in log_of(tmp_path / "a.pt") if "val_loss" in entry]
    assert losses[0] != losses[-1]


# -----------------------------------------------------------------------------
# resuming

def impatient(folder):
    """finetune_cls.py with short phases, transformers of 128 frames and none of their dropout."""
    path = folder / "impatient.py"
    path.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import finetune_cls, model
from common import settings
finetune_cls.PATIENCE = finetune_cls.HALVINGS = 0
model.DROPOUT, model.AST_FRAMES = 0.0, 128
settings.script(finetune_cls.main)""")
    return str(path)


def test_sigterm_within_an_epoch_saves_and_the_run_resumes_to_the_same_bits(demo, tmp_path):
    """Ten clips in batches of two: five steps an epoch, through the SGD phases."""
    arguments = [*CLS, "--batch_size=2", "--variant=tail", "--epochs=8", "--task=genre",
                 f"--data={demo}/demo_clips", "--learning_rate=1e-2", "--log_every=3"]
    script = impatient(tmp_path)
    run([script], *arguments, f"--out={tmp_path}/a.pt")
    output, status = stopped_by(signal.SIGTERM, script, 8, tmp_path / "b.pt", *arguments)
    assert "error: stopped at step" in output and status == 1 and "Traceback" not in output
    assert 5 < torch.load(tmp_path / "b.resume", weights_only=True)["step"] < 40
    run([script], *arguments, f"--out={tmp_path}/b.pt", "--resume=True")
    assert same_weights(tmp_path / "a.resume", tmp_path / "b.resume")
    assert same_weights(tmp_path / "a.pt", tmp_path / "b.pt")
    assert log_values(tmp_path / "a.pt") == log_values(tmp_path / "b.pt")
    assert max(entry.get("phase", 0) for entry in log_of(tmp_path / "a.pt")) > 0


TO_STOP = ["--batch_size=2", "--variant=tail", "--epochs=3", "--learning_rate=1e-2",
           "--recipe=modern"]


def test_two_processes_equal_one(demo, tmp_path):
    """Through a change of phase; without BatchNorm, whose statistics differ per process."""
    args = [*AST_TAIL, f"--data={demo}/demo_clips", "--recipe=ast", "--epochs=6"]
    script = impatient(tmp_path)
    run([script], *args, f"--out={tmp_path}/one.pt")
    output = run([*TORCHRUN, script], *args, f"--out={tmp_path}/two.pt")
    assert output.count("best validation loss") == 1        # only one process prints and writes
    one, two = (log_of(tmp_path / name) for name in ("one.pt", "two.pt"))
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two]
    assert one[-1]["phase"] == 1                            # Adam, then SGD
    for key in ("loss", "val_loss"):
        expected, values = ([entry[key] for entry in log if key in entry] for log in (one, two))
        assert values == pytest.approx(expected, rel=1e-4)
    errors = run("finetune_cls.py", *args, f"--out={tmp_path}/two.pt", "--resume=True", ok=False)
    assert "processes: 2 -> 1" in errors


@pytest.fixture(scope="module")
def unstopped(demo, tmp_path_factory):
    out = tmp_path_factory.mktemp("unstopped") / "a.pt"
    finetune(demo, out, *TO_STOP)
    return out


@pytest.mark.parametrize("step", [0, 5, 12])
def test_a_stop_at_any_step_resumes_to_the_same_bits(demo, unstopped, tmp_path, step):
    code = f"""
import sys, finetune_cls
from common import run, settings
class Stop:
    count = 0
    @property
    def asked(self):
        Stop.count += 1
        return Stop.count > {step}
run.Stop, sys.argv[0] = Stop, "finetune_cls.py"
settings.script(finetune_cls.main)"""
    common = [*CLS, f"--data={demo}/demo_clips", f"--out={tmp_path}/b.pt", *TO_STOP]
    assert f"stopped at step {step};" in run(["-c", code], *common, ok=False)
    finetune(demo, tmp_path / "b.pt", *TO_STOP, "--resume=True")
    assert same_weights(unstopped.with_suffix(".resume"), tmp_path / "b.resume")
    assert log_values(unstopped) == log_values(tmp_path / "b.pt")


def test_changed_splits_are_refused(demo, tmp_path):
    shutil.copytree(demo / "demo_clips", tmp_path / "clips")
    arguments = ["--variant=tail", "--epochs=1", f"--data={tmp_path}/clips"]
    finetune(demo, tmp_path / "a.pt", *arguments)
    scoring = ["eval.py", tmp_path / "a.pt", f"--out={tmp_path}/results", "--bootstrap=0",
               "--overwrite=True"]
    path = tmp_path / "clips" / "index.json"
    before, index = path.read_text(), json.loads(path.read_text())
    a, b = (next(i for i in index["items"] if i["split"] == split) for split in ("train", "test"))
    a["split"], b["split"] = b["split"], a["split"]
    path.write_text(json.dumps(index))
    assert "splits or labels" in run(*scoring, ok=False)
    errors = finetune(demo, tmp_path / "a.pt", *arguments, "--resume=True", ok=False)
    assert f"splits or labels in {tmp_path}/clips" in errors
    run(*scoring, f"--data={tmp_path}/clips")               # explicitly
    path.write_text(before)
    (tmp_path / "clips").rename(tmp_path / "moved")         # the same splits elsewhere
    finetune(demo, tmp_path / "a.pt", *arguments, f"--data={tmp_path}/moved", "--resume=True")


# -----------------------------------------------------------------------------
# the transformer

AST = [arg for arg in CLS if "tail_widths" not in arg] + [
    "--variant=ast", "--transformer=16,5,2", "--skips=2"]
AST_TAIL = [*AST, "--variant=ast_tail"]


def test_a_transformer_is_trained_joined_and_evaluated(demo, separator, tmp_path):
    fake_vit(tmp_path / "v.npz")
    output = run("finetune_cls.py", *AST_TAIL, f"--data={demo}/demo_clips", "--epochs=1",
                 f"--vit={tmp_path}/v.npz", f"--out={tmp_path}/alone.pt")
    assert f"{tmp_path}/v.npz" in output.split("vit = ")[1].split("\n", 1)[1]      # was loaded
    run("finetune_cls.py", *AST, f"--data={demo}/demo_clips", f"--init={separator}",
        f"--tail={tmp_path}/alone.pt", "--epochs=0", f"--out={tmp_path}/both.pt")
    joined, alone = weights_of(tmp_path / "both.pt"), weights_of(tmp_path / "alone.pt")
    kernel = alone["tail.patches.weight"]
    torch.testing.assert_close(joined["tail.patches.weight"], kernel.expand(-1, 2, -1, -1) / 2)
    assert joined["tail.mean"].shape == (2, 1, 1) and (joined["tail.std"] != 1).all()
    run("eval.py", tmp_path / "both.pt", f"--out={tmp_path}/r", "--bootstrap=0",
        "--pictures=False")
    result = json.loads((tmp_path / "r" / "both.json").read_text())
    assert result["kind"] == "classifier" and len(result["per_class"]) == 16


def test_the_ast_recipe_halves_the_rate_and_resumes_to_the_same_bits(demo, tmp_path):
    args = [*AST_TAIL, "--recipe=ast", "--learning_rate=1e-3", "--batch_size=5", "--epochs=8",
            f"--data={demo}/demo_clips"]
    constants = {"finetune_cls.HALVINGS": 1, "model.AST_FRAMES": 128}
    output = run("finetune_cls.py", *args, f"--out={tmp_path}/a.pt", constants=constants)
    assert "Adam at 0.0005" in output and "SGD at 0.001" in output
    rates = [entry["lr"] for entry in log_of(tmp_path / "a.pt") if "lr" in entry]
    assert rates == [1e-3] * 10 + [5e-4] * 4 + [1e-3] * 2   # two steps an epoch
    code = """
import sys, finetune_cls, model
from common import run, settings
class Stop:
    count = 0
    @property
    def asked(self):
        Stop.count += 1
        return Stop.count > 11      # in the phase at half the rate
run.Stop, finetune_cls.HALVINGS, model.AST_FRAMES = Stop, 1, 128
sys.argv[0] = "finetune_cls.py"
settings.script(finetune_cls.main)"""
    assert "stopped at step 11;" in run(["-c", code], *args, f"--out={tmp_path}/b.pt", ok=False)
    run("finetune_cls.py", *args, f"--out={tmp_path}/b.pt", "--resume=True", constants=constants)
    assert same_weights(tmp_path / "a.resume", tmp_path / "b.resume")
    assert log_values(tmp_path / "a.pt") == log_values(tmp_path / "b.pt")


# -----------------------------------------------------------------------------
# wrong settings

@pytest.fixture(scope="module")
def answers(demo, separator, tail_only, tmp_path_factory):
    """[error message] of all wrong settings, run in one process."""
    root = tmp_path_factory.mktemp("wrong")
    jobs = []
    for script, args, _ in WRONG:
        folders = {"SONGS": f"--data={demo}/demo_songs", "CLIPS": f"--data={demo}/demo_clips"}
        args = [folders.get(arg, arg).format(separator=separator, tail=tail_only, demo=demo)
                for arg in args]
        if script != "eval.py":
            args.append(f"--out={root}/x.pt")
        jobs.append([script, args])
    (root / "jobs.json").write_text(json.dumps(jobs))
    code = f"""
import importlib, json, sys, traceback
answers = []
for script, args in json.load(open({str(root / "jobs.json")!r})):
    name = script.removesuffix(".py")
    sys.modules.pop(name, None)
    sys.argv = [script, *args]
    module = importlib.import_module(name)
    try:
        module.main()
        answers.append("ran")
    except (SystemExit, ValueError, OSError) as e:
        answers.append(str(e))
    except Exception:
        answers.append(traceback.format_exc())
json.dump(answers, open({str(root / "answers.json")!r}, "w"))"""
    run(["-c", code])
    assert not list(root.glob("x.*"))  # nothing was written
    return json.loads((root / "answers.json").read_text())


SMALL = [arg for arg in CLS if not arg.startswith("--epochs")]
WRONG = [
    ("pretrain_sep.py", ["--data=nowhere"], "nowhere"),
    ("pretrain_sep.py", ["CLIPS"], "demo_clips/index.json"),
    ("pretrain_sep.py", ["SONGS", "--sources=guitar"], "guitar"),
    ("pretrain_sep.py", ["SONGS", "--batch_size=3", "--accumulate=2"], "x processes = 2"),
    ("pretrain_sep.py", ["SONGS", "--dtype=int8"], "dtype must be one of"),
    ("pretrain_sep.py", ["SONGS", "--pool=median"], "pool must be one of"),
    ("pretrain_sep.py", ["SONGS", "--resume=True"], "x.resume"),
    ("pretrain_sep.py", ["SONGS", "--batch_size=0"], "batch_size must be at least 1"),
    ("pretrain_sep.py", ["SONGS", "--accumulate=0"], "accumulate must be at least 1"),
    ("pretrain_sep.py", ["SONGS", "--device=gpu"], "device=gpu"),
    ("pretrain_sep.py", ["SONGS", "--seed=4294967296"], "seed must be from 0 to 4294967295"),
    ("pretrain_sep.py", ["SONGS", "--learning_rate=1e999"], "learning_rate must be a finite"),
    ("pretrain_sep.py", ["SONGS", "--learning_rate=0"], "learning_rate must be a"),
    ("pretrain_sep.py", ["SONGS", "{demo}/demo_songs/audio.int16"], "demo_songs/audio.int16"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--tail_widths=4,4"], "tail_widths"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--variant=tail", "--freeze=tail"], "variant=tail"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--init={tail}"], "variant tail"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--init=none.pt"], "no checkpoint at none.pt"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--init=README.md"], "README.md"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--task=mood"], "mood"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--batch_size=64"], "batch of 64"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--batch_size=1"], "batch_size=1 must be at least 2"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--dropout=1.5"], "dropout must be from 0 to 1"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--tail={tail}"], "variant=v3 or ast"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--variant=v3", "--tail={separator}"],
     "sep.pt is not"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--skips=6"], "skips must be from 0 to 5"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--label_fraction=0"], "label_fraction must be from"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--fold=0"], "fold=0"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--fold=-2"], "fold must be at least -1"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--vit=v.npz"], "variant=ast or ast_tail"),
    ("finetune_cls.py", ["CLIPS", *AST, "--vit=v.npz", "--tail={tail}"], "--vit and --tail"),
    ("finetune_cls.py", ["CLIPS", *AST, "--transformer=32,4,2"], "skips"),
    ("finetune_cls.py", ["CLIPS", *AST, "--transformer=30,12,4"], "transformer=30,12,4"),
    ("finetune_cls.py", ["CLIPS", *AST, "--vit=README.md"], "README.md is not"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--init=released:vocal"], "did you mean vocals"),
    ("eval.py", ["none.pt"], "no checkpoint at none.pt"),
    ("eval.py", ["{tail}", "SONGS"], "demo_songs/index.json"),
    ("eval.py", ["{tail}", "--task=genre"], "tail.pt has 16 classes"),
    ("eval.py", ["{tail}", "--split=dev"], "split must be one of"),
    ("eval.py", ["{tail}", "--bootstrap=-1"], "bootstrap must be at least 0"),
]


@pytest.mark.parametrize("number", range(len(WRONG)), ids=[w[2] for w in WRONG])
def test_wrong_settings_are_refused_before_anything_is_written(answers, number):
    assert WRONG[number][2] in answers[number] and "Traceback" not in answers[number]
