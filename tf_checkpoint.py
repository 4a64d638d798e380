"""
Reads a TensorFlow checkpoint (`NAME.index` + `NAME.data-00000-of-00001`) without TensorFlow, as the paper's authors released theirs.

    from tf_checkpoint import read
    layers = read("downstream_models/MTAT/vocals/checkpoint-2")     # [{"kernel": (h, w, in, out) array, "bias": ...}, ...]

The index is a LevelDB table: blocks of prefix-compressed keys, each with a small protobuf (dtype, shape, offset, size, checksum);
the data file holds raw little-endian tensors. Everything read is checked: bounds, sizes, checksums. Broken files raise ValueError.
"""
import os
import re

import numpy as np

MAGIC = bytes.fromhex("57fb808b247547db")
KEY = re.compile(r"layer_with_weights-(\d+)/(kernel|bias|gamma|beta|moving_mean|moving_variance)/\.ATTRIBUTES/VARIABLE_VALUE")
FLOAT32 = 1  # the number of tf.float32 in TensorFlow's DataType


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


def _block(buf, offset, size):
    """Yields (key, value) of one table block; a 5-byte trailer (compression, checksum) follows the block."""
    block, trailer = _slice(buf, offset, size), _slice(buf, offset + size, 5)
    if trailer[0] != 0:
        raise ValueError("a compressed block, which checkpoints do not have")
    if masked_crc32c(block + trailer[:1]) != int.from_bytes(trailer[1:], "little"):
        raise ValueError("the checksum of a block does not match: the file is damaged")
    restarts = int.from_bytes(block[-4:], "little")
    end, at, key = len(block) - 4 * (restarts + 1), 0, b""
    while at < end:
        shared, at = _varint(block, at)
        fresh, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + _slice(block, at, fresh)
        yield key, _slice(block, at + fresh, length)
        at += fresh + length


def _fields(buf):
    """Yields (field number, value) of a protobuf message: integers for varint and fixed32, bytes for nested messages."""
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
    """A BundleEntry message as {dtype, shape, shard, offset, size, crc}; fields left out of the message are 0."""
    fields = dict(_fields(buf))
    dims = [dict(_fields(dim)).get(1, 0) for number, dim in _fields(fields.get(2, b"")) if number == 2]
    return {"dtype": fields.get(1, 0), "shape": tuple(dims), "shard": fields.get(3, 0), "offset": fields.get(4, 0),
            "size": fields.get(5, 0), "crc": fields.get(6, 0)}


def read_index(prefix):
    """Entries of the network's own weights as [{"kernel": entry, "bias": entry, ...}, ...] in layer order, without reading the data.

    Optimizer slots and the object graph are passed over. ValueError if the file is not a checkpoint index or a layer number is missing."""
    path = f"{prefix}.index"
    with open(path, "rb") as f:
        buf = f.read()
    if len(buf) < 48 or buf[-8:] != MAGIC:
        raise ValueError(f"{path} is not a TensorFlow checkpoint index")
    layers = {}
    try:
        _, at = _varint(buf, len(buf) - 48)
        _, at = _varint(buf, at)
        offset, at = _varint(buf, at)
        size, at = _varint(buf, at)
        for _, handle in _block(buf, offset, size):
            offset, at = _varint(handle, 0)
            size, _ = _varint(handle, at)
            for key, value in _block(buf, offset, size):
                match = KEY.fullmatch(key.decode("utf-8", "replace"))
                if match:
                    layers.setdefault(int(match[1]), {})[match[2]] = _entry(value)
    except (ValueError, IndexError, TypeError) as e:
        raise ValueError(f"{path} is damaged: {e}") from e
    missing = [n for n in range(max(layers, default=-1) + 1) if n not in layers]
    if missing or not layers:
        raise ValueError(f"{path} has no weights for layers {missing}" if layers else f"{path} holds no layer_with_weights-N")
    return [layers[n] for n in sorted(layers)]


