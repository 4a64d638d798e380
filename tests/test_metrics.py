"""
Metrics against independent references: scikit-learn, museval, plain loops.

    python -m pytest -q tests/test_metrics.py
"""
import importlib.util
import math
import os

import numpy as np
import pytest
from conftest import RATE
from sklearn import metrics as sk

from common import metrics


@pytest.fixture(scope="module")
def museval():
    """museval.metrics, loaded alone: importing the package needs an ffmpeg program."""
    folder = importlib.util.find_spec("museval").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("m", os.path.join(folder, "metrics.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def songs(sources=2, seconds=5, seed=0, overlap=0.3):
    """References, and estimates with filtering, interference and noise: lists of float32 (N,)."""
    rng = np.random.default_rng(seed)
    truth = [rng.standard_normal(seconds * RATE).astype(np.float32) for _ in range(sources)]
    guess = []
    for i, wave in enumerate(truth):
        filtered = np.convolve(wave, [0.9, 0.2, -0.1])[:len(wave)]
        other = truth[(i + 1) % sources]
        noise = 0.1 * rng.standard_normal(len(wave))
        guess.append((filtered + overlap * other + noise).astype(np.float32))
    return truth, guess


@pytest.mark.parametrize("sources, seconds", [(2, 5), (4, 7), (2, 1)])
def test_bss_eval_matches_museval(museval, sources, seconds):
    truth, guess = songs(sources, seconds)
    stacked = [np.stack(waves).astype(np.float64)[..., None] for waves in (truth, guess)]
    sdr, _, sir, sar, _ = museval.bss_eval(*stacked, window=RATE, hop=RATE,
                                           compute_permutation=False)
    for ours, theirs in zip(metrics.bss_eval(truth, guess), (sdr, sir, sar), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_frames_with_a_silent_source_are_nan(museval):
    truth, guess = songs(2, 4)
    truth[0][RATE:2 * RATE] = 0
    ours = metrics.bss_eval(truth, guess)
    stacked = [np.stack(waves).astype(np.float64)[..., None] for waves in (truth, guess)]
    theirs = museval.bss_eval(*stacked, window=RATE, hop=RATE, compute_permutation=False)[0]
    assert np.isnan(ours[:, :, 1]).all() and np.isfinite(np.delete(ours, 1, 2)).all()
    np.testing.assert_allclose(ours[0], theirs, atol=1e-4)


def test_song_level_sdr_matches_definition():
    (truth, _), (guess, _) = songs()
    truth, guess = truth.astype(np.float64), guess.astype(np.float64)
    error = np.sum((truth - guess) ** 2)
    assert metrics.new_sdr(truth, guess) == pytest.approx(
        10 * math.log10(np.sum(truth ** 2) / error), abs=1e-6)
    scaled = np.dot(guess, truth) / np.dot(truth, truth) * truth
    plain = 10 * math.log10(np.sum(scaled ** 2) / np.sum((guess - scaled) ** 2))
    assert metrics.si_sdr(truth, guess) == pytest.approx(plain, abs=1e-6)
    assert metrics.si_sdr(truth, 0.1 * guess) == pytest.approx(plain, abs=1e-6)


def test_silent_sources_are_left_out():
    (vocals, bass), (guess, other) = songs()
    silence = np.zeros_like(vocals)
    truth, guess = {"vocals": vocals, "bass": bass}, {"vocals": guess, "bass": other}
    whole = metrics.song_metrics(truth, guess, ["vocals", "drums"])
    more = metrics.song_metrics({**truth, "drums": silence}, {**guess, "drums": other},
                                   ["vocals", "drums"])
    assert whole == more and "drums" not in whole
    alone = metrics.song_metrics({"vocals": vocals, "rest": silence}, guess, ["vocals"])
    assert set(alone["vocals"]) == {"SI-SDR", "new SDR"}


def test_si_sdr_of_a_silent_estimate_is_minus_120_db():
    reference = np.sin(np.arange(1000.0))
    assert metrics.si_sdr(reference, np.zeros(1000)) == -120


# -----------------------------------------------------------------------------
# classification

def tag_scores(kind, seed, clips=60, tags=6):
    """Targets and scores (clips, tags), random or with a special case."""
    rng = np.random.default_rng(seed)
    targets, scores = (rng.random((clips, tags)) < 0.3).astype(int), rng.random((clips, tags))
    targets[0], targets[1] = 1, 0       # each tag has a positive and a negative clip
    if kind == "ties":
        scores = np.round(scores, 1)
    if kind == "constant":
        scores[:] = 0.5
    if kind == "one positive":
        targets[1:] = 0
    if kind == "undefined":
        targets[:, 2], targets[:, 4] = 0, 1
    if kind == "perfect":
        scores = targets + 0.1 * scores
    if kind == "tiny":
        scores = scores * 1e-300
    return targets, scores


KINDS = ["random", "ties", "constant", "one positive", "undefined", "perfect", "tiny"]


@pytest.mark.parametrize("kind", KINDS)
def test_tag_metrics_match_scikit_learn(kind):
    targets, scores = tag_scores(kind, 1)
    used = [c for c in range(6) if 0 < targets[:, c].sum() < len(targets)]
    actual = metrics.tag_metrics(targets, scores)
    assert actual["tags used"].tolist() == [len(used)]
    for key, theirs in (("ROC-AUC", sk.roc_auc_score), ("PR-AUC", sk.average_precision_score)):
        assert actual[key][0] == pytest.approx(theirs(targets[:, used], scores[:, used]), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_resampled_tag_metrics_match_repeated_clips(kind):
    targets, scores = tag_scores(kind, 2)
    counts = metrics.resamples(len(targets), 5, 1)
    actual = metrics.tag_metrics(targets, scores, counts)
    for r, count in enumerate(counts):
        drawn = np.repeat(np.arange(len(targets)), count)
        alone = metrics.tag_metrics(targets[drawn], scores[drawn])
        assert len(drawn) == len(targets)
        for key in actual:
            np.testing.assert_allclose(actual[key][r], alone[key][0], atol=1e-12)


def test_roc_auc_is_the_fraction_of_ordered_pairs():
    targets, scores = tag_scores("ties", 3)
    yes, no = scores[targets[:, 0] == 1, 0], scores[targets[:, 0] == 0, 0]
    pairs = (yes[:, None] > no) + 0.5 * (yes[:, None] == no)
    roc, _ = metrics.areas(targets[:, 0], scores[:, 0], np.ones((1, 60), int))
    assert roc[0] == pytest.approx(pairs.mean())


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, bool, np.float16])
def test_scores_of_any_dtype(dtype):
    targets = np.array([[1], [0], [1], [0]], bool)
    scores = np.array([[0], [1], [1], [0]]).astype(dtype)
    assert metrics.tag_metrics(targets, scores)["ROC-AUC"][0] == 0.5
    assert metrics.tag_metrics(~targets, targets.astype(dtype))["ROC-AUC"][0] == 0


def test_a_single_clip_has_no_auc():
    actual = metrics.tag_metrics(np.array([[1, 0]]), np.array([[0.2, 0.3]]))
    assert np.isnan(actual["ROC-AUC"][0]) and actual["tags used"][0] == 0


@pytest.mark.parametrize("scores", [[[0.2], [math.nan]], [[0.2]]])
def test_wrong_scores_are_refused(scores):
    with pytest.raises(ValueError, match="scores"):
        metrics.tag_metrics(np.array([[1], [0]]), np.array(scores))


@pytest.mark.parametrize("present", [4, 2, 1])
def test_genre_metrics_match_scikit_learn(present):
    rng = np.random.default_rng(present)
    truth, scores = rng.integers(present, size=50), rng.random((50, 4))
    predicted, counts = scores.argmax(1), metrics.resamples(50, 4, 1)
    actual = metrics.genre_metrics(np.eye(4, dtype=int)[truth], scores, counts)
    for r, count in enumerate(counts):
        options = dict(labels=np.unique(truth[count > 0]), average="macro", zero_division=0,
                       sample_weight=count)
        assert actual["accuracy"][r] == pytest.approx(
            sk.accuracy_score(truth, predicted, sample_weight=count))
        assert actual["macro F1"][r] == pytest.approx(sk.f1_score(truth, predicted, **options))
        assert actual["balanced accuracy"][r] == pytest.approx(
            sk.recall_score(truth, predicted, **options))


@pytest.mark.parametrize("measure", [metrics.tag_metrics, metrics.genre_metrics])
def test_metrics_do_not_depend_on_clip_order(measure):
    targets, scores = tag_scores("ties", 4)
    if measure is metrics.genre_metrics:
        targets = np.eye(6, dtype=int)[scores.argmin(1)]
    order = np.random.default_rng(0).permutation(60)
    before, after = measure(targets, scores), measure(targets[order], scores[order])
    for key in before:
        np.testing.assert_allclose(before[key], after[key], atol=1e-12)


def test_interval_contains_the_value_and_is_seeded():
    tags = tag_scores("ties", 0)
    low, high = metrics.interval(metrics.tag_metrics, *tags, 50, 1)["ROC-AUC"]
    assert low < metrics.tag_metrics(*tags)["ROC-AUC"][0] < high
    assert [low, high] == metrics.interval(metrics.tag_metrics, *tags, 50, 1)["ROC-AUC"]
    assert metrics.interval(metrics.tag_metrics, *tags, 0, 1) == {}


# -----------------------------------------------------------------------------
# differences of pairs of runs

def pairs_of(gain, clips, runs, seed=0):
    """Pairs of genre runs in two folds; the accuracy of the first is higher by `gain`."""
    rng, pairs = np.random.default_rng(seed), []
    truth = rng.integers(2, size=(2, clips))
    for run in range(runs):
        fold = run % 2
        scores = []
        for right in (0.6 + gain, 0.6):
            predicted = np.where(rng.random(clips) < right, truth[fold], 1 - truth[fold])
            scores.append(np.eye(2)[predicted])
        pairs.append((fold, np.eye(2, dtype=int)[truth[fold]], *scores))
    return pairs


def test_paired_difference_is_the_mean_over_runs():
    pairs = pairs_of(0.1, 50, 6)
    mean, low, high, differences = metrics.paired_interval(
        metrics.genre_metrics, pairs, 200, 1)["accuracy"]
    plain = [(a.argmax(1) == t.argmax(1)).mean() - (b.argmax(1) == t.argmax(1)).mean()
             for _, t, a, b in pairs]
    np.testing.assert_allclose(differences, plain, atol=1e-12)
    assert mean == pytest.approx(np.mean(plain)) and low < mean < high


def test_paired_difference_to_itself_is_zero():
    pairs = [(fold, truth, scores, scores) for fold, truth, scores, _ in pairs_of(0, 30, 4)]
    actual = metrics.paired_interval(metrics.genre_metrics, pairs, 100, 1)
    assert all(value[:3] == (0, 0, 0) for value in actual.values())


def test_coverage_of_paired_intervals():
    covered = 0
    for seed in range(100):
        pairs = pairs_of(0.15, 60, 8, seed)
        _, low, high, _ = metrics.paired_interval(
            metrics.genre_metrics, pairs, 200, 1)["accuracy"]
        covered += low <= 0.15 <= high
    assert covered >= 86        # of 95 expected; fewer with probability 1e-3


def test_more_clips_narrow_the_paired_interval():
    ends = [metrics.paired_interval(metrics.genre_metrics, pairs_of(0.1, clips, 8), 200, 1)
            ["accuracy"][1:3] for clips in (30, 3000)]
    assert ends[0][1] - ends[0][0] > 3 * (ends[1][1] - ends[1][0])
