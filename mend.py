"""
Audio files whose header says less than there is, or that are damaged in the middle: made into what libsndfile reads to its end.
"""
import io
import re
from typing import NamedTuple

TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN")     # of title, text and picture
LENGTH_TAGS = (b"Xing", b"Info", b"VBRI")   # in the first frame of an mp3: how many frames there are, and mostly
GAPLESS = 4 * 1152                          # how many samples at both ends, fewer than this, are not music

# the header of an mp3's frame (ISO 11172-3, 2.4.1.3, and 13818-3): 11 ones, version, layer II or III, bit rate, sample rate, padding, mode
HEADER = re.compile(b"\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd][" + re.escape(bytes(b for b in range(0x10, 0xf0) if b & 12 != 12)) + b"].", re.DOTALL)
KBITS = {(1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320), (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
         (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160), (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}


class Overlong(io.BytesIO):
    """A file that says it is 64 times as long as it is, so that mpg123, which estimates the length of an mp3 from its bit rate at the
    start, does not stop before the end. The last 128 bytes, where it looks for a tag, are zeros."""

    def __init__(self, raw):
        super().__init__(raw)
        self.at, self.end = 0, 64 * len(raw)

    def tell(self):
        return self.at

    def seek(self, offset, whence=0):
        self.at = offset + (0, self.at, self.end)[whence]
        return self.at

    def readinto(self, buffer):
        n = min(len(buffer), self.end - self.at)
        if self.at >= self.end - 128:
            buffer[:n] = bytes(n)
        else:
            super().seek(self.at)
            n = super().readinto(buffer)
        self.at += n
        return n


def behind_id3(raw):
    """Where an mp3 begins: behind the tag with the title and the picture, which may look like music or like a header."""
    return 10 + sum((byte & 127) << shift for byte, shift in zip(raw[6:10], (21, 14, 7, 0))) if raw[:3] == b"ID3" else 0


def length_tags(raw):
    """Where an mp3 says how long it is."""
    begin = behind_id3(raw)
    return [at for tag in LENGTH_TAGS if (at := raw.find(tag, begin, begin + 65536)) >= 0]


def frame(header):
    """(what all frames of an mp3 have in common: version, layer, sample rate, mono or not; length in bytes) of a match of HEADER."""
    _, kind, rates, mode = header[0]
    version, layer = {3: 1, 2: 2, 0: 2.5}[kind >> 3 & 3], 4 - (kind >> 1 & 3)
    rate = (44100, 48000, 32000)[rates >> 2 & 3] // {1: 1, 2: 2, 2.5: 4}[version]
    kbit = KBITS[min(2, int(version)), layer][(rates >> 4) - 1]
    return (version, layer, rate, mode >> 6 == 3), (72_000 if layer == 3 and version > 1 else 144_000) * kbit // rate + (rates >> 1 & 1)


def mp3_frames(raw):
    """(the frames of an mp3 that go with its first ones, joined; bytes between them that are left out, but for tags; where the last one ends, or
    the tags behind it).

    A frame counts if it follows another or is followed by one: mpg123 takes the first thing like a header behind a gap, and libsndfile ends
    there if that has another rate."""
    frames, kind, at, end, gaps, others = [], None, behind_id3(raw), -1, 0, -1
    while header := HEADER.search(raw, at):
        at = header.start()
        its, length = frame(header)
        following = HEADER.match(raw, at + length)
        if kind in (None, its) and at + length <= len(raw) and (at == end or following and frame(following)[0] == its):
            gaps += at - end if kind and not raw.startswith(TAGS, end) else 0
            kind, end = its, at + length
            frames.append(raw[at:end])
            at = end
        else:
            others = at if following and frame(following)[0] == its else others
            at += 1
    return b"".join(frames), gaps, len(raw) if raw.startswith(TAGS, end) and others < end else end


class Mended(NamedTuple):
    file: io.BytesIO    # for libsndfile
    length: int         # of what is in it, in bytes
    end: int            # where the last of these bytes was; what is behind is lost
    gaps: int = 0       # bytes between them that are left out
    padding: int = 0    # it may hold so many samples more that are not music


def mended(raw, format, read, used, lies):
    """A file of which libsndfile `read` so many samples and `used` so many bytes, as Mended, or None where nothing is known to help (of an ogg
    file the note says what is lost). If its header `lies`, which says that this is all, what it says is taken out."""
    if format == "MP3":
        tags = length_tags(raw) if lies else []
        for at in tags:
            raw[at:at + 4] = bytes(4)
        music, gaps, end = mp3_frames(bytes(raw))
        if not music:  # of a format of its own
            music, gaps, end = bytes(raw), 0, len(raw)
        return Mended(Overlong(music), len(music), end, gaps, GAPLESS if tags else 0)
    if format == "FLAC" and raw[:4] == b"fLaC" and used < 0.98 * len(raw):
        raw[21:26] = bytes([raw[21] & 0xF0, 0, 0, 0, 0])            # 36 bits: unknown
    elif format == "AU" and raw[:4] == b".snd" and used < 0.98 * len(raw):
        raw[8:12] = b"\xff" * 4                                     # unknown
    elif format in ("WAV", "WAVEX") and read == 0 and (at := open_chunk(raw)):  # a recorder that was not closed
        raw[at + 4:at + 8] = b"\xff" * 4
    else:
        return None
    return Mended(io.BytesIO(bytes(raw)), len(raw), len(raw))


def open_chunk(raw):
    """Where a wav file's data chunk begins, if it says that it is empty and what follows are not other chunks, to the end."""
    at, data = 12, None
    while at + 8 <= len(raw):
        if raw[at:at + 8] == bytes(8):  # no name and no size: minutes of silence, or padding
            at += (re.compile(rb"\0*").match(raw, at).end() - at) // 8 * 8
            continue
        size = int.from_bytes(raw[at + 4:at + 8], "little")
        data = at if raw[at:at + 4] == b"data" and not size else data
        at += 8 + size + size % 2
    return data if at != len(raw) else None


def ends(ogg):
    """Whether the last page in the last bytes of an ogg file is whole, and says that it is the last (RFC 3533)."""
    _, mark, page = ogg.rpartition(b"OggS")                          # version, flags, 20 bytes, number of segments, their lengths, segments
    return bool(mark) and len(page) > 22 and bool(page[1] & 4) and len(page) >= 23 + page[22] + sum(page[23:23 + page[22]])
