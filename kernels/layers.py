"""
Layers with compiled kernels for CPUs, and convolutions over padded channels for GPUs.

On a CPU, [BatchNorm, LeakyReLU, 3x3 convolution] and [BatchNorm, LeakyReLU, max pooling] run as
one kernel each: the normalised tensor is never in memory, and is recomputed for the gradient. Sums
are accumulated in float64 in a fixed order, so results do not depend on the number of threads.
Every class falls back to PyTorch's own function where its kernel does not apply.
"""
import ctypes

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.build import library

DTYPES = [torch.float32, torch.bfloat16]    # of activations; parameters are float32


def supported(x):
    """Whether kernels can run on x; never while tracing, which cannot follow a C function."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return x.device.type == "cpu" and x.dtype in DTYPES and x.dim() in (2, 4) and not traced


def to_channels_last(x):
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return x.contiguous(memory_format=layout)


def empty(*shape, dtype=torch.float32):
    """An uninitialised CPU tensor, whatever torch's default dtype and device are."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=layout)


def argument(value):
    """A tensor, None, float, int or one of DTYPES as a ctypes argument; ValueError if another."""
    if isinstance(value, torch.dtype):
        return ctypes.c_int(DTYPES.index(value))
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, int):
        return ctypes.c_long(value)
    return ctypes.c_void_p(None if value is None else value.data_ptr())


def call(name, *arguments):
    getattr(library(), name)(*map(argument, arguments))


def norm_apply(x, weight, bias, mean, var, eps, slope):
    """leaky_relu(weight (x - mean) / sqrt(var + eps) + bias), without gradients."""
    y = torch.empty_like(x)
    call("norm_apply", x.dtype, x, y, x.numel(), x.shape[1], weight, bias, mean, var, eps, slope)
    return y


def norm_measure(x):
    """(mean, biased variance) of a batch, each (C,)."""
    mean, var = empty(x.shape[1]), empty(x.shape[1])
    call("norm_measure", x.dtype, x, x.numel(), x.shape[1], mean, var)
    return mean, var


def norm_backward(dy, x, dx, weight, bias, mean, var, eps, slope, sums=None):
    """(dweight, dbias); dx is written unless it is None, and may be dy itself.

    sums: over pixels, if another kernel has accumulated them already, else None.
    """
    dweight, dbias = empty(x.shape[1]), empty(x.shape[1])
    call("norm_backward", x.dtype, dy, x, dx, x.numel(), x.shape[1], weight, bias, mean, var,
         eps, slope, sums, dweight, dbias)
    return dweight, dbias


def deviation(var, eps):
    """sqrt(var + eps) as in fused.cpp: PyTorch's float32 root is off by a bit on some CPUs."""
    return torch.sqrt((var + eps).double()).float()


def fold_bn(weight, bias, mean, var, eps):
    """(a, b), each (C,): normalising is a x + b. (None, None) without a norm."""
    if weight is None:
        return None, None
    a = weight / deviation(var, eps)
    return a, bias - mean * a


