"""
TensorFlow checkpoints, read without TensorFlow: the format of the authors' released weights.

PREFIX.index is a LevelDB table: blocks of prefix-compressed keys, and for each key a small protobuf
(dtype, shape, shard, offset, size, CRC-32C). PREFIX.data-00000-of-00001, and further shards, hold
raw little-endian tensors. Sizes and checksums are verified on every read.
"""
import math
import re

import google_crc32c
import numpy as np
import torch
import torch.nn as nn

import model

FOOTER = 48                             # bytes at the end of an index: two handles, padding, magic
KEY = re.compile(r"layer_with_weights-(\d+)/(kernel|bias|gamma|beta|moving_mean|moving_variance)"
                 r"/\.ATTRIBUTES/VARIABLE_VALUE")
BFLOAT16 = 14
BYTES = {1: 4, BFLOAT16: 2, 19: 2}      # TensorFlow's DataType: float32, bfloat16, half

# kernels of the published networks
UNET_KERNELS = 6 * 2 + 6 * 3 + 3        # encoder, decoder (one of three is transposed), head
TAIL_CONVS = 7 * 2
FOUR_SOURCES = ["vocals", "other", "drums", "bass"]     # the authors' order

# Keras' names of variables, and PyTorch's
NAMES = {"kernel": "weight", "gamma": "weight", "bias": "bias", "beta": "bias",
         "moving_mean": "running_mean", "moving_variance": "running_var"}


def _varints(buf, at, count):
    """(*values, next position) of `count` base-128 varints from buf[at] on."""
    values = []
    for _ in range(count):
        value, shift = 0, 0
        while (byte := buf[at]) >= 128:
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
        values.append(value | byte << shift)
        at += 1
    return *values, at


def _block(buf, offset, size):
    """Yields the (key, value) pairs of a table block. Its trailer: compression type and CRC."""
    block, trailer = buf[offset:offset + size], buf[offset + size:offset + size + 5]
    if trailer[0] or masked_crc32c(block + trailer[:1]) != int.from_bytes(trailer[1:], "little"):
        raise ValueError("a block is compressed, or its checksum does not match")
    restarts = int.from_bytes(block[-4:], "little")
    end, at, key = len(block) - 4 * (restarts + 1), 0, b""
    while at < end:
        shared, unshared, length, at = _varints(block, at, 3)
        key = key[:shared] + block[at:at + unshared]
        at += unshared + length
        yield key, block[at - length:at]


def _table(buf):
    """Yields the (key, value) pairs of a table. The footer points to the block of handles."""
    _, _, offset, size, _ = _varints(buf, len(buf) - FOOTER, 4)     # after the metaindex block
    for _, handle in _block(buf, offset, size):
        yield from _block(buf, *_varints(handle, 0, 2)[:2])


def _fields(buf):
    """Yields (field number, value) of a protobuf message: integers, or bytes for messages."""
    at = 0
    while at < len(buf):
        tag, at = _varints(buf, at, 1)
        if tag & 7 == 5:                # fixed 32 bits
            value, at = int.from_bytes(buf[at:at + 4], "little"), at + 4
        else:
            value, at = _varints(buf, at, 1)
        if tag & 7 == 2:                # the value is a length
            value, at = buf[at:at + value], at + value
        yield tag >> 3, value


def _entry(buf, prefix, shards):
    """A BundleEntry message as a dictionary; protobuf omits fields that are 0."""
    fields = dict(_fields(buf))
    dims = [dict(_fields(dim)) for number, dim in _fields(fields.get(2, b"")) if number == 2]
    return {"dtype": fields.get(1, 0), "shape": tuple(dim.get(1, 0) for dim in dims),
            "file": f"{prefix}.data-{fields.get(3, 0):05d}-of-{shards:05d}",
            "offset": fields.get(4, 0), "size": fields.get(5, 0), "crc": fields.get(6, 0)}


def read_index(prefix):
    """[{"kernel": entry, "bias": entry, ...}, ...] in layer order, without reading the data.

    An entry is a dictionary: dtype, shape, file, offset, size, crc. Optimizer slots and the object
    graph are skipped. ValueError if the file is damaged, or not an index of layers.
    """
    path = f"{prefix}.index"
    with open(path, "rb") as f:
        buf = f.read()
    layers, header = {}, {}
    try:
        for key, value in _table(buf):
            match = KEY.fullmatch(key.decode("utf-8", "replace"))
            if key == b"":              # the header, which comes first
                header = dict(_fields(value))
            elif match:
                entry = _entry(value, prefix, header.get(1, 1))
                layers.setdefault(int(match[1]), {})[match[2]] = entry
    except (ValueError, IndexError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e}), or not a TensorFlow checkpoint index: "
                         "download it again") from e
    if not layers or header.get(2, 0):
        raise ValueError(f"{path} belongs to another network (no layer_with_weights-N), or to a "
                         "big-endian machine")
    return [layers[n] for n in sorted(layers)]


