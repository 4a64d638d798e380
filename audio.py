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
import os
from math import ceil, gcd

import av
import numpy as np

from containers import Broken, check_wav, cut_off, is_padding, without_tags

LONGEST = 4 * 3600                  # seconds; an int16 track of that length is 0.5 GB
RATES = range(1000, 1_000_001)      # Hz; outside, the header is wrong
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
        self.stack, self.damage, self.name = contextlib.ExitStack(), [], str(file)
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
            if not tracks:
                raise Broken("holds no sound")
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

    rate, channels: those of the stream's header; what has others is converted. declared: seconds
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
        for rate, samples in self.decoded():
            if (rate, len(samples)) != (self.rate, self.channels):
                other += samples.shape[1] / rate
                samples = self.converted(rate, samples)
            n += samples.shape[1]
            yield samples
        if other:
            self.damage.append(f"{other:.1f} s of it have another sample rate or number of "
                               "channels: converted")
        self.check_end(n, self.rate)

    def decoded(self):
        """What decode() gives; an error of the disk says of which file."""
        try:
            yield from decode(self.container, self.track, self.damage)
        except OSError as e:
            raise OSError(e.errno, e.strerror, self.name) from e

    def converted(self, rate, samples):
        if len(samples) != self.channels:
            samples = np.repeat(samples.mean(0, keepdims=True), self.channels, 0)
        return resample(samples, rate, self.rate)


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
            frame = packed(frame)
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
    """Whether a frame has samples, in a form that PyAV passes on: at most 8 separate channels."""
    several = frame.format.is_planar and frame.layout.nb_channels > 8
    return frame.samples > 0 and not several


def packed(frame):
    """A frame of 8 separate channels with the channels in turn: PyAV crashes on the former."""
    if not frame.format.is_planar or frame.layout.nb_channels < 8:
        return frame
    frame.pts = None
    form = av.AudioResampler(frame.format.packed, frame.layout, frame.sample_rate)
    return form.resample(frame)[0]


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


class Sink:
    """A file for FFmpeg to write to, which keeps an error until FFmpeg has returned.

    Raised inside, it would come out garbled. What is written after it is dropped.
    """

    def __init__(self, f):
        self.f, self.error = f, None

    def attempt(self, work, *args, otherwise=0):
        if self.error is None:
            try:
                return work(*args)
            except OSError as e:
                self.error = e
        return otherwise

    def write(self, data):
        return self.attempt(self.f.write, data, otherwise=len(data))

    def seek(self, *where):
        return self.attempt(self.f.seek, *where)

    def tell(self):
        return self.attempt(self.f.tell)

    def check(self):
        if self.error:
            raise self.error


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
    sink = Sink(f)
    with av.open(sink, "w", format=name, container_options=options) as container:
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
            sink.check()

        yield write
        for part in converter.resample(None):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    sink.check()
