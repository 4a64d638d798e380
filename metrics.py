"""
What is measured: separation of songs, and scores of clips, from arrays alone.

    counts = metrics.resamples(len(targets), 1000, seed)        # (R, clips)
    metrics.tag_metrics(targets, scores)["ROC-AUC"]             # (1,): on the clips as they are
    metrics.tag_metrics(targets, scores, counts)["ROC-AUC"]     # (R,): on resampled clips

Letters in shapes: N samples, I sources, E estimates, F frequency bins, R resamples.
"""
import math

import numpy as np
import torch

import model
from model import SAMPLE_RATE

TAPS = 512                          # length of the distortion filters of BSSEval
SIZE = 2 ** 15                      # of its Fourier transforms
BLOCK = SIZE - TAPS                 # samples that are worked on at a time: a long song is large


# -----------------------------------------------------------------------------
# separation

def blocks(*waves):
    """Yields the same piece of each wave (N,) as float64, piece after piece."""
    for at in range(0, len(waves[0]), BLOCK):
        yield [wave[at:at + BLOCK].astype(np.float64) for wave in waves]


def si_sdr(reference, estimate):
    """Scale-invariant SDR in dB of (N,), mean not removed (Le Roux et al. 2019).

    A silent estimate has -120 dB: it holds nothing of the reference.
    """
    if not np.any(estimate):
        return -120.0
    power = sum(np.dot(r, r) for r, _ in blocks(reference, estimate))
    scale = sum(np.dot(e, r) for r, e in blocks(reference, estimate)) / power
    error = sum(np.sum((e - scale * r) ** 2) for r, e in blocks(reference, estimate))
    return 10 * math.log10((scale ** 2 * power + 1e-12) / (error + 1e-12))


def new_sdr(reference, estimate, delta=1e-7):
    """SDR of the Music Demixing Challenge 2021 in dB of (N,): energies of the whole song."""
    power = sum(np.sum(r ** 2) for r, _ in blocks(reference, estimate))
    error = sum(np.sum((r - e) ** 2) for r, e in blocks(reference, estimate))
    return 10 * math.log10((power + delta) / (error + delta))


def correlations(left, right):
    """r[i, j, k] = sum over t of left[i][t] right[j][t + k] for the lags k = 0..511.

    left and right are lists of I and J waves (N,); the result is (I, J, 512) in float64.
    """
    total = 0.0
    for at in range(0, len(left[0]), BLOCK):
        short = np.stack([wave[at:at + BLOCK] for wave in left])                # (I, BLOCK)
        long = np.stack([wave[at:at + SIZE] for wave in right])                 # (J, BLOCK + 512)
        short = np.fft.rfft(short.astype(np.float64), SIZE)                     # (I, F)
        long = np.fft.rfft(long.astype(np.float64), SIZE)                       # (J, F)
        total = total + short.conj()[:, None] * long                            # (I, J, F)
    return np.fft.irfft(total, SIZE)[..., :TAPS]


def projection(among, onto):
    """The least-squares filters that make an estimate out of the sources: (E, I, 512).

    among (I, I, 512): correlations of the sources. onto (I, E, 512): those of the sources with
    the estimates.
    """
    both = np.concatenate([among.swapaxes(0, 1)[..., :0:-1], among], 2)         # (I, I, 1023)
    lag = np.arange(TAPS)[:, None] - np.arange(TAPS)                            # (512, 512)
    gram = both[:, :, lag + TAPS - 1].transpose(0, 2, 1, 3)                     # (I, 512, I, 512)
    n = len(among) * TAPS
    gram = gram.reshape(n, n) + np.finfo(float).eps * np.eye(n)
    wanted = onto.transpose(0, 2, 1).reshape(n, -1)                             # (I 512, E)
    try:
        found = np.linalg.solve(gram, wanted)
    except np.linalg.LinAlgError:   # one source is another one, filtered
        found = np.linalg.lstsq(gram, wanted)[0]
    return found.T.reshape(-1, len(among), TAPS)                                # (E, I, 512)


