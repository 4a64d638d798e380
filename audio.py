"""
Any audio file in, float32 out; resampling; int16.

    wave, rate, damage = audio.read("song.mp3")     # mono; or an open binary file
    wave = audio.resample(wave, rate, 16000)
    with audio.Blocks("song.mp3") as song:          # all channels, block by block
        for block in song: ...                      # (C, n) at song.rate

Reads what FFmpeg reads, to the last sample that can be decoded. PyAV brings FFmpeg along.
"""
import contextlib
import errno
import functools
import io
import os
from math import ceil, gcd

import av
import numpy as np

LONGEST = 4 * 3600                  # seconds; an int16 track of that length is 0.5 GB
RATES = range(1000, 1_000_001)      # Hz; outside, the header is wrong
SLACK = 0.25                        # seconds that a header may be wrong by
JITTER = 0.1                        # seconds that the time of a frame may be wrong by
BLOCK = 1 << 20                     # samples that are taken over at once
# what FFmpeg must not take a file for: these formats open other files, addresses or devices
UNSAFE = {"alsa", "avisynth", "concat", "dash", "fbdev", "hls", "image2", "image2pipe", "imf",
          "kmsgrab", "lavfi", "oss", "rtp", "rtsp", "sap", "sdp", "vapoursynth", "vobsub",
          "webm_dash_manifest", "x11grab"}
FORMATS = ",".join(sorted(av.formats_available - UNSAFE))
# Kaiser-windowed sinc with 96 zero crossings: flat to 7.5 kHz, below -95 dB from 8 kHz on.
# torchaudio's default lets 8.1 kHz through at -13 dB, its "kaiser_best" 8.0 kHz at -62 dB.
KERNEL = dict(lowpass_filter_width=96, rolloff=0.965, beta=9.5)

# what FFmpeg, PyAV and reading for them may raise
BAD = (av.FFmpegError, ValueError, IndexError, OSError)

av.logging.set_level(av.logging.PANIC)  # what is wrong with a file is returned, not printed


class Broken(ValueError):
    """A file that cannot be used; its text is the reason."""


# -----------------------------------------------------------------------------
# reading

def read(file, stream=0):
    """(mono float32 (N,), sample rate, damage) of one audio stream of a file.

    file: a path, or an open binary file that can seek. stream: which of its audio streams.
    The wave is the mean of the channels, in [-1, 1] unless the file holds more.
    damage: sentences on what is damaged, cut off or left out; empty for a healthy file.
    Broken with the reason if nothing can be decoded; OSError if the file cannot be opened.
    """
    with Sound(file, stream) as sound:
        waves, seconds = [], {}
        for rate, samples in decode(sound.container, sound.track, sound.damage):
            wave = samples[0] if len(samples) == 1 else samples.mean(0)         # (n,)
            waves.append((rate, wave))
            seconds[rate] = seconds.get(rate, 0) + len(wave) / rate
            if sum(seconds.values()) > LONGEST:
                raise Broken(f"is longer than {LONGEST // 3600} hours")

        # a file may change its rate, most often because damage looks like a header
        rate = max(seconds, key=seconds.get, default=0)
        other = sum(seconds.values()) - seconds.get(rate, 0)
        if other:
            sound.damage.append(f"{other:.1f} s of it have another sample rate: left out")
        wave = np.concatenate([np.zeros(0, np.float32), *(w for r, w in waves if r == rate)])
        sound.check_end(len(wave), rate)
    return wave, rate, sound.damage


class Sound:
    """An open file and one of its audio streams; `damage` gathers what is wrong with it."""

    def __init__(self, file, stream=0):
        self.stack, self.damage = contextlib.ExitStack(), []
        with self.stack:        # closes what is open if anything below fails
            f = file
            if isinstance(file, (str, os.PathLike)):
                # FFmpeg would take a name for an address
                f = self.stack.enter_context(open(file, "rb"))
            if f.seek(0, os.SEEK_END) == 0:
                raise Broken("is empty (0 bytes)")
            self.file = without_tags(f)
            self.container = self.stack.enter_context(open_container(self.file))
            self.format = self.container.format.name.partition(",")[0]
            tracks = self.container.streams.audio
            if stream >= len(tracks):
                raise Broken(f"has {len(tracks)} audio streams, number {stream + 1} is wanted")
            self.track = tracks[stream]
            self.declared = (self.container.duration or 0) / av.time_base       # seconds
            if self.track.duration:
                self.declared = float(self.track.duration * self.track.time_base)
            self.stack = self.stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stack.close()

    def check_end(self, n, rate):
        """What is known once all is decoded, to n samples: Broken, or one more kind of damage."""
        if self.format == "wav":
            check_wav(self.file)
        if not n:
            raise Broken("holds no sound that can be decoded")
        problem = cut_off(self.file, self.format, self.declared, n / rate, rate)
        if problem:
            self.damage.append(problem)


