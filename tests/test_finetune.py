"""
Stage 2: what the classifier starts from, both recipes, resuming in the middle of an epoch.

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
    TORCHRUN,
    facts,
    log_of,
    randomise,
    run,
    same_weights,
    stopped_by,
    weights_of,
    write_tensorflow,
)

import finetune_cls
import model


def finetune(demo, out, *args, **options):
    return run("finetune_cls.py", *CLS, f"--data={demo}/demo_clips", f"--out={out}", *args,
               **options)


# -----------------------------------------------------------------------------
# what it starts from

def test_it_starts_from_the_separator_by_name(demo, separator, tmp_path):
    text = finetune(demo, tmp_path / "a.pt", f"--init={separator}", "--epochs=0")
    ours, theirs = weights_of(tmp_path / "a.pt"), weights_of(separator)
    assert f"{len(theirs)} of {len(theirs)} tensors" in text and len(theirs) == 196
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_it_starts_from_tensorflow(demo, tmp_path):
    net = randomise(model.Separator(["vocals"], NARROW))
    write_tensorflow(net, tmp_path / "checkpoint-1")
    finetune(demo, tmp_path / "a.pt", f"--init={tmp_path}/checkpoint-1", "--epochs=0")
    ours = weights_of(tmp_path / "a.pt")["unet.head.1.weight"]
    assert torch.equal(ours, net.unet.head[1].weight)


def test_joining_in_three_stages_keeps_what_the_tail_knew(demo, separator, tail_only, tmp_path):
    finetune(demo, tmp_path / "a.pt", "--variant=v3", f"--init={separator}",
             f"--tail={tail_only}", "--epochs=0")
    joined, tail = weights_of(tmp_path / "a.pt"), weights_of(tail_only)
    kernel = "tail.blocks.0.convs.0.weight"
    assert joined[kernel].shape[1] == 2
    torch.testing.assert_close(joined[kernel].sum(1, keepdim=True), tail[kernel])
    assert all(torch.equal(joined[name], tail[name]) for name in tail if name != kernel)


def test_a_tail_brings_its_front_end_and_leaves_its_classes(demo, separator, tmp_path):
    finetune(demo, tmp_path / "t.pt", "--variant=tail", "--epochs=0", "--mel_of_log=True")
    finetune(demo, tmp_path / "a.pt", "--variant=v3", f"--init={separator}", "--task=genre",
             f"--tail={tmp_path}/t.pt", "--epochs=0")
    net, meta = model.load(tmp_path / "a.pt")
    assert net.args["mel_of_log"] and net.tail.out.out_features == len(meta["classes"]) == 4
    dense = weights_of(tmp_path / "t.pt")["tail.dense.weight"]
    assert torch.equal(net.tail.dense.weight, dense)


def test_what_a_run_started_from_may_move_but_not_change(demo, separator, tmp_path):
    shutil.copy(separator, tmp_path / "one.pt")
    arguments = ["--epochs=1", f"--init={tmp_path}/two.pt", "--resume=True"]
    finetune(demo, tmp_path / "a.pt", "--epochs=1", f"--init={tmp_path}/one.pt")
    (tmp_path / "one.pt").rename(tmp_path / "two.pt")
    finetune(demo, tmp_path / "a.pt", *arguments)
    saved = torch.load(tmp_path / "two.pt", weights_only=True)
    torch.save({**saved, "step": 5}, tmp_path / "two.pt")
    assert "another file than when" in finetune(demo, tmp_path / "a.pt", *arguments, ok=False)


def test_a_frozen_unet_does_not_move_and_the_tail_does(demo, separator, tmp_path):
    finetune(demo, tmp_path / "a.pt", "--freeze=unet", f"--init={separator}", "--recipe=modern")
    after, before = weights_of(tmp_path / "a.resume"), weights_of(separator)
    assert all(torch.equal(after[name], before[name]) for name in before)  # statistics too
    losses = [entry["val_loss"] for entry in log_of(tmp_path / "a.pt") if "val_loss" in entry]
    assert losses[0] != losses[-1]


def test_the_loss_refuses_shapes_that_would_be_broadcast():
    with pytest.raises(ValueError, match="differ in shape"):
        finetune_cls.crop_losses(torch.zeros(2, 3), torch.zeros(2, 1), True)
    losses = finetune_cls.crop_losses(torch.full((2, 3), 200.0), torch.zeros(2, 3), True)
    assert torch.isfinite(losses).all()


# -----------------------------------------------------------------------------
# resuming

def test_sigterm_in_an_epoch_saves_and_the_run_resumes_to_the_same_bits(demo, tmp_path):
    """Ten clips in batches of two: five steps an epoch. The paper's SGD phases come too."""
    arguments = [*CLS, "--batch_size=2", "--variant=tail", "--recipe=paper", "--epochs=8",
                 f"--data={demo}/demo_clips", "--task=genre", "--learning_rate=1e-2",
                 "--patience=0", "--log_every=3"]
    run("finetune_cls.py", *arguments, f"--out={tmp_path}/a.pt")
    said, status = stopped_by(signal.SIGTERM, "finetune_cls.py", 8, tmp_path / "b.pt", *arguments)
    assert "error: stopped at step" in said and status == 1 and "Traceback" not in said
    assert 5 < torch.load(tmp_path / "b.resume", weights_only=True)["step"] < 40
    run("finetune_cls.py", *arguments, f"--out={tmp_path}/b.pt", "--resume=True")
    assert same_weights(tmp_path / "a.resume", tmp_path / "b.resume")
    assert same_weights(tmp_path / "a.pt", tmp_path / "b.pt")
    assert facts(tmp_path / "a.pt") == facts(tmp_path / "b.pt")
    phases = [entry["phase"] for entry in facts(tmp_path / "a.pt") if entry["phase"] is not None]
    assert max(phases) > 0


