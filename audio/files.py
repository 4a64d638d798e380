"""
Audio files of any format in, float32 out; int16 in, files out. FFmpeg through PyAV.

    wave, rate, damage = files.read("song.mp3")     # mono; also takes an open binary file
    with files.Blocks("song.mp3") as song:          # all channels, block by block
        for block in song: ...                      # (C, n) at song.rate
    with files.writer(f, "flac", rate, 2) as write:
        write(block)                                # int16 (2, n)
"""
import contextlib
import errno
import functools
import io
import os

import av
import numpy as np

from audio.truncation import Broken, check_wav, is_padding, truncation, without_tags
from common.files import naming

MAX_SECONDS = 4 * 3600              # an int16 track of that length takes 0.5 GB
RATES = range(1000, 1_000_001)      # Hz; anything else is a damaged header
JITTER = 0.1                        # tolerance for the timestamp of a frame, seconds
BLOCK = 1 << 20                     # samples per channel
# demuxers that would open other files, addresses or devices
UNSAFE = {"alsa", "avisynth", "concat", "dash", "fbdev", "hls", "image2", "image2pipe", "imf",
          "kmsgrab", "lavfi", "oss", "rtp", "rtsp", "sap", "sdp", "vapoursynth", "vobsub",
          "webm_dash_manifest", "x11grab"}
FORMATS = ",".join(sorted(av.formats_available - UNSAFE))
READ_ERRORS = (av.FFmpegError, ValueError, IndexError, OSError)

av.logging.set_level(av.logging.PANIC)  # damage is returned, not printed


def resampled(wave, rate, to):
    """audio.resample.resample() of a NumPy array, float32 (..., N) at `rate` Hz."""
    if rate == to:
        return wave
    import torch  # lazy: it takes seconds and 0.5 GB, and files at 16 kHz do not need it

    from audio.resample import resample
    return resample(torch.from_numpy(wave), rate, to).numpy()


def to_int16(wave):
    """Float in [-1, 1] to little-endian int16, rounded to even; clips beyond full scale."""
    scaled = np.asarray(wave) * 32768.0
    np.rint(scaled, out=scaled)
    return np.clip(scaled, -32768, 32767, out=scaled).astype("<i2")


def read(file, stream=0):
    """(mono float32 (N,), sample rate, damage) of one audio stream of a file.

    file: a path, or a seekable binary file. stream: index among its audio streams.
    The wave is the mean of the channels. Full scale is 1, which float formats may exceed.
    damage: a list of messages about what is damaged, missing or left out; empty if intact.
    Raises Broken if nothing can be decoded, OSError if the file cannot be opened.
    """
    with Sound(file, stream) as sound:
        parts, seconds = {}, 0.0        # {sample rate: [wave]}, of all rates
        for rate, samples in sound.decode():
            wave = samples[0] if len(samples) == 1 else samples.mean(0)         # (n,)
            parts.setdefault(rate, []).append(wave)
            seconds += len(wave) / rate
            if seconds > MAX_SECONDS:
                raise Broken(f"is longer than {MAX_SECONDS // 3600} hours")

        # the rate may change within a file, mostly where damaged data looks like a header
        waves = {rate: np.concatenate(part) for rate, part in parts.items()}
        rate = max(waves, key=lambda rate: len(waves[rate]) / rate, default=0)
        wave = waves.get(rate, np.zeros(0, np.float32))                         # (N,)
        if len(waves) > 1:
            left_out = seconds - len(wave) / rate
            sound.damage.append(f"left out {left_out:.1f} s at another sample rate")
        sound.check_end(len(wave), rate)
    return wave, rate, sound.damage