class Blocks(Sound):
    """The samples of an audio stream in float32 blocks (C, n), for songs of any length.

    rate, channels: those of the stream's header; what has others is left out. declared: seconds
    by the header, 0 if unknown. damage is complete at the end. Errors are those of read().
    """

    def __init__(self, file, stream=0):
        super().__init__(file, stream)
        context = self.track.codec_context
        self.rate, self.channels = context.sample_rate, context.layout.nb_channels
        if self.rate not in RATES or not self.channels:
            self.stack.close()
            raise Broken(f"has a sample rate of {self.rate} Hz and {self.channels} channels")

    def __iter__(self):
        n, other = 0, 0.0
        for rate, samples in decode(self.container, self.track, self.damage):
            if (rate, len(samples)) != (self.rate, self.channels):
                other += samples.shape[1] / rate
                continue
            n += samples.shape[1]
            yield samples
        if other:
            self.damage.append(f"{other:.1f} s of it have another sample rate or number of "
                               "channels: left out")
        self.check_end(n, self.rate)


def open_container(f):
    f.seek(0)
    try:
        return av.open(f, metadata_errors="ignore", options={"format_whitelist": FORMATS})
    except BAD as e:
        blame_the_file(e)
        raise Broken("not audio that FFmpeg can read") from e


def blame_the_file(e):
    """Raises an error of the machine again.

    A damaged file makes FFmpeg look for places that no file has (EINVAL).
    """
    of_the_machine = isinstance(e, OSError) and not isinstance(e, av.FFmpegError)
    if of_the_machine and e.errno != errno.EINVAL:
        raise e


def decode(container, track, damage):
    """Blocks (rate, (C, n)) of one stream, to its last frame that can be decoded.

    What is wrong is added to `damage`, a list of sentences, at the end.
    """
    fifo, kind, bad = av.AudioFifo(), None, 0
    due, lost = None, 0.0  # when the next frame should begin, and what is missing; in seconds
    for packet in packets(container, track):
        try:
            decoded = packet.decode() if packet else track.codec_context.decode(None)
        except av.FFmpegError:
            bad += not is_padding(bytes(packet)) if packet else 1
            continue  # FFmpeg goes on at the next whole frame
        bad += sum(not can_be_taken(frame) for frame in decoded)
        for frame in filter(can_be_taken, decoded):
            if frame.time is not None:
                gap = frame.time - due if due is not None else 0.0
                lost += gap if gap > JITTER else 0.0
                due = frame.time + frame.samples / frame.sample_rate
            # a fifo holds frames of one kind, and would read beyond the end of others
            its = frame.sample_rate, frame.layout.nb_channels, frame.format.name
            if fifo.samples and (its != kind or fifo.samples > BLOCK):
                yield samples_of(fifo)
                fifo = av.AudioFifo()
            frame.pts, kind = None, its  # with its time, the fifo would insist on its own clock
            fifo.write(frame)
    if fifo.samples:
        yield samples_of(fifo)
    told = {f"{bad} of its packets are damaged: left out": bad,
            f"{lost:.1f} s are missing inside it": lost}
    damage += [text for text, count in told.items() if count]


def can_be_taken(frame):
    """Whether a frame has samples, in a form that PyAV takes over: at most 8 separate channels."""
    several = frame.format.is_planar and frame.layout.nb_channels > 8
    return frame.samples > 0 and not several


def packets(container, track):
    """The packets of a stream; None, which asks for what is left, if reading breaks off."""
    found = container.demux(track)
    while True:
        try:
            yield next(found)
        except StopIteration:
            return
        except BAD as e:
            blame_the_file(e)
            yield None
            return


def samples_of(fifo):
    """(rate, what is in the fifo as float32 (C, n), full scale is 1)."""
    frame = fifo.read()
    if frame.sample_rate not in RATES:
        raise Broken(f"has a sample rate of {frame.sample_rate} Hz")
    samples = frame.to_ndarray()                    # planar: (C, N), else (1, N C)
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T               # (C, N)
    full = {"u1": 2.0 ** 7, "i2": 2.0 ** 15, "i4": 2.0 ** 31, "i8": 2.0 ** 63}
    scale = np.float32(full.get(samples.dtype.str[1:], 1.0))
    silence = np.float32(128.0 if samples.dtype == np.uint8 else 0.0)
    return frame.sample_rate, (samples.astype(np.float32) - silence) / scale


# -----------------------------------------------------------------------------
# what FFmpeg does not tell: tags behind the sound, files that end before their end

# containers whose header gives the length, and not a guess
EXACT = ("ogg", "flac", "aiff", "au", "avi", "mov", "matroska", "asf", "ape", "wv", "tta")
# containers made of chunks: where the first begins, bytes of its name and of its size, byte order,
# bytes of both if the size counts them, and what a chunk's end is rounded up to
CHUNKS = {"wav": (12, 4, 4, "little", 0, 2), "w64": (40, 16, 8, "little", 24, 8),
          "caf": (8, 4, 8, "big", 0, 1)}
TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN")    # of title, text and picture


def is_padding(raw):
    """Whether bytes between or behind frames are a tag, or one byte again and again."""
    return raw.startswith(TAGS) or len(raw) < 8192 and len(set(raw)) == 1