TO_STOP = ["--batch_size=2", "--variant=tail", "--epochs=3", "--learning_rate=1e-2",
           "--recipe=modern"]


def test_two_processes_do_what_one_does(demo, tmp_path):
    """With BatchNorm over both, and through a change of phase."""
    args = [*CLS, f"--data={demo}/demo_clips", "--dropout=0", "--patience=0",
            "--learning_rate=1e-4", "--sync_batchnorm=True", "--log_every=1"]
    two = [*TORCHRUN, "finetune_cls.py"]
    run("finetune_cls.py", *args, "--epochs=3", f"--out={tmp_path}/one.pt")
    said = run(two, *args, "--epochs=3", f"--out={tmp_path}/two.pt")
    assert said.count("best validation loss") == 1          # one process speaks and writes
    one, both = (log_of(tmp_path / name) for name in ("one.pt", "two.pt"))
    assert [entry["step"] for entry in one] == [entry["step"] for entry in both]
    for key in ("loss", "val_loss"):
        wanted, found = ([entry[key] for entry in log if key in entry] for log in (one, both))
        assert found[0] == pytest.approx(wanted[0], rel=1e-5)
        assert found == pytest.approx(wanted, rel=5e-3)     # rounding grows from step to step
    refused = run("finetune_cls.py", *args, "--epochs=3", f"--out={tmp_path}/two.pt",
                  "--resume=True", ok=False)
    assert "processes: 2 -> 1" in refused
    assert "at least 2" in run("finetune_cls.py", *args, "--batch_size=1", ok=False)


@pytest.fixture(scope="module")
def unstopped(demo, tmp_path_factory):
    out = tmp_path_factory.mktemp("unstopped") / "a.pt"
    finetune(demo, out, *TO_STOP)
    return out


@pytest.mark.parametrize("step", [0, 5, 12])
def test_a_run_that_was_stopped_at_any_step_resumes_to_the_same_bits(
        demo, unstopped, tmp_path, step):
    code = f"""
import sys, runtime, finetune_cls
class Stop:
    count = 0
    def __init__(self): pass
    @property
    def asked(self):
        Stop.count += 1
        return Stop.count > {step}
runtime.Stop, sys.argv[0] = Stop, "finetune_cls.py"
runtime.script(finetune_cls.main)"""
    common = [*CLS, f"--data={demo}/demo_clips", f"--out={tmp_path}/b.pt", *TO_STOP]
    assert f"stopped at step {step};" in run(["-c", code], *common, ok=False)
    finetune(demo, tmp_path / "b.pt", *TO_STOP, "--resume=True")
    assert same_weights(unstopped.with_suffix(".resume"), tmp_path / "b.resume")
    assert facts(unstopped) == facts(tmp_path / "b.pt")


def test_splits_that_changed_since_are_noticed(demo, tmp_path):
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
    assert "other splits or labels than when" in run(*scoring, ok=False)
    said = finetune(demo, tmp_path / "a.pt", *arguments, "--resume=True", ok=False)
    assert "are not those that this run was started with" in said
    run(*scoring, f"--data={tmp_path}/clips")  # asked for
    path.write_text(before)
    (tmp_path / "clips").rename(tmp_path / "moved")  # the same, elsewhere
    finetune(demo, tmp_path / "a.pt", *arguments, f"--data={tmp_path}/moved", "--resume=True")


# -----------------------------------------------------------------------------
# wrong input

