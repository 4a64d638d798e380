"""
What FFmpeg does not report: tags it decodes as audio, and files that end too early.
"""
import io
import mmap
import os

SLACK = 0.25            # tolerance for the length in a header, seconds
LARGE = 1 << 26         # bytes; larger files are memory-mapped
# containers whose header holds the exact length
EXACT = ("ogg", "flac", "aiff", "au", "avi", "mov", "matroska", "asf", "ape", "wv", "tta")
# chunked containers: offset of the first chunk, bytes of a chunk's name and of its size,
# byte order, bytes of the chunk header that the size includes, alignment of chunks
CHUNKS = {"wav": (12, 4, 4, "little", 0, 2), "w64": (40, 16, 8, "little", 24, 8),
          "caf": (8, 4, 8, "big", 0, 1)}
TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN")


class Broken(ValueError):
    """A file that cannot be used. The message is the reason."""


def is_padding(data):
    """True for a tag between or behind frames, and for a short run of one repeated byte."""
    return data.startswith(TAGS) or (len(data) < 8192 and len(set(data)) == 1)


class View:
    """A read-only binary file over a buffer. FFmpeg uses `name` if the start is damaged."""

    def __init__(self, data, name):
        self.data, self.name, self.at = data, name, 0

    def tell(self):
        return self.at

    def seek(self, offset, whence=os.SEEK_SET):
        self.at = max(0, (0, self.at, len(self.data))[whence] + offset)
        return self.at

    def read(self, size=None):
        data = bytes(self.data[self.at:][:size])
        self.at += len(data)
        return data


def without_tags(f):
    """The file without leading and trailing tags, which FFmpeg reports as damage.

    Only formats without a header have such tags: mp3, aac, ac3. Also turns BW64 files below
    4 GB, which FFmpeg rejects, into RIFF.
    """
    f.seek(0)
    head = f.read(16)
    if head[:4] == b"BW64" and head[12:] != b"ds64":
        f.seek(4)
        return io.BytesIO(b"RIFF" + f.read())
    if not head.startswith((b"ID3", b"\xff", b"\x0b\x77")):
        return f
    mapped = isinstance(f, io.BufferedReader) and f.seek(0, os.SEEK_END) > LARGE
    f.seek(0)
    data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if mapped else f.read()
    start, end = 0, len(data)
    while data[start:start + 3] == b"ID3":
        header = data[start:start + 10].ljust(10, b"\0")
        footer = 10 if header[5] & 0x10 else 0
        start += 10 + syncsafe(header[6:]) + footer
    if data[start:start + 1] not in (b"\xff", b"\x0b", b"f", b"R", b"F"):
        start = 0  # the tag's length is damaged: let FFmpeg search for the first frame
    while start < end and (length := tag_length(data, end)):
        end -= length
    return View(memoryview(data)[start:end], str(getattr(f, "name", "")))


def tag_length(data, end):
    """Bytes of the tag that ends at data[:end]; 0 if there is none."""
    if data[end - 128:end - 125] == b"TAG":                         # ID3v1
        return 128
    if data[end - 32:end - 24] == b"APETAGEX":                      # APEv2, header optional
        size = int.from_bytes(data[end - 20:end - 16], "little")
        header = end - size - 32
        return size + 32 if data[header:header + 8] == b"APETAGEX" else size
    if data[end - 9:end] == b"LYRICS200" and data[end - 15:end - 9].isdigit():
        return int(data[end - 15:end - 9]) + 15                     # Lyrics3
    if data[end - 10:end - 7] == b"3DI":                            # ID3v2 with a footer
        return 20 + syncsafe(data[end - 4:end])

    # ID3v2 without a footer: search for its header
    at = end
    while (at := data.rfind(b"ID3", max(1, end - (1 << 24)), at)) > 0:
        if at + 10 + syncsafe(data[at + 6:at + 10]) == end:
            return end - at
    return 0


def syncsafe(data):
    """The integer that ID3v2 stores in seven bits of each byte, the highest first."""
    return sum((byte & 127) << 7 * k for k, byte in enumerate(reversed(data)))


def truncation(f, container, declared, decoded, rate):
    """A message if the file is truncated, else None. Lengths in seconds."""
    if container == "mp3":
        declared = mp3_length(f, rate)
    elif container not in EXACT or declared * rate > 5e8:
        declared = 0.0  # estimated from the bit rate, or unknown because written to a pipe
    if decoded + SLACK < declared:
        return f"header declares {declared:.1f} s, but only {decoded:.1f} s can be decoded"
    truncated = container == "ogg" and not ogg_is_complete(f)
    if container in CHUNKS:
        at, size = data_chunk(f, container)
        unknown = size % (1 << 31) == 0 or size % (1 << 31) >= 0x7FFF0000   # written to a pipe
        truncated = not unknown and at + size > f.seek(0, os.SEEK_END) + 1024
    return f"truncated after {decoded:.1f} s" if truncated else None


def data_chunk(f, container):
    """(offset, declared size in bytes) of the samples in a chunked file; size 0 if not found."""
    at, name_bytes, size_bytes, order, included, align = CHUNKS[container]
    size64 = None
    while True:
        f.seek(at)
        head = f.read(32)
        begin = at + name_bytes + size_bytes
        name, size = head[:4], head[name_bytes:name_bytes + size_bytes]
        size = int.from_bytes(size, order) - included
        if not name.strip().isalnum() or size < 0 or len(head) < 24:
            return begin, 0
        if name == b"ds64":  # RF64 and BW64: 64-bit sizes of the file and of the samples
            size64 = int.from_bytes(head[16:24], "little")
        if name == b"data":
            return begin, size64 if size == 0xFFFFFFFF and size64 is not None else size
        at = begin + size
        at += -at % align


def check_wav(f):
    """Raises Broken for big-endian files, and for empty ones whose chunks FFmpeg plays as audio.

    FFmpeg is right where a recorder was not closed: audio follows there, not a chunk.
    """
    f.seek(0)
    if f.read(4) == b"RIFX":
        raise Broken("a big-endian wav file (RIFX): convert it first")
    at, size = data_chunk(f, "wav")
    if size:
        return
    end = f.seek(0, os.SEEK_END)
    while at + 8 <= end:
        f.seek(at)
        head = f.read(8)
        if not (head[:4].isascii() and head[:4].strip().isalnum()):
            return
        size = int.from_bytes(head[4:], "little")
        at += 8 + size + size % 2
    if at in (end, end + 1):
        raise Broken("contains no audio")


def ogg_is_complete(f):
    """Whether the last page of an ogg file is whole and flagged as the last (RFC 3533)."""
    f.seek(max(0, f.seek(0, os.SEEK_END) - (1 << 17)))
    page = f.read().rpartition(b"OggS")[2]
    if len(page) < 23 or not page[1] & 4:
        return False
    segments = page[22]
    return len(page) >= 23 + segments + sum(page[23:23 + segments])


def mp3_length(f, rate):
    """Seconds according to the first frame of an mp3 (Xing, Info, VBRI); 0 without a count."""
    f.seek(0)
    head = f.read(4096)
    for tag, offset in ((b"Xing", 8), (b"Info", 8), (b"VBRI", 14)):
        at = head.find(tag)
        if at >= 0 and (tag == b"VBRI" or head[at + 7:at + 8] and head[at + 7] & 1):
            frames = int.from_bytes(head[at + offset:at + offset + 4], "big")
            return frames * (1152 if rate >= 32000 else 576) / rate
    return 0.0