class Rest(io.BytesIO):
    """What is left of a file, under its name: FFmpeg looks at that where the start is damaged."""
    name = ""


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
    f.seek(0)
    raw = f.read()
    start, end = 0, len(raw)
    while raw[start:start + 3] == b"ID3":
        header = raw[start:start + 10].ljust(10, b"\0")
        footer = 10 if header[5] & 0x10 else 0
        start += 10 + syncsafe(header[6:]) + footer
    if raw[start:start + 1] not in (b"\xff", b"\x0b", b"f", b"R", b"F"):
        start = 0  # the length of the tag is damaged: FFmpeg looks for the first frame
    while start < end and (length := tag_length(raw, end)):
        end -= length
    rest = Rest(raw[start:end])
    rest.name = str(getattr(f, "name", ""))
    return rest


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
    at = raw.rfind(b"ID3", 0, end)
    while at > 0 and at > end - (1 << 24):
        if at + 10 + syncsafe(raw[at + 6:at + 10]) == end:
            return end - at
        at = raw.rfind(b"ID3", 0, at)
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


# -----------------------------------------------------------------------------
# resampling

@functools.lru_cache(8)
def resampler(rate, to):
    import torchaudio  # torch takes seconds to load, and files at 16 kHz do without it
    return torchaudio.transforms.Resample(
        rate, to, resampling_method="sinc_interp_kaiser", **KERNEL)


def resample(wave, rate, to):
    """float32 (..., N) at `rate` Hz -> (..., ceil(N to / rate)) at `to` Hz, by torchaudio.

    Two rates with little in common (44,101 Hz) would need gigabytes of kernels: then by FFT.
    """
    n = wave.shape[-1]
    if rate == to or not n:
        return wave
    import torch
    down, up = rate // gcd(rate, to), to // gcd(rate, to)
    kernels = up * (down + 2 * KERNEL["lowpass_filter_width"] * max(down / up, 1))
    with torch.no_grad():
        wave = torch.from_numpy(np.ascontiguousarray(wave))
        if kernels < 2 ** 23:
            return resampler(rate, to)(wave).numpy()

        # whole units of `down` samples become `up`; silence keeps the end out of the beginning
        units = ceil((n + rate / 10) / down)
        spectrum = torch.fft.rfft(wave.double(), units * down)                  # (..., bins)
        hertz = torch.arange(spectrum.shape[-1]) * (rate / (units * down))
        above = (hertz / (min(rate, to) / 2) - 0.9375) / 0.0625
        spectrum *= torch.cos(above.clamp(0, 1) * torch.pi / 2) ** 2    # 1 to 7.5 kHz, 0 at 8
        longer = torch.fft.irfft(spectrum, units * up) * (up / down)
        return longer[..., :ceil(n * to / rate)].float().numpy()


def to_int16(wave):
    """Float in [-1, 1] to little-endian int16; louder samples are clipped."""
    scaled = np.asarray(wave) * 32768.0
    np.rint(scaled, out=scaled)
    return np.clip(scaled, -32768, 32767, out=scaled).astype("<i2")


# -----------------------------------------------------------------------------
# writing

# what can be written: container and codec
WRITTEN = {"wav": ("wav", "pcm_s16le"), "flac": ("flac", "flac"), "mp3": ("mp3", "libmp3lame"),
           "opus": ("opus", "libopus")}
LAYOUTS = ("mono", "stereo", "3.0", "quad", "5.0", "5.1", "6.1", "7.1")  # of 1 to 8 channels
BITS = 96_000                       # a second and channel of mp3 and opus


@contextlib.contextmanager
def writer(f, kind, rate, channels, bits=BITS):
    """A function that writes blocks of int16 (C, n) to an open binary file.

    kind: wav or flac, which keep every sample; mp3 or opus of `bits` a second and channel, which
    change the rate where they do not know it. ValueError if it cannot hold so many channels.
    """
    if channels > (2 if kind == "mp3" else 8):
        raise ValueError(f"{kind} cannot hold {channels} channels: choose wav or flac, which hold "
                         "up to 8")
    name, codec = WRITTEN[kind]
    known = av.codec.Codec(codec, "w").audio_rates
    own = min((r for r in known if r >= rate), default=max(known)) if known else rate
    options = {"rf64": "auto"} if kind == "wav" else {}             # beyond 4 GB
    with av.open(f, "w", format=name, container_options=options) as container:
        layout = LAYOUTS[channels - 1]
        stream = container.add_stream(codec, rate=own, layout=layout)
        if known:
            stream.bit_rate = bits * channels
        stream.codec_context.open()
        converter = av.AudioResampler(stream.format, layout, own, stream.codec_context.frame_size)

        def write(samples):
            flat = np.ascontiguousarray(samples.T).reshape(1, -1)               # (1, n C)
            frame = av.AudioFrame.from_ndarray(flat, format="s16", layout=layout)
            frame.sample_rate = rate
            for part in converter.resample(frame):
                container.mux(stream.encode(part))

        yield write
        for part in converter.resample(None):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
