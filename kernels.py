"""
Compiles our kernels for CPUs, fused.cpp, narrow.cpp, pool.cpp and winograd.cpp, for fused.py.

This takes some seconds, once; the library is kept in the cache folder of the user. Where there is
no C++ compiler, and on other devices, PyTorch's functions are used. One line says that there is
none.
"""
import contextlib
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
DTYPES = [torch.float32, torch.bfloat16]
switched_off = False            # see plain()


@contextlib.contextmanager
def plain():
    """Within it, PyTorch's functions are used: their arithmetic can be counted."""
    global switched_off
    before, switched_off = switched_off, True
    try:
        yield
    finally:
        switched_off = before


@functools.cache
def kernel():
    """The compiled kernels; None if they cannot be had here, which is told in one line."""
    sources = [os.path.join(HERE, name) for name in SOURCES]
    # a home folder may be shared by machines with other processors
    what = [*FLAGS, platform.platform(), torch.backends.cpu.get_cpu_capability(), processor()]
    seen = hashlib.sha256(" ".join(what).encode())
    for path in [*sources, os.path.join(HERE, HEADER)]:
        with open(path, "rb") as f:
            seen.update(f.read())
    name = seen.hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = os.path.join(cache, "music-sep-pretrain", f"fused-{name}.so")
    try:
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            made = f"{path}.{os.getpid()}.tmp"
            compiler = os.environ.get("CXX", "c++")
            done = subprocess.run([compiler, *FLAGS, *sources, "-o", made],
                                  capture_output=True, timeout=120)
            if done.returncode:
                raise OSError(done.stderr.decode(errors="replace").strip() or "it says nothing")
            os.replace(made, path)
        return ctypes.CDLL(path)
    except (OSError, subprocess.TimeoutExpired) as e:
        reason = " ".join(str(e).split())[:160]
        print(f"note: the kernels for CPUs cannot be compiled here ({reason}): networks are slower",
              file=sys.stderr)
        return None


def processor():
    """What the processor calls its abilities, on Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            return next((line for line in f if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""


def takes(x):
    """Whether the kernels can do it; compilers and exporters want PyTorch's functions."""
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return (x.device.type == "cpu" and x.dtype in DTYPES and not switched_off and not watched
            and kernel() is not None)


def fills_up(x):
    """Whether a convolution does better with more channels, see Conv3x3.in_eights()."""
    return x.is_cuda and not switched_off


def pixels_last(x):
    """The same values with the channels next to each other."""
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return x.contiguous(memory_format=layout)


def address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def longs(*numbers):
    return map(ctypes.c_long, numbers)


def half(x):
    return DTYPES.index(x.dtype)        # an error for others: the kernels would write too far
