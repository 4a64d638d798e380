"""
Evaluation: the oracle, results of separators and classifiers, means over seeds.

    python -m pytest -q tests/test_eval.py
"""
import json
import os

import numpy as np
import pytest
import torch
from conftest import CLS, NARROW, RATE, TAIL, randomise, run, write_tensorflow
from sklearn import metrics as sk

import data
import eval as evaluation
import model
from common import metrics

# -----------------------------------------------------------------------------
# functions

def test_oracle_in_blocks_matches_oracle_of_the_whole_song():
    rng = np.random.default_rng(0)
    stems = [rng.standard_normal(11 * RATE).astype(np.float32) for _ in range(2)]
    mixture = sum(stems)
    whole = evaluation.oracle(mixture, stems, block=10 ** 9)
    blocks = evaluation.oracle(mixture, stems, block=2 * RATE)
    np.testing.assert_allclose(blocks, whole, atol=1e-5)
    assert metrics.si_sdr(stems[0], whole[0]) > metrics.si_sdr(stems[0], mixture) + 2


def test_per_class_scores_match_scikit_learn():
    targets = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0]])
    scores = np.array([[0.1, 0.3, 0.5], [0.2, 0.2, 0.1], [0, 0, 0.9]])
    a, b, c = evaluation.per_class(targets, scores, ["a", "b", "c"], True)
    assert a["ROC-AUC"] is None and c["PR-AUC"] is None and "recall" not in a
    assert b["ROC-AUC"] == sk.roc_auc_score(targets[:, 1], scores[:, 1])
    targets = np.eye(3, dtype=int)[[0, 0, 1]]
    rows = evaluation.per_class(targets, scores, ["a", "b", "c"], False)
    assert [row["recall"] for row in rows] == [0.5, 0.0, None]


def test_scores_do_not_depend_on_batching(demo):
    clips = data.Clips(data.Prepared(str(demo / "demo_clips"), "clips"), "test", "tags")
    net = randomise(model.Classifier(16, True, "v1", widths=NARROW, tail_widths=TAIL))
    batch = torch.cat([clips.clip(n) for n in range(len(clips))])           # (clips, N)
    with torch.no_grad():
        batched = torch.sigmoid(net(batch)).numpy()
    np.testing.assert_allclose(evaluation.clip_scores(net, clips), batched, atol=1e-6)


def test_checkpoint_of_a_fold_on_data_without_folds(demo, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "data", str(demo / "demo_clips"))
    prepared = evaluation.prepared_for({"kind": "classifier", "config": {"fold": 1}}, "a.pt")
    assert len(prepared.items("test")) == 12
    assert "no folds" in capsys.readouterr().out


def test_data_with_other_labels_is_refused_unless_named(demo, monkeypatch):
    meta = {"kind": "classifier", "config": {"data": str(demo / "demo_clips"), "trained_on": "x"}}
    with pytest.raises(SystemExit, match="demo_clips have changed"):
        evaluation.prepared_for(meta, "a.pt")
    monkeypatch.setattr(evaluation, "data", str(demo / "demo_clips"))
    assert evaluation.prepared_for(meta, "a.pt").path == str(demo / "demo_clips")
    with pytest.raises(SystemExit, match="--data="):
        monkeypatch.setattr(evaluation, "data", "")
        evaluation.prepared_for({"kind": "classifier", "config": {}}, "a.pt")


# -----------------------------------------------------------------------------
# the script

