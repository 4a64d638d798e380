"""
What FFmpeg does not tell of sound files: tags behind the sound, files that end before their end.

audio.py asks, and is the only one who does.
"""
import io
import mmap
import os

SLACK = 0.25                        # seconds that a header may be wrong by
LARGE = 1 << 26                     # bytes of a file that is not read at once
# containers whose header gives the length, and not a guess
EXACT = ("ogg", "flac", "aiff", "au", "avi", "mov", "matroska", "asf", "ape", "wv", "tta")
# containers made of chunks: where the first begins, bytes of its name and of its size, byte order,
# bytes of both if the size counts them, and what a chunk's end is rounded up to
CHUNKS = {"wav": (12, 4, 4, "little", 0, 2), "w64": (40, 16, 8, "little", 24, 8),
          "caf": (8, 4, 8, "big", 0, 1)}
TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN")    # of title, text and picture


class Broken(ValueError):
    """A file that cannot be used; its text is the reason."""


def is_padding(raw):
    """Whether bytes between or behind frames are a tag, or one byte again and again."""
    return raw.startswith(TAGS) or len(raw) < 8192 and len(set(raw)) == 1


class Rest(io.RawIOBase):
    """The bytes from begin to end, under the name of their file.

    FFmpeg looks at the name where the start is damaged.
    """

    def __init__(self, raw, begin, end, name):
        self.raw, self.begin, self.end, self.at, self.name = raw, begin, end, begin, name

    def readable(self):
        return True

    seekable = readable

    def tell(self):
        return self.at - self.begin

    def seek(self, offset, whence=os.SEEK_SET):
        self.at = max(self.begin, (self.begin, self.at, self.end)[whence] + offset)
        return self.tell()

    def readinto(self, buffer):
        some = self.raw[self.at:min(self.end, self.at + len(buffer))]
        buffer[:len(some)] = some
        self.at += len(some)
        return len(some)


def without_tags(f):
    """The file without the tags in front of and behind the sound, which FFmpeg takes for damage.

    Only files without a header of their own have such tags: mp3, aac, ac3; and what follows a
    tag. The other one that FFmpeg must be helped with is BW64 of less than 4 GB.
    """
    f.seek(0)
    head = f.read(16)
    if head[:4] == b"BW64" and head[12:] != b"ds64":
        f.seek(4)
        return io.BytesIO(b"RIFF" + f.read())
    if not head.startswith((b"ID3", b"\xff", b"\x0b\x77")):
        return f
    raw = all_bytes(f)
    start, end = 0, len(raw)
    while raw[start:start + 3] == b"ID3":
        header = raw[start:start + 10].ljust(10, b"\0")
        footer = 10 if header[5] & 0x10 else 0
        start += 10 + syncsafe(header[6:]) + footer
    if raw[start:start + 1] not in (b"\xff", b"\x0b", b"f", b"R", b"F"):
        start = 0  # the length of the tag is damaged: FFmpeg looks for the first frame
    while start < end and (length := tag_length(raw, end)):
        end -= length
    return Rest(raw, start, end, str(getattr(f, "name", "")))


def all_bytes(f):
    """The bytes of a file. Large ones stay on the disk."""
    if isinstance(f, io.BufferedReader) and f.seek(0, os.SEEK_END) > LARGE:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    f.seek(0)
    return f.read()


def tag_length(raw, end):
    """Bytes of the tag that ends at raw[:end]; 0 if none does."""
    if raw[end - 128:end - 125] == b"TAG":                          # ID3v1
        return 128
    if raw[end - 32:end - 24] == b"APETAGEX":                       # APEv2: without its header
        size = int.from_bytes(raw[end - 20:end - 16], "little")
        header = end - size - 32
        return size + 32 if raw[header:header + 8] == b"APETAGEX" else size
    if raw[end - 9:end] == b"LYRICS200" and raw[end - 15:end - 9].isdigit():
        return int(raw[end - 15:end - 9]) + 15                      # Lyrics3: without its end
    if raw[end - 10:end - 7] == b"3DI":                             # ID3v2 with a footer
        return 20 + syncsafe(raw[end - 4:end])

    # ID3v2 without a footer: it has to be found by its header
    first = max(1, end - (1 << 24))
    at = raw.rfind(b"ID3", first, end)
    while at > 0:
        if at + 10 + syncsafe(raw[at + 6:at + 10]) == end:
            return end - at
        at = raw.rfind(b"ID3", first, at)
    return 0