def bss_eval(references, estimates, frame=SAMPLE_RATE):
    """SDR, SIR and SAR in dB of BSSEval v4, each (I, frames), from lists of I waves (N,).

    The numbers are those of museval.metrics.bss_eval (Stöter et al. 2018), which needs memory for
    dozens of such waves. One pass over the song finds the filters of 512 samples that turn the
    references into each estimate; a second one compares frame by frame. A frame in which any
    reference or estimate is silent has no value (NaN).
    """
    among, onto = correlations(references, references), correlations(references, estimates)
    every = np.fft.rfft(projection(among, onto), SIZE)                          # (I, I, F)
    alone = [projection(among[i:i + 1, i:i + 1], onto[i:i + 1, i:i + 1])[0, 0]
             for i in range(len(references))]
    alone = np.fft.rfft(alone, SIZE)                                            # (I, F)

    starts = range(0, max(1, len(references[0]) - frame + 1), frame)
    result = np.full((3, len(references), len(starts)), np.nan)
    for column, at in enumerate(starts):
        truth = np.stack([wave[at:at + frame] for wave in references]).astype(np.float64)
        guess = np.stack([wave[at:at + frame] for wave in estimates]).astype(np.float64)
        if not (truth.any(1).all() and guess.any(1).all()):
            continue
        # what of an estimate can be made out of its own source, and out of all sources
        spectra, end = np.fft.rfft(truth, SIZE), truth.shape[1] + TAPS - 1      # (I, F)
        own = np.fft.irfft(alone * spectra, SIZE)[:, :end]                      # (I, frame + 511)
        mixed = np.fft.irfft((every * spectra).sum(1), SIZE)[:, :end]           # (I, frame + 511)
        artifacts = mixed.copy()
        artifacts[:, :truth.shape[1]] -= guess
        pairs = (truth, guess - truth), (own, mixed - own), (mixed, artifacts)
        for row, (good, bad) in zip(result, pairs, strict=True):
            with np.errstate(divide="ignore"):                                  # no error: infinite
                row[:, column] = 10 * np.log10((good ** 2).sum(1) / (bad ** 2).sum(1))
    return result


def song_metrics(references, estimates, wanted):
    """{source: {SDR, SIR, SAR, SI-SDR, new SDR}} of a song, from {source: wave (N,)}.

    Frames of 1 s and their median, as the tables of museval. Sources that are silent all through
    the song are left out. Frames in which any source is silent do not count.
    """
    sounding = [s for s in references if np.any(references[s])]
    result = {}
    for s in [s for s in sounding if s in wanted]:
        result[s] = {"SI-SDR": si_sdr(references[s], estimates[s]),
                     "new SDR": new_sdr(references[s], estimates[s])}
    if len(sounding) < 2:
        return result
    frames = bss_eval([references[s] for s in sounding], [estimates[s] for s in sounding])
    for key, rows in zip(("SDR", "SIR", "SAR"), frames, strict=True):
        for s, values in zip(sounding, rows, strict=True):
            if s in wanted and np.isfinite(values).any():
                result[s][key] = float(np.median(values[np.isfinite(values)]))
    return result


def oracle(mixture, references, piece=10 * SAMPLE_RATE):
    """Ideal ratio masks |S| / sum |S| with the mixture's phase: K waves (N,) -> (K, N).

    The spectrogram is the network's own. It is made piece by piece, each with all frames that
    touch it, so a long song needs no more memory than a short one.
    """
    waves, edge, hop = [mixture, *references], model.EDGE, model.HOP
    result = np.empty((len(references), len(mixture)), np.float32)
    for at in range(0, len(mixture), piece):
        n = min(piece, len(mixture) - at)
        length = (math.ceil(n / hop) + 2) * hop + model.WIN
        parts = [wave[max(0, at - edge):at - edge + length] for wave in waves]
        silence = max(0, edge - at)                     # before the song, and below: after it
        silence = silence, length - silence - len(parts[0])
        some = np.stack([np.pad(part, silence) for part in parts])              # (1 + K, length)
        spec = model.stft(torch.from_numpy(some))                               # (1 + K, T, 257)
        size = spec[1:, :, :model.BINS].abs()                                   # (K, T, 256)
        masks = torch.nn.functional.pad(size / (size.sum(0) + 1e-8), (0, 1), value=1.0)
        result[:, at:at + n] = model.istft(masks * spec[0])[:, edge:edge + n].numpy()
    return result


# -----------------------------------------------------------------------------
# classification

def areas(truth, scores, counts):
    """(ROC-AUC, PR-AUC) of one class, each (R,): NaN where all clips or no clips have the class.

    truth (clips,) is 0 or 1, scores (clips,), and counts (R, clips) says how often a clip is there.
    Clips of the same score stand together: no order among them is assumed. PR-AUC is the average
    precision.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)         # (clips,): of those that are alike
    counts = counts[:, order]
    hits = np.cumsum(counts * truth[order], 1)[:, last]         # (R, thresholds)
    answers = np.cumsum(counts, 1)[:, last]                     # (R, thresholds)
    misses = answers - hits
    new_hits, new_misses = np.diff(hits, prepend=0), np.diff(misses, prepend=0)
    precision = hits / np.maximum(answers, 1)
    with np.errstate(invalid="ignore", divide="ignore"):        # 0 / 0: there is no AUC
        pairs = hits[:, -1] * misses[:, -1]
        roc = (new_misses * (hits - new_hits / 2)).sum(1) / pairs
        pr = np.where(pairs > 0, (new_hits * precision).sum(1) / hits[:, -1], np.nan)
    return roc, pr


def mean_of_known(values):
    """The mean (R,) of values (R, classes) that are not NaN; NaN where all of them are."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(1) / known.sum(1)