def read_tensor(entry, name):
    """The float32 array of an index entry; float16 and bfloat16 are converted."""
    dtype, shape = entry["dtype"], entry["shape"]
    with open(entry["file"], "rb") as f:
        f.seek(entry["offset"])
        raw = f.read(entry["size"])
    if len(raw) != BYTES.get(dtype, 0) * math.prod(shape) or masked_crc32c(raw) != entry["crc"]:
        raise ValueError(f"{entry['file']}: checksum mismatch in {name} (delete it and download it "
                         f"again), or type {dtype} is not float32, bfloat16 or half")
    if dtype == BFLOAT16:               # the upper half of a float32
        values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(raw, f"<f{BYTES[dtype]}").astype(np.float32)
    return values.reshape(shape)


def masked_crc32c(raw):
    """The stored form of CRC-32C: rotated by 15 bits, plus a constant."""
    c = google_crc32c.value(raw)
    return ((c >> 15 | c << 17) + 0xA282EAD8) & 0xFFFFFFFF


def load(prefix):
    """(net, meta) of a checkpoint of one of the paper's networks; ValueError for any other."""
    layers = read_index(prefix)
    kind, args = architecture(layers, prefix)
    net = kind(**args)
    copy_layers(layers, net, prefix)
    # what the authors' code did differently when it trained these weights
    published = [f"{net.args['pool']} pooling"] if args.get("variant") != "tail" else []
    if args.get("mel_of_log"):
        published.append("mel filters on the logarithm of the mixture")
    return net, {"kind": kind.__name__.lower(), "args": net.args, "classes": None, "step": None,
                 "config": {}, "source": "tensorflow", "as_published": ", ".join(published)}


def architecture(layers, prefix):
    """(class in model.py, constructor arguments), from the shapes in an index.

    Shapes do not determine the pooling: the authors' four-source separator averages, all other
    networks take the maximum. ValueError if the network is none of the paper's.
    """
    # (h, w, in, out) of convolutions, (in, out) of dense layers
    shapes = [layer["kernel"]["shape"] for layer in layers if "kernel" in layer]
    n_unet = UNET_KERNELS if "gamma" in layers[0] else 0        # the U-Net begins with BatchNorm
    unet, tail = [shape for shape in shapes[:n_unet] if len(shape) == 4], shapes[n_unet:]
    convs = [shape for shape in tail if len(shape) == 4 and shape[0] == 3]
    adapters = [shape for shape in tail if len(shape) == 4 and shape[0] == 1]
    dense = [shape for shape in tail if len(shape) == 2]
    counts = len(unet), len(convs), len(dense)
    if counts not in ((UNET_KERNELS, 0, 0), (UNET_KERNELS, TAIL_CONVS, 2), (0, TAIL_CONVS, 2)):
        raise ValueError(f"{prefix} is not a separator or classifier of the paper: U-Net, tail and "
                         f"dense kernels are {counts}, expected {UNET_KERNELS}, {TAIL_CONVS}, 2")
    args = {}
    if unet:
        n_sources = unet[-1][3]
        four = n_sources == len(FOUR_SOURCES)
        sources = FOUR_SOURCES if four else [f"source{i + 1}" for i in range(n_sources)]
        args = {"sources": sources, "widths": [shape[3] for shape in unet[1:12:2]],
                "pool": "avg" if four and not convs else "max"}
    if not convs:
        return model.Separator, args
    widths, n_classes = [shape[3] for shape in convs[1::2]], dense[1][1]
    # concatenated decoder outputs make the input of a block wider than the output before it
    wider = sum(shape[2] > width for shape, width in zip(convs[2::2], widths, strict=False))
    variant = "v3" if adapters else "v3_concat"
    if not unet:
        variant = "tail"
    elif widths[1] == 2 * widths[0]:    # only v1 widens at the second block
        variant = "v1"
    return model.Classifier, args | {
        "n_classes": n_classes, "multilabel": n_classes == 50, "variant": variant,
        "tail_widths": widths, "skips": len(adapters) or wider, "mel_of_log": variant == "v1"}


def weighted_layers(net):
    """Modules with weights in the order of definition, which is the authors' Keras layer order."""
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.Linear)
    return [m for m in net.modules() if isinstance(m, kinds)]


def copy_layers(layers, net, prefix):
    """Copies all tensors of a checkpoint into a network; ValueError if one does not fit."""
    modules = weighted_layers(net)
    flattened = next((m for m in modules if isinstance(m, nn.Linear)), None)
    arrays = [{NAMES[key]: read_tensor(entry, f"layer {n} {key}") for key, entry in layer.items()}
              for n, layer in enumerate(layers)]
    try:
        for module, layer in zip(modules, arrays, strict=True):
            module.load_state_dict({
                name: _to_pytorch(array, module is flattened) for name, array in layer.items()})
    except (RuntimeError, ValueError) as e:     # other variables, shapes or number of layers
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"{prefix} has {len(layers)} layers for {len(modules)}; layer "
                         f"{modules.index(module)} does not fit: {reason}") from e


def _to_pytorch(array, flattened):
    """An array in PyTorch's layout. `flattened`: it belongs to the layer after Keras' Flatten."""
    value = torch.from_numpy(array)
    if value.dim() == 4:
        return value.permute(3, 2, 0, 1)        # (h, w, in, out) -> (out, in, h, w)
    if value.dim() == 2 and flattened:          # Keras flattens (time, channel), we (channel, time)
        value = value.view(2, -1, value.shape[1]).transpose(0, 1).flatten(0, 1)
    return value.t()
