"""
Optional: faster layers, swapped into a plain network in place. The network knows nothing of them;
without this folder everything runs on PyTorch's own functions, on CPUs about half as fast.

    kernels.accelerate(net)         # CPU: compiled kernels for convolution, BatchNorm, pooling
    kernels.pad_channels(net)       # GPU: convolutions over multiples of eight channels

Classes change, parameters and their names stay: checkpoints are the same with and without.
"""
from torch import nn

from kernels import build, layers
from kernels.malloc import keep_freed_memory

__all__ = ["accelerate", "keep_freed_memory", "pad_channels"]

SWAP = {
    nn.Sequential: layers.FusedSequential, nn.Conv2d: layers.Conv3x3,
    nn.ConvTranspose2d: layers.Up, nn.BatchNorm2d: layers.Norm2d, nn.BatchNorm1d: layers.Norm1d,
    nn.MaxPool2d: layers.MaxPool, nn.AvgPool2d: layers.AvgPool}


def accelerate(net):
    """Swaps layers of `net` for CPU kernels, in place, where they fit; compiles these if needed.

    Without a C++ compiler the network stays as it is, after a note.
    """
    if build.library() is not None:
        swap(net, SWAP)
    return net


def pad_channels(net):
    """Swaps 3x3 convolutions whose channels are no multiples of eight, in place: GPUs multiply
    eight at a time."""
    return swap(net, {nn.Conv2d: layers.PaddedConv})


def swap(net, classes):
    for module in net.modules():
        fast = classes.get(type(module))
        if fast and fast.fits(module):
            module.__class__ = fast
    return net
