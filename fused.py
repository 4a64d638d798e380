"""
BatchNorm and LeakyReLU in one module: on a CPU by our own kernel, fused.cpp, else by PyTorch.

PyTorch's own functions take most of the time that is not convolution. The kernel takes a third of
theirs, its sums are more exact, and they do not depend on the number of threads. It is compiled
within seconds, once, to the cache folder of the user. Where there is no C++ compiler, PyTorch's
functions are used, and one line says so.
"""
import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

HERE = os.path.dirname(os.path.abspath(__file__))
FLAGS = ["-O3", "-std=c++17", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
         "-shared", "-fPIC"]


@functools.cache
def kernel():
    """The compiled fused.cpp; None if it cannot be had here, which is told in one line."""
    with open(os.path.join(HERE, "fused.cpp"), "rb") as f:
        source = f.read()
    # a home folder may be shared by machines with other processors
    what = [*FLAGS, platform.platform(), torch.backends.cpu.get_cpu_capability(), processor()]
    name = hashlib.sha256(source + " ".join(what).encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = os.path.join(cache, "music-sep-pretrain", f"fused-{name}.so")
    try:
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            made = f"{path}.{os.getpid()}.tmp"
            compiler = os.environ.get("CXX", "c++")
            done = subprocess.run([compiler, *FLAGS, "-x", "c++", "-", "-o", made], input=source,
                                  capture_output=True, timeout=120)
            if done.returncode:
                raise OSError(done.stderr.decode(errors="replace").strip() or "it says nothing")
            os.replace(made, path)
        return ctypes.CDLL(path)
    except (OSError, subprocess.TimeoutExpired) as e:
        reason = " ".join(str(e).split())[:160]
        print(f"note: fused.cpp cannot be compiled here ({reason}): networks are slower",
              file=sys.stderr)
        return None


def processor():
    """What the processor calls its abilities, on Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            return next((line for line in f if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""


def address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def sizes(x):
    return int(x.dtype == torch.bfloat16), ctypes.c_long(x.numel()), ctypes.c_long(x.shape[1])


def apply(x, weight, bias, mean, var, eps, slope):
    """leaky_relu(weight (x - mean) / sqrt(var + eps) + bias), without gradients."""
    half, n, channels = sizes(x)
    y = torch.empty_like(x)
    numbers = map(ctypes.c_float, (eps, slope))
    kernel().norm_apply(half, address(x), address(y), n, channels,
                        *map(address, (weight, bias, mean, var)), *numbers)
    return y


class NormLeakyFunction(torch.autograd.Function):
    """(B, C), or (B, C, T, F) channels last -> (y, mean, biased variance) of this batch."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, slope):
        half, n, channels = sizes(x)
        mean, var = torch.empty_like(weight), torch.empty_like(weight)
        kernel().norm_measure(half, address(x), n, channels, address(mean), address(var))
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.numbers = eps, slope
        ctx.mark_non_differentiable(mean, var)
        return apply(x, weight, bias, mean, var, eps, slope), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        x, *parameters = ctx.saved_tensors
        half, n, channels = sizes(x)
        if dy.stride() != x.stride():
            dy = torch.empty_like(x).copy_(dy)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweight, dbias = (torch.empty_like(parameters[0]) for _ in range(2))
        kernel().norm_backward(half, *map(address, (dy, x, dx)), n, channels,
                               *map(address, parameters), *map(ctypes.c_float, ctx.numbers),
                               address(dweight), address(dbias))
        return dx, dweight, dbias, None, None


class NormLeaky(nn.modules.batchnorm._BatchNorm):
    """BatchNorm, then LeakyReLU: (B, C) or (B, C, T, F) -> the same. A slope of 0 makes it a ReLU.

    Names and values of its weights are those of nn.BatchNorm2d. If `synced`, statistics in training
    are those of the batches of all processes together.
    """

    def __init__(self, channels, slope, momentum):
        super().__init__(channels, eps=1e-3, momentum=momentum)
        self.slope, self.synced = slope, False

    def _check_input_dim(self, x):
        if x.dim() not in (2, 4):
            raise ValueError(f"(B, C) or (B, C, T, F) is expected, got {tuple(x.shape)}")

    def forward(self, x):
        if self.training and self.synced:
            return self.forward_synced(x)
        with_gradient = torch.is_grad_enabled() and not self.training
        if with_gradient or not self.is_for_kernel(x):
            return F.leaky_relu(super().forward(x), self.slope, inplace=True)
        layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        x = x.contiguous(memory_format=layout)
        if not self.training:
            return apply(x, self.weight, self.bias, self.running_mean, self.running_var, self.eps,
                         self.slope)
        y, mean, var = NormLeakyFunction.apply(x, self.weight, self.bias, self.eps, self.slope)
        self.take_statistics(mean, var, x.numel() // x.shape[1])
        return y

    def is_for_kernel(self, x):
        """Whether the kernel can do it; compilers and exporters want PyTorch's functions."""
        return (x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
                and self.weight.dtype == torch.float32 and x.numel() > x.shape[1]
                and not torch.compiler.is_compiling() and kernel() is not None)

    @torch.compiler.disable         # compiled, it would lose the gradient through the sums
    def forward_synced(self, x):
        """The same over the batches of all processes, which must be of one size."""
        from torch.distributed.nn.functional import all_reduce  # not every PyTorch has it
        world, dims = dist.get_world_size(), [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide = x.float()
        # a gradient passes through both sums: batches of others depend on this one
        own_var, own_mean = torch.var_mean(wide, dims, correction=0)            # (C,)
        mean = all_reduce(own_mean) / world
        var = all_reduce(own_var + (own_mean - mean) ** 2) / world
        self.take_statistics(mean.detach(), var.detach(), world * x.numel() // x.shape[1])
        scale = self.weight * torch.rsqrt(var + self.eps)
        y = (wide - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)
        return F.leaky_relu(y, self.slope, inplace=True).to(x.dtype)

    @torch.no_grad()
    def take_statistics(self, mean, var, pixels):
        """Moves the running statistics towards those of a batch; var is the biased one."""
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (pixels / (pixels - 1)), self.momentum)


def synchronise(net):
    """From here on, BatchNorm statistics of a network are those of all processes together."""
    for module in net.modules():
        if isinstance(module, NormLeaky):
            module.synced = True
