"""
Optional faster layers, swapped into a network of plain torch.nn in place. Without this folder
everything runs on PyTorch's own functions, about half as fast on CPUs.

    kernels.accelerate(net)         # CPU: compiled kernels for convolution, BatchNorm, pooling
    kernels.pad_channels(net)       # GPU: convolutions over multiples of eight channels

Only the classes of modules change; parameters and their names stay, so checkpoints do too.
"""
from torch import nn

from kernels import build, layers
from kernels.malloc import keep_freed_memory

__all__ = ["accelerate", "keep_freed_memory", "pad_channels"]

SWAP = {
    nn.Sequential: layers.FusedSequential, nn.Conv2d: layers.Conv3x3,
    nn.ConvTranspose2d: layers.Up, nn.BatchNorm2d: layers.Norm2d, nn.BatchNorm1d: layers.Norm1d,
    nn.MaxPool2d: layers.MaxPool, nn.AvgPool2d: layers.AvgPool}

# options that the kernels support
NORM = {"affine": True, "track_running_stats": True}
POOL = {"padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False,
        "divisor_override": None}
OPTIONS = {
    nn.Conv2d: {"kernel_size": (3, 3), "padding": (1, 1), "stride": (1, 1), "dilation": (1, 1),
                "groups": 1, "padding_mode": "zeros"},
    nn.ConvTranspose2d: {"kernel_size": (2, 2), "padding": (0, 0), "stride": (2, 2),
                         "dilation": (1, 1), "groups": 1, "output_padding": (0, 0)},
    nn.BatchNorm2d: NORM, nn.BatchNorm1d: NORM, nn.MaxPool2d: POOL, nn.AvgPool2d: POOL}


def accelerate(net):
    """Swaps supported layers of `net` for CPU kernels, in place; compiles these if needed.

    Without a C++ compiler, prints a note and leaves the network unchanged. Returns the network.
    """
    if build.library() is not None:
        for module in net.modules():
            if type(module) in SWAP and supported(module):
                module.__class__ = SWAP[type(module)]
    return net


def pad_channels(net):
    """Pads the channels of 3x3 convolutions to multiples of eight, in place, for tensor cores."""
    for module in net.modules():
        if type(module) is nn.Conv2d and supported(module) and (
                module.in_channels % 8 or module.out_channels % 8):
            module.__class__ = layers.PaddedConv
    return net


def supported(module):
    """Whether a module has these options, a bias if it can, and no overlap if it pools."""
    options = OPTIONS.get(type(module), {})
    if options is POOL and module.stride != module.kernel_size:
        return False
    return getattr(module, "bias", True) is not None and all(
        getattr(module, name, value) == value for name, value in options.items())
