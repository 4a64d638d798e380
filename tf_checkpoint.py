"""
Reads TensorFlow checkpoints without TensorFlow, as the paper's authors released theirs.

    from tf_checkpoint import read
    layers = read("downstream_models/MTAT/vocals/checkpoint-25")
    # [{"kernel": (h, w, in, out) array, "bias": ...}, ...]

A checkpoint NAME is NAME.index and one or several NAME.data-00000-of-00001. The index is a LevelDB
table: blocks of prefix-compressed keys, each with a small protobuf (dtype, shape, shard, offset,
size, checksum). The data files hold raw little-endian tensors. All that is read is checked: bounds,
sizes, checksums. Broken files raise ValueError.
"""
import math
import os
import re

import numpy as np
import torch
import torch.nn as nn

from fused import NormLeaky

MAGIC = bytes.fromhex("57fb808b247547db")
FOOTER = 48                         # bytes at the end of an index: two handles, padding, MAGIC
KEY = re.compile(r"layer_with_weights-(\d+)/(kernel|bias|gamma|beta|moving_mean|moving_variance)"
                 r"/\.ATTRIBUTES/VARIABLE_VALUE")
FLOAT32, BFLOAT16, HALF = 1, 14, 19     # numbers in TensorFlow's DataType
BYTES = {FLOAT32: 4, BFLOAT16: 2, HALF: 2}

# layers with weights in the released networks, in Keras' order
UNET_KERNELS = 6 * 2 + 6 * 3 + 3        # encoder, decoder (one is transposed), head
UNET_LAYERS = UNET_KERNELS + 6 * 2 + 6 * 2 + 2      # ... and a BatchNorm before nearly each
TAIL_CONVS = 7 * 2
FOUR_SOURCES = ["vocals", "other", "drums", "bass"]     # the authors' order


# -----------------------------------------------------------------------------
# the index

def _varint(buf, at):
    """(value, next position) of the little-endian base-128 number at buf[at]."""
    value = shift = 0
    while True:
        byte = buf[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number longer than 64 bits")


def _slice(buf, at, size):
    if at + size > len(buf):
        raise ValueError(f"{size} bytes wanted at {at}, the file has {len(buf)}")
    return buf[at:at + size]


def _handle(buf, at):
    """(offset, size, next position) of the block that a handle at buf[at] points to."""
    offset, at = _varint(buf, at)
    size, at = _varint(buf, at)
    return offset, size, at


def _block(buf, offset, size):
    """Yields (key, value) of one table block; compression and checksum are in 5 bytes behind."""
    block, trailer = _slice(buf, offset, size), _slice(buf, offset + size, 5)
    if trailer[0] != 0:
        raise ValueError("a compressed block, which checkpoints do not have")
    if masked_crc32c(block + trailer[:1]) != int.from_bytes(trailer[1:], "little"):
        raise ValueError("the checksum of a block does not match")
    restarts = int.from_bytes(block[-4:], "little")
    end, at, key = len(block) - 4 * (restarts + 1), 0, b""
    while at < end:
        shared, at = _varint(block, at)
        fresh, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + _slice(block, at, fresh)
        yield key, _slice(block, at + fresh, length)
        at += fresh + length


def _table(buf):
    """Yields (key, value) of a whole table. The footer leads to the block that lists the rest."""
    _, _, at = _handle(buf, len(buf) - FOOTER)      # of a block without meaning here
    offset, size, _ = _handle(buf, at)
    for _, handle in _block(buf, offset, size):
        offset, size, _ = _handle(handle, 0)
        yield from _block(buf, offset, size)


def _fields(buf):
    """Yields (field number, value) of a protobuf message: integers, or bytes for messages."""
    at = 0
    while at < len(buf):
        tag, at = _varint(buf, at)
        if tag & 7 == 0:
            value, at = _varint(buf, at)
        elif tag & 7 == 2:
            size, at = _varint(buf, at)
            value, at = _slice(buf, at, size), at + size
        elif tag & 7 == 5:
            value, at = int.from_bytes(_slice(buf, at, 4), "little"), at + 4
        else:
            raise ValueError(f"protobuf wire type {tag & 7}, which checkpoints do not use")
        yield tag >> 3, value


def _entry(buf):
    """A BundleEntry message as a dictionary; fields left out of the message are 0."""
    fields = dict(_fields(buf))
    dims = [dict(_fields(dim)) for number, dim in _fields(fields.get(2, b"")) if number == 2]
    return {"dtype": fields.get(1, 0), "shape": tuple(dim.get(1, 0) for dim in dims),
            "shard": fields.get(3, 0), "offset": fields.get(4, 0), "size": fields.get(5, 0),
            "crc": fields.get(6, 0)}


def read_index(prefix):
    """[{"kernel": entry, "bias": entry, ...}, ...] in layer order, without reading the data.

    An entry is a dictionary: dtype, shape, file, offset, size, crc. Optimizer slots and the object
    graph are passed over. ValueError if the file is not the index of a checkpoint, or a layer
    number is missing.
    """
    path = f"{prefix}.index"
    with open(path, "rb") as f:
        buf = f.read()
    if len(buf) < FOOTER or not buf.endswith(MAGIC):
        raise ValueError(f"{path} is not a TensorFlow checkpoint index")
    layers, shards = {}, 1
    try:
        for key, value in _table(buf):
            match = KEY.fullmatch(key.decode("utf-8", "replace"))
            if key == b"":  # the header, which comes first
                header = dict(_fields(value))
                shards = header.get(1, 1)
                if header.get(2, 0) != 0:
                    raise ValueError("its numbers are big-endian, which is not supported")
            elif match:
                entry = _entry(value)
                entry["file"] = f"{prefix}.data-{entry['shard']:05d}-of-{shards:05d}"
                layers.setdefault(int(match[1]), {})[match[2]] = entry
    except (ValueError, IndexError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e}): download it again") from e
    if not layers:
        raise ValueError(f"{path} holds no layer_with_weights-N: it is of another network")
    missing = [n for n in range(max(layers)) if n not in layers]
    if missing:
        raise ValueError(f"{path} has no weights for {len(missing)} layers, layer {missing[0]} "
                         "for one: it is of another network")
    return [layers[n] for n in sorted(layers)]


