"""
Device, ranks, precision, compilation and speed, for both training scripts.
"""
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from common.settings import die

try:
    import kernels
except ModuleNotFoundError as e:
    if e.name != "kernels":
        raise
    kernels = None
if not hasattr(kernels, "accelerate"):
    kernels = None      # no such folder, or a package of the same name from PyPI

# precision of the convolutional parts, see model.py
AMP_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def setup_device(device):
    """(device, rank, world size). Joins the process group if torchrun started this process."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, world, local_rank = _ranks()
    if world > 1 and device == "cuda":
        device = f"cuda:{local_rank}"
    elif world > 1 and device != "cpu":
        die(f"device={device} with {world} processes: use --device=cuda, one GPU per process")
    if device == "cpu" and kernels:
        kernels.keep_freed_memory()
    try:
        resolved = torch.empty(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).splitlines()[0][:120]
        die(f"device={device} does not work here ({reason}): use --device=cpu")
    if resolved.type == "cuda":
        torch.cuda.set_device(resolved)     # CUDA graphs are captured on the current device
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if rank > 0:                            # only rank 0 prints; errors of all ranks appear
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")
    return device, rank, world


def _ranks():
    """(rank, world size, local rank) from the environment that torchrun sets."""
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [key for key in keys if key not in os.environ]
    if not missing:
        return [int(os.environ[key]) for key in keys[:3]]
    # schedulers set WORLD_SIZE too: joining a group whose other ranks never start would hang
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        print(f"note: WORLD_SIZE={world} is ignored because {', '.join(missing)} is not set: "
              "running one process (torchrun starts several)", flush=True)
    return 0, 1, 0


def cores():
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def distribute(net, device, sync_batchnorm):
    """The module to call in training: `net`, in DistributedDataParallel if there are several ranks.

    With sync_batchnorm, BatchNorm statistics are those of the whole batch instead of each rank's
    part. PyTorch has this for GPUs only.
    """
    if not dist.is_initialized():
        return net
    on_gpu = device.startswith("cuda")
    if sync_batchnorm and not on_gpu:
        die(f"sync_batchnorm=True needs GPUs, but device={device}: use --sync_batchnorm=False")
    if sync_batchnorm:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)      # in place: it replaces children
        for module in net.modules():
            if isinstance(module, torch.nn.SyncBatchNorm):
                module.forward = torch.compiler.disable(module.forward)     # it all-reduces
    return DistributedDataParallel(net, [device] if on_gpu else None)


def sum_over_ranks(values, device):
    """All-reduce: the element-wise sum of a list of numbers over all ranks."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def mean_over_ranks(value, device):
    ranks, total = sum_over_ranks([1.0, value], device)
    return total / ranks


def sync_and_check(net, device):
    """Broadcasts BatchNorm statistics from rank 0. Exits if weights differ between ranks."""
    if not dist.is_initialized():
        return
    for buffer in net.buffers():            # each rank updates its own running statistics
        dist.broadcast(buffer, 0)
    own = sum(p.double().sum().item() for p in net.parameters())
    mean = mean_over_ranks(own, device)
    if abs(mean - own) > 1e-6 * max(1.0, abs(own)):
        die("weights differ between ranks: their gradients were not all-reduced")


def accelerate(net, device):
    """Swaps layers for faster ones, in place: CPU kernels, or padded channels on a CUDA GPU.

    Count operations before: FlopCounterMode does not know the kernels.
    """
    if kernels and device == "cpu":
        kernels.accelerate(net)
    elif kernels and device.startswith("cuda"):
        kernels.pad_channels(net)


def compile_parts(parts, device):
    """torch.compile of the modules, in place; prints a note if that does not work here."""
    # torch.compile() itself never fails, but the first call does (no Triton, an old GPU, ...)
    probe = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.LeakyReLU()).to(device)
    try:
        torch.compile(probe, dynamic=False)(torch.zeros(2, 1, 8, 8, device=device)).sum().backward()
    except Exception as e:      # each backend has exceptions of its own
        reason = f"{type(e).__name__}: {str(e).strip()}".splitlines()[0][:120]
        print(f"note: torch.compile does not work here ({reason}): running without it")
        return
    print("compiling: the first step takes a minute or more (--compile=False skips this)")
    for part in parts:
        part.compile(dynamic=False)         # in place: parameter names stay


def keep_on_gpu(prepared, device):
    """Moves audio to the GPU, where crops are cut faster, if it fits half of the free memory."""
    if not device.startswith("cuda"):
        return
    size, free = prepared.audio.nbytes, torch.cuda.mem_get_info(device)[0]
    if 2 * size <= free:
        prepared.keep_on(device)
    else:
        print(f"note: {prepared.path} stays in CPU memory: {size / 2 ** 30:.1f} GiB of audio would "
              f"take more than half of the {free / 2 ** 30:.1f} GiB free on the GPU")


class CudaGraph:
    """step(*tensors) -> loss, which leaves gradients in `parameters`, captured as one CUDA graph.

    Launching hundreds of kernels takes longer than running them on small batches. The first three
    calls run as usual, while cuDNN and compilers choose kernels; later ones replay the fourth, so
    shapes must not change. Gradients must be None before a call, which overwrites the last loss.
    """

    def __init__(self, step, parameters):
        self.step, self.parameters = step, [p for p in parameters if p.requires_grad]
        self.calls, self.graph = 0, torch.cuda.CUDAGraph()

    def __call__(self, *tensors):
        self.calls += 1
        if self.calls <= 3:
            return self.step(*tensors)
        if self.calls == 4:
            self.inputs = [t.clone() for t in tensors]
            # thread_local: loader threads may use the GPU during the capture
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.loss = self.step(*self.inputs)
            self.gradients = [p.grad for p in self.parameters]
        for static, new in zip(self.inputs, tensors, strict=True):
            static.copy_(new)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss


@torch.no_grad()
def count_flops(net, crop, device):
    """FLOPs to train on a crop of `crop` samples: a backward pass costs two forward passes."""
    net.eval()
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, crop, device=device))
    net.train()
    return 3 * counter.get_total_flops()


@torch.no_grad()
def matmul_rate(device, amp_dtype):
    """FLOP/s of a large matrix product: the best of five, as other processes may use the cores."""
    n = 8192 if device.startswith("cuda") else 2048
    if device == "cpu" and amp_dtype == torch.float16:
        n = 256     # on CPUs without float16 instructions a larger product takes minutes
    x, durations = torch.randn(n, n, device=device, dtype=amp_dtype or torch.float32), []
    for _ in range(6):
        began = time.perf_counter()
        (x @ x)[0, 0].item()                # reading a number waits for the GPU
        durations.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(durations[1:])


def peak_seconds(net, crop, device):
    """Seconds to train on a crop if all FLOPs ran at the rate of a large matrix product."""
    rate, threads = matmul_rate(device, net.amp_dtype), torch.get_num_threads()
    if device == "cpu" and threads > 1:
        torch.set_num_threads(1)
        single = matmul_rate(device, net.amp_dtype)
        torch.set_num_threads(threads)
        if rate < 1.3 * single:
            print(f"note: {threads} threads are only {rate / single:.1f} times as fast as one, as "
                  "other processes use these cores: OMP_NUM_THREADS=1 is often faster then")
    return count_flops(net, crop, device) / rate
