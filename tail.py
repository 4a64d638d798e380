"""
The back ends of the classifier: what follows the U-Net, or stands alone.

Tail is a VGG of seven blocks (Won et al. 2020's short-chunk VGG, two convolutions per resolution).
Transformer is a ViT (Gong et al. 2021's AST). Decoder outputs of the U-Net join either.

Letters in shapes: B batch, S sources, C channels, T frames, F frequency bins, M mel bands, P
patches, D width of the transformer.
"""
from collections import OrderedDict

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from fused import Conv3x3, NormLeaky, NormsAndConvs, pool

PATCH = 16              # frames and mel bands of a patch
DROPOUT = 0.1           # in the transformer


class TailBlock(nn.Module):
    """2 x [Conv3x3, BatchNorm, ReLU], max pool; `join` is how a decoder output comes in.

    join: None (there is none), concat (along channels), add (through a 1x1 convolution).
    """

    def __init__(self, c_in, c_out, c_skip, join, size, momentum):
        super().__init__()
        self.join, self.size = join, size
        if join == "add":
            self.adapter = nn.Conv2d(c_skip, c_in, 1)
        if join == "concat":
            c_in = c_in + c_skip
        self.convs = NormsAndConvs(OrderedDict({    # numbered as in older checkpoints
            "0": Conv3x3(c_in, c_out), "1": NormLeaky(c_out, 0.0, momentum),
            "3": Conv3x3(c_out, c_out), "4": NormLeaky(c_out, 0.0, momentum)}))

    def forward(self, x, skip=None):
        if self.join:
            skip = pool(skip, (1, 2))                               # (B, C, T', F'/2), as mel
        if self.join == "concat":
            x = torch.cat([x, skip], 1)                             # (B, C + C', T', M')
        elif self.join == "add":
            x = x + self.adapter(skip)
        return self.convs(x, self.size)                             # (B, C, T'/t, M'/f)


class Tail(nn.Module):
    """Mel spectrograms (B, S + 1, 384, 128) and decoder outputs -> logits (B, classes)."""

    def __init__(self, c_in, n_classes, widths, join, skip_widths, dropout, momentum):
        super().__init__()
        self.blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            joined = join is not None and 1 <= i <= len(skip_widths)
            c_skip = skip_widths[i - 1] if joined else 0
            size = (2, 2) if i < len(widths) - 1 else (3, 2)        # 3 in time: 384 = 3 x 2^7
            self.blocks.append(
                TailBlock(c_in, width, c_skip, join if joined else None, size, momentum))
            c_in = width
        flat = 2 * widths[-1]                                       # 2 steps in time are left
        self.dense = nn.Linear(flat, flat)
        self.dense_norm = NormLeaky(flat, 0.0, momentum)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(flat, n_classes)

    def forward(self, x, skips=()):
        for i, block in enumerate(self.blocks):
            skip = skips[i - 1] if block.join else None
            x = block(x, skip)                                      # (B, C, T/2, M/2), ...
        x = self.dense(x.flatten(1))                                # (B, 512)
        return self.out(self.dropout(self.dense_norm(x)))           # (B, classes)


# -----------------------------------------------------------------------------
# the transformer

class Attention(nn.Module):
    """Multi-head self-attention: (B, P + 1, D) -> (B, P + 1, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in (self.query, self.key, self.value))  # (B, heads, P + 1, D / heads)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=DROPOUT if self.training else 0.0)
        return self.out(x.transpose(1, 2).flatten(2))               # (B, P + 1, D)


class Layer(nn.Module):
    """[LayerNorm, attention], [LayerNorm, MLP], each added to what comes in."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(DROPOUT),
                                 nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))            # (B, P + 1, D)


