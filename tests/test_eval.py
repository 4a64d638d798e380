"""
Stage 3: metrics against independent references, results, tables.

    python -m pytest -q tests/test_eval.py
"""
import json
import os

import numpy as np
import torch
from conftest import CLS, NARROW, TAIL, randomise, run, write_tensorflow

import data
import eval as evaluation
import model

# -----------------------------------------------------------------------------
# classification

def test_a_tag_that_all_clips_have_is_not_scored():
    targets, scores = np.array([[1, 0], [1, 1], [1, 0]]), np.array([[0.1, 0.3], [0.2, 0.2], [0, 0]])
    rows = evaluation.per_class(targets, scores, ["a", "b"], True)
    assert rows[0]["ROC-AUC"] is None and rows[1]["ROC-AUC"] == 0.5


def test_scores_do_not_depend_on_how_clips_come_together(demo):
    clips = data.Clips(data.Prepared(str(demo / "demo_clips"), "clips"), "test", "tags")
    net = randomise(model.Classifier(16, True, "v1", widths=NARROW, tail_widths=TAIL))
    together = torch.cat([clips.clip(n) for n in range(len(clips))])
    with torch.no_grad():
        together = torch.sigmoid(net(together)).numpy()
    np.testing.assert_allclose(evaluation.clip_scores(net, clips), together, atol=1e-6)


def test_a_checkpoint_of_a_fold_is_measured_on_data_without_folds(demo, capsys):
    folder, meta = str(demo / "demo_clips"), {"config": {"fold": 1}}
    prepared = evaluation.prepared_for(meta, "a.pt", "clips", folder, "test")
    assert len(prepared.items("test")) == 12
    assert "has no folds, so its own test split is measured" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# the script

def test_a_separator_is_measured_between_floor_and_ceiling(separator, tmp_path):
    text = run("eval.py", separator, f"--out={tmp_path}")
    result = json.loads((tmp_path / "sep.json").read_text())["median"]["vocals"]
    assert result["floor"]["SI-SDR"] < result["ceiling"]["SI-SDR"] and "vocals, ceiling" in text
    for name in ("sep.png", "sep_curves.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_several_taggers_make_a_table_over_seeds(tail_only, tmp_path):
    for n in (1, 2):
        (tmp_path / f"run-seed{n}.pt").write_bytes(tail_only.read_bytes())
    text = run("eval.py", tmp_path / "run-seed[12].pt", tail_only, f"--out={tmp_path}",
               "--bootstrap=5")
    result = json.loads((tmp_path / "tail.json").read_text())
    assert f"| run | 2 | {result['metrics']['ROC-AUC']:.4f} ± 0.0000" in text
    assert (tmp_path / "summary.md").read_text().strip() in text
    for name in ("tail_classes.png", "tail_curves.png", "summary.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert "--overwrite=True" in run("eval.py", tail_only, f"--out={tmp_path}", ok=False)


def test_a_name_that_looks_like_a_pattern_is_taken_literally(tail_only, tmp_path):
    (tmp_path / "a[1].pt").write_bytes(tail_only.read_bytes())
    run("eval.py", tmp_path / "a[1].pt", f"--out={tmp_path / 'r'}", "--bootstrap=0")
    assert (tmp_path / "r" / "a[1].json").exists()


def test_results_stand_even_if_no_picture_can_be_drawn(tail_only, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('broken')")
    text = run("eval.py", tail_only, f"--out={tmp_path / 'r'}", "--bootstrap=0",
               env={"PYTHONPATH": str(tmp_path)})
    assert "note: no picture" in text and "broken" in text
    assert sorted(os.listdir(tmp_path / "r")) == ["tail.json", "tail.npz"]


def test_an_error_leaves_no_empty_folder(tail_only, tmp_path):
    run("eval.py", tail_only, "--data=nowhere", f"--out={tmp_path / 'r'}", ok=False)
    assert not (tmp_path / "r").exists()


def test_checkpoints_of_other_clips_make_no_common_table(demo, tail_only, tmp_path):
    (tmp_path / "fewer").mkdir()
    (tmp_path / "fewer" / "audio.int16").symlink_to(demo / "demo_clips" / "audio.int16")
    index = json.loads((demo / "demo_clips" / "index.json").read_text())
    index["items"] = index["items"][:-1]
    (tmp_path / "fewer" / "index.json").write_text(json.dumps(index))
    other = torch.load(tail_only, weights_only=True)
    other["config"]["data"] = str(tmp_path / "fewer")
    torch.save(other, tmp_path / "other.pt")
    text = run("eval.py", tmp_path / "other.pt", tail_only, f"--out={tmp_path / 'r'}",
               "--bootstrap=5")
    assert "no common table" in text and not (tmp_path / "r" / "summary.md").exists()


def test_a_genre_classifier_has_a_confusion_whose_rows_are_the_truth(demo, tmp_path):
    run("finetune_cls.py", *CLS, "--task=genre", "--variant=tail", f"--data={demo}/demo_clips",
        f"--out={tmp_path}/g.pt", "--epochs=0")
    text = run("eval.py", tmp_path / "g.pt", f"--out={tmp_path}", "--bootstrap=5")
    result = json.loads((tmp_path / "g.json").read_text())
    rows = np.array(result["confusion"]).sum(1).tolist()
    assert rows == [row["clips"] for row in result["per_class"]] and sum(rows) == 12
    assert "balanced accuracy" in text and (tmp_path / "g_confusion.png").exists()


def test_a_released_separator_is_told_its_source(demo, tmp_path):
    write_tensorflow(randomise(model.Separator(["vocals"], NARROW)), tmp_path / "checkpoint-1")
    arguments = [tmp_path / "checkpoint-1", f"--data={demo}/demo_songs", f"--out={tmp_path}/r"]
    assert "--sources=vocals" in run("eval.py", *arguments, ok=False)
    assert "vocals, model" in run("eval.py", *arguments, "--sources=vocals")
