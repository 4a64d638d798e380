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


def blocks(waves, step=BLOCK, length=None):
    """Yields aligned blocks (K, n) of K waves (N,) as float64, `step` samples apart."""
    for at in range(0, len(waves[0]), step):
        yield np.stack([wave[at:at + (length or step)] for wave in waves], dtype=np.float64)


def si_sdr(reference, estimate):
    """Scale-invariant SDR of (N,) in dB, mean not removed (Le Roux et al. 2019).

    -120 dB for a silent estimate, for which it is undefined.
    """
    if not np.any(estimate):
        return -120.0
    both = reference, estimate
    power = sum(np.dot(r, r) for r, _ in blocks(both))
    scale = sum(np.dot(e, r) for r, e in blocks(both)) / power
    error = sum(np.sum((e - scale * r) ** 2) for r, e in blocks(both))
    return 10 * math.log10((scale ** 2 * power + 1e-12) / (error + 1e-12))


def new_sdr(reference, estimate):
    """SDR of (N,) in dB over the whole song, as in the Music Demixing Challenge 2021."""
    power = sum(np.sum(r ** 2) for (r,) in blocks([reference]))
    error = sum(np.sum((r - e) ** 2) for r, e in blocks([reference, estimate]))
    return 10 * math.log10((power + 1e-7) / (error + 1e-7))


def correlations(left, right):
    """Cross-correlations r[i, j, k] = sum over t of left[i][t] right[j][t + k], k = 0..511.

    left, right: lists of I and J waves (N,). Returns (I, J, 512) float64.
    """
    total = 0.0
    for short, long in zip(blocks(left), blocks(right, BLOCK, FFT), strict=True):
        short, long = np.fft.rfft(short, FFT), np.fft.rfft(long, FFT)           # (I, F), (J, F)
        total = total + short.conj()[:, None] * long                            # (I, J, F)
    return np.fft.irfft(total, FFT)[..., :TAPS]


def projection(auto, cross):
    """Least-squares filters that predict each estimate from the sources: (E, I, 512).

    correlations() among the sources: auto (I, I, 512); with the estimates: cross (I, E, 512).
    """
    both = np.concatenate([auto.swapaxes(0, 1)[..., :0:-1], auto], 2)           # (I, I, 1023)
    lag = np.arange(TAPS)[:, None] - np.arange(TAPS)                            # (512, 512)
    gram = both[:, :, lag + TAPS - 1].transpose(0, 2, 1, 3)                     # (I, 512, I, 512)
    n = len(auto) * TAPS
    gram = gram.reshape(n, n) + np.finfo(float).eps * np.eye(n)                 # (I 512, I 512)
    right = cross.transpose(0, 2, 1).reshape(n, -1)                             # (I 512, E)
    try:
        filters = np.linalg.solve(gram, right)
    except np.linalg.LinAlgError:   # singular: one source is a filtered copy of another
        filters = np.linalg.lstsq(gram, right)[0]
    return filters.T.reshape(-1, len(auto), TAPS)                               # (E, I, 512)


