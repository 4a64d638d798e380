"""
Parts of the networks that are faster than PyTorch's own. On a CPU, by our kernels: BatchNorm and
LeakyReLU in one, with the convolution or the pooling behind them; convolutions; pooling.

With PyTorch's own functions steps take half as long again, and up to twice the memory. The sums of
the kernels are more exact, and they do not depend on the number of threads. Where there is no
kernel, see kernels.py, PyTorch's functions are used.
"""
import ctypes

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import address, fills_up, half, kernel, longs, pixels_last, takes

# -----------------------------------------------------------------------------
# BatchNorm and LeakyReLU

def sizes(x):
    return half(x), *longs(x.numel(), x.shape[1])


def apply(x, weight, bias, mean, var, eps, slope):
    """leaky_relu(weight (x - mean) / sqrt(var + eps) + bias), without gradients."""
    is_half, n, channels = sizes(x)
    y = torch.empty_like(x)
    numbers = map(ctypes.c_float, (eps, slope))
    kernel().norm_apply(is_half, address(x), address(y), n, channels,
                        *map(address, (weight, bias, mean, var)), *numbers)
    return y


def norm_backward(dy, x, dx, weight, bias, mean, var, eps, slope, sums=None):
    """Gradients of weight and bias; that of x goes to dx, if that is not None. It may be dy.

    `sums` over pixels have been made already, or are None.
    """
    is_half, n, channels = sizes(x)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    numbers = map(ctypes.c_float, (eps, slope))
    kernel().norm_backward(is_half, *map(address, (dy, x, dx)), n, channels,
                           *map(address, (weight, bias, mean, var)), *numbers,
                           *map(address, (sums, dweight, dbias)))
    return dweight, dbias


def measure(x):
    """(mean, biased variance), each (C,), of a batch."""
    is_half, n, channels = sizes(x)
    mean, var = torch.empty(x.shape[1]), torch.empty(x.shape[1])
    kernel().norm_measure(is_half, address(x), n, channels, address(mean), address(var))
    return mean, var