# -----------------------------------------------------------------------------
# the weights

def read(prefix):
    """[{"kernel": float32 array, "bias": ...}, ...] in layer order.

    Variables in half precision and bfloat16 become float32. ValueError if anything does not fit.
    """
    layers = []
    for n, layer in enumerate(read_index(prefix)):
        layers.append({name: _tensor(e, f"layer {n} {name}") for name, e in layer.items()})
    return layers


def _tensor(entry, name):
    file, dtype, size = entry["file"], entry["dtype"], entry["size"]
    if dtype not in BYTES:
        raise ValueError(f"{file}: {name} is of TensorFlow type {dtype}, only float32 (1), "
                         "bfloat16 (14) and half (19) are read")
    if size != BYTES[dtype] * math.prod(entry["shape"]):
        raise ValueError(f"{file}: {name} has {size} bytes, which do not fit its shape "
                         f"{entry['shape']}")
    if not os.path.isfile(file):
        raise ValueError(f"{file} is missing, which holds {name}: download it too")
    end = entry["offset"] + size
    if end > os.path.getsize(file):
        raise ValueError(f"{file}: {name} ends at byte {end}, the file at "
                         f"{os.path.getsize(file)}: download it again")
    with open(file, "rb") as f:
        f.seek(entry["offset"])
        raw = f.read(size)
    if masked_crc32c(raw) != entry["crc"]:
        raise ValueError(f"{file}: the checksum of {name} does not match: download it again")
    if dtype == BFLOAT16:  # the upper half of a float32
        upper = np.frombuffer(raw, "<u2").astype(np.uint32)
        values = (upper << 16).view(np.float32)
    else:
        values = np.frombuffer(raw, f"<f{BYTES[dtype]}").astype(np.float32)
    return values.reshape(entry["shape"])


def prefix_of(path):
    """The prefix of a checkpoint, of which `path` may name the index or a data file."""
    return re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", path)


def is_checkpoint(prefix):
    return os.path.exists(f"{prefix}.index")


def refuse_keras(path):
    """ValueError for Keras' own files, which are not checkpoints."""
    if path.lower().endswith((".keras", ".h5", ".hdf5")):
        raise ValueError(
            f"{path} is a Keras file, which is not read: load it in TensorFlow with Keras 2, and "
            "save it with model.save_weights('NAME', save_format='tf'); then give NAME")