class NormFunction(torch.autograd.Function):
    """(B, C), or (B, C, T, F) channels last -> (leaky_relu(norm(x)), mean, biased variance).

    With `size`, (t, f), the result is max-pooled: (B, C, T / t, F / f).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps, slope, size):
        mean, var = norm_measure(x)
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.numbers, ctx.size = (eps, slope), size
        ctx.mark_non_differentiable(mean, var)
        if size is None:
            return norm_apply(x, weight, bias, mean, var, eps, slope), mean, var
        folded = fold_bn(weight, bias, mean, var, eps)
        y, ctx.argmax = pool_forward(x, size, True, folded, slope)  # (B, C, T / t, F / f)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        x, *parameters = ctx.saved_tensors
        dy = to_channels_last(dy)
        if ctx.size is not None:
            dx, *others = pooled_norm_backward(dy, ctx.argmax, x, ctx.size, *parameters,
                                               *ctx.numbers)
            return dx, *others, None, None, None
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        return dx, *norm_backward(dy, x, dx, *parameters, *ctx.numbers), None, None, None


class Norm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm, with the LeakyReLU of a FusedSequential: slope 1 is none, 0 a ReLU."""

    def has_kernel(self, x):
        """Whether a kernel supports x: in eval mode only without gradients."""
        if not supported(x) or self.weight.dtype != torch.float32 or x.numel() <= x.shape[1]:
            return False
        return self.training or not torch.is_grad_enabled()

    def forward(self, x):
        return self.activated(x, 1.0) if self.has_kernel(x) else super().forward(x)

    def activated(self, x, slope, size=None):
        """leaky_relu(norm(x)), max-pooled by `size` if given; has_kernel(x) must hold."""
        x = to_channels_last(x)
        if self.training:
            y, mean, var = NormFunction.apply(x, self.weight, self.bias, self.eps, slope, size)
            self.update(mean, var, x)
            return y
        if size is None:
            return norm_apply(x, *self.parts(), slope)
        return pool_forward(x, size, True, fold_bn(*self.parts()), slope)[0]

    def convolved(self, x, slope, conv, kind):
        """conv(leaky_relu(norm(x))) by a kernel; has_kernel(x) must hold."""
        x = to_channels_last(x)
        if not self.training:
            return convolve(kind, x, conv.weight, conv.bias, fold_bn(*self.parts()), slope)
        y, mean, var = ConvFunction.apply(kind, x, conv.weight, conv.bias, self.weight, self.bias,
                                          self.eps, slope)
        self.update(mean, var, x)
        return y

    def parts(self):
        return self.weight, self.bias, self.running_mean, self.running_var, self.eps

    @torch.no_grad()
    def update(self, mean, var, x):
        """Moves the running statistics towards those of batch x; var is the biased variance."""
        n = x.numel() // x.shape[1]
        self.num_batches_tracked += 1
        momentum = self.momentum    # None is a cumulative average, as in PyTorch
        momentum = 1 / float(self.num_batches_tracked) if momentum is None else momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * (n / (n - 1)), momentum)


class Norm1d(Norm, nn.BatchNorm1d):
    pass


class Norm2d(Norm, nn.BatchNorm2d):
    pass


class ConvFunction(torch.autograd.Function):
    """Convolution by (C', C, 3, 3): (B, C, T, F) -> (y (B, C', T, F), mean, biased variance).

    `kind` names the kernel, narrow or winograd. With the weight and bias of a BatchNorm, the
    input of the convolution is leaky_relu(norm(x)), with the statistics of this batch.
    """

    @staticmethod
    def forward(ctx, kind, x, weight, bias, norm_weight, norm_bias, eps, slope):
        mean = var = None
        if norm_weight is not None:
            mean, var = norm_measure(x)
            ctx.mark_non_differentiable(mean, var)
        norm = norm_weight, norm_bias, mean, var
        ctx.save_for_backward(x, weight, *norm)
        ctx.kind, ctx.numbers = kind, (eps, slope)
        return convolve(kind, x, weight, bias, fold_bn(*norm, eps), slope), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        x, weight, *norm = ctx.saved_tensors
        with_dx = any(ctx.needs_input_grad[k] for k in (1, 4, 5))   # x, and the norm's weights
        gradients = narrow_backward if ctx.kind == "narrow" else winograd_backward
        folded = fold_bn(*norm, ctx.numbers[0])
        dx, dweight, dbias, sums = gradients(to_channels_last(dy), x, weight, folded,
                                             ctx.numbers[1], norm[2], with_dx)
        dnorm = None, None
        if with_dx and norm[0] is not None:
            dnorm = norm_backward(dx, x, dx, *norm, *ctx.numbers, sums)     # in place
        return None, dx, dweight.permute(3, 2, 0, 1), dbias, *dnorm, None, None


def flipped(weight):
    """(C', C, 3, 3) -> (C, C', 3, 3): the kernel that convolves dy to dx."""
    return weight.flip(2, 3).transpose(0, 1)


def kernel_last(weight):
    """(C', C, 3, 3) -> (3, 3, C, C') contiguous."""
    return weight.permute(2, 3, 1, 0).contiguous()


def narrow_backward(dy, x, weight, folded, slope, mean, with_dx):
    """(dx or None, dweight (3, 3, C, C'), dbias, sums for norm_backward())."""
    c_out, c_in = weight.shape[:2]
    dx = torch.empty_like(x) if with_dx else None
    counts = 9 * c_in * c_out, c_out, 2 * c_in
    sums = empty(sum(counts), dtype=torch.float64)
    call_conv("narrow_backward", x, c_out, x, *folded, slope, dy, kernel_last(flipped(weight)),
              mean, dx, sums)
    dweight, dbias, of_norm = sums.split(counts)
    return dx, dweight.float().view(3, 3, c_in, c_out), dbias.float(), of_norm