class Adapter(nn.Module):
    """A decoder output (B, C, T / 2^(5 - d), 256 / 2^(5 - d)) -> patches (B, P, D), d = 0..4."""

    def __init__(self, channels, width, d):
        super().__init__()
        if d == 0:      # coarser than the patches in time
            self.conv = nn.ConvTranspose2d(channels, width, 2, stride=(2, 1))
        else:
            size = 2 ** (d - 1), 2 ** d
            self.conv = nn.Conv2d(channels, width, size, stride=size)

    def forward(self, skip):
        x = self.conv(skip)[..., :128 // PATCH]                     # (B, D, T/16, 8)
        return x.flatten(2).transpose(1, 2)                         # (B, P, D)


class Transformer(nn.Module):
    """Mel spectrograms (B, S + 1, T, 128) and decoder outputs -> logits (B, classes).

    Patches of 16 x 16 become tokens, with a class token before them. Decoder outputs, the finest
    first, are added to the tokens before the layers 2, 4, 6, 8, 10 (counted from 0), or as many of
    these as there are. The input is scaled by the mean and twice the standard deviation that
    measure() found, channel by channel. With `batch_scale` it is scaled to 0..1 by the lowest and
    highest value of the batch, a slip of the authors' code: an answer then depends on the rest of
    the batch.
    """

    def __init__(self, c_in, n_classes, frames, width, depth, heads, skip_widths, batch_scale):
        super().__init__()
        if min(width, depth, heads) < 1 or width % heads or len(skip_widths) > (depth - 1) // 2:
            raise ValueError(f"transformer={width},{depth},{heads} (width, layers, heads): the "
                             "width must be a multiple of the heads, and each decoder output that "
                             f"joins needs two layers: with {depth} layers --skips is at most "
                             f"{(depth - 1) // 2}")
        self.batch_scale = batch_scale
        self.register_buffer("mean", torch.zeros(c_in, 1, 1))
        self.register_buffer("std", torch.ones(c_in, 1, 1))
        self.patches = nn.Conv2d(c_in, width, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        tokens = frames // PATCH * (128 // PATCH) + 1
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.dropout = nn.Dropout(DROPOUT)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.adapters = nn.ModuleList(
            Adapter(channels, width, 4 - i) for i, channels in enumerate(skip_widths))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, n_classes)

    @torch.no_grad()
    def measure(self, x):
        """Takes the scale from spectrograms (B, S + 1, T, 128) of the training set."""
        self.mean.copy_(x.mean((0, 2, 3))[:, None, None])
        self.std.copy_(x.std((0, 2, 3))[:, None, None].clamp(min=1e-6))

    def forward(self, x, skips=()):
        if self.batch_scale:
            x = (x - x.amin()) / (x.amax() - x.amin()).clamp(min=1e-6)     # silence has no range
        else:
            x = (x - self.mean) / (2 * self.std)                    # (B, S + 1, T, M)
        x = self.patches(x).flatten(2).transpose(1, 2)              # (B, P, D)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = self.dropout(x)                                         # (B, P + 1, D)
        for i, layer in enumerate(self.layers):
            joined = i // 2 - 1
            if i % 2 == 0 and 0 <= joined < len(self.adapters):
                x = x + F.pad(self.adapters[joined](skips[joined]), (0, 0, 1, 0))
            x = layer(x)
        return self.out(self.norm(x)[:, 0])                         # (B, classes)


# -----------------------------------------------------------------------------
# the weights of ViT-B/16 that were published as .npz files (Dosovitskiy et al. 2021)

@torch.no_grad()
def load_vit(net, path):
    """Gives a Transformer the weights of a ViT, but for the adapters and the last layer.

    The kernel of the patches is averaged over red, green and blue, and divided among the channels
    that there are. The square grid of positions is resized to ours. ValueError if the file does
    not fit.
    """
    try:
        with np.load(path) as saved:
            weights = {key: torch.from_numpy(saved[key].astype(np.float32)) for key in saved.files}
    except Exception as e:  # np.load has no error type of its own: zip, zlib, pickle, memory
        raise ValueError(f"{path} cannot be read as an .npz file ({type(e).__name__}: {e}): is it "
                         "complete?") from e
    try:
        if not all(torch.isfinite(value).all() for value in weights.values()):
            raise ValueError("not all of its numbers are finite")
        if f"Transformer/encoderblock_{len(net.layers)}/LayerNorm_0/scale" in weights:
            raise ValueError("it has more layers")
        kernel = weights["embedding/kernel"]                        # (16, 16, 3, D)
        c_in = net.patches.in_channels
        kernel = kernel.mean(2).permute(2, 0, 1)[:, None] / c_in    # (D, 1, 16, 16)
        copy(net.patches.weight, kernel.expand(-1, c_in, -1, -1))
        copy(net.patches.bias, weights["embedding/bias"])
        copy(net.class_token, weights["cls"])
        copy(net.positions, resized(weights["Transformer/posembed_input/pos_embedding"],
                                    net.positions.shape[1] - 1))
        copy_norm(net.norm, weights, "Transformer/encoder_norm")
        for i, layer in enumerate(net.layers):
            copy_layer(layer, weights, f"Transformer/encoderblock_{i}")
    except (KeyError, ValueError, IndexError, RuntimeError) as e:
        raise ValueError(f"{path} is not the .npz file of a ViT of this size ({e}): ViT-B/16 fits "
                         "--transformer=768,12,12") from e
    print(f"transformer from {path}; adapters and the last layer are new")


def copy(ours, theirs):
    if ours.shape != theirs.shape:
        raise ValueError(f"{tuple(theirs.shape)} where {tuple(ours.shape)} is needed")
    ours.copy_(theirs)


def copy_norm(ours, weights, name):
    copy(ours.weight, weights[f"{name}/scale"])
    copy(ours.bias, weights[f"{name}/bias"])


def copy_layer(layer, weights, name):
    copy_norm(layer.norm1, weights, f"{name}/LayerNorm_0")
    copy_norm(layer.norm2, weights, f"{name}/LayerNorm_2")
    attention = f"{name}/MultiHeadDotProductAttention_1"
    for part in ("query", "key", "value"):
        ours, theirs = getattr(layer.attention, part), weights[f"{attention}/{part}/kernel"]
        if theirs.shape[1] != layer.attention.heads:                            # (D, heads, D')
            raise ValueError(f"it has {theirs.shape[1]} heads, not {layer.attention.heads}")
        copy(ours.weight, theirs.flatten(1).T)
        copy(ours.bias, weights[f"{attention}/{part}/bias"].flatten())
    copy(layer.attention.out.weight, weights[f"{attention}/out/kernel"].flatten(0, 1).T)
    copy(layer.attention.out.bias, weights[f"{attention}/out/bias"])
    for ours, number in ((layer.mlp[0], 0), (layer.mlp[3], 1)):
        copy(ours.weight, weights[f"{name}/MlpBlock_3/Dense_{number}/kernel"].T)
        copy(ours.bias, weights[f"{name}/MlpBlock_3/Dense_{number}/bias"])


def resized(positions, patches):
    """Positions (1, n * n + 1, D) of a square of patches -> (1, P + 1, D) of ours, (T/16) x 8."""
    head, grid = positions[:, :1], positions[:, 1:]
    side = round(grid.shape[1] ** 0.5)
    grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)      # (1, D, n, n)
    high = 128 // PATCH
    grid = F.interpolate(grid, (patches // high, high), mode="bilinear", align_corners=False)
    return torch.cat([head, grid.flatten(2).transpose(1, 2)], 1)    # (1, P + 1, D)
