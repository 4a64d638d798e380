"""
Evaluation metrics on NumPy arrays: source separation, classification, bootstrap intervals.

    counts = metrics.resamples(len(targets), 1000, seed)        # (R, clips)
    metrics.tag_metrics(targets, scores)["ROC-AUC"]             # (1,): on the clips as they are
    metrics.tag_metrics(targets, scores, counts)["ROC-AUC"]     # (R,): on resampled clips

Letters in shapes: N samples, I sources, E estimates, F frequency bins, R resamples.
"""
import math

import numpy as np

FRAME = 16_000                      # samples per frame of SDR, SIR and SAR: 1 s at 16 kHz
TAPS = 512                          # length of the distortion filters of BSSEval
FFT = 2 ** 15                       # FFT size for correlations and filtering
BLOCK = FFT - TAPS                  # samples per step, which bounds the memory for long songs


# -----------------------------------------------------------------------------
# separation

def blocks(*waves):
    """Yields aligned blocks of all waves (N,) as float64."""
    for at in range(0, len(waves[0]), BLOCK):
        yield [wave[at:at + BLOCK].astype(np.float64) for wave in waves]


def si_sdr(reference, estimate):
    """Scale-invariant SDR of (N,) in dB, mean not removed (Le Roux et al. 2019).

    -120 dB for a silent estimate, for which it is undefined.
    """
    if not np.any(estimate):
        return -120.0
    power = sum(np.dot(r, r) for r, _ in blocks(reference, estimate))
    scale = sum(np.dot(e, r) for r, e in blocks(reference, estimate)) / power
    error = sum(np.sum((e - scale * r) ** 2) for r, e in blocks(reference, estimate))
    return 10 * math.log10((scale ** 2 * power + 1e-12) / (error + 1e-12))


def new_sdr(reference, estimate, delta=1e-7):
    """SDR of (N,) in dB over the whole song, as in the Music Demixing Challenge 2021."""
    power = sum(np.sum(r ** 2) for r, _ in blocks(reference, estimate))
    error = sum(np.sum((r - e) ** 2) for r, e in blocks(reference, estimate))
    return 10 * math.log10((power + delta) / (error + delta))


def correlations(left, right):
    """Cross-correlations r[i, j, k] = sum over t of left[i][t] right[j][t + k], k = 0..511.

    left, right: lists of I and J waves (N,). Returns (I, J, 512) float64.
    """
    total = 0.0
    for at in range(0, len(left[0]), BLOCK):
        short = np.stack([wave[at:at + BLOCK] for wave in left])                # (I, BLOCK)
        long = np.stack([wave[at:at + FFT] for wave in right])                  # (J, BLOCK + 512)
        short = np.fft.rfft(short.astype(np.float64), FFT)                      # (I, F)
        long = np.fft.rfft(long.astype(np.float64), FFT)                        # (J, F)
        total = total + short.conj()[:, None] * long                            # (I, J, F)
    return np.fft.irfft(total, FFT)[..., :TAPS]


def projection(among, onto):
    """Least-squares filters that predict each estimate from the sources: (E, I, 512).

    among (I, I, 512): correlations between sources; onto (I, E, 512): with the estimates.
    """
    both = np.concatenate([among.swapaxes(0, 1)[..., :0:-1], among], 2)         # (I, I, 1023)
    lag = np.arange(TAPS)[:, None] - np.arange(TAPS)                            # (512, 512)
    gram = both[:, :, lag + TAPS - 1].transpose(0, 2, 1, 3)                     # (I, 512, I, 512)
    n = len(among) * TAPS
    gram = gram.reshape(n, n) + np.finfo(float).eps * np.eye(n)
    right = onto.transpose(0, 2, 1).reshape(n, -1)                              # (I 512, E)
    try:
        filters = np.linalg.solve(gram, right)
    except np.linalg.LinAlgError:   # singular: one source is a filtered copy of another
        filters = np.linalg.lstsq(gram, right)[0]
    return filters.T.reshape(-1, len(among), TAPS)                              # (E, I, 512)