def winograd_backward(dy, x, weight, folded, slope, mean, with_dx):
    """As narrow_backward(); sums are None if the channels do not fill whole vectors."""
    c_out, c_in = weight.shape[:2]
    dweight, dbias = empty(3 * 3 * c_in * c_out).view(3, 3, c_in, c_out), empty(c_out)
    call_conv("winograd_weight", x, c_out, x, *folded, slope, dy, dweight, dbias)
    if not with_dx:
        return None, dweight, dbias, None
    zeros = torch.zeros_like(weight[0, :, 0, 0])                    # (C,)
    if mean is None or c_in % 16:       # 16 are whole vectors on every CPU
        dx = convolve("winograd", dy, flipped(weight), zeros, (None, None), 0.0)
        return dx, dweight, dbias, None
    dx, sums = torch.empty_like(x), empty(2 * c_in, dtype=torch.float64)
    call_conv("winograd_gradient", dy, c_in, dy, kernel_last(flipped(weight)), zeros, dx, x,
              *folded, slope, mean, sums)
    return dx, dweight, dbias, sums


def convolve(kind, x, weight, bias, folded, slope):
    """(B, C, T, F) by a kernel (C', C, 3, 3) -> (B, C', T, F); `folded` as from fold_bn()."""
    c_out = len(weight)
    y = empty(len(x), c_out, *x.shape[2:])
    call_conv(f"{kind}_forward", x, c_out, x, *folded, slope, kernel_last(weight), bias, y)
    return y


def call_conv(name, x, c_out, *arguments):
    """Calls a kernel of narrow.cpp or winograd.cpp for x (B, C, T, F)."""
    images, c_in, height, width = x.shape
    call(name, *arguments, images, height, width, c_in, c_out)


class Conv3x3(nn.Conv2d):
    """3x3 convolution, padded by one: (B, C, T, F) -> (B, C', T, F)."""

    def forward(self, x):
        kind = self.kernel_for(x)
        if not kind:
            return super().forward(x)
        return ConvFunction.apply(kind, to_channels_last(x), self.weight, self.bias, None, None,
                                  0.0, 0.0)[0]

    def kernel_for(self, x):
        """The fastest kernel that supports x: narrow, winograd or None (PyTorch's)."""
        is_float = x.dtype == self.weight.dtype == torch.float32
        if not is_float or torch.is_autocast_enabled("cpu") or not supported(x):
            return None
        height, width = x.shape[2:]
        if height * width < 192:
            return None
        if min(self.in_channels, self.out_channels) < 12:   # would fill few of Winograd's lanes
            return "narrow"
        return "winograd" if height % 2 == width % 2 == 0 else None


class FusedSequential(nn.Sequential):
    """nn.Sequential that runs [norm, activation, convolution or max pooling] as one kernel."""

    def forward(self, x):
        layers, at = list(self), 0
        while at < len(layers):
            layer, *following = layers[at:at + 3]
            activation = following[0] if following else None
            slope = getattr(activation, "negative_slope", None)
            if type(activation) is nn.ReLU:
                slope = 0.0
            if isinstance(layer, Norm) and slope is not None and layer.has_kernel(x):
                x, used = self.fused(x, layer, slope, following[1] if following[1:] else None)
                at += used
            else:
                x, at = layer(x), at + 1
        return x

    def fused(self, x, norm, slope, last):
        """(result, number of layers) of norm, activation and, if it can be fused, `last`."""
        if isinstance(last, Conv3x3) and (kind := last.kernel_for(x)):
            return norm.convolved(x, slope, last, kind), 3          # (B, C', T, F)
        if isinstance(last, MaxPool) and last.divides(x):
            return norm.activated(x, slope, last.size()), 3         # (B, C, T / t, F / f)
        return norm.activated(x, slope), 2


