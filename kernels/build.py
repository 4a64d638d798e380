"""
Compiles the CPU kernels, once per machine and version, into the user's cache folder.
"""
import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCES, HEADER = ["fused.cpp", "narrow.cpp", "pool.cpp", "winograd.cpp"], "fused.h"
FLAGS = ["-O3", "-std=c++17", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
         "-shared", "-fPIC"]


@functools.cache
def library():
    """The compiled kernels as a ctypes library; prints a note and returns None if that fails."""
    path = library_path()
    try:
        if not is_whole(path):
            compile_to(path)
        return ctypes.CDLL(path)
    except (OSError, subprocess.TimeoutExpired) as e:
        reason = " ".join(str(e).split())[:160]
        print(f"note: the CPU kernels cannot be compiled ({reason}): using PyTorch's own "
              "functions, which are slower", file=sys.stderr)
        return None


def library_path():
    """A name with a hash of sources, flags and CPU: machines may share a home folder."""
    options = [*FLAGS, platform.platform(), torch.backends.cpu.get_cpu_capability(), cpu_flags()]
    digest = hashlib.sha256(" ".join(options).encode())
    for name in [*SOURCES, HEADER]:
        with open(os.path.join(HERE, name), "rb") as f:
            digest.update(f.read())
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "music-sep-pretrain", f"kernels-{digest.hexdigest()[:16]}.so")


def cpu_flags():
    """The instruction sets of this processor, on Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            return next((line for line in f if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""


def is_whole(path):
    """Whether the library has its checksum: loading a truncated one would crash Python."""
    try:
        with open(path, "rb") as f, open(f"{path}.sha256", encoding="ascii") as expected:
            return hashlib.sha256(f.read()).hexdigest() == expected.read()
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def compile_to(path):
    print("note: compiling the CPU kernels (once, about 20 seconds)", file=sys.stderr)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = f"{path}.{os.getpid()}.tmp"
    sources = [os.path.join(HERE, name) for name in SOURCES]
    try:
        done = subprocess.run([os.environ.get("CXX", "c++"), *FLAGS, *sources, "-o", partial],
                              capture_output=True, timeout=120)
        if done.returncode:
            raise OSError(done.stderr.decode(errors="replace").strip() or "no compiler output")
        with open(partial, "rb") as f:
            digest = hashlib.sha256(f.read()).hexdigest()
        os.replace(partial, path)
        # two processes may compile at once: each rename is atomic, and the last digest counts
        with open(partial, "w", encoding="ascii") as f:
            f.write(digest)
        os.replace(partial, f"{path}.sha256")
    finally:
        if os.path.exists(partial):
            os.remove(partial)