def bss_eval(references, estimates, frame=FRAME):
    """SDR, SIR and SAR of BSSEval v4 in dB, each (I, frames), from lists of I waves (N,).

    Same values as museval.metrics.bss_eval (Stöter et al. 2018), in constant memory. The first
    pass finds the filters of 512 samples that predict each estimate from the references, the
    second one compares frame by frame. NaN where any reference or estimate is silent.
    """
    among, onto = correlations(references, references), correlations(references, estimates)
    every = np.fft.rfft(projection(among, onto), FFT)                           # (I, I, F)
    alone = [projection(among[i:i + 1, i:i + 1], onto[i:i + 1, i:i + 1])[0, 0]
             for i in range(len(references))]
    alone = np.fft.rfft(alone, FFT)                                             # (I, F)

    starts = range(0, max(1, len(references[0]) - frame + 1), frame)
    result = np.full((3, len(references), len(starts)), np.nan)
    for column, at in enumerate(starts):
        truth = np.stack([wave[at:at + frame] for wave in references]).astype(np.float64)
        guess = np.stack([wave[at:at + frame] for wave in estimates]).astype(np.float64)
        if not (truth.any(1).all() and guess.any(1).all()):
            continue
        # projections of the estimate on its own source, and on all sources
        spectra, end = np.fft.rfft(truth, FFT), truth.shape[1] + TAPS - 1       # (I, F)
        own = np.fft.irfft(alone * spectra, FFT)[:, :end]                       # (I, frame + 511)
        mixed = np.fft.irfft((every * spectra).sum(1), FFT)[:, :end]            # (I, frame + 511)
        artifacts = mixed.copy()
        artifacts[:, :truth.shape[1]] -= guess
        pairs = (truth, guess - truth), (own, mixed - own), (mixed, artifacts)
        for row, (good, bad) in zip(result, pairs, strict=True):
            with np.errstate(divide="ignore"):                                  # no error: inf
                row[:, column] = 10 * np.log10((good ** 2).sum(1) / (bad ** 2).sum(1))
    return result


def song_metrics(references, estimates, evaluated):
    """{source: {SDR, SIR, SAR, SI-SDR, new SDR}} in dB of one song, from {source: wave (N,)}.

    evaluated: sources to return. SDR, SIR and SAR are medians over frames of 1 s, as in museval.
    Sources that are silent throughout are left out, then frames in which any source is silent.
    """
    sounding = [s for s in references if np.any(references[s])]
    result = {}
    for s in [s for s in sounding if s in evaluated]:
        result[s] = {"SI-SDR": si_sdr(references[s], estimates[s]),
                     "new SDR": new_sdr(references[s], estimates[s])}
    if len(sounding) < 2:
        return result
    frames = bss_eval([references[s] for s in sounding], [estimates[s] for s in sounding])
    for key, rows in zip(("SDR", "SIR", "SAR"), frames, strict=True):
        for s, values in zip(sounding, rows, strict=True):
            if s in evaluated and np.isfinite(values).any():
                result[s][key] = float(np.median(values[np.isfinite(values)]))
    return result


# -----------------------------------------------------------------------------
# classification

def areas(truth, scores, counts):
    """(ROC-AUC, PR-AUC) of one class, each (R,); NaN if all clips or no clips have the class.

    truth (clips,): 0 or 1. scores (clips,). counts (R, clips): multiplicity of each clip in each
    resample. Tied scores share one threshold. PR-AUC is the average precision.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)         # (clips,): last of each tie
    counts = counts[:, order]
    hits = np.cumsum(counts * truth[order], 1)[:, last]         # (R, thresholds)
    positives = np.cumsum(counts, 1)[:, last]                   # (R, thresholds): predicted
    misses = positives - hits
    new_hits, new_misses = np.diff(hits, prepend=0), np.diff(misses, prepend=0)
    precision = hits / np.maximum(positives, 1)
    with np.errstate(invalid="ignore", divide="ignore"):        # 0 / 0: AUC is undefined
        pairs = hits[:, -1] * misses[:, -1]
        roc = (new_misses * (hits - new_hits / 2)).sum(1) / pairs
        pr = np.where(pairs > 0, (new_hits * precision).sum(1) / hits[:, -1], np.nan)
    return roc, pr


def nan_mean(values):
    """Mean (R,) over the classes of values (R, classes) without NaN; NaN if all are NaN."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(1) / known.sum(1)


