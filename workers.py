"""
Processes that decode audio (decode.py), each of which may die: a file that crashes the decoder, makes it hang or asks for absurd memory
costs itself only.

    pool = Workers(2, 16000)
    info, samples = pool.decode(job)        # from as many threads as there are processes
    pool.close()
"""
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

# one thread each; and glibc keeps the memory it has, instead of giving it back and taking it again, zeroed, with every file
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
               "MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
DECODE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "decode.py")


class Worker:
    """One process that decodes; started anew after it died or was stopped."""

    def __init__(self, arguments, seconds):
        self.arguments, self.seconds, self.process, self.deadline, self.closed = arguments, seconds, None, float("inf"), False
        self.said = tempfile.TemporaryFile()  # mpg123 complains of most clips cut out of a longer mp3; kept only in case it cannot start

    def start(self):
        self.process = subprocess.Popen([sys.executable, DECODE, *self.arguments], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.said, start_new_session=True,
                                        env={**os.environ, **ENVIRONMENT})
        if sys.platform == "linux":
            import fcntl
            with contextlib.suppress(OSError):  # over the user's limit: the pipe stays small
                fcntl.fcntl(self.process.stdout, fcntl.F_SETPIPE_SZ, 1 << 20)
        if not self.process.stdout.readline():
            self.said.seek(0)
            raise OSError("the decoding process does not start: " + self.said.read().decode(errors="replace").strip()[-300:])

    def kill(self):
        """Kills the process and those it started (ffmpeg)."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError, AttributeError):  # already gone; no process groups on Windows
            with contextlib.suppress(AttributeError):
                self.process.kill()

    def stop(self, late):
        """Forgets the process, which has ended or is late; returns its exit status."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0 if late else 5)
        self.kill()
        code = self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process = None
        return code

    def decode(self, job):
        """(info, int16 (tracks, length)) or ({"reason"}, None)."""
        for attempt in (1, 2, 3):  # a process can die of something other than its file
            if self.closed:
                raise OSError("stopped")
            if not self.process:
                self.start()
            self.deadline = time.monotonic() + self.seconds
            try:
                answer = self.ask(job)
            except (BrokenPipeError, ValueError):
                answer = None
            late, self.deadline = time.monotonic() > self.deadline, float("inf")
            if answer and "fatal" in answer[0]:
                raise OSError(f"{job['name']} {answer[0]['fatal']}: the same command goes on once this is mended")
            if answer and answer[0].pop("ends", False):
                self.stop(late)
            if answer:
                return answer
            code = self.stop(late)
            if late:
                return {"reason": f"took longer than {self.seconds:g} s to decode: stopped"}, None
            if code != -9 and attempt == 2:
                return {"reason": "crashes the decoder (" + (signal.Signals(-code).name if code < 0 else f"exit status {code}") + ")"}, None
            time.sleep(attempt if code == -9 else 0)  # SIGKILL, and not from here: the system is out of memory
        raise OSError(f"decoding {job['name']} was killed three times, mostly a sign of too little memory: take fewer --workers, and the same command "
                      "goes on from here")

    def ask(self, job):
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()
        info = json.loads(self.process.stdout.readline())  # ValueError: it died before its answer
        if "reason" in info or "fatal" in info:
            return info, None
        audio = np.empty((len(job["tracks"]), info["length"]), "<i2")
        if self.process.stdout.readinto(memoryview(audio).cast("B")) < audio.nbytes:
            return None
        return info, audio


class Workers:
    """Processes that decode, as many as `count`, each with at most `memory` bytes and `seconds` per file."""

    def __init__(self, count, rate, memory=4 << 30, seconds=120):
        self.idle = queue.SimpleQueue()
        self.all = [Worker([str(rate), str(memory), str(int(seconds))], seconds) for _ in range(count)]
        for worker in self.all:
            self.idle.put(worker)
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        """Kills whoever is late."""
        while not all(worker.closed for worker in self.all):
            time.sleep(0.2)
            for worker in self.all:
                if time.monotonic() > worker.deadline:
                    worker.kill()

    def decode(self, job):
        """(info, samples) of one job by the next idle process; safe to call from `count` threads."""
        worker = self.idle.get()
        try:
            return worker.decode(job)
        finally:
            self.idle.put(worker)

    def close(self):
        for worker in self.all:
            worker.closed = True
            if worker.process:
                worker.kill()  # a thread that waits for it sees its end