def syncsafe(raw):
    """The number that ID3v2 writes in seven bits a byte."""
    number = 0
    for byte in raw:
        number = number << 7 | byte & 127
    return number


def cut_off(f, container, declared, held, rate):
    """A sentence if the file ends before its end, else None. Lengths are in seconds.

    FFmpeg takes what there is without a word.
    """
    if container == "mp3":
        declared = mp3_declares(f, rate)
    elif container not in EXACT or declared * rate > 5e8:
        declared = 0.0  # a guess from the bit rate, or unknown, as it was written to a pipe
    if held + SLACK < declared:
        return f"its header says {declared:.1f} s, it holds {held:.1f} s"
    ends_early = container == "ogg" and not ogg_ends(f)
    if container in CHUNKS:
        ends_early = misses_data(f, container)
    return f"it is cut off after {held:.1f} s" if ends_early else None


def data_chunk(f, container):
    """(first byte, number of bytes by the header) of the samples of a file made of chunks."""
    at, name_bytes, size_bytes, order, counted, align = CHUNKS[container]
    long_size = None
    while True:
        f.seek(at)
        head = f.read(32)
        begin = at + name_bytes + size_bytes
        name, size = head[:4], head[name_bytes:name_bytes + size_bytes]
        size = int.from_bytes(size, order) - counted
        if not name.strip().isalnum() or size < 0 or len(head) < 24:
            return begin, 0
        if name == b"ds64":  # RF64 and BW64: 64 bits for the file, then 64 for the samples
            long_size = int.from_bytes(head[16:24], "little")
        if name == b"data":
            if size == 0xFFFFFFFF and long_size is not None:
                size = long_size
            return begin, size
        at = begin + size
        at += -at % align


def misses_data(f, container):
    """Whether a file has fewer bytes of samples than its header says, if it says something."""
    at, size = data_chunk(f, container)
    unknown = size % (1 << 31) == 0 or size % (1 << 31) >= 0x7FFF0000  # written to a pipe
    return not unknown and at + size > f.seek(0, os.SEEK_END) + 1024


def check_wav(f):
    """Broken if a wav file holds what FFmpeg would take for sound.

    That is: samples of the other byte order, and chunks to the end where there are no samples.
    FFmpeg is right where a recorder was not closed: then sound follows, which is no chunk.
    """
    f.seek(0)
    if f.read(4) == b"RIFX":
        raise Broken("is a wav file of the other byte order (RIFX): convert it first")
    at, size = data_chunk(f, "wav")
    end = f.seek(0, os.SEEK_END)
    if size:
        return
    while at + 8 <= end:
        f.seek(at)
        head = f.read(8)
        if not (head[:4].isascii() and head[:4].strip().isalnum()):
            return
        size = int.from_bytes(head[4:], "little")
        at += 8 + size + size % 2
    if at in (end, end + 1):
        raise Broken("holds no sound")


def ogg_ends(f):
    """Whether the last page of an ogg file is whole and says that it is the last (RFC 3533)."""
    f.seek(max(0, f.seek(0, os.SEEK_END) - (1 << 17)))
    page = f.read().rpartition(b"OggS")[2]
    if len(page) < 23 or not page[1] & 4:
        return False
    segments = page[22]  # their lengths follow, then they themselves
    return len(page) >= 23 + segments + sum(page[23:23 + segments])


def mp3_declares(f, rate):
    """Seconds by the number of frames in the first frame of an mp3 (Xing, VBRI); 0 if none."""
    f.seek(0)
    head = f.read(4096)
    frame = 1152 if rate >= 32000 else 576                                      # samples
    for tag, where in ((b"Xing", 8), (b"Info", 8), (b"VBRI", 14)):
        found = head.find(tag)
        if found >= 0:
            frames = head[found + where:found + where + 4]
            has_frames = tag == b"VBRI" or head[found + 7:found + 8] and head[found + 7] & 1
            return int.from_bytes(frames, "big") * frame / rate if has_frames else 0.0
    return 0.0