def read(prefix):
    """Weights of a checkpoint as [{"kernel": float32 array, "bias": ...}, ...] in layer order. ValueError if anything does not fit."""
    path = f"{prefix}.data-00000-of-00001"
    index = read_index(prefix)
    with open(path, "rb") as f:
        data = f.read()

    def tensor(e, name):
        if e["dtype"] != FLOAT32 or e["shard"] != 0 or e["size"] != 4 * int(np.prod(e["shape"], dtype=object)):
            raise ValueError(f"{path}: {name} is not float32 in one shard with shape {e['shape']}")
        if e["offset"] + e["size"] > len(data):
            raise ValueError(f"{path}: {name} ends at byte {e['offset'] + e['size']}, the file at {len(data)}: download it again")
        raw = data[e["offset"]:e["offset"] + e["size"]]
        if masked_crc32c(raw) != e["crc"]:
            raise ValueError(f"{path}: the checksum of {name} does not match: download it again")
        return np.frombuffer(raw, "<f4").reshape(e["shape"]).astype(np.float32)

    return [{name: tensor(e, f"layer {n} {name}") for name, e in layer.items()} for n, layer in enumerate(index)]


def is_checkpoint(prefix):
    return os.path.exists(f"{prefix}.index")


# -----------------------------------------------------------------------------
# CRC-32C (Castagnoli). A byte-by-byte loop takes a minute per checkpoint in Python. The checksum is linear over GF(2), so cut the
# bytes into rows, advance all rows at once with NumPy, and then join neighbouring rows: crc(ab) = advance(crc(a), len(b)) ^ crc(b).

def _advance_one_bit(c):
    return np.where(c & 1, (c >> 1) ^ np.uint32(0x82F63B78), c >> 1).astype(np.uint32)


TABLE = np.arange(256, dtype=np.uint32)
for _ in range(8):
    TABLE = _advance_one_bit(TABLE)


def _apply(matrix, c):
    """matrix (32,): images of the 32 unit bits; c (n,): the vectors to map."""
    out = np.zeros_like(c)
    for bit in range(32):
        out ^= np.where((c >> np.uint32(bit)) & 1, matrix[bit], np.uint32(0)).astype(np.uint32)
    return out


def crc32c(data):
    data = np.frombuffer(bytes(data), np.uint8)
    rows = 1 << max(0, (len(data) // 64).bit_length() // 2)                                     # a power of two near sqrt(len / 64)
    padded = np.zeros(-(-max(len(data), 4) // rows) * rows, np.uint8)
    padded[len(padded) - len(data):] = data                                                     # leading zeros leave a zero register alone
    if len(data) < 4:                                                                           # too short for the trick below
        c = 0xFFFFFFFF
        for byte in data.tolist():
            c = int(TABLE[(c ^ byte) & 255]) ^ (c >> 8)
        return c ^ 0xFFFFFFFF
    padded[len(padded) - len(data):][:4] ^= 255                                                 # the same as starting from all ones
    columns = padded.reshape(rows, -1).T.astype(np.uint32)                                      # (bytes in a row, rows)
    c = np.zeros(rows, np.uint32)
    for column in columns:
        c = TABLE[(c ^ column) & 255] ^ (c >> np.uint32(8))
    advance, power, n = 1 << np.arange(32, dtype=np.uint32), 1 << np.arange(32, dtype=np.uint32), len(columns)
    for _ in range(8):
        power = _advance_one_bit(power)                                                         # one zero byte
    while n:                                                                                    # advance = power ** len(columns)
        if n & 1:
            advance = _apply(power, advance)
        power, n = _apply(power, power), n >> 1
    while len(c) > 1:
        c, advance = _apply(advance, c[0::2]) ^ c[1::2], _apply(advance, advance)
    return int(c[0]) ^ 0xFFFFFFFF


def masked_crc32c(data):
    """As stored in the file: rotated by 15 bits plus a constant, so that checksums of checksums stay harmless."""
    c = crc32c(data)
    return ((c >> 15 | c << 17) + 0xA282EAD8) & 0xFFFFFFFF