def check(targets, scores):
    """The targets as int and the scores as float: the sign of an unsigned score would wrap."""
    if targets.shape != scores.shape or not np.isfinite(scores).all():
        raise ValueError(f"targets {targets.shape} and scores {scores.shape} must be of one shape, "
                         "and all scores must be numbers")
    return targets.astype(int), scores.astype(float)


def tag_metrics(targets, scores, counts=None):
    """{metric: (R,)} of (clips, classes): macro ROC-AUC and PR-AUC, and how many tags they have.

    Tags that no clip has, or every clip, have no AUC and are left out.
    """
    targets, scores = check(targets, scores)
    counts = np.ones((1, len(targets)), int) if counts is None else counts
    roc, pr = np.stack([areas(t, s, counts) for t, s in zip(targets.T, scores.T, strict=True)], 1)
    return {"ROC-AUC": mean_of_known(roc.T), "PR-AUC": mean_of_known(pr.T),
            "tags used": (~np.isnan(roc)).sum(0)}


def genre_metrics(targets, scores, counts=None):
    """{metric: (R,)} of (clips, classes): accuracy, macro F1 and balanced accuracy.

    The last two are means over the classes that occur.
    """
    targets, scores = check(targets, scores)
    counts = np.ones((1, len(targets)), int) if counts is None else counts
    answers = np.eye(targets.shape[1], dtype=int)[scores.argmax(1)]             # (clips, classes)
    true, said, hits = counts @ targets, counts @ answers, counts @ (targets * answers)
    with np.errstate(invalid="ignore", divide="ignore"):        # a class that does not occur
        recall = np.where(true > 0, hits / true, np.nan)                        # (R, classes)
        f1 = np.where(true > 0, 2 * hits / (true + said), np.nan)               # (R, classes)
    return {"accuracy": hits.sum(1) / counts.sum(1), "macro F1": mean_of_known(f1),
            "balanced accuracy": mean_of_known(recall)}


def resamples(clips, number, seed):
    """(number, clips): how often each clip is drawn when as many are drawn as there are."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(clips, np.full(clips, 1 / clips), number)


def percentiles(values):
    """[low, high] of the middle 95 % of resamples (R,); None if none of them has a value."""
    values = values[~np.isnan(values)]
    return np.percentile(values, [2.5, 97.5]).tolist() if len(values) else None


def interval(measure, targets, scores, number, seed):
    """{metric: [low, high]}: 95 % bootstrap interval over clips, {} if there is none."""
    if number == 0:
        return {}
    found = measure(targets, scores, resamples(len(targets), number, seed))
    found = {key: percentiles(values) for key, values in found.items() if key != "tags used"}
    return {key: ends for key, ends in found.items() if ends}


def paired_interval(measure, pairs, number, seed):
    """{metric: (mean difference, low, high, differences)} of pairs of runs, first minus second.

    pairs: [(test set, targets, scores of the first, scores of the second)]. Runs with the same
    name of a test set are scored on the same clips. The 95 % bootstrap interval is over clips and
    runs: each resample draws the clips of each test set, the same for both runs of a pair, and
    draws as many pairs as there are. Both are drawn with replacement.
    """
    rng, counts, plain, drawn = np.random.default_rng(seed), {}, [], []
    for k, (test_set, targets, first, second) in enumerate(pairs):
        if test_set not in counts:
            counts[test_set] = resamples(len(targets), number, [seed, k])
        for found, clips in ((plain, None), (drawn, counts[test_set])):
            one, two = measure(targets, first, clips), measure(targets, second, clips)
            found.append({key: one[key] - two[key] for key in one if key != "tags used"})
    chosen = rng.integers(len(pairs), size=(number, len(pairs)))                # (R, pairs)
    result = {}
    for key in plain[0]:
        differences = [float(pair[key][0]) for pair in plain]
        resampled = np.stack([pair[key] for pair in drawn], 1)                  # (R, pairs)
        means = np.take_along_axis(resampled, chosen, 1).mean(1)                # (R,)
        low, high = percentiles(means) or (math.nan, math.nan)
        result[key] = (float(np.mean(differences)), low, high, differences)
    return result


# -----------------------------------------------------------------------------
# as texts

def mean_and_spread(values, form=".3f"):
    """Mean of several runs, and their standard deviation: "0.685 ± 0.013"; of one, itself."""
    spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"


def difference(found):
    """What paired_interval() has found of a metric: "+0.032 (+0.006 to +0.059)"; None: nothing."""
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*found) if found else ""