def bss_eval(references, estimates):
    """SDR, SIR and SAR of BSSEval v4 in dB, each (I, frames), from lists of I waves (N,).

    Same values as museval.metrics.bss_eval (Stöter et al. 2018), in constant memory. The first
    pass computes the filters of 512 samples that predict each estimate from the references, the
    second one the ratios frame by frame. NaN where any reference or estimate is silent.
    """
    auto = correlations(references, references)                                 # (I, I, 512)
    cross = correlations(references, estimates)                                 # (I, I, 512)
    joint_filters = np.fft.rfft(projection(auto, cross), FFT)                   # (I, I, F)
    own_filters = [projection(auto[i:i + 1, i:i + 1], cross[i:i + 1, i:i + 1])[0, 0]
                   for i in range(len(references))]
    own_filters = np.fft.rfft(own_filters, FFT)                                 # (I, F)

    n = max(1, len(references[0]) // FRAME)     # whole frames, except in a song shorter than one
    result = np.full((3, len(references), n), np.nan)
    frames = zip(range(n), blocks(references, FRAME), blocks(estimates, FRAME), strict=False)
    for column, source, estimate in frames:                                     # (I, FRAME)
        if not (source.any(1).all() and estimate.any(1).all()):
            continue
        # projections of each estimate on its own source, and on all sources
        spectra, end = np.fft.rfft(source, FFT), source.shape[1] + TAPS - 1     # (I, F)
        on_own = np.fft.irfft(own_filters * spectra, FFT)[:, :end]              # (I, FRAME + 511)
        on_all = np.fft.irfft((joint_filters * spectra).sum(1), FFT)[:, :end]   # (I, FRAME + 511)
        artifacts = on_all.copy()
        artifacts[:, :source.shape[1]] -= estimate
        ratios = (source, estimate - source), (on_own, on_all - on_own), (on_all, artifacts)
        for row, (signal, error) in zip(result, ratios, strict=True):
            with np.errstate(divide="ignore"):                                  # no error: inf
                row[:, column] = 10 * np.log10((signal ** 2).sum(1) / (error ** 2).sum(1))
    return result


def song_metrics(references, estimates, evaluated):
    """{source: {SDR, SIR, SAR, SI-SDR, new SDR}} in dB of one song, from {source: wave (N,)}.

    evaluated: sources to return. SDR, SIR and SAR are medians over frames of 1 s, as in museval.
    Leaves out sources that are silent throughout, and frames in which any other one is silent.
    """
    sounding = [s for s in references if np.any(references[s])]
    result = {s: {"SI-SDR": si_sdr(references[s], estimates[s]),
                  "new SDR": new_sdr(references[s], estimates[s])}
              for s in sounding if s in evaluated}
    if len(sounding) < 2:
        return result
    frames = bss_eval([references[s] for s in sounding], [estimates[s] for s in sounding])
    for key, rows in zip(("SDR", "SIR", "SAR"), frames, strict=True):
        for s, values in zip(sounding, rows, strict=True):
            if s in evaluated and np.isfinite(values).any():
                result[s][key] = float(np.median(values[np.isfinite(values)]))
    return result


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
    """Mean over classes, ignoring NaN: (R, classes) -> (R,). NaN if all are NaN."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(1) / known.sum(1)


def prepare(targets, scores, counts):
    """Targets as int, scores as float (negating unsigned ones would wrap around), and counts."""
    if targets.shape != scores.shape or not np.isfinite(scores).all():
        raise ValueError(f"targets {targets.shape} and scores {scores.shape} must have the same "
                         "shape, and all scores must be finite")
    counts = np.ones((1, len(targets)), int) if counts is None else counts
    return targets.astype(int), scores.astype(float), counts


def tag_metrics(targets, scores, counts=None):
    """{metric: (R,)} of (clips, classes): macro ROC-AUC, macro PR-AUC, number of tags used.

    Tags without positive or without negative clips have no AUC and are left out.
    """
    targets, scores, counts = prepare(targets, scores, counts)
    roc, pr = np.stack([areas(t, s, counts) for t, s in zip(targets.T, scores.T, strict=True)], 1)
    return {"ROC-AUC": nan_mean(roc.T), "PR-AUC": nan_mean(pr.T),
            "tags used": (~np.isnan(roc)).sum(0)}


def genre_metrics(targets, scores, counts=None):
    """{metric: (R,)} of (clips, classes): accuracy; macro F1, balanced accuracy of used classes."""
    targets, scores, counts = prepare(targets, scores, counts)
    one_hot = np.eye(targets.shape[1], dtype=int)[scores.argmax(1)]             # (clips, classes)
    true, predicted = counts @ targets, counts @ one_hot                        # (R, classes)
    hits = counts @ (targets * one_hot)                                         # (R, classes)
    with np.errstate(invalid="ignore", divide="ignore"):        # classes that do not occur
        recall = np.where(true > 0, hits / true, np.nan)                        # (R, classes)
        f1 = np.where(true > 0, 2 * hits / (true + predicted), np.nan)          # (R, classes)
    return {"accuracy": hits.sum(1) / counts.sum(1), "macro F1": nan_mean(f1),
            "balanced accuracy": nan_mean(recall)}


def resamples(clips, number, seed):
    """(number, clips): multiplicity of each clip in each bootstrap resample."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(clips, np.full(clips, 1 / clips), number)


def percentiles(values):
    """[2.5th, 97.5th percentile] of (R,), ignoring NaN; None if all are NaN, or R is 0."""
    values = values[~np.isnan(values)]
    return np.percentile(values, [2.5, 97.5]).tolist() if len(values) else None


def interval(measure, targets, scores, number, seed):
    """{metric: [low, high]}: 95 % bootstrap interval over clips; {} if number is 0."""
    measured = measure(targets, scores, resamples(len(targets), number, seed))
    bounds = {key: percentiles(values) for key, values in measured.items() if key != "tags used"}
    return {key: ends for key, ends in bounds.items() if ends}


def paired_interval(measure, pairs, number, seed):
    """{metric: (mean difference, low, high, differences)} of pairs of runs, first minus second.

    pairs: [(test set, targets, scores of the first, scores of the second)]. The 95 % bootstrap
    interval is over clips and runs: each resample draws the clips of each test set, the same for
    all its runs, and as many pairs as there are, all with replacement.
    """
    rng, counts = np.random.default_rng(seed), {}
    observed, bootstrapped = [], []         # per pair: {metric: (1,)} and {metric: (R,)}
    for k, (test_set, targets, first, second) in enumerate(pairs):
        if test_set not in counts:
            counts[test_set] = resamples(len(targets), number, [seed, k])
        for differences, clips in ((observed, None), (bootstrapped, counts[test_set])):
            a, b = measure(targets, first, clips), measure(targets, second, clips)
            differences.append({key: a[key] - b[key] for key in a if key != "tags used"})
    chosen = rng.integers(len(pairs), size=(number, len(pairs)))                # (R, pairs)
    result = {}
    for key in observed[0]:
        differences = [float(pair[key][0]) for pair in observed]
        resampled = np.stack([pair[key] for pair in bootstrapped], 1)           # (R, pairs)
        means = np.take_along_axis(resampled, chosen, 1).mean(1)                # (R,)
        low, high = percentiles(means) or (math.nan, math.nan)
        result[key] = (float(np.mean(differences)), low, high, differences)
    return result


def mean_and_std(values, spec=".3f"):
    """Mean and sample standard deviation, "0.685 ± 0.013"; only the mean of a single value."""
    spread = f" ± {np.std(values, ddof=1):{spec}}" if len(values) > 1 else ""
    return f"{np.mean(values):{spec}}{spread}"


def difference(entry):
    """An entry of paired_interval() as "+0.032 (+0.006 to +0.059)"; "" for None."""
    if not entry:
        return ""
    mean, low, high, *_ = entry
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