class Sound(contextlib.ExitStack):
    """An open file and one of its audio streams. `damage` collects messages."""

    def __init__(self, file, stream=0):
        super().__init__()
        self.damage, self.name = [], str(file)
        with contextlib.ExitStack() as opened:
            if isinstance(file, (str, os.PathLike)):
                # FFmpeg gets an open file, as it treats some names as URLs
                file = opened.enter_context(open(file, "rb"))
            self.file = without_tags(file)
            self.container = opened.enter_context(open_container(self.file))
            tracks = self.container.streams.audio
            if stream >= len(tracks):
                raise Broken(f"has {len(tracks)} audio streams, stream {stream + 1} requested"
                             if tracks else "contains no audio")
            self.push(opened.pop_all())
        self.track = tracks[stream]
        self.declared = (self.container.duration or 0) / av.time_base           # seconds
        if self.track.duration:
            self.declared = float(self.track.duration * self.track.time_base)

    def decode(self):
        """Yields (rate, samples (C, n)) up to the last frame that can be decoded."""
        fifo, kind, bad = av.AudioFifo(), None, 0
        due, missing = None, 0.0    # expected time of the next frame, sum of all gaps; in seconds
        for packet in self.packets():
            try:
                frames = packet.decode() if packet else self.track.codec_context.decode(None)
            except av.FFmpegError:
                bad += not packet or not is_padding(bytes(packet))
                continue  # FFmpeg resumes at the next intact frame
            for frame in frames:
                # PyAV returns no samples of more than 8 planar channels
                channels = frame.layout.nb_channels
                if not frame.samples or frame.format.is_planar and channels > 8:
                    bad += 1
                    continue
                if frame.time is not None:
                    if due is not None and frame.time - due > JITTER:
                        missing += frame.time - due
                    due = frame.time + frame.samples / frame.sample_rate
                frame = interleave(frame)
                # a fifo reads out of bounds if its frames differ in rate, layout or format
                new_kind = frame.sample_rate, channels, frame.format.name
                if fifo.samples and (new_kind != kind or fifo.samples > BLOCK):
                    yield drain(fifo)
                    fifo = av.AudioFifo()
                frame.pts, kind = None, new_kind    # the fifo rejects gaps between timestamps
                fifo.write(frame)
        if fifo.samples:
            yield drain(fifo)
        if bad:
            self.damage.append(f"damaged packets skipped: {bad}")
        if missing:
            self.damage.append(f"{missing:.1f} s missing in the middle")

    def packets(self):
        """Yields packets; None, which flushes the decoder, once reading fails."""
        try:
            yield from self.container.demux(self.track)
        except READ_ERRORS as e:
            reraise_system_error(e)
            yield None

    def check_end(self, n, rate):
        """Call after the last of n samples. Adds a truncation to `damage`; Broken without audio."""
        container = self.container.format.name.partition(",")[0]
        if container == "wav":
            check_wav(self.file)
        if not n:
            raise Broken("contains no audio that can be decoded")
        message = truncation(self.file, container, self.declared, n / rate, rate)
        if message:
            self.damage.append(message)


class Blocks(Sound):
    """Yields an audio stream as float32 blocks (C, n), in constant memory.

    rate, channels: from the header; frames that differ are converted. declared: seconds from
    the header, 0 if unknown. damage: complete after the last block. Same exceptions as read().
    """

    def __init__(self, file, stream=0):
        super().__init__(file, stream)
        context = self.track.codec_context
        self.rate, self.channels = context.sample_rate, context.layout.nb_channels
        check_layout(self.rate, self.channels)

    def __iter__(self):
        n, other = 0, 0.0
        with naming(self.name):
            for rate, samples in self.decode():
                if (rate, len(samples)) != (self.rate, self.channels):
                    other += samples.shape[1] / rate
                    if len(samples) != self.channels:
                        mono = samples.mean(0, keepdims=True)                   # (1, n)
                        samples = np.repeat(mono, self.channels, 0)             # (C, n)
                    samples = resampled(samples, rate, self.rate)
                n += samples.shape[1]
                yield samples
        if other:
            self.damage.append(f"converted {other:.1f} s with another sample rate or layout")
        self.check_end(n, self.rate)


def check_layout(rate, channels):
    if rate not in RATES or not channels:
        raise Broken(f"has a sample rate of {rate} Hz and {channels} channels")


def open_container(f):
    f.seek(0)
    try:
        return av.open(f, metadata_errors="ignore", options={"format_whitelist": FORMATS})
    except READ_ERRORS as e:
        reraise_system_error(e)
        empty = f.seek(0, os.SEEK_END) == 0
        raise Broken("is empty (0 bytes)" if empty else "not audio that FFmpeg can read") from e