class NormLeakyFunction(torch.autograd.Function):
    """(B, C), or (B, C, T, F) channels last -> (y, mean, biased variance) of this batch.

    Given `size`, y is max-pooled by it: (B, C, T / t, F / f).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps, slope, size):
        mean, var = measure(x)
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.numbers, ctx.size = (eps, slope), size
        ctx.mark_non_differentiable(mean, var)
        if size is None:
            return apply(x, weight, bias, mean, var, eps, slope), mean, var
        line = norm_line(weight, bias, mean, var, eps)
        y, ctx.which = pool_forward(x, size, True, line, slope)     # (B, C, T / t, F / f)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        x, *parameters = ctx.saved_tensors
        dy = pixels_last(dy)
        if ctx.size is not None:
            dx, *others = pooled_norm_backward(dy, ctx.which, x, ctx.size, *parameters,
                                               *ctx.numbers)
            return dx, *others, None, None, None
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        return dx, *norm_backward(dy, x, dx, *parameters, *ctx.numbers), None, None, None


class NormLeaky(nn.modules.batchnorm._BatchNorm):
    """BatchNorm, then LeakyReLU: (B, C) or (B, C, T, F) -> the same. A slope of 0 makes it a ReLU.

    Given `size`, (t, f), it is max-pooled by that: (B, C, T / t, F / f).

    Names and values of its weights are those of nn.BatchNorm2d. If `synced`, statistics in training
    are those of the batches of all processes together.
    """

    def __init__(self, channels, slope, momentum):
        super().__init__(channels, eps=1e-3, momentum=momentum)
        self.slope, self.synced = float(slope), False

    def _check_input_dim(self, x):
        if x.dim() not in (2, 4):
            raise ValueError(f"(B, C) or (B, C, T, F) is expected, got {tuple(x.shape)}")

    def forward(self, x, size=None):
        if size is not None and not divides(size, x):
            return pool(self(x), size)
        if self.training and self.is_kernel(x):
            x = pixels_last(x)
            y, mean, var = NormLeakyFunction.apply(x, self.weight, self.bias, self.eps, self.slope,
                                                   size)
            self.take_statistics(mean, var, x.numel() // x.shape[1])
            return y
        if self.training and self.synced:
            y = self.forward_synced(x)
        elif self.is_kernel(x):
            learnt = self.weight, self.bias, self.running_mean, self.running_var, self.eps
            if size is not None:
                return pool_forward(pixels_last(x), size, True, norm_line(*learnt), self.slope)[0]
            y = apply(pixels_last(x), *learnt, self.slope)
        else:
            y = F.leaky_relu(super().forward(x), self.slope, inplace=True)
        return y if size is None else pool(y, size)

    def is_kernel(self, x):
        """Whether a kernel can do it. Those have no gradient through statistics that are given."""
        if not takes(x) or self.weight.dtype != torch.float32 or x.numel() <= x.shape[1]:
            return False
        if self.training:
            return not self.synced
        return not torch.is_grad_enabled()

    def convolve(self, x, conv, kind):
        """conv(self(x)) by a kernel, narrow.cpp or winograd.cpp."""
        x = pixels_last(x)
        if not self.training:
            line = norm_line(self.weight, self.bias, self.running_mean, self.running_var, self.eps)
            return convolve(kind, x, conv.weight, conv.bias, line, self.slope)
        y, mean, var = ConvFunction.apply(kind, x, conv.weight, conv.bias, self.weight, self.bias,
                                          self.eps, self.slope)
        self.take_statistics(mean, var, x.numel() // x.shape[1])
        return y

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
            # compiled, it would lose the gradient through the sums
            module.forward_synced = torch.compiler.disable(module.forward_synced)


# -----------------------------------------------------------------------------
# convolutions

class ConvFunction(torch.autograd.Function):
    """A convolution by (C', C, 3, 3): (B, C, T, F) -> (y (B, C', T, F), mean, biased variance).

    `kind` names the kernel: narrow or winograd. Given the weight and bias of a BatchNorm, it is
    that of leaky_relu(norm(x)), with the statistics of this batch. What is normalised is never in
    memory: it is computed again for the gradient.
    """

    @staticmethod
    def forward(ctx, kind, x, weight, bias, norm_weight, norm_bias, eps, slope):
        mean = var = None
        if norm_weight is not None:
            mean, var = measure(x)
            ctx.mark_non_differentiable(mean, var)
        norm = norm_weight, norm_bias, mean, var
        ctx.save_for_backward(x, weight, *norm)
        ctx.kind, ctx.numbers = kind, (eps, slope)
        return convolve(kind, x, weight, bias, norm_line(*norm, eps), slope), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        x, weight, *norm = ctx.saved_tensors
        with_dx = any(ctx.needs_input_grad[k] for k in (1, 4, 5))   # x, and the norm's weights
        gradients = narrow_backward if ctx.kind == "narrow" else winograd_backward
        line = norm_line(*norm, ctx.numbers[0])
        dx, dweight, dbias, sums = gradients(pixels_last(dy), x, weight, line, ctx.numbers[1],
                                             norm[2], with_dx)
        dnorm = None, None
        if with_dx and norm[0] is not None:
            dnorm = norm_backward(dx, x, dx, *norm, *ctx.numbers, sums)     # written over
        return None, dx, dweight.permute(3, 2, 0, 1), dbias, *dnorm, None, None


def turned_around(weight):
    """The kernel (C, C', 3, 3) by which the gradient of a convolution is that of its input."""
    return weight.flip(2, 3).transpose(0, 1)


def narrow_backward(dy, x, weight, line, slope, mean, with_dx):
    """Gradients of input, or None, weight (3, 3, C, C') and bias; sums for norm_backward()."""
    c_out, c_in = weight.shape[:2]
    dx = torch.empty_like(x) if with_dx else None
    counts = 9 * c_in * c_out, c_out, 2 * c_in
    sums = torch.empty(sum(counts), dtype=torch.float64)
    turned = turned_around(weight).permute(2, 3, 1, 0).contiguous()     # (3, 3, C', C)
    run_convolution("narrow_backward", x, c_out, x, *line, slope, dy, turned, mean, dx, sums)
    dweight, dbias, of_norm = sums.split(counts)
    return dx, dweight.float().view(3, 3, c_in, c_out), dbias.float(), of_norm


def winograd_backward(dy, x, weight, line, slope, mean, with_dx):
    """The same. There are no sums if channels do not fill whole vectors."""
    c_out, c_in = weight.shape[:2]
    dweight, dbias = torch.empty(3, 3, c_in, c_out), torch.empty(c_out)
    run_convolution("winograd_weight", x, c_out, x, *line, slope, dy, dweight, dbias)
    if not with_dx:
        return None, dweight, dbias, None
    turned, zeros = turned_around(weight), torch.zeros(c_in)
    if mean is None or c_in % 16:       # 16 are whole vectors on every processor
        dx = convolve("winograd", dy, turned, zeros, (None, None), 0.0)
        return dx, dweight, dbias, None
    dx, sums = torch.empty_like(x), torch.empty(2 * c_in, dtype=torch.float64)
    turned = turned.permute(2, 3, 1, 0).contiguous()                    # (3, 3, C', C)
    run_convolution("winograd_gradient", dy, c_in, dy, turned, zeros, dx, x, *line, slope, mean,
                    sums)
    return dx, dweight, dbias, sums


def deviation_of(var, eps):
    """sqrt(var + eps) as in fused.cpp: in float32 PyTorch's is off by a bit on some processors."""
    return torch.sqrt((var + eps).double()).float()


def norm_line(weight, bias, mean, var, eps):
    """(scale, shift), each (C,), of what normalising is: scale x + shift. None if there is none."""
    if weight is None:
        return None, None
    scale = weight / deviation_of(var, eps)
    return scale, bias - mean * scale


def run_convolution(name, x, c_out, *what):
    """Calls a kernel of narrow.cpp or winograd.cpp for x (B, C, T, F)."""
    images, c_in, height, width = x.shape
    getattr(kernel(), name)(*map(value_of, what), *longs(images, height, width, c_in, c_out))


def value_of(one):
    """How a kernel takes a tensor, None or a number."""
    return ctypes.c_float(one) if isinstance(one, float) else address(one)


def convolve(kind, x, weight, bias, line, slope):
    """(B, C, T, F) by a kernel (C', C, 3, 3) -> (B, C', T, F); `line` as norm_line() gives it."""
    c_out = len(weight)
    y = torch.empty((len(x), c_out, *x.shape[2:]), memory_format=torch.channels_last)
    weight = weight.permute(2, 3, 1, 0).contiguous()                # (3, 3, C, C')
    run_convolution(f"{kind}_forward", x, c_out, x, *line, slope, weight, bias, y)
    return y


class Conv3x3(nn.Conv2d):
    """nn.Conv2d of 3x3, padded by one: (B, C, T, F) -> (B, C', T, F).

    Given `norm`, a NormLeaky, it is the convolution of norm(x).
    """

    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out, 3, padding=1)

    def forward(self, x, norm=None):
        kind = self.kernel_for(x)
        if kind and norm is not None and norm.is_kernel(x):
            return norm.convolve(x, self, kind)
        if norm is not None:
            x = norm(x)
        if kind:
            return ConvFunction.apply(kind, pixels_last(x), self.weight, self.bias, None, None,
                                      0.0, 0.0)[0]
        return self.in_eights(x) if fills_up(x) else super().forward(x)

    def in_eights(self, x):
        """The same with channels of zeros up to a multiple of eight, as GPUs multiply them."""
        more_in, more_out = -self.in_channels % 8, -self.out_channels % 8
        if not more_in and not more_out:
            return super().forward(x)
        if more_in:     # else it would be copied
            x = F.pad(x, (0, 0, 0, 0, 0, more_in))                  # (B, 8n, T, F)
        weight = F.pad(self.weight, (0, 0, 0, 0, 0, more_in, 0, more_out))
        bias = F.pad(self.bias, (0, more_out))
        y = F.conv2d(pixels_last(x), pixels_last(weight), bias, padding=1)
        return y[:, :self.out_channels]                             # (B, C', T, F)

    def kernel_for(self, x):
        """Which kernel can do it, and pays: narrow, winograd or, for PyTorch's function, None."""
        is_plain = x.dtype == self.weight.dtype == torch.float32
        if not is_plain or torch.is_autocast_enabled("cpu") or not takes(x):
            return None
        height, width = x.shape[2:]
        if height * width < 192:
            return None
        fewest = min(self.in_channels, self.out_channels)
        if fewest < 12:         # they would fill winograd.cpp's vectors badly
            return "narrow"
        return "winograd" if height % 2 == width % 2 == 0 else None