class UpFunction(torch.autograd.Function):
    """2x2 transposed convolution with stride 2; its gradients are two matrix products."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.conv_transpose2d(x, weight, bias, stride=2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        images, c_in, height, width = x.shape
        c_out = dy.shape[1]
        # one row per input pixel: the 2x2 output pixels it contributes to, then channels
        dy = to_channels_last(dy).permute(0, 2, 3, 1)               # (B, 2T, 2F, C')
        dy = dy.reshape(images, height, 2, width, 2 * c_out).transpose(2, 3)
        dy = dy.reshape(-1, 4 * c_out)                              # (B T F, 4 C')
        pixels = x.permute(0, 2, 3, 1).reshape(-1, c_in).to(dy.dtype)           # (B T F, C)
        flat = weight.permute(0, 2, 3, 1).reshape(c_in, 4 * c_out).to(dy.dtype)
        dx = (dy @ flat.T).view(images, height, width, c_in).permute(0, 3, 1, 2)
        dweight = (pixels.T @ dy).view(c_in, 2, 2, c_out).permute(0, 3, 1, 2)
        dbias = dy.sum(0, dtype=torch.float32).view(4, c_out).sum(0)
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias


class Up(nn.ConvTranspose2d):
    """2x2 transposed convolution with stride 2: (B, C, T, F) -> (B, C', 2T, 2F)."""

    def forward(self, x):
        if supported(x) and torch.is_grad_enabled():
            return UpFunction.apply(x, self.weight, self.bias)
        return super().forward(x)


class PaddedConv(nn.Conv2d):
    """3x3 convolution with channels zero-padded to multiples of eight, for tensor cores."""

    def forward(self, x):
        more_in, more_out = -self.in_channels % 8, -self.out_channels % 8
        if more_in:     # even with nothing to pad, F.pad would copy x
            x = F.pad(x, (0, 0, 0, 0, 0, more_in))                  # (B, 8n, T, F)
        weight = F.pad(self.weight, (0, 0, 0, 0, 0, more_in, 0, more_out))
        bias = F.pad(self.bias, (0, more_out))
        y = F.conv2d(to_channels_last(x), to_channels_last(weight), bias, padding=1)
        return y[:, :self.out_channels]                             # (B, C', T, F)


def pool_forward(x, size, is_max, folded=(None, None), slope=0.0):
    """(B, C, T, F) -> (y (B, C, T / t, F / f), argmax in the window as uint8, None for means).

    With `folded`, see fold_bn(), the input of the pooling is leaky_relu(a x + b).
    """
    images, channels, height, width = x.shape
    y = empty(images, channels, height // size[0], width // size[1], dtype=x.dtype)
    argmax = torch.empty_like(y, dtype=torch.uint8) if is_max else None
    call_pool("pool_forward", y, size, x, y, argmax, *folded, slope)
    return y, argmax


def pooled_norm_backward(dy, argmax, x, size, weight, bias, mean, var, eps, slope):
    """(dx, dweight, dbias) of a norm whose output is pooled and never in memory."""
    folded = fold_bn(weight, bias, mean, var, eps)
    sums = empty(2 * len(mean), dtype=torch.float64)
    call_pool("pool_sums", dy, size, dy, argmax, x, *folded, slope, mean, sums)
    dweight, dbias = norm_backward(dy, x, None, weight, bias, mean, var, eps, slope, sums)

    # the gradient through the batch's statistics is again linear in x: a x + b, see fused.cpp
    n, scale = x.numel() // len(mean), folded[0]
    a = -scale * dweight / (deviation(var, eps) * n)
    b = -scale * dbias / n - a * mean
    dx = torch.empty_like(x)
    call_pool("pool_backward", dy, size, dy, argmax, dx, x, *folded, slope, a, b)
    return dx, dweight, dbias


def call_pool(name, small, size, *arguments):
    images, channels, height, width = small.shape
    call(name, small.dtype, *arguments, images * height, size[0], width, size[1], channels)


class PoolFunction(torch.autograd.Function):
    """Saves one byte per output for the gradient, where PyTorch saves the input and eight."""

    @staticmethod
    def forward(ctx, x, size, is_max):
        ctx.shape, ctx.size = x.shape, size
        y, ctx.argmax = pool_forward(x, size, is_max)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dy, dx = to_channels_last(dy), empty(*ctx.shape, dtype=dy.dtype)
        no_norm = None, None, None, 0.0, None, None
        call_pool("pool_backward", dy, ctx.size, dy, ctx.argmax, dx, *no_norm)
        return dx, None, None


class Pool(nn.Module):
    """Pooling without overlap: (B, C, T, F) -> (B, C, T / t, F / f)."""

    def size(self):
        size = self.kernel_size
        return size if isinstance(size, tuple) else (size, size)

    def divides(self, x):
        return x.shape[2] % self.size()[0] == x.shape[3] % self.size()[1] == 0

    def forward(self, x):
        if supported(x) and self.divides(x):
            return PoolFunction.apply(to_channels_last(x), self.size(), isinstance(self, MaxPool))
        return super().forward(x)


class MaxPool(Pool, nn.MaxPool2d):
    pass


class AvgPool(Pool, nn.AvgPool2d):
    pass
