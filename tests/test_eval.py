"""
Stage 3: metrics against independent references, results, tables.

    python -m pytest -q tests/test_eval.py
"""
import importlib.util
import json
import math
import os

import numpy as np
import pytest
import torch
from conftest import CLS, NARROW, RATE, TAIL, randomise, run, write_tensorflow
from sklearn import metrics

import data
import eval as evaluation
import model


@pytest.fixture(scope="module")
def museval():
    """Its metrics alone: the package imports what refuses to load without an ffmpeg program."""
    folder = importlib.util.find_spec("museval").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("m", os.path.join(folder, "metrics.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def songs(sources=2, seconds=5, seed=0, overlap=0.3):
    """References and estimates, lists of float32 waves, that are related but not the same."""
    rng = np.random.default_rng(seed)
    truth = [rng.standard_normal(seconds * RATE).astype(np.float32) for _ in range(sources)]
    guess = []
    for i, wave in enumerate(truth):
        filtered = np.convolve(wave, [0.9, 0.2, -0.1])[:len(wave)]
        other = truth[(i + 1) % sources]
        noise = 0.1 * rng.standard_normal(len(wave))
        guess.append((filtered + overlap * other + noise).astype(np.float32))
    return truth, guess


# -----------------------------------------------------------------------------
# separation

@pytest.mark.parametrize("sources, seconds", [(2, 5), (4, 7), (2, 1)])
def test_bss_eval_is_musevals(museval, sources, seconds):
    truth, guess = songs(sources, seconds)
    stacked = [np.stack(waves).astype(np.float64)[..., None] for waves in (truth, guess)]
    sdr, _, sir, sar, _ = museval.bss_eval(*stacked, window=RATE, hop=RATE,
                                           compute_permutation=False)
    for ours, theirs in zip(evaluation.bss_eval(truth, guess), (sdr, sir, sar), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_frames_with_a_silent_source_have_no_value(museval):
    truth, guess = songs(2, 4)
    truth[0][RATE:2 * RATE] = 0
    ours = evaluation.bss_eval(truth, guess)
    stacked = [np.stack(waves).astype(np.float64)[..., None] for waves in (truth, guess)]
    theirs = museval.bss_eval(*stacked, window=RATE, hop=RATE, compute_permutation=False)[0]
    assert np.isnan(ours[:, :, 1]).all() and np.isfinite(np.delete(ours, 1, 2)).all()
    np.testing.assert_allclose(ours[0], theirs, atol=1e-4)


def test_sdr_of_a_song_against_plain_formulas():
    (truth, _), (guess, _) = songs()
    truth, guess = truth.astype(np.float64), guess.astype(np.float64)
    error = np.sum((truth - guess) ** 2)
    assert evaluation.new_sdr(truth, guess) == pytest.approx(
        10 * math.log10(np.sum(truth ** 2) / error), abs=1e-6)
    scaled = np.dot(guess, truth) / np.dot(truth, truth) * truth
    plain = 10 * math.log10(np.sum(scaled ** 2) / np.sum((guess - scaled) ** 2))
    assert evaluation.si_sdr(truth, guess) == pytest.approx(plain, abs=1e-6)
    assert evaluation.si_sdr(truth, 0.1 * guess) == pytest.approx(plain, abs=1e-6)


def test_a_source_that_is_silent_all_through_is_left_out():
    (vocals, bass), (guess, other) = songs()
    silence = np.zeros_like(vocals)
    truth, guess = {"vocals": vocals, "bass": bass}, {"vocals": guess, "bass": other}
    whole = evaluation.song_metrics(truth, guess, ["vocals", "drums"])
    more = evaluation.song_metrics({**truth, "drums": silence}, {**guess, "drums": other},
                                   ["vocals", "drums"])
    assert whole == more and "drums" not in whole
    alone = evaluation.song_metrics({"vocals": vocals, "rest": silence}, guess, ["vocals"])
    assert set(alone["vocals"]) == {"SI-SDR", "new SDR"}


def test_the_ceiling_in_pieces_is_the_ceiling_at_once():
    truth, _ = songs(2, 11)
    mixture = sum(truth)
    whole = evaluation.oracle(mixture, truth, piece=10 ** 9)
    pieces = evaluation.oracle(mixture, truth, piece=2 * RATE)
    np.testing.assert_allclose(pieces, whole, atol=1e-5)
    assert evaluation.si_sdr(truth[0], whole[0]) > evaluation.si_sdr(truth[0], mixture) + 2


# -----------------------------------------------------------------------------
# classification

@pytest.fixture
def tags():
    """60 clips, 5 tags: one that no clip has, one that every clip has; scores with ties."""
    rng = np.random.default_rng(0)
    targets = (rng.random((60, 5)) < 0.3).astype(int)
    targets[:, 2], targets[:, 4] = 0, 1
    return targets, np.round(rng.random((60, 5)), 1)


def test_auc_is_the_share_of_pairs_in_the_right_order(tags):
    targets, scores = tags
    aucs = []
    for c in (0, 1, 3):
        yes, no = scores[targets[:, c] == 1, c], scores[targets[:, c] == 0, c]
        pairs = (yes[:, None] > no) + 0.5 * (yes[:, None] == no)
        aucs.append(pairs.mean())
    found = evaluation.tag_metrics(targets, scores)
    assert found["tags used"] == 3 and found["ROC-AUC"] == pytest.approx(np.mean(aucs))
    used = [0, 1, 3]
    assert found["PR-AUC"] == pytest.approx(
        metrics.average_precision_score(targets[:, used], scores[:, used]))


def test_tags_with_one_class_only_have_no_auc(tags):
    rows = evaluation.per_class(*tags, list("abcde"), True)
    assert [row["ROC-AUC"] is None for row in rows] == [False, False, True, False, True]
    with pytest.raises(ValueError, match="there is no AUC"):
        evaluation.tag_metrics(tags[0][:1], tags[1][:1])  # a single clip


def test_the_interval_holds_the_value_and_follows_from_the_seed(tags):
    low, high = evaluation.interval(evaluation.tag_metrics, *tags, 50, 1)["ROC-AUC"]
    assert low < evaluation.tag_metrics(*tags)["ROC-AUC"] < high
    assert [low, high] == evaluation.interval(evaluation.tag_metrics, *tags, 50, 1)["ROC-AUC"]
    assert evaluation.interval(evaluation.tag_metrics, *tags, 0, 1) == {}


def test_genre_metrics_are_means_over_the_classes_that_occur():
    targets, scores = np.eye(3, dtype=int)[[0, 0, 0, 1]], np.eye(3)[[0, 0, 1, 1]]
    assert evaluation.genre_metrics(targets, scores) == pytest.approx(
        {"accuracy": 0.75, "macro F1": (0.8 + 2 / 3) / 2, "balanced accuracy": (2 / 3 + 1) / 2})


def test_scores_do_not_depend_on_how_clips_come_together(demo):
    clips = data.Clips(data.Prepared(str(demo / "demo_clips"), "clips"), "test", "tags")
    net = randomise(model.Classifier(15, True, "v1", widths=NARROW, tail_widths=TAIL))
    together = torch.cat([clips.clip(n) for n in range(len(clips))])
    with torch.no_grad():
        together = torch.sigmoid(net(together)).numpy()
    np.testing.assert_allclose(evaluation.clip_scores(net, clips), together, atol=1e-6)


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
    assert sorted(os.listdir(tmp_path / "r")) == ["tail.json"]


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
