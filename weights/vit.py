"""
Published ViT weights for the transformer (Dosovitskiy et al. 2021: .npz files, such as ViT-B/16).
"""
import numpy as np
import torch
import torch.nn.functional as F

from model import MELS, PATCH
from weights import inflate, load_matching

# modules of one layer in model.Layer, and in the file
LAYER = {
    "norm1": "LayerNorm_0", "norm2": "LayerNorm_2",
    **{f"attention.{part}": f"MultiHeadDotProductAttention_1/{part}"
       for part in ("query", "key", "value", "out")},
    "mlp.0": "MlpBlock_3/Dense_0", "mlp.3": "MlpBlock_3/Dense_1"}
BLOCK = "Transformer/encoderblock_"


def load_vit(net, path):
    """Copies the weights of a ViT into a model.Transformer, except adapters and the last layer.

    The patch kernel is averaged over red, green and blue, and divided among the input channels. The
    square grid of positions is interpolated to (T/16, 8). ValueError if the file does not fit.
    """
    width, size = net.norm.weight.numel(), (len(net.layers), net.layers[0].attention.heads)
    try:
        with np.load(path) as file:
            arrays = {key: torch.from_numpy(file[key].astype(np.float32)) for key in file.files}
        queries = [w for key, w in arrays.items() if key.endswith("/query/bias")]
        found = len(queries), len(queries[0])                       # each is (heads, D')
        if found != size or not all(array.isfinite().all() for array in arrays.values()):
            raise ValueError(f"it has {found[0]} layers of {found[1]} heads, or values that are "
                             "not finite")
        load_matching(net, to_pytorch(arrays, net), path, ("adapters.*", "out.*", "mean", "std"))
    except Exception as e:  # np.load raises errors of zipfile, zlib, pickle and others
        raise ValueError(f"{path} is not a ViT for --transformer={width},{size[0]},{size[1]}, or "
                         f"is incomplete ({type(e).__name__}: {e}); ViT-B/16 needs "
                         "--transformer=768,12,12") from e


def to_pytorch(arrays, net):
    """{name in the file: array} -> {name in net: tensor}."""
    kernel = arrays["embedding/kernel"].mean(2)                     # (16, 16, D)
    positions = arrays["Transformer/posembed_input/pos_embedding"]
    state = {
        "class_token": arrays["cls"],
        "positions": resize(positions, net.positions.shape[1] - 1),
        "patches.weight": inflate(kernel.permute(2, 0, 1)[:, None], net.patches.in_channels),
        "patches.bias": arrays["embedding/bias"],
        "norm.weight": arrays["Transformer/encoder_norm/scale"],
        "norm.bias": arrays["Transformer/encoder_norm/bias"]}
    for i in range(len(net.layers)):
        for ours, theirs in LAYER.items():
            ours, theirs = f"layers.{i}.{ours}", f"{BLOCK}{i}/{theirs}"
            bias = state[f"{ours}.bias"] = arrays[f"{theirs}/bias"].flatten()   # (out,)
            scale = arrays.get(f"{theirs}/scale")                   # of LayerNorm only
            state[f"{ours}.weight"] = (                             # (out, in)
                arrays[f"{theirs}/kernel"].reshape(-1, len(bias)).T if scale is None else scale)
    return state


def resize(positions, patches):
    """Positions (1, n * n + 1, D) of a square of patches -> (1, P + 1, D) for (T/16) x 8."""
    head, grid = positions[:, :1], positions[:, 1:]
    side, mels = round(grid.shape[1] ** 0.5), MELS // PATCH
    grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)      # (1, D, n, n)
    grid = F.interpolate(grid, (patches // mels, mels), mode="bilinear", align_corners=False)
    return torch.cat([head, grid.flatten(2).transpose(1, 2)], 1)    # (1, P + 1, D)