# -----------------------------------------------------------------------------
# which network it is

def architecture(layers, prefix="the checkpoint"):
    """(kind, constructor arguments of model.py) of the shapes in the index of a checkpoint.

    `layers` is what read_index gives. Shapes cannot tell the pooling: the authors' four-source
    separator averages, all the rest takes the maximum. ValueError if it is another network.
    """
    shapes = [layer["kernel"]["shape"] if "kernel" in layer else () for layer in layers]
    has_unet = "gamma" in layers[0]                 # the U-Net begins with BatchNorm
    split = UNET_LAYERS if has_unet else 0
    unet = [shape for shape in shapes[:split] if len(shape) == 4]
    convs = [shape for shape in shapes[split:] if len(shape) == 4]
    dense = [shape for shape in shapes[split:] if len(shape) == 2]
    if has_unet and len(unet) != UNET_KERNELS:
        raise ValueError(f"{prefix} is not a separator or classifier of the paper: its U-Net has "
                         f"{len(unet)} kernels, not {UNET_KERNELS}")
    if has_unet and len(layers) == UNET_LAYERS:
        return "separator", _unet_args(unet, averages=True)
    args = _tail_args(convs, dense, has_unet, prefix)
    if has_unet:
        args |= _unet_args(unet, averages=False)
    return "classifier", args


def _unet_args(kernels, averages):
    n_sources = kernels[-1][3]                      # (h, w, in, out)
    sources = [f"source{i + 1}" for i in range(n_sources)]
    pool = "max"
    if n_sources == len(FOUR_SOURCES):
        sources = FOUR_SOURCES
        pool = "avg" if averages else "max"
    encoder = kernels[:6 * 2]
    return {"sources": sources, "widths": [kernel[3] for kernel in encoder[1::2]], "pool": pool}


def _tail_args(kernels, dense, has_unet, prefix):
    convs = [kernel for kernel in kernels if kernel[0] == 3]
    adapters = [kernel for kernel in kernels if kernel[0] == 1]
    if len(convs) != TAIL_CONVS or len(dense) != 2:
        raise ValueError(f"{prefix} is not a separator or classifier of the paper: its tail has "
                         f"{len(convs)} convolutions and {len(dense)} dense layers, not "
                         f"{TAIL_CONVS} and 2")
    widths = [kernel[3] for kernel in convs[1::2]]
    n_classes = dense[1][1]
    # blocks whose input is wider than what comes from the block before take a decoder output
    inputs = [kernel[2] for kernel in convs[2::2]]
    wider = sum(width > before for width, before in zip(inputs, widths[:-1], strict=True))
    variant = _variant(has_unet, widths, adapters)
    return {"n_classes": n_classes, "multilabel": n_classes == 50, "variant": variant,
            "tail_widths": widths, "skips": len(adapters) or wider,
            "mel_of_log": variant == "v1"}


def _variant(has_unet, widths, adapters):
    if not has_unet:
        return "tail"
    if widths[1] == 2 * widths[0]:                  # only v1 widens at the second block
        return "v1"
    return "v3" if adapters else "v3_concat"


# -----------------------------------------------------------------------------
# into a network of ours

# the names of TensorFlow's variables, and ours
DENSE = {"kernel": "weight", "bias": "bias"}
NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean",
        "moving_variance": "running_var"}


def weighted_layers(net):
    """Modules with weights, in the order of definition: the authors' Keras layer order."""
    kinds = (nn.Conv2d, nn.ConvTranspose2d, NormLeaky, nn.Linear)
    return [m for m in net.modules() if isinstance(m, kinds)]


def copy_into(net, prefix):
    """Copies the weights of a checkpoint into a network of its architecture; else ValueError."""
    modules, layers = weighted_layers(net), read(prefix)
    if len(layers) != len(modules):
        raise ValueError(f"{prefix} has {len(layers)} layers instead of {len(modules)}")
    first_dense = next((m for m in modules if isinstance(m, nn.Linear)), None)
    for n, (module, layer) in enumerate(zip(modules, layers, strict=True)):
        names = NORM if isinstance(module, NormLeaky) else DENSE
        if layer.keys() != names.keys():
            raise ValueError(f"{prefix}: layer {n} has {', '.join(sorted(layer))}, expected "
                             f"{', '.join(sorted(names))}")
        for key, value in layer.items():
            value, ours = torch.from_numpy(value), getattr(module, names[key])
            if key == "kernel":
                value = _our_kernel(value, flattened=module is first_dense)
            if ours.shape != value.shape:
                raise ValueError(f"{prefix}: layer {n} {key} is {tuple(value.shape)}, expected "
                                 f"{tuple(ours.shape)}")
            ours.data.copy_(value)