@pytest.fixture(scope="module")
def answers(demo, separator, tail_only, tmp_path_factory):
    """{number: what a script says} of all wrong inputs, run in one process."""
    root = tmp_path_factory.mktemp("wrong")
    jobs = []
    for script, args, _ in WRONG:
        words = {"SONGS": f"--data={demo}/demo_songs", "CLIPS": f"--data={demo}/demo_clips"}
        args = [words.get(arg, arg).format(separator=separator, tail=tail_only, demo=demo)
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


AST = [arg for arg in CLS if "tail_widths" not in arg] + ["--variant=ast"]
SMALL = [arg for arg in CLS if not arg.startswith("--epochs")]
WRONG = [
    ("pretrain_sep.py", ["--data=nowhere"], "no prepared data in nowhere"),
    ("pretrain_sep.py", ["CLIPS"], "separation needs songs with stems"),
    ("pretrain_sep.py", ["SONGS", "--sources=guitar"], "sources must be some of"),
    ("pretrain_sep.py", ["SONGS", "--batch_size=3", "--accumulate=2"], "must be a multiple"),
    ("pretrain_sep.py", ["SONGS", "--dtype=int8"], "dtype must be one of"),
    ("pretrain_sep.py", ["SONGS", "--pool=median"], "pool must be one of"),
    ("pretrain_sep.py", ["SONGS", "--resume=True"], "to go on from"),
    ("pretrain_sep.py", ["SONGS", "--batch_size=0"], "batch_size must be at least 1"),
    ("pretrain_sep.py", ["SONGS", "--accumulate=0"], "accumulate must be at least 1"),
    ("pretrain_sep.py", ["SONGS", "--device=gpu"], "device=gpu does not work here"),
    ("pretrain_sep.py", ["SONGS", "--seed=-1"], "seed must be from 0"),
    ("pretrain_sep.py", ["SONGS", "--seed=4294967296"], "seed must be from 0 to 4294967295"),
    ("pretrain_sep.py", ["SONGS", "--learning_rate=1e999"], "learning_rate must be a finite"),
    ("pretrain_sep.py", ["SONGS", "--learning_rate=0"], "learning_rate must be above 0"),
    ("pretrain_sep.py", ["SONGS", "{demo}/demo_songs/audio.int16"], "audio.int16: "),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--tail_widths=4,4"], "tail_widths seven"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--variant=tail", "--freeze=tail"], "has only a tail"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--init={tail}"], "is a classifier of variant tail"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--init=none.pt"], "no checkpoint at none.pt"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--init=README.md"], "cannot be read as a checkpoint"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--task=mood"], "no task 'mood'"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--batch_size=64"], "do not fill"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--batch_size=1"], "batch_size must be at least 2"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--dropout=1.5"], "dropout must be from 0 to 1"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--tail={tail}"], "needs variant=v3"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--variant=v3", "--tail={separator}"],
     "not a classifier of variant tail"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--skips=6"], "skips must be from 0 to 5"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--label_fraction=0"], "label_fraction must be from"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--fold=0"], "needs clips with folds 0, 1, 2"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--fold=-2"], "fold must be at least -1"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--vit=v.npz"], "vit= needs variant=ast"),
    ("finetune_cls.py", ["CLIPS", *AST, "--vit=v.npz", "--tail={tail}"], "choose one"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--frames=768"], "384 without a transformer"),
    ("finetune_cls.py", ["CLIPS", *AST, "--frames=100"], "frames must be a multiple of 64"),
    ("finetune_cls.py", ["CLIPS", *AST, "--transformer=32,4,2"], "with 4 layers --skips is at"),
    ("finetune_cls.py", ["CLIPS", *AST, "--transformer=30,12,4"], "a multiple of the heads"),
    ("finetune_cls.py", ["CLIPS", *AST, "--vit=README.md"], "cannot be read as an .npz"),
    ("finetune_cls.py", ["CLIPS", *SMALL, "--init=released:vocal"], "did you mean vocals?"),
    ("eval.py", ["none.pt"], "no checkpoint at none.pt"),
    ("eval.py", ["{tail}", "SONGS"], "classification needs labelled clips"),
    ("eval.py", ["{tail}", "--task=genre"], "evaluate it on the data it was trained for"),
    ("eval.py", ["{tail}", "--name=a/b"], "without /"),
    ("eval.py", ["{tail}", "--split=dev"], "split must be one of"),
    ("eval.py", ["{tail}", "--bootstrap=-1"], "bootstrap must be at least 0"),
]


@pytest.mark.parametrize("number", range(len(WRONG)), ids=[w[2] for w in WRONG])
def test_wrong_input_is_told_before_anything_is_written(answers, number):
    assert WRONG[number][2] in answers[number] and "Traceback" not in answers[number]