def check(targets, scores):
    """Targets as int and scores as float, as negating unsigned scores would wrap."""
    if targets.shape != scores.shape or not np.isfinite(scores).all():
        raise ValueError(f"targets {targets.shape} and scores {scores.shape} must have the same "
                         "shape, and all scores must be finite")
    return targets.astype(int), scores.astype(float)


def tag_metrics(targets, scores, counts=None):
    """{metric: (R,)} of (clips, classes): macro ROC-AUC, macro PR-AUC, number of tags used.

    Tags without positive or without negative clips have no AUC and are left out.
    """
    targets, scores = check(targets, scores)
    counts = np.ones((1, len(targets)), int) if counts is None else counts
    roc, pr = np.stack([areas(t, s, counts) for t, s in zip(targets.T, scores.T, strict=True)], 1)
    return {"ROC-AUC": nan_mean(roc.T), "PR-AUC": nan_mean(pr.T),
            "tags used": (~np.isnan(roc)).sum(0)}


def genre_metrics(targets, scores, counts=None):
    """{metric: (R,)} of (clips, classes): accuracy; macro F1, balanced accuracy of used classes."""
    targets, scores = check(targets, scores)
    counts = np.ones((1, len(targets)), int) if counts is None else counts
    answers = np.eye(targets.shape[1], dtype=int)[scores.argmax(1)]             # (clips, classes)
    true, predicted = counts @ targets, counts @ answers                        # (R, classes)
    hits = counts @ (targets * answers)                                         # (R, classes)
    with np.errstate(invalid="ignore", divide="ignore"):        # classes that do not occur
        recall = np.where(true > 0, hits / true, np.nan)                        # (R, classes)
        f1 = np.where(true > 0, 2 * hits / (true + predicted), np.nan)          # (R, classes)
    return {"accuracy": hits.sum(1) / counts.sum(1), "macro F1": nan_mean(f1),
            "balanced accuracy": nan_mean(recall)}


# -----------------------------------------------------------------------------
# bootstrap

def resamples(clips, number, seed):
    """(number, clips): multiplicity of each clip in each bootstrap resample."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(clips, np.full(clips, 1 / clips), number)


def percentiles(values):
    """[2.5th, 97.5th percentile] of (R,) without NaN; None if all are NaN."""
    values = values[~np.isnan(values)]
    return np.percentile(values, [2.5, 97.5]).tolist() if len(values) else None


def interval(measure, targets, scores, number, seed):
    """{metric: [low, high]}: 95 % bootstrap interval over clips; {} if number is 0."""
    if number == 0:
        return {}
    result = measure(targets, scores, resamples(len(targets), number, seed))
    result = {key: percentiles(values) for key, values in result.items() if key != "tags used"}
    return {key: ends for key, ends in result.items() if ends}


def paired_interval(measure, pairs, number, seed):
    """{metric: (mean difference, low, high, differences)} of pairs of runs, first minus second.

    pairs: [(test set, targets, scores of the first, scores of the second)]. Runs with the same
    test set are scored on the same clips. The 95 % bootstrap interval is over clips and runs:
    each resample draws the clips of each test set, the same for both runs of a pair, and as many
    pairs as there are, all with replacement.
    """
    rng, counts, plain, drawn = np.random.default_rng(seed), {}, [], []
    for k, (test_set, targets, first, second) in enumerate(pairs):
        if test_set not in counts:
            counts[test_set] = resamples(len(targets), number, [seed, k])
        for differences, clips in ((plain, None), (drawn, counts[test_set])):
            a, b = measure(targets, first, clips), measure(targets, second, clips)
            differences.append({key: a[key] - b[key] for key in a if key != "tags used"})
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
# formatting

def mean_and_std(values, form=".3f"):
    """Mean and sample standard deviation, "0.685 ± 0.013"; the value alone if there is one."""
    spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"


def difference(interval):
    """An entry of paired_interval(): "+0.032 (+0.006 to +0.059)"; "" for None."""
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*interval) if interval else ""