def as_published(net):
    """How the authors' code differs in what the weights of a network were trained with."""
    found = [f"{net.args['pool']} pooling"] if net.args.get("variant") != "tail" else []
    if net.args.get("mel_of_log"):
        found.append("mel filters on the logarithm of the mixture")
    return ", ".join(found)


def _our_kernel(value, flattened):
    """A kernel in PyTorch's layout. `flattened`: it follows Keras' flatten layer."""
    if value.dim() == 4:
        return value.permute(3, 2, 0, 1)        # (h, w, in, out) -> (out, in, h, w)
    if flattened and len(value) % 2 == 0:
        value = value.view(2, 1, -1, value.shape[1])    # Keras flattens (time, mel, channel)
        return value.permute(3, 2, 0, 1).flatten(1)     # ours is (channel, time, mel)
    return value.T


# -----------------------------------------------------------------------------
# CRC-32C (Castagnoli). A byte-by-byte loop takes a minute per checkpoint in Python. The checksum is
# linear over GF(2). So cut the bytes into rows, advance all rows at once with NumPy, and then join
# neighbouring rows: crc(ab) = advance(crc(a), len(b)) ^ crc(b).

def _advance_one_bit(c):
    return np.where(c & 1, (c >> 1) ^ np.uint32(0x82F63B78), c >> 1).astype(np.uint32)


TABLE = np.arange(256, dtype=np.uint32)
for _ in range(8):
    TABLE = _advance_one_bit(TABLE)
PER_BYTE = TABLE.tolist()
SHORT = 1 << 14         # bytes: so many are faster one by one than by matrices


def _apply(matrix, c):
    """matrix (32,): the images of the 32 unit bits; c (n,): the vectors to map."""
    out = np.zeros_like(c)
    for bit in range(32):
        out ^= np.where((c >> np.uint32(bit)) & 1, matrix[bit], np.uint32(0)).astype(np.uint32)
    return out


def _advance(n):
    """The matrix (32,) that advances a checksum by n zero bytes: one byte's, to the power n."""
    units = 1 << np.arange(32, dtype=np.uint32)
    result, power = units, units
    for _ in range(8):
        power = _advance_one_bit(power)
    while n:
        if n & 1:
            result = _apply(power, result)
        power, n = _apply(power, power), n >> 1
    return result


def crc32c(data):
    data = np.frombuffer(bytes(data), np.uint8)
    if len(data) < SHORT:
        c = 0xFFFFFFFF
        for byte in data.tolist():
            c = PER_BYTE[(c ^ byte) & 255] ^ (c >> 8)
        return c ^ 0xFFFFFFFF

    # as many rows as a power of two near sqrt(len / 64); zeros in front change nothing
    rows = 1 << (len(data) // 64).bit_length() // 2
    padded = np.zeros(-(-len(data) // rows) * rows, np.uint8)
    padded[len(padded) - len(data):] = data
    padded[len(padded) - len(data):][:4] ^= 255                 # the same as starting from ones
    columns = padded.reshape(rows, -1).T.astype(np.uint32)      # (bytes in a row, rows)
    c = np.zeros(rows, np.uint32)
    for column in columns:
        c = TABLE[(c ^ column) & 255] ^ (c >> np.uint32(8))

    # join neighbours until one is left; what is joined is twice as long each time
    advance = _advance(len(columns))
    while len(c) > 1:
        c, advance = _apply(advance, c[0::2]) ^ c[1::2], _apply(advance, advance)
    return int(c[0]) ^ 0xFFFFFFFF


def masked_crc32c(data):
    """As stored in the file: rotated by 15 bits, plus a constant."""
    c = crc32c(data)
    return ((c >> 15 | c << 17) + 0xA282EAD8) & 0xFFFFFFFF
