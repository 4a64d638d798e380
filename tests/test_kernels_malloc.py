"""
Huge pages and reuse of freed memory.

    python -m pytest -q tests/test_kernels_malloc.py
"""
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from kernels import malloc

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc only")

SETUP = """
import resource, torch
from kernels import keep_freed_memory
def kib(field):
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps") if field in line)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
"""


def numbers(code, threads="1"):
    """The integers that a process with this code prints."""
    done = subprocess.run([sys.executable, "-c", SETUP + code], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": threads})
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split()))


def huge_pages():
    """(size in bytes, whether a program may request them)."""
    folder = "/sys/kernel/mm/transparent_hugepage"
    try:
        with open(f"{folder}/enabled") as state, open(f"{folder}/hpage_pmd_size") as size:
            return int(size.read()), "[never]" not in state.read()
    except FileNotFoundError:
        return 0, False


def test_tensors_are_in_huge_pages():
    size, allowed = huge_pages()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not allowed or size != 2 << 20 or memory < malloc.HEAP:
        pytest.skip("no huge pages of 2 MiB, or less than 4 GiB of memory")
    code = "keep_freed_memory()\nx = torch.ones(1 << 26)\nprint(kib('AnonHugePages'))"  # 256 MiB
    assert numbers(code)[0] > 100 << 10


@pytest.mark.parametrize("space", [0, 2 << 30])     # unlimited; less than HEAP
@pytest.mark.parametrize("threads", ["1", "2"])
def test_freed_memory_is_reused(space, threads):
    code = f"""
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
if {space}:
    resource.setrlimit(resource.RLIMIT_AS, (used + {space},) * 2)
keep_freed_memory()
for k in range(20):
    if k == 5:
        before = faults()
    large = [torch.ones(1 << 24 + n % 2) for n in range(4)]     # 64 and 128 MiB
    small = [torch.ones(1000) for n in range(10)]               # allocated in between
    del large
print(faults() - before, kib("Rss:") >> 10)"""
    new_pages, mib = numbers(code, threads)
    # without reuse: 192 huge or 98,304 small pages in each iteration
    limit = 2000 if huge_pages()[1] and not space else 150_000
    assert new_pages < limit and mib < 1600