def test_separator_is_compared_with_mixture_and_oracle(separator, tmp_path):
    output = run("eval.py", separator, f"--out={tmp_path}")
    result = json.loads((tmp_path / "sep.json").read_text())["median"]["vocals"]
    assert list(result) == ["model", "mixture", "oracle"]
    assert result["mixture"]["SI-SDR"] < result["oracle"]["SI-SDR"]
    assert f"{result['oracle']['SI-SDR']:.2f}" in output
    for name in ("sep.png", "sep_curves.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_several_checkpoints_have_means_over_seeds(tail_only, tmp_path):
    other = torch.load(tail_only, weights_only=True)
    for weight in other["model"].values():
        weight += 0.1 * torch.randn(weight.shape) if weight.is_floating_point() else 0
    (tmp_path / "run-seed1.pt").write_bytes(tail_only.read_bytes())
    torch.save(other, tmp_path / "run-seed2.pt")
    output = run("eval.py", tmp_path / "run-seed[12].pt", tail_only, f"--out={tmp_path}",
                 "--bootstrap=5").splitlines()
    results = [json.loads((tmp_path / f"{name}.json").read_text())["metrics"]["ROC-AUC"]
               for name in ("run-seed1", "run-seed2", "tail")]
    mean, std = np.mean(results[:2]), np.std(results[:2], ddof=1)
    assert any(line.startswith("run,") and f"ROC-AUC {mean:.4f} ± {std:.4f}" in line
               for line in output)
    assert any(line.startswith("tail,") and f"ROC-AUC {results[2]:.4f}," in line
               for line in output)
    for name in ("tail_classes.png", "tail_curves.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert "tail.json" in run("eval.py", tail_only, f"--out={tmp_path}", ok=False)


def test_runs_on_other_test_clips_are_not_averaged(demo, tail_only, tmp_path):
    (tmp_path / "fewer").mkdir()
    (tmp_path / "fewer" / "audio.int16").symlink_to(demo / "demo_clips" / "audio.int16")
    index = json.loads((demo / "demo_clips" / "index.json").read_text())
    index["items"] = index["items"][:-1]
    (tmp_path / "fewer" / "index.json").write_text(json.dumps(index))
    other = torch.load(tail_only, weights_only=True)
    other["config"]["data"] = str(tmp_path / "fewer")
    torch.save(other, tmp_path / "a-seed2.pt")
    (tmp_path / "a-seed1.pt").write_bytes(tail_only.read_bytes())
    output = run("eval.py", tmp_path / "a-seed1.pt", tmp_path / "a-seed2.pt",
                 f"--out={tmp_path / 'r'}", "--bootstrap=0", "--pictures=False")
    assert output.count("\na, n = 1: ") == 2 and "±" not in output


def test_two_checkpoints_of_the_same_name_are_refused(tail_only, tmp_path):
    (tmp_path / "tail.pt").write_bytes(tail_only.read_bytes())
    errors = run("eval.py", tail_only, tmp_path / "tail.pt", f"--out={tmp_path / 'r'}", ok=False)
    assert str(tmp_path / "r" / "tail.json") in errors


def test_an_existing_path_is_not_a_pattern(tail_only, tmp_path):
    for name in ("a[1].pt", "a1.pt"):
        (tmp_path / name).write_bytes(tail_only.read_bytes())
    run("eval.py", tmp_path / "a[1].pt", f"--out={tmp_path / 'r'}", "--bootstrap=0")
    assert (tmp_path / "r" / "a[1].json").exists() and not (tmp_path / "r" / "a1.json").exists()


def test_results_are_written_without_matplotlib(tail_only, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('broken')")
    output = run("eval.py", tail_only, f"--out={tmp_path / 'r'}", "--bootstrap=0",
                 env={"PYTHONPATH": str(tmp_path)})
    assert "tail_classes.png: ImportError: broken" in output
    assert sorted(os.listdir(tmp_path / "r")) == ["tail.json", "tail.npz"]


def test_an_error_leaves_no_empty_folder(tail_only, tmp_path):
    assert "nowhere" in run("eval.py", tail_only, "--data=nowhere", f"--out={tmp_path / 'r'}",
                            ok=False)
    assert not (tmp_path / "r").exists()


def test_an_unwritable_folder_is_found_before_the_evaluation(tail_only, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "r"
    assert str(tmp_path / "file") in run("eval.py", tail_only, f"--out={out}", ok=False)


def test_rows_of_the_confusion_matrix_are_true_classes(demo, tmp_path):
    run("finetune_cls.py", *CLS, "--task=genre", "--variant=tail", f"--data={demo}/demo_clips",
        f"--out={tmp_path}/g.pt", "--epochs=0")
    output = run("eval.py", tmp_path / "g.pt", f"--out={tmp_path}", "--bootstrap=5")
    result = json.loads((tmp_path / "g.json").read_text())
    rows = np.array(result["confusion"]).sum(1).tolist()
    assert rows == [row["clips"] for row in result["per_class"]] and sum(rows) == 12
    assert result["chance"] == {"accuracy": max(rows) / 12, "balanced accuracy": 0.25}
    assert "balanced accuracy" in output and (tmp_path / "g_confusion.png").exists()


def test_released_separator_needs_its_source(demo, tmp_path):
    write_tensorflow(randomise(model.Separator(["vocals"], NARROW)), tmp_path / "checkpoint-1")
    arguments = [tmp_path / "checkpoint-1", f"--data={demo}/demo_songs", f"--out={tmp_path}/r"]
    assert "--sources=vocals" in run("eval.py", *arguments, ok=False)
    assert "vocals, model" in run("eval.py", *arguments, "--sources=vocals")
