"""
Files to int16 at 16 kHz, in processes that may die.

A file that crashes its decoder, makes it hang or asks for absurd memory costs itself only. What
is wrong with the machine (a full disk, an unplugged drive) ends the run, and no file is given up
for it.
"""
import errno
import os
import signal
import sys
import time
from concurrent.futures import TimeoutError
from itertools import islice
from multiprocessing import get_context

import numpy as np
from pebble import ProcessExpired, ProcessPool

import audio
from audio import Broken
from prepare import files

QUIET = 33          # int16: a second without a sample above -60 dB of full scale is silent
LOUD = 100          # times full scale: beyond, the samples have another scale
AHEAD = 4           # results per process that may wait in memory for one before them
OUT_OF_MEMORY = 77  # exit status of a process that had too little; the next file gets a new one
# one thread each; and glibc keeps the memory it has instead of taking it again with every file
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
               "MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
# errors of the machine, not of the file
MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOENT,
           errno.ENODEV, errno.ENOTCONN, errno.ESTALE}


# -----------------------------------------------------------------------------
# in the process that decodes

def start(memory):
    """The surroundings of a decoder: one thread, bounded memory, Ctrl-C left to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def decode(sources, rate, seconds):
    """(record, int16 (tracks, length)) of the tracks of one item, or ({"reason"}, None)."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds + 10)  # if the parent is gone, nobody else would end this
    try:
        record, tracks = decode_tracks(sources, rate)
    except Broken as e:
        record, tracks = {"reason": str(e)}, None
    except OSError:
        raise
    except Exception as e:  # an error of ours or of a library costs this file only
        if short_of_memory(e):
            os._exit(OUT_OF_MEMORY)
        record, tracks = {"reason": f"{type(e).__name__}: {e}"}, None
    if hasattr(signal, "alarm"):
        signal.alarm(0)
    return record, tracks


def short_of_memory(e):
    """torch raises a RuntimeError, or one of the last two if it cannot even be loaded."""
    if type(e) is RuntimeError:
        return "memory" in str(e).lower()
    return isinstance(e, (MemoryError, ImportError, SystemError))


def decode_tracks(sources, rate):
    """(record, int16 (tracks, length)) at `rate` Hz. Broken with the reason if it cannot be used.

    A source is as in files.py; or None, which is silence; or "sum", the sum of the other tracks.
    """
    waves, damage = [], []
    for source in sources:
        wave = np.zeros(0, np.float32)
        if isinstance(source, dict):
            wave, its_damage = decode_source(source, rate, several=len(sources) > 1)
            damage += its_damage
        waves.append(wave)

    # tracks of one song have one length; one that is cut off would be silence from there on
    length = max(map(len, waves))
    real = [len(w) for w, s in zip(waves, sources, strict=True) if isinstance(s, dict)]
    notes = []
    if length - min(real) > 0.1 * rate:
        notes.append(f"its tracks differ by up to {(length - min(real)) / rate:.1f} s: "
                     "silence added")
        if damage:
            raise Broken("; ".join([*damage, notes[0].partition(":")[0]]))
    waves = [np.pad(wave, (0, length - len(wave))) for wave in waves]
    if "sum" in sources:
        waves[sources.index("sum")] = sum(waves)  # its own place holds zeros

    tracks = np.stack([audio.to_int16(wave) for wave in waves])                 # (tracks, length)
    if tracks.max() == 32767 or tracks.min() == -32768:
        loud = max(np.count_nonzero(np.abs(wave) > 1) for wave in waves)
        if loud > length // 1000:
            notes.append(f"{100 * loud / length:.1f} % of its samples were beyond full scale and "
                         "are clipped")
    return describe(tracks, rate, notes, damage), tracks


def decode_source(source, rate, several):
    """(wave (N,) at `rate` Hz, damage) of one file; its name is told if it is one of several."""
    which = f"{os.path.basename(source['file'])}: " if several else ""
    try:
        with files.open_source(source) as f:
            wave, its_rate, damage = audio.read(f, source.get("stream", 0))
        peak = max(wave.max(initial=0), -wave.min(initial=0))
        if np.isnan(peak):
            raise Broken("has samples that are not numbers")
        if peak > LOUD:
            raise Broken(f"has samples of {peak:.3g} times full scale")
    except Broken as e:
        raise Broken(which + str(e)) from e
    except OSError as e:
        if e.errno in MACHINE:
            raise
        raise Broken(f"{which}cannot be read: {e.strerror or e}") from e
    return audio.resample(wave, its_rate, rate), [which + text for text in damage]


def describe(tracks, rate, notes=(), damage=()):
    """The record of int16 (tracks, length): silent is the number of silent seconds per track."""
    whole = tracks.shape[1] // rate * rate
    seconds = tracks[:, :whole].reshape(len(tracks), -1, rate)          # (tracks, seconds, rate)
    silent = (seconds.max(2) <= QUIET) & (seconds.min(2) >= -QUIET)     # (tracks, seconds)
    peak = max(int(tracks[0].max(initial=0)), -int(tracks[0].min(initial=0)))
    return {"length": tracks.shape[1], "silent": silent.sum(1).tolist(), "peak": peak,
            "notes": list(notes), "damage": list(damage)}


# -----------------------------------------------------------------------------
# in the process that asks

def decode_all(jobs, rate, workers, seconds, memory):
    """Yields (job, record, int16 (tracks, length) or None) for (name, sources) jobs, in order.

    workers: processes. seconds and memory (bytes): what one item may take. A record with a reason
    has "again" if another attempt might succeed. OSError if something is wrong with the machine.
    """
    pool = ProcessPool(workers, initializer=start, initargs=(memory,), context=get_context("spawn"))

    def ask(job):
        return job, pool.schedule(decode, (job[1], rate, int(seconds)), timeout=seconds)

    jobs = iter(jobs)
    before = {key: os.environ.get(key) for key in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)  # the processes take these over
    try:
        waiting = [ask(job) for job in islice(jobs, AHEAD * workers)]
        while waiting:
            job, future = waiting.pop(0)
            waiting.extend(ask(job) for job in islice(jobs, 1))
            yield job, *outcome(pool, ask, job, future, seconds, memory)
    finally:
        pool.stop()  # what still runs may hang
        pool.join()
        for key in ENVIRONMENT:
            del os.environ[key]
        os.environ.update({key: value for key, value in before.items() if value is not None})


def outcome(pool, ask, job, future, seconds, memory):
    """(record, samples) of a job, or a record of what became of its process."""
    for pause in (1, 2, None):
        try:
            return future.result()
        except TimeoutError:
            return given_up(f"took longer than {seconds:g} s to decode: stopped (--timeout)")
        except ProcessExpired as e:
            code = e.exitcode
        except OSError as e:
            raise OSError(f"{job[0]} cannot be read: {e.strerror or e} ({e.filename}): the same "
                          "command goes on once this is mended") from e
        if code == OUT_OF_MEMORY:
            return given_up(f"needs more than {memory >> 20} MB of memory (--memory)")
        if code != -signal.SIGKILL:
            name = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
            return given_up(f"crashes the decoder ({name})")

        # killed, and not from here: the system is out of memory, mostly for a while
        if pause:
            time.sleep(pause)
            _, future = ask(job)
    raise OSError(f"decoding {job[0]} was killed three times, mostly a sign of too little memory: "
                  "take fewer --workers, and the same command goes on from here")


def given_up(reason):
    return {"reason": reason, "again": True}, None
