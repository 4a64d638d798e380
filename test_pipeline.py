"""
Tests of data, configuration, training and evaluation: the scripts are run as a user runs them, on very small data made on the spot.

    python -m pytest -q test_*.py
"""
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import finetune_cls
import model
import pretrain_sep
import runtime
import synth
from test_model import NARROW, TAIL, randomise, write_tensorflow

ROOT = Path(__file__).resolve().parent


def run(script, *args, ok=True, env=None):
    """Runs a script as a user would; returns what it printed. With ok=False it must end with one line that begins with "error: "."""
    command = [sys.executable, *(script if isinstance(script, list) else [script]), *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, env={**os.environ, **(env or {})})
    if ok:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-4000:]
    assert done.stderr.strip().splitlines()[-1].startswith("error: "), done.stderr
    return done.stderr


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A very small demo set: prepared folder OUT with demo_songs and demo_clips."""
    out = tmp_path_factory.mktemp("data")
    run("prepare_data.py", "demo", f"--out={out}", "--songs=3,2,2", "--song_seconds=15", "--clips=10,4,12", "--clip_seconds=6")
    return out


SEP = [f"--widths={NARROW}", "--batch_size=2", "--val_mixes=2", "--val_every=2", "--log_every=1", "--compile=False", "--device=cpu"]
CLS = [f"--widths={NARROW}", f"--tail_widths={TAIL}", "--batch_size=4", "--chunk=1024", "--epochs=2", "--log_every=1", "--compile=False", "--device=cpu"]


@pytest.fixture(scope="session")
def separator(demo, tmp_path_factory):
    """A separator trained for four steps."""
    out = tmp_path_factory.mktemp("ckpt") / "sep.pt"
    run("pretrain_sep.py", "config/vocals.py", *SEP, f"--data={demo}/demo_songs", f"--out={out}", "--steps=4")
    return out


@pytest.fixture(scope="session")
def tail_only(demo, tmp_path_factory):
    out = tmp_path_factory.mktemp("ckpt") / "tail.pt"
    run("finetune_cls.py", "config/mtat.py", "config/tail.py", *CLS, f"--data={demo}/demo_clips", f"--out={out}")
    return out


# -----------------------------------------------------------------------------
# data

def test_demo_clips_are_labelled_with_what_sounds_in_them():
    for i in range(12):
        rng = np.random.default_rng([7, i])
        song = synth.sketch(rng, full=i % 2 == 0)
        tracks = synth.render(song, 6 * model.SAMPLE_RATE, rng)
        tags = synth.labels(song)
        assert set(tags) <= set(synth.TAGS) and song["genre"] in synth.GENRES
        assert ("voice" in tags) == bool(np.any(tracks["vocals"])) and ("no drums" in tags) == (not np.any(tracks["drums"]))
        np.testing.assert_allclose(tracks["mixture"], sum(tracks[t] for t in data.TRACKS[1:]), atol=1e-12)
        assert max(np.abs(t).max() for t in tracks.values()) <= 0.9 + 1e-9


def test_demo_data_depends_on_the_seed_alone(demo, tmp_path):
    arguments = ["prepare_data.py", "demo", f"--out={tmp_path}", "--songs=3,2,2", "--song_seconds=15", "--clips=10,4,12", "--clip_seconds=6"]
    run(*arguments)
    for name in ("demo_songs/audio.int16", "demo_songs/index.json", "demo_clips/audio.int16", "demo_clips/index.json"):
        assert (demo / name).read_bytes() == (tmp_path / name).read_bytes()
    before = (tmp_path / "demo_songs" / "audio.int16").stat().st_mtime_ns
    assert "nothing done" in run(*arguments)
    assert (tmp_path / "demo_songs" / "audio.int16").stat().st_mtime_ns == before


def test_mixes_are_sums_of_crops_from_different_places(demo):
    songs = data.Prepared(str(demo / "demo_songs"), "stems")
    four = data.Mixes(songs, "train", ["vocals", "other", "drums", "bass"], seed=3)
    mixture, stems = four.batch(10, 3)
    assert mixture.shape == (3, model.CROP) and stems.shape == (3, 4, model.CROP)
    torch.testing.assert_close(stems.sum(1), mixture, atol=1e-6, rtol=0)
    again = four.mix(12)
    assert np.array_equal(again[0], mixture[2].numpy()) and not np.array_equal(four.mix(13)[0], again[0])
    assert not np.array_equal(data.Mixes(songs, "train", four.sources, seed=4).mix(12)[0], again[0])

    # one source, against a plain loop over the same draws
    one = data.Mixes(songs, "train", ["bass"], seed=3)
    rng = np.random.default_rng([3, 0, 5])
    offset, places = int(rng.integers(96_000 - model.CROP + 1)), rng.choice(len(one.segments), 4, replace=False)
    assert len(set(places.tolist())) == 4
    target, whole = np.zeros(model.CROP), np.zeros(model.CROP)
    for k, place in enumerate(places):
        song, at = one.segments[place]
        stems = {t: songs.read(song, t).astype(np.float64)[at + offset:][:model.CROP] for t in data.TRACKS[1:]}
        target += stems["bass"] if k < 2 else 0
        whole += stems["bass"] if k < 2 else stems["drums"] + stems["other"] + stems["vocals"]
    mixture, sources = one.mix(5)
    np.testing.assert_allclose(sources[0], target, atol=1e-6)
    np.testing.assert_allclose(mixture, whole, atol=1e-6)


def test_crops_of_clips(demo):
    clips = data.Clips(data.Prepared(str(demo / "demo_clips"), "clips"), "train", "genre", seed=1)
    waves, targets = clips.batch(0, [4, 7])
    alone, _ = clips.batch(0, [7])
    assert torch.equal(waves[1], alone[0]) and not torch.equal(clips.batch(1, [7])[0], alone)
    assert targets.shape == (2, 4) and (targets.sum(1) == 1).all()
    whole = clips.clip(7)[0]
    assert (whole.unfold(0, model.CROP, 1) == alone[0]).all(1).any()
    assert torch.equal(clips.crops(7, 7), whole[:model.CROP][None])
    assert sorted(clips.order(0)) == list(range(10)) and list(clips.order(0)) != list(clips.order(1))
    clips.items[0] = {**clips.items[0], "length": 1000}
    assert clips.batch(0, [0])[0][0, 1000:].abs().max() == 0 and clips.crops(0, 7).shape == (1, model.CROP)


def test_prefetching_keeps_the_order_and_passes_errors_on():
    assert list(data.prefetch(lambda n: n * n, range(20), 3)) == list(data.prefetch(lambda n: n * n, range(20), 0)) == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(data.prefetch(lambda n: 1 // n, range(3), 2))


@pytest.mark.parametrize("change, message", [({"sample_rate": 44100}, "44100 Hz"), ({"kind": "clips"}, "stems"), ({"format": 99}, "format 99"),
                                             ({"n_samples": 12}, "does not fit its index"),
                                             ({"items": [{"name": "a", "split": "train", "offset": 0, "length": 9.0}]}, "whole numbers")])
def test_data_that_does_not_fit_is_refused(demo, tmp_path, change, message):
    index = json.loads((demo / "demo_songs" / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, **change}))
    os.symlink(demo / "demo_songs" / "audio.int16", tmp_path / "audio.int16")
    assert message in run("pretrain_sep.py", "config/vocals.py", *SEP, f"--data={tmp_path}", f"--out={tmp_path}/x.pt", ok=False)


# -----------------------------------------------------------------------------
# configuration

def test_configuration_order_types_and_mistakes(tmp_path):
    def configure(*argv, **files):
        scope = {"__file__": pretrain_sep.__file__, "__doc__": ""}
        return runtime.configure(scope, list(argv))[0]
    config = tmp_path / "c.py"
    config.write_text("steps = 2 * 500\nlearning_rate = 1\nsources = ['bass']\n_private = 3\n")
    got = configure(str(config), "--steps=1e4", "--widths=1,2", "--compile=False", "--out=a=b.pt")
    assert (got["steps"], got["learning_rate"], got["sources"], got["widths"], got["compile"], got["out"]) == (10_000, 1.0, ["bass"], [1, 2], False, "a=b.pt")
    assert type(got["learning_rate"]) is float and got["batch_size"] == 8 and configure("--sources=vocals,bass")["sources"] == ["vocals", "bass"]
    config.write_text("from pathlib import Path\ndata = Path('data/mine')\n")
    with pytest.raises(SystemExit, match="data must be str"):
        configure(str(config))
    config.write_text("step = 5\n")
    for argv, words in ((["--batchsize=4"], "did you mean 'batch_size'"), (["--steps=many"], "int"), (["--compile=1"], "True / False"), ([str(config)], "'steps'"),
                        (["--steps"], "--key=value"), (["missing.py"], "no config file"), (["--steps=1.5"], "int"), (["--widths=a,b"], "list"), (["--widths=1.5,2"], "int")):
        with pytest.raises(SystemExit, match="error: ") as e:
            configure(*argv)
        assert words in str(e.value)


@pytest.mark.parametrize("script", ["pretrain_sep.py", "finetune_cls.py", "eval.py", "prepare_data.py"])
def test_help_lists_every_key(script):
    text = run(script, "--help")
    keys = runtime._documented_keys(ROOT / script)
    assert len(keys) > 5 and all(f"  {k} = " in text and (comment in text) and comment for k, (_, comment) in keys.items())


@pytest.mark.parametrize("config", sorted(p.name for p in (ROOT / "config").glob("*.py")))
def test_every_config_is_known_to_its_script(config):
    script = pretrain_sep if config in ("vocals.py", "bass.py", "drums.py", "other.py", "multisource.py", "demo_sep.py") else finetune_cls
    runtime.configure({"__file__": script.__file__, "__doc__": ""}, [str(ROOT / "config" / config)])


# -----------------------------------------------------------------------------
# training

def weights_of(path):
    return torch.load(path, weights_only=True)["model"]


def same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_of(path):
    return [json.loads(line) for line in Path(str(path).removesuffix(".pt") + ".jsonl").read_text().splitlines()]


def test_pretraining_resumes_to_the_same_bits_and_overwrites_nothing(demo, separator, tmp_path):
    arguments = ["pretrain_sep.py", "config/vocals.py", *SEP, f"--data={demo}/demo_songs", f"--out={tmp_path}/a.pt", "--steps=4"]
    run(*arguments, "--workers=0")
    assert same_weights(tmp_path / "a.resume", str(separator).replace(".pt", ".resume"))  # again, and with other threads
    full = log_of(tmp_path / "a.pt")
    assert "exists: --resume=True" in run(*arguments, ok=False)
    state = torch.load(tmp_path / "a.resume", weights_only=True)
    run(*arguments, "--overwrite=True", "--steps=2")  # a run may be lengthened: nothing depends on `steps`
    run(*arguments, "--resume=True")
    assert same_weights(tmp_path / "a.resume", str(separator).replace(".pt", ".resume")) and same_weights(tmp_path / "a.pt", separator)
    assert torch.load(tmp_path / "a.resume", weights_only=True)["optimizer"]["state"].keys() == state["optimizer"]["state"].keys()
    facts = [[{k: e.get(k) for k in ("step", "loss", "val_loss", "lr")} for e in entries] for entries in (full, log_of(tmp_path / "a.pt"))]
    assert facts[0] == facts[1]
    assert "other settings (seed: 1 -> 2)" in run(*arguments, "--resume=True", "--seed=2", ok=False)


def test_pretraining_learns(demo, tmp_path):
    run("pretrain_sep.py", "config/multisource.py", *SEP, "--learning_rate=1e-2", "--bn_momentum=0.5", "--val_every=100", "--val_mixes=8",
        f"--data={demo}/demo_songs", f"--out={tmp_path}/a.pt", "--steps=25", "--grad_clip=1.0")
    losses = [e["val_loss"] for e in log_of(tmp_path / "a.pt") if "val_loss" in e]
    assert losses[-1] < 0.85 * losses[0]


def test_accumulation_and_processes_divide_the_same_batch(demo, tmp_path):
    """BatchNorm sees smaller batches, so the losses are near each other, not equal; the first validation comes before any of that."""
    losses = {}
    for name, launch in (("whole", []), ("accumulate", ["--accumulate=2"]), ("processes", [])):
        script = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "pretrain_sep.py"] if name == "processes" else "pretrain_sep.py"
        run(script, "config/vocals.py", *SEP, *launch, "--batch_size=4", "--steps=3", f"--data={demo}/demo_songs", f"--out={tmp_path}/{name}.pt",
            env={"OMP_NUM_THREADS": "1"})
        losses[name] = [e.get("loss", e.get("val_loss")) for e in log_of(tmp_path / f"{name}.pt")]
    for name in ("accumulate", "processes"):
        assert losses[name][0] == pytest.approx(losses["whole"][0], rel=1e-4)
        assert losses[name] == pytest.approx(losses["whole"], rel=0.2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision_trains(demo, separator, tmp_path, dtype):
    run("pretrain_sep.py", "config/vocals.py", *SEP, f"--data={demo}/demo_songs", f"--out={tmp_path}/a.pt", "--steps=2", f"--dtype={dtype}", "--grad_clip=1")
    loss = [[e["loss"] for e in log_of(path) if "loss" in e][:2] for path in (tmp_path / "a.pt", separator)]
    assert loss[0] == pytest.approx(loss[1], rel=0.05) and loss[0] != loss[1]


def test_compiled_and_eager_training_agree(demo, tmp_path):
    losses = {}
    for on in (False, True):
        text = run("pretrain_sep.py", "config/vocals.py", *SEP, f"--data={demo}/demo_songs", f"--out={tmp_path}/{on}.pt", "--steps=2", "--widths=4,4", f"--compile={on}")
        losses[on] = [e["loss"] for e in log_of(tmp_path / f"{on}.pt") if "loss" in e]
    assert "does not work here" not in text or not shutil.which("c++")
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    assert weights_of(tmp_path / "True.pt").keys() == weights_of(tmp_path / "False.pt").keys()  # no "_orig_mod."


def test_training_goes_on_where_compiling_does_not_work(demo, tmp_path):
    text = run("pretrain_sep.py", "config/vocals.py", *SEP, f"--data={demo}/demo_songs", f"--out={tmp_path}/a.pt", "--steps=1", "--compile=True",
               env={"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert text.count("torch.compile does not work here") == 1 and (tmp_path / "a.pt").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(demo, tmp_path):
    message = run("pretrain_sep.py", "config/vocals.py", *SEP, f"--data={demo}/demo_songs", f"--out={tmp_path}/a.pt", "--steps=6", "--learning_rate=1e30",
                  ok=False)
    assert "lower learning_rate" in message
    assert all(torch.isfinite(w).all() for w in weights_of(tmp_path / "a.resume").values())


def test_finetuning_starts_from_the_separator_by_name(demo, separator, tmp_path):
    text = run("finetune_cls.py", *CLS, f"--init={separator}", f"--data={demo}/demo_clips", f"--out={tmp_path}/a.pt", "--epochs=0")
    ours, theirs = weights_of(tmp_path / "a.pt"), weights_of(separator)
    assert f"{len(theirs)} of {len(theirs)} tensors" in text and len(theirs) == 196
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_finetuning_starts_from_tensorflow(demo, tmp_path):
    net = randomise(model.Separator(["vocals"], NARROW))
    write_tensorflow(net, tmp_path / "checkpoint-1")
    run("finetune_cls.py", *CLS, f"--init={tmp_path}/checkpoint-1", f"--data={demo}/demo_clips", f"--out={tmp_path}/a.pt", "--epochs=0")
    assert torch.equal(weights_of(tmp_path / "a.pt")["unet.head.1.weight"], net.unet.head[1].weight)


def test_three_stage_joining_keeps_what_the_tail_knew(demo, separator, tail_only, tmp_path):
    run("finetune_cls.py", *CLS, "--variant=v3", f"--init={separator}", f"--tail={tail_only}", f"--data={demo}/demo_clips", f"--out={tmp_path}/a.pt", "--epochs=0")
    joined, tail = weights_of(tmp_path / "a.pt"), weights_of(tail_only)
    kernel = "tail.blocks.0.convs.0.weight"
    torch.testing.assert_close(joined[kernel].sum(1, keepdim=True), tail[kernel])
    assert joined[kernel].shape[1] == 2 and all(torch.equal(joined[k], tail[k]) for k in tail if k != kernel)


def test_a_frozen_unet_does_not_move_and_the_tail_does(demo, separator, tmp_path):
    run("finetune_cls.py", *CLS, "--freeze=unet", f"--init={separator}", f"--data={demo}/demo_clips", f"--out={tmp_path}/a.pt", "--recipe=modern")
    after, before = torch.load(tmp_path / "a.resume", weights_only=True)["model"], weights_of(separator)
    assert all(torch.equal(after[k], before[k]) for k in before)  # BatchNorm statistics too
    fresh = log_of(tmp_path / "a.pt")
    assert fresh[0]["val_loss"] != fresh[-1]["val_loss"]


@pytest.mark.parametrize("recipe", ["paper", "modern"])
def test_finetuning_resumes_to_the_same_bits(demo, tmp_path, recipe):
    arguments = ["finetune_cls.py", *CLS, "--variant=tail", f"--recipe={recipe}", f"--data={demo}/demo_clips", "--task=genre", "--epochs=4", "--learning_rate=1e-2",
                 "--patience=0"]  # so that the SGD phases come
    run(*arguments, f"--out={tmp_path}/a.pt")
    stopped = "import sys, runtime, finetune_cls as f\nsave = runtime.save_atomically\n" \
              "def stop(thing, path):\n    save(thing, path)\n    if thing.get('epoch') == 2 and 'phase' in thing: sys.exit(0)\n" \
              "runtime.save_atomically = stop\nc, _ = runtime.configure(vars(f), sys.argv[1:]); f.device = 'cpu'\nf.main(c, f.out)"
    run(["-c", stopped], *arguments[1:], f"--out={tmp_path}/b.pt")  # ends right after saving epoch 2
    run(*arguments, f"--out={tmp_path}/b.pt", "--resume=True")
    assert same_weights(tmp_path / "a.resume", tmp_path / "b.resume") and same_weights(tmp_path / "a.pt", tmp_path / "b.pt")
    facts = [[(e["step"], e.get("loss"), e.get("val_loss"), e.get("phase")) for e in log_of(tmp_path / f"{n}.pt")] for n in "ab"]
    assert facts[0] == facts[1]
    assert recipe == "modern" or max(f[3] or 0 for f in facts[0]) > 0


def test_splits_that_changed_since_training_are_noticed(demo, tmp_path):
    shutil.copytree(demo / "demo_clips", tmp_path / "clips")
    arguments = ["finetune_cls.py", *CLS, "--variant=tail", f"--data={tmp_path}/clips", "--epochs=1", f"--out={tmp_path}/a.pt"]
    run(*arguments)
    scoring = ["eval.py", tmp_path / "a.pt", f"--out={tmp_path}/results", "--bootstrap=0", "--overwrite=True"]
    run(*scoring)
    index = json.loads((tmp_path / "clips" / "index.json").read_text())
    a, b = (next(i for i in index["items"] if i["split"] == split) for split in ("train", "test"))
    a["split"], b["split"] = b["split"], a["split"]
    (tmp_path / "clips" / "index.json").write_text(json.dumps(index))
    assert "other splits or labels than when" in run(*scoring, ok=False)
    assert "are not those that this run was started with" in run(*arguments, "--resume=True", ok=False)
    run(*scoring, f"--data={tmp_path}/clips")
    a["split"], b["split"] = b["split"], a["split"]
    (tmp_path / "clips" / "index.json").write_text(json.dumps(index))
    (tmp_path / "clips").rename(tmp_path / "moved")                       # the same, elsewhere
    run(*arguments, f"--data={tmp_path}/moved", "--resume=True")
    state = torch.load(tmp_path / "a.resume", weights_only=True)
    del state["config"]["trained_on"]                                     # as before it was written down
    torch.save(state, tmp_path / "a.resume")
    run(*arguments, f"--data={tmp_path}/moved", "--resume=True")


def test_wrong_input_is_told_in_one_line(demo, separator, tail_only, tmp_path):
    songs, clips, out = f"--data={demo}/demo_songs", f"--data={demo}/demo_clips", f"--out={tmp_path}/x.pt"
    cases = [
        ("pretrain_sep.py", [out, "--data=nowhere"], "no prepared data in nowhere"),
        ("pretrain_sep.py", [out, clips], "separation needs songs with stems"),
        ("pretrain_sep.py", [out, songs, "--sources=guitar"], "sources must be some of"),
        ("pretrain_sep.py", [out, songs, "--batch_size=3", "--accumulate=2"], "must be a multiple"),
        ("pretrain_sep.py", [out, songs, "--dtype=int8"], "dtype must be one of"),
        ("pretrain_sep.py", [out, songs, "--pool=median"], "pool must be one of"),
        ("pretrain_sep.py", [out, songs, "--resume=True"], "to go on from"),
        ("pretrain_sep.py", [out, songs, "--batch_size=0"], "batch_size must be at least 1"),
        ("pretrain_sep.py", [out, songs, "--accumulate=0"], "accumulate must be at least 1"),
        ("pretrain_sep.py", [out, songs, "--device=gpu"], "device=gpu does not work here"),
        ("pretrain_sep.py", [out, demo / "demo_songs" / "audio.int16"], "audio.int16: "),
        ("finetune_cls.py", [out, clips, *CLS, "--tail_widths=4,4"], "tail_widths seven"),
        ("finetune_cls.py", [out, clips, *CLS, "--variant=tail", "--freeze=tail"], "has only tail"),
        ("finetune_cls.py", [out, clips, *CLS, f"--init={tail_only}"], "starts from a separator"),
        ("finetune_cls.py", [out, clips, *CLS, "--init=none.pt"], "no checkpoint at none.pt"),
        ("finetune_cls.py", [out, clips, *CLS, f"--init={ROOT}/README.md"], "cannot be read as a checkpoint"),
        ("finetune_cls.py", [out, clips, *CLS, "--task=mood"], "no task 'mood'"),
        ("finetune_cls.py", [out, clips, *CLS, "--batch_size=64"], "do not fill"),
        ("finetune_cls.py", [out, clips, *CLS, f"--tail={tail_only}"], "needs variant=v3"),
        ("finetune_cls.py", [out, clips, *CLS, "--variant=v3", f"--tail={separator}"], "not a tail-only classifier"),
        ("finetune_cls.py", [out, clips, *CLS, "--variant=v3", f"--tail={tail_only}", "--task=genre"], "of another shape"),
        ("finetune_cls.py", [out, clips, *CLS, "--skips=6"], "skips 0 to 5"),
        ("eval.py", ["none.pt"], "no checkpoint at none.pt"),
        ("eval.py", [tail_only, songs, f"--out={tmp_path}"], "classification needs labelled clips"),
        ("eval.py", [tail_only, "--task=genre", f"--out={tmp_path}"], "evaluate it on the data it was trained for"),
        ("prepare_data.py", ["demos"], "name one"),
    ]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda case: run(case[0], *case[1], ok=False, env={"OMP_NUM_THREADS": "1"}), cases))
    assert [case[2] for case, answer in zip(cases, answers) if case[2] not in answer] == []


# -----------------------------------------------------------------------------
# evaluation

def test_separation_metrics_against_plain_formulas_and_museval():
    rng = np.random.default_rng(0)
    truth = {s: rng.standard_normal(3 * 16000) for s in ("vocals", "bass")}
    guess = {s: t + 0.3 * rng.standard_normal(len(t)) for s, t in truth.items()}
    got = evaluation.song_metrics(evaluation.load_museval().bss_eval, truth, guess, ["vocals"])["vocals"]
    error = truth["vocals"] - guess["vocals"]
    assert got["new SDR"] == pytest.approx(10 * math.log10((truth["vocals"] @ truth["vocals"]) / (error @ error)), abs=1e-4)
    assert got["SI-SDR"] == pytest.approx(evaluation.si_sdr(truth["vocals"], 0.1 * guess["vocals"]), abs=1e-9)
    assert got["SDR"] == pytest.approx(-20 * math.log10(0.3), abs=0.5) and got["SIR"] > got["SDR"]
    silent = evaluation.song_metrics(evaluation.load_museval().bss_eval, {**truth, "drums": np.zeros(48000)}, {**guess, "drums": guess["bass"]}, ["vocals", "drums"])
    assert "drums" not in silent and silent["vocals"] == got


def test_tagging_and_genre_metrics():
    rng = np.random.default_rng(0)
    targets, scores = (rng.random((60, 4)) < 0.3).astype(int), rng.random((60, 4))
    targets[:, 2] = 0  # no such clip: no AUC
    pairs = [[np.mean([(p > n) + 0.5 * (p == n) for p in scores[targets[:, c] == 1, c] for n in scores[targets[:, c] == 0, c]])] for c in (0, 1, 3)]
    got = evaluation.tag_metrics(targets, scores)
    assert got["tags used"] == 3 and got["ROC-AUC"] == pytest.approx(np.mean(pairs))
    low, high = evaluation.interval(evaluation.tag_metrics, targets, scores)["ROC-AUC"]
    assert low < got["ROC-AUC"] < high
    one_hot = np.eye(3, dtype=int)[[0, 0, 0, 1]]
    genre = evaluation.genre_metrics(one_hot, np.eye(3)[[0, 0, 1, 1]])
    assert genre == pytest.approx({"accuracy": 0.75, "macro F1": (0.8 + 2 / 3) / 2, "balanced accuracy": (2 / 3 + 1) / 2})


def test_evaluating_checkpoints(demo, separator, tail_only, tmp_path):
    text = run("eval.py", separator, f"--out={tmp_path}")
    result = json.loads((tmp_path / "sep.json").read_text())
    assert result["median"]["vocals"]["floor"]["SI-SDR"] < result["median"]["vocals"]["ceiling"]["SI-SDR"] and "vocals, ceiling" in text
    for n in (1, 2):
        (tmp_path / f"run-seed{n}.pt").write_bytes(tail_only.read_bytes())
    text = run("eval.py", tmp_path / "run-seed1.pt", tmp_path / "run-seed2.pt", tail_only, f"--out={tmp_path}", "--bootstrap=5")
    result = json.loads((tmp_path / "tail.json").read_text())
    assert f"| run | 2 | {result['metrics']['ROC-AUC']:.4f} ± 0.0000" in text
    for picture in ("sep.png", "sep_curves.png", "tail_classes.png", "tail_curves.png", "summary.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
    assert "--overwrite=True" in run("eval.py", tail_only, f"--out={tmp_path}", ok=False)

    (tmp_path / "fewer").mkdir()
    (tmp_path / "fewer" / "audio.int16").symlink_to(demo / "demo_clips" / "audio.int16")
    index = json.loads((demo / "demo_clips" / "index.json").read_text())
    index["items"] = index["items"][:-1]  # one test clip less: no common table, which would have one floor for both
    (tmp_path / "fewer" / "index.json").write_text(json.dumps(index))
    other = torch.load(tail_only, weights_only=True)
    other["config"]["data"] = str(tmp_path / "fewer")
    torch.save(other, tmp_path / "other.pt")
    text = run("eval.py", tmp_path / "other.pt", tail_only, f"--out={tmp_path / 'two'}", "--bootstrap=5")
    assert "no common table" in text and not (tmp_path / "two" / "summary.md").exists()


def test_evaluating_a_genre_classifier_and_a_tensorflow_separator(demo, tmp_path):
    run("finetune_cls.py", *CLS, "--task=genre", "--variant=tail", f"--data={demo}/demo_clips", f"--out={tmp_path}/g.pt", "--epochs=0")
    assert "balanced accuracy" in run("eval.py", tmp_path / "g.pt", f"--out={tmp_path}", "--bootstrap=5")
    result = json.loads((tmp_path / "g.json").read_text())
    assert np.array(result["confusion"]).sum() == 12 and (tmp_path / "g_confusion.png").exists()
    assert np.array(result["confusion"]).sum(1).tolist() == [r["clips"] for r in result["per_class"]]  # rows are the truth
    prefix = tmp_path / "checkpoint-1"
    write_tensorflow(randomise(model.Separator(["vocals"], NARROW)), prefix)
    assert "--sources=vocals" in run("eval.py", prefix, f"--data={demo}/demo_songs", f"--out={tmp_path}/tf", ok=False)
    assert "vocals, model" in run("eval.py", prefix, f"--data={demo}/demo_songs", f"--out={tmp_path}/tf", "--sources=vocals")


def test_scores_do_not_depend_on_how_clips_come_together(demo, monkeypatch):
    monkeypatch.setattr(evaluation, "device", "cpu")
    clips = data.Clips(data.Prepared(str(demo / "demo_clips"), "clips"), "test", "tags")
    net = randomise(model.Classifier(len(clips.classes), True, "v1", widths=NARROW, tail_widths=TAIL))
    scores = evaluation.clip_scores(net, clips)
    with torch.no_grad():
        together = torch.sigmoid(net(torch.cat([clips.clip(n) for n in range(len(clips))]))).numpy()
    np.testing.assert_allclose(scores, together, atol=1e-6)
    assert torch.isfinite(finetune_cls.crop_losses(net(clips.crops(0, 7)), clips.targets[:1], True)).all()