class NormsAndConvs(nn.Sequential):
    """NormLeaky and Conv3x3 in turn; what follows a norm is computed together with it.

    Given `size`, (t, f), the result is max-pooled.
    """

    def forward(self, x, size=None):
        norm = None
        for module in self:
            if isinstance(module, NormLeaky):
                norm = module
            else:
                x, norm = module(x, norm), None                     # (B, C', T, F)
        if norm is not None:
            return norm(x, size)                                    # (B, C', T / t, F / f)
        return x if size is None else pool(x, size)


class UpFunction(torch.autograd.Function):
    """A transposed convolution of 2x2 with stride 2; its gradients are two matrix products."""

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
        # beside each other what came of one pixel: row and column in a square of four, channel
        dy = pixels_last(dy).permute(0, 2, 3, 1)                    # (B, 2T, 2F, C')
        dy = dy.reshape(images, height, 2, width, 2 * c_out).transpose(2, 3)
        dy = dy.reshape(-1, 4 * c_out)                              # (B T F, 4 C')
        pixels = x.permute(0, 2, 3, 1).reshape(-1, c_in).to(dy.dtype)           # (B T F, C)
        flat = weight.permute(0, 2, 3, 1).reshape(c_in, 4 * c_out).to(dy.dtype)
        dx = (dy @ flat.T).view(images, height, width, c_in).permute(0, 3, 1, 2)
        dweight = (pixels.T @ dy).view(c_in, 2, 2, c_out).permute(0, 3, 1, 2)
        dbias = dy.sum(0, dtype=torch.float32).view(4, c_out).sum(0)
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias


class Up(nn.ConvTranspose2d):
    """nn.ConvTranspose2d of 2x2 with stride 2: (B, C, T, F) -> (B, C', 2T, 2F)."""

    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out, 2, stride=2)

    def forward(self, x):
        if takes(x) and torch.is_grad_enabled():
            return UpFunction.apply(x, self.weight, self.bias)
        return super().forward(x)


# -----------------------------------------------------------------------------
# pooling

def pool_forward(x, size, largest, line=(None, None), slope=0.0):
    """(B, C, T, F) -> (B, C, T / t, F / f), and which of the values each is, one byte, or None.

    With `line`, see norm_line(), leaky_relu(scale x + shift) is what is pooled.
    """
    images, channels, height, width = x.shape
    y = torch.empty((images, channels, height // size[0], width // size[1]), dtype=x.dtype,
                    memory_format=torch.channels_last)
    which = torch.empty_like(y, dtype=torch.uint8) if largest else None
    run_pool("pool_forward", y, size, x, y, which, *line, slope)
    return y, which


def pool_backward(dy, which, shape, size):
    """The gradient of pooling, of the shape of its input."""
    dx = torch.empty(shape, dtype=dy.dtype, memory_format=torch.channels_last)
    no_norm = None, None, None, 0.0, None, None
    run_pool("pool_backward", dy, size, dy, which, dx, *no_norm)
    return dx


def pooled_norm_backward(dy, which, x, size, weight, bias, mean, var, eps, slope):
    """Gradients of x, weight and bias of a norm whose result is pooled: that is never in memory."""
    line = norm_line(weight, bias, mean, var, eps)
    sums = torch.empty(2 * len(mean), dtype=torch.float64)
    run_pool("pool_sums", dy, size, dy, which, x, *line, slope, mean, sums)
    dweight, dbias = norm_backward(dy, x, None, weight, bias, mean, var, eps, slope, sums)

    # the gradient of normalising is again a line, see fused.cpp
    pixels, deviation = x.numel() // len(mean), deviation_of(var, eps)
    along = -line[0] * dweight / (deviation * pixels)
    still = -line[0] * dbias / pixels - along * mean
    dx = torch.empty_like(x)
    run_pool("pool_backward", dy, size, dy, which, dx, x, *line, slope, along, still)
    return dx, dweight, dbias


def run_pool(name, small, size, *what):
    images, channels, height, width = small.shape
    getattr(kernel(), name)(half(small), *map(value_of, what),
                            *longs(images * height, size[0], width, size[1], channels))


class PoolFunction(torch.autograd.Function):
    """Keeps one byte per result for the gradient, where PyTorch keeps the input and eight."""

    @staticmethod
    def forward(ctx, x, size, largest):
        ctx.shape, ctx.size = x.shape, size
        y, ctx.which = pool_forward(x, size, largest)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return pool_backward(pixels_last(dy), ctx.which, ctx.shape, ctx.size), None, None


def divides(size, x):
    return x.shape[2] % size[0] == x.shape[3] % size[1] == 0


def pool(x, size, kind="max"):
    """F.max_pool2d or F.avg_pool2d: (B, C, T, F) by size (t, f) -> (B, C, T / t, F / f)."""
    if not (takes(x) and divides(size, x)):
        return {"max": F.max_pool2d, "avg": F.avg_pool2d}[kind](x, size)
    return PoolFunction.apply(pixels_last(x), size, kind == "max")


# -----------------------------------------------------------------------------
# resynthesis

class OverlapAdd(torch.autograd.Function):
    """Frames (..., T, W) that begin `hop` samples apart, added up: (..., (T - 1) hop + W).

    The gradient is a view of what comes in: no copies.
    """

    @staticmethod
    def forward(ctx, frames, hop):
        n_frames, ctx.length, ctx.hop = *frames.shape[-2:], hop
        parts = frames.split(hop, -1)                               # each (..., T, <= hop)
        hops = frames.new_zeros(*frames.shape[:-2], n_frames + len(parts) - 1, hop)
        for k, part in enumerate(parts):
            hops[..., k:k + n_frames, :part.shape[-1]] += part
        return hops.flatten(-2)[..., :(n_frames - 1) * hop + ctx.length]

    @staticmethod
    def backward(ctx, dy):
        return dy.unfold(-1, ctx.length, ctx.hop), None             # (..., T, W)
