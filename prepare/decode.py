"""
Decodes files to int16 at the models' sample rate, in worker processes.

A file that crashes its decoder, hangs or needs absurd amounts of memory is skipped. An error of the
machine (a full disk, an unplugged drive) ends the run, and no file is skipped for it.
"""
import os
import signal
import sys
import time
from concurrent.futures import TimeoutError
from itertools import islice
from multiprocessing import get_context

import numpy as np
from pebble import ProcessExpired, ProcessPool

from audio.files import Broken, read, resampled, to_int16
from common.files import MACHINE
from prepare.files import open_source

QUIET = 33          # int16: a second whose samples are all below -60 dBFS is silent
LOUD = 100          # times full scale: samples beyond are not meant to be in [-1, 1]
AHEAD = 4           # results per worker that may wait in memory for an earlier one
OUT_OF_MEMORY = 77  # exit status of a worker that ran out; the next file gets a new worker
# one thread per worker; and glibc keeps freed memory instead of requesting it for every file
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
               "MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


def start(memory):
    """Sets up a worker: bounded memory (bytes); Ctrl-C is handled by its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def decode(sources, rate, seconds):
    """(record, int16 (tracks, length)) of the tracks of one item, or ({"reason"}, None)."""
    alarm = getattr(signal, "alarm", lambda seconds: None)      # Windows has none
    alarm(seconds + 10)     # in case the parent, which stops slow workers, has died
    try:
        record, tracks = decode_tracks(sources, rate)
    except OSError:
        raise
    except Exception as e:  # a bug, ours or a library's, costs this file only
        # lack of memory is a RuntimeError in torch, an ImportError or SystemError in its imports
        torch_memory = type(e) is RuntimeError and "memory" in str(e).lower()
        if torch_memory or isinstance(e, (MemoryError, ImportError, SystemError)):
            os._exit(OUT_OF_MEMORY)
        reason = str(e) if isinstance(e, Broken) else f"{type(e).__name__}: {e}"
        record, tracks = {"reason": reason}, None
    alarm(0)
    return record, tracks


def decode_tracks(sources, rate):
    """(record, int16 (tracks, length)) at `rate` Hz. Broken with the reason if it is unusable.

    A source is as in files.py; None for silence; or "sum" for the sum of the other tracks.
    """
    waves, damage, notes = [np.zeros(0, np.float32)] * len(sources), [], []
    files = [k for k, source in enumerate(sources) if isinstance(source, dict)]
    for k in files:
        waves[k], messages = decode_source(sources[k], rate, several=len(sources) > 1)
        damage += messages

    # tracks are padded to one length, except truncated ones: there silence would replace music
    length, shortest = max(map(len, waves)), min(len(waves[k]) for k in files)
    if length - shortest > 0.1 * rate:
        differ = f"track lengths differ by up to {(length - shortest) / rate:.1f} s"
        if damage:
            raise Broken("; ".join([*damage, differ]))
        notes.append(f"{differ}: padded with silence")
    waves = [np.pad(wave, (0, length - len(wave))) for wave in waves]
    if "sum" in sources:
        waves[sources.index("sum")] = sum(waves)  # all zeros itself so far

    tracks = np.stack([to_int16(wave) for wave in waves])                       # (tracks, length)
    clipped = max(np.count_nonzero(np.abs(wave) > 1) for wave in waves)
    if clipped > length // 1000:
        notes.append(f"{100 * clipped / length:.1f} % of its samples exceeded full scale and are "
                     "clipped")
    return describe(tracks, rate, notes, damage), tracks


def decode_source(source, rate, several):
    """(wave (N,) at `rate` Hz, damage) of one file. Messages name it if there are several."""
    name, problem = f"{os.path.basename(source['file'])}: " if several else "", ""
    try:
        with open_source(source) as f:
            wave, file_rate, damage = read(f, source.get("stream", 0))
        peak = max(wave.max(initial=0), -wave.min(initial=0))
        if np.isnan(peak):
            problem = "has NaN samples"
        elif peak > LOUD:
            problem = f"has samples of {peak:.3g} times full scale"
    except Broken as e:
        problem = str(e)
    except OSError as e:
        if e.errno in MACHINE:
            raise
        problem = f"cannot be read: {e.strerror or e}"
    if problem:
        raise Broken(name + problem)
    return resampled(wave, file_rate, rate), [name + text for text in damage]


def describe(tracks, rate, notes=(), damage=()):
    """The record of int16 (tracks, length): silent is the number of silent seconds per track."""
    whole = tracks.shape[1] // rate * rate
    seconds = tracks[:, :whole].reshape(len(tracks), -1, rate)          # (tracks, seconds, rate)
    silent = (seconds.max(2) <= QUIET) & (seconds.min(2) >= -QUIET)     # (tracks, seconds)
    peak = max(int(tracks[0].max(initial=0)), -int(tracks[0].min(initial=0)))
    return {"length": tracks.shape[1], "silent": silent.sum(1).tolist(), "peak": peak,
            "notes": list(notes), "damage": list(damage)}


def decode_all(jobs, rate, workers, seconds, memory):
    """Yields (name, record, int16 (tracks, length) or None) for (name, sources) jobs, in order.

    workers: number of processes. seconds, memory (bytes): limits per item. A record with a reason
    has "again" if another attempt might succeed. OSError for an error of the machine.
    """
    pool = ProcessPool(workers, initializer=start, initargs=(memory,), context=get_context("spawn"))

    def submit(job):
        return job, pool.schedule(decode, (job[1], rate, int(seconds)), timeout=seconds)

    jobs = iter(jobs)
    before = {key: os.environ[key] for key in ENVIRONMENT if key in os.environ}
    os.environ.update(ENVIRONMENT)  # inherited by the workers
    try:
        waiting = [submit(job) for job in islice(jobs, AHEAD * workers)]
        while waiting:
            job, future = waiting.pop(0)
            waiting.extend(submit(job) for job in islice(jobs, 1))
            yield job[0], *outcome(submit, job, future, seconds, memory)
    finally:
        pool.stop()  # without waiting for files that hang
        pool.join()
        for key in ENVIRONMENT:
            del os.environ[key]
        os.environ.update(before)


def outcome(submit, job, future, seconds, memory):
    """(record, samples) of a job, or ({"reason", "again"}, None) if its worker died."""
    for pause in (1, 2, None):
        code = None
        try:
            return future.result()
        except TimeoutError:
            reason = f"took longer than {seconds:g} s to decode (--timeout)"
        except ProcessExpired as e:
            code = e.exitcode
            name = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
            reason = f"crashes the decoder ({name})"
            if code == OUT_OF_MEMORY:
                reason = f"needs more than {memory >> 20} MB of memory (--memory)"
        except OSError as e:
            problem = f"{e.strerror or e} ({e.filename}): fix this"
            break
        if code != -signal.SIGKILL:
            return {"reason": reason, "again": True}, None

        # killed from outside: the system is out of memory, usually not for long
        problem = "killed three times, usually for lack of memory: use fewer --workers"
        if pause:
            time.sleep(pause)
            _, future = submit(job)
    raise OSError(f"{job[0]} cannot be read: {problem} and run the same command again, it resumes")