def reraise_system_error(e):
    """Raises e if the operating system caused it.

    EINVAL does not count: damaged files make FFmpeg seek to impossible offsets.
    """
    if not isinstance(e, av.FFmpegError) and getattr(e, "errno", errno.EINVAL) != errno.EINVAL:
        raise e


def interleave(frame):
    """Converts 8 planar channels, on which PyAV crashes, to packed ones."""
    if not frame.format.is_planar or frame.layout.nb_channels < 8:
        return frame
    frame.pts = None
    resampler = av.AudioResampler(frame.format.packed, frame.layout, frame.sample_rate)
    return resampler.resample(frame)[0]


def drain(fifo):
    """(rate, float32 (C, n)) of all samples in the fifo; full scale is 1."""
    frame = fifo.read()
    channels = frame.layout.nb_channels
    check_layout(frame.sample_rate, channels)
    samples = frame.to_ndarray()                    # planar: (C, n), packed: (1, n C)
    if not frame.format.is_planar:
        samples = samples.reshape(-1, channels).T                               # (C, n)
    full_scale = {"u1": 2.0 ** 7, "i2": 2.0 ** 15, "i4": 2.0 ** 31, "i8": 2.0 ** 63}
    scale = np.float32(full_scale.get(samples.dtype.str[1:], 1.0))
    offset = np.float32(128.0 if samples.dtype == np.uint8 else 0.0)
    return frame.sample_rate, (samples.astype(np.float32) - offset) / scale


ENCODERS = {"wav": "pcm_s16le", "flac": "flac", "mp3": "libmp3lame", "opus": "libopus"}
LAYOUTS = ("mono", "stereo", "3.0", "quad", "5.0", "5.1", "6.1", "7.1")     # 1 to 8 channels
BIT_RATE = 96_000       # of mp3 and opus, per channel

# not soundfile: libsndfile 1.2.2 loses the OSError of a full disk in its callbacks, and attenuates
# mp3 from int16


class Sink:
    """Defers the first OSError of a file, which FFmpeg's callbacks would replace by their own."""

    def __init__(self, f):
        self.f, self.error = f, None

    def call(self, method, *args):
        try:
            return getattr(self.f, method)(*args)
        except OSError as e:
            self.f, self.error = io.BytesIO(), e        # the rest is discarded
            return self.call(method, *args)

    write = functools.partialmethod(call, "write")
    seek = functools.partialmethod(call, "seek")
    tell = functools.partialmethod(call, "tell")

    def check(self):
        if self.error:
            raise self.error


@contextlib.contextmanager
def writer(f, codec, rate, channels, bit_rate=BIT_RATE):
    """A function that writes int16 blocks (C, n) to an open binary file.

    wav and flac are lossless; wav becomes RF64 beyond 4 GB. mp3 and opus have `bit_rate` per
    channel, and the next higher sample rate that they support. ValueError for too many channels.
    """
    if channels > (2 if codec == "mp3" else 8):
        raise ValueError(f"{codec} cannot store {channels} channels: wav and flac store up to 8")
    encoder, layout = ENCODERS[codec], LAYOUTS[channels - 1]
    supported_rates = av.codec.Codec(encoder, "w").audio_rates or [rate]
    coded_rate = min((r for r in supported_rates if r >= rate), default=max(supported_rates))
    options = {"rf64": "auto"} if codec == "wav" else {}
    sink = Sink(f)
    with av.open(sink, "w", format=codec, container_options=options) as container:
        stream = container.add_stream(encoder, rate=coded_rate, layout=layout)
        if codec in ("mp3", "opus"):
            stream.bit_rate = bit_rate * channels
        context = stream.codec_context
        context.open()
        resampler = av.AudioResampler(stream.format, layout, coded_rate, context.frame_size)

        def encode(frame):
            for part in resampler.resample(frame):
                container.mux(stream.encode(part))
            sink.check()

        def write(samples):
            packed = np.ascontiguousarray(samples.T).reshape(1, -1)             # (1, n C)
            frame = av.AudioFrame.from_ndarray(packed, format="s16", layout=layout)
            frame.sample_rate = rate
            encode(frame)

        yield write
        encode(None)
        container.mux(stream.encode(None))
    sink.check()
