"""
Audio files to 16 kHz mono int16: whatever can be decoded of them, resampled.

`python decode.py RATE MEMORY SECONDS` is one of the processes of workers.py: it reads jobs from its standard input and writes what it decoded
to its standard output. A job is {"name": ..., "tracks": [source, ...], "least": seconds, "published": true or false}, with several tracks for
the stems of a song. A source is {"file": path} or {"zip": [paths of the parts], "file": member}, with "stream": k, "of": n for the k-th of n
audio streams of an mp4 (by ffmpeg); or null for silence, or "sum" for the sum of the other tracks.

What libsndfile says about a file is not believed: it ends files where their header says (an mp3 of variable bit rate without a table of
contents can lose most of its length) and throws away what it decoded before an error. Such files are mended (mend.py) and read again.
"""
import errno
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from math import ceil, gcd

import numpy as np
import soundfile as sf

import mend

BLOCK = 1 << 21                     # samples that are decoded at once, at most
QUIET = 33                          # int16: a second without a sample above -60 dB of full scale counts as silent
# errors that say something about the machine: the run ends, and no file is given up for them
NOT_THE_FILES = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOENT, errno.ENODEV, errno.ENOTCONN, errno.ESTALE}
SILENT = 3                          # int16: a file without a sample above -81 dB is silence
LOUD = 100                          # times full scale: beyond, the samples have another scale, and clipping them would make noise of them
RATES = (1000, 1_000_000)           # Hz: outside, the header is wrong
MOST_SECONDS = 4 * 3600             # longer files are refused: an int16 track of that length is 0.5 GB
# Kaiser-windowed sinc with 96 zero crossings on either side: flat to 7.5 kHz, a full-scale tone anywhere above 8 kHz comes out below -95 dB
# (torchaudio's default lets 8.1 kHz through at -13 dB, its "kaiser_best" 8.0 kHz at -62 dB)
KERNEL = dict(lowpass_filter_width=96, rolloff=0.965, beta=9.5)


class Broken(ValueError):
    """A file that cannot be used; its text is the reason."""


# -----------------------------------------------------------------------------
# reading

class Parts(io.RawIOBase):
    """The parts of a split archive as one file to read."""

    def __init__(self, paths):
        self.files = [open(p, "rb") for p in paths]
        self.ends = np.cumsum([os.path.getsize(p) for p in paths]).tolist()
        self.at = 0

    def readable(self):
        return True

    seekable = readable

    def tell(self):
        return self.at

    def seek(self, offset, whence=0):
        self.at = offset + (0, self.at, self.ends[-1])[whence]
        return self.at

    def readinto(self, buffer):
        for f, start, end in zip(self.files, [0, *self.ends], self.ends):
            if self.at < end:
                f.seek(self.at - start)
                n = f.readinto(memoryview(buffer)[:end - self.at])
                self.at += n
                return n
        return 0


@functools.lru_cache(4)
def open_zip(paths):
    """A zip file, in one or several parts. zipfile.BadZipFile if it is not one."""
    return zipfile.ZipFile(paths[0] if len(paths) == 1 else io.BufferedReader(Parts(paths), 1 << 20))


def open_source(source):
    """A binary file, at its beginning. What is in an archive goes to a temporary file, so that it is read just as if it lay unpacked."""
    if "zip" not in source:
        return open(source["file"], "rb", buffering=0)
    try:
        member = open_zip(tuple(source["zip"])).read(source["file"])
    except MemoryError:
        raise
    except Exception as e:  # damaged, cut off, encrypted, of unknown method: zipfile and its decompressors have no common class of error
        raise Broken(f"cannot be taken out of its archive ({e})") from e
    unpacked = tempfile.TemporaryFile()
    unpacked.write(member)
    unpacked.seek(0)
    return unpacked.detach()


class Sound(sf.SoundFile):
    """Read on as if from a pipe: soundfile then neither cuts at the length in the header nor seeks after each block, which fails in streamed
    flac files."""

    def seekable(self):
        return False


def mono(frames):
    """The mean of the channels: (N, channels) float32 -> (N,)."""
    channels = frames.shape[1]
    return frames[:, 0] if channels == 1 else frames @ np.full(channels, 1 / channels, np.float32)


def decode_blocks(stream, block=None):
    """(mono float32 (N,), SoundFile, error or None): all that can be decoded, to the error if there is one."""
    stream.seek(0)
    try:
        sound = Sound(stream.fileno(), closefd=False) if isinstance(stream, io.FileIO) else Sound(stream)  # an mp3 is read in 1,600 small pieces
    except sf.LibsndfileError as e:
        raise Broken("not audio that libsndfile can read (wav, flac, ogg, mp3, aiff, au)") from e
    if not RATES[0] <= sound.samplerate <= RATES[1]:
        raise Broken(f"has a sample rate of {sound.samplerate} Hz")
    pieces, error, n = [], None, 0
    block = block or min(sound.frames + 1, BLOCK // sound.channels)  # mostly all at once, but the header is not relied upon
    try:
        while len(piece := sound.read(block, "float32", always_2d=True)):               # (frames, channels)
            pieces.append(mono(piece))
            n += len(piece)
            if n > MOST_SECONDS * sound.samplerate:
                raise Broken(f"is longer than {MOST_SECONDS // 3600} hours")
    except sf.LibsndfileError as e:
        error = e.error_string
    if error and block != 64:  # the block with the error is lost: take smaller ones
        return decode_blocks(stream, 64)
    return (pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.float32), *pieces])), sound, error


def read_audio(source):
    """(mono float32 (N,), sample rate, notes) of an audio file: every sample that libsndfile can decode, whatever its header says.

    Broken with the reason if there is none. Notes say what is odd about it."""
    with open_source(source) as stream:
        size = stream.seek(0, os.SEEK_END)
        if size == 0:
            raise Broken("is empty (0 bytes)")
        most = size - max(1024, size // 50)  # what follows may be a tag
        try:
            wave, sound, error = decode_blocks(stream)
        except Broken as e:
            wave, sound, error = np.zeros(0, np.float32), None, e
            if not source["file"].lower().endswith((".mp3", ".mp2")):
                raise
        used, gaps, claimed = stream.tell(), 0, sound.frames if sound else 0
        mp3 = not sound or sound.format == "MP3"
        if mp3 and (error or used < most) or not error and len(wave) >= claimed and used < size:  # ended by damage, or by its header, not by its bytes
            stream.seek(0)
            found = mend.mended(bytearray(stream.read()), "MP3" if mp3 else sound.format, len(wave), used, len(wave) >= claimed)
            if found and (sound or 2 * found.length > size):
                longer, its_sound, problem = decode_blocks(found.file)
                end = found.end - max(0, found.length - found.file.tell())
                if len(longer) > len(wave) + found.padding:
                    wave, sound, error, used, gaps = longer, sound or its_sound, problem, end, found.gaps
                elif sound and mp3:  # there is no more
                    error, used = problem, max(used, end)
        if not sound:
            raise error
        notes, rate = [], sound.samplerate
        if gaps:
            notes.append(f"{gaps:,} of {size:,} bytes, between its parts, are damaged or not music: left out")
        if sound.format == "OGG":
            stream.seek(max(0, size - (1 << 17)))
            if not mend.ends(stream.read()):
                notes.append(f"its last page is missing: it may be cut off, after {len(wave) / rate:.1f} s")
        if sound.format == "MP3" and len(wave) + rate < claimed:
            stream.seek(0)
            claimed *= bool(mend.length_tags(stream.read()))  # without, it is a guess, which takes the picture for music
    if error:
        notes.append(f"decoding broke off after {len(wave) / rate:.1f} s: {error}")
    elif used < most:
        notes.append(f"decoding stopped after {len(wave) / rate:.1f} s, at {used:,} of {size:,} bytes")
    elif "(should be" in sound.extra_info:  # libsndfile's report of a wav or aiff file
        notes.append("its header and its size do not agree: it may be cut off")
    elif len(wave) + rate < claimed < 1e12:
        notes.append(f"its header says {claimed / rate:.1f} s, it holds {len(wave) / rate:.1f} s")
    return wave, rate, notes


def call(command):
    """Runs a program of ffmpeg's. If it is killed, so is this process: the file is tried again, or crashes the decoder."""
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode < 0:
        os.kill(os.getpid(), -done.returncode)
    return done


def read_stream(source):
    """As read_audio, for one audio stream of a video or stem file, decoded by ffmpeg."""
    with tempfile.TemporaryDirectory() as folder:
        path = source["file"]
        if "zip" in source:  # ffmpeg has to seek in it
            path = os.path.join(folder, "song.mp4")
            with open(path, "wb") as f, open_source(source) as stream:
                shutil.copyfileobj(stream, f)
        path = path if os.path.isabs(path) else os.path.join(".", path)  # so that no name is taken for an option or a protocol
        probe = ["ffprobe", "-v", "error", "-select_streams", "a", "-show_entries", "stream=sample_rate,channels", "-of", "json", path]
        streams = json.loads(call(probe).stdout or "{}").get("streams", [])
        if len(streams) != source["of"]:
            raise Broken(f"has {len(streams)} audio streams that ffmpeg can read instead of {source['of']}")
        rate, channels = int(streams[source["stream"]]["sample_rate"]), int(streams[source["stream"]]["channels"])
        if not RATES[0] <= rate <= RATES[1] or channels < 1:
            raise Broken(f"has a sample rate of {rate} Hz and {channels} channels")
        done = call(["ffmpeg", "-v", "error", "-i", path, "-map", f"0:a:{source['stream']}", "-f", "f32le", "-"])
    said = done.stderr.decode(errors="replace").strip().splitlines()
    if done.returncode or not done.stdout:
        raise Broken(f"ffmpeg fails on it: {said[0] if said else 'no samples'}")
    samples = np.frombuffer(done.stdout, "<f4", len(done.stdout) // (4 * channels) * channels)
    wave = mono(samples.reshape(-1, channels))                                           # (N, channels) -> (N,)
    return wave, rate, [f"ffmpeg: {said[0]}"] if said else []


# -----------------------------------------------------------------------------
# resampling

@functools.lru_cache(8)
def resampler(rate, to):
    import torchaudio  # torch takes seconds to load, and files at 16 kHz do without it
    return torchaudio.transforms.Resample(rate, to, resampling_method="sinc_interp_kaiser", **KERNEL)


def resample(wave, rate, to):
    """float32 (N,) at `rate` Hz to (ceil(N to / rate),) at `to` Hz, by torchaudio with KERNEL.

    Where the two rates have so little in common that its table of kernels would take gigabytes (44,101 Hz), by FFT."""
    if rate == to or not len(wave):
        return wave
    import torch
    torch.set_num_threads(1)
    up, down = to // gcd(rate, to), rate // gcd(rate, to)
    table = up * (down + 2 * KERNEL["lowpass_filter_width"] * max(down / up, 1))
    with torch.no_grad():
        wave = torch.from_numpy(np.ascontiguousarray(wave))
        if table < 2 ** 23:
            return resampler(rate, to)(wave).numpy()
        units = ceil((len(wave) + rate / 10) / down)  # of `down` samples, which become `up`; the silence keeps the end out of the beginning
        spectrum = torch.fft.rfft(wave.double(), units * down)                           # (bins,)
        hertz = torch.arange(len(spectrum)) * (rate / (units * down))
        top = min(rate, to) / 2
        spectrum *= torch.cos(((hertz / top - 0.9375) / 0.0625).clamp(0, 1) * torch.pi / 2) ** 2   # 1 to 7.5 kHz, 0 from 8 kHz
        return (torch.fft.irfft(spectrum, units * up)[:ceil(len(wave) * to / rate)] * (up / down)).float().numpy()


def to_int16(wave):
    """Float in [-1, 1] to little-endian int16; louder samples are clipped."""
    scaled = np.asarray(wave) * 32768.0
    return np.clip(np.rint(scaled, out=scaled), -32768, 32767, out=scaled).astype("<i2")


# -----------------------------------------------------------------------------
# a job, done in a worker

def decode(job, rate):
    """({"length", "silent", "notes", "damaged"}, int16 (tracks, length)) of a job, at `rate` Hz; silent is the number of silent seconds per
    track, and damaged says that a file may have more than could be read.

    Broken with the reason if it cannot be used."""
    waves, notes, damaged = [], [], False
    for source in job["tracks"]:
        if not isinstance(source, dict):
            waves.append(np.zeros(0, np.float32))
            continue
        which = f"{os.path.basename(source['file'])}: " if len(job["tracks"]) > 1 else ""
        try:
            wave, its_rate, its_notes = (read_stream if "stream" in source else read_audio)(source)
            peak = max(wave.max(initial=0), -wave.min(initial=0))
            if not peak < LOUD:
                raise Broken("has samples that are not numbers" if np.isnan(wave).any() else f"has samples of {peak:.3g} times full scale")
        except Broken as e:
            raise Broken(which + str(e)) from e
        waves.append(resample(wave, its_rate, rate))
        notes.extend(which + note for note in its_notes)
        damaged = damaged or bool(its_notes)
    length = max(map(len, waves))
    if length < max(1, job["least"] * rate):
        raise Broken(f"is too short: {length / rate:.3f} s, --min_seconds={job['least']:g}" + "".join(f"; {note}" for note in notes))
    uneven = max(length - len(w) for w, source in zip(waves, job["tracks"]) if isinstance(source, dict))
    if uneven > 0.1 * rate:
        notes.append(f"its tracks differ by up to {uneven / rate:.1f} s" + (": silence added" if not damaged else ""))
        if damaged:
            raise Broken("; ".join(notes))
    waves = [w if len(w) == length else np.pad(w, (0, length - len(w))) for w in waves]
    waves = [sum(waves) if source == "sum" else w for w, source in zip(waves, job["tracks"])]   # its own place holds zeros
    audio = np.stack([to_int16(w) for w in waves])                                       # (tracks, length)
    at_the_rails = audio.max() == 32767 or audio.min() == -32768
    loud = max(np.count_nonzero(np.abs(w) > 1) for w in waves) if at_the_rails else 0
    if loud > length // 1000:
        notes.append(f"{100 * loud / length:.1f} % of its samples were beyond full scale and are clipped")
    if max(audio[0].max(), -int(audio[0].min())) <= SILENT:
        if not job.get("published"):
            raise Broken("is silent")
        notes.append("is silent")  # a published split has it: numbers are to compare with those of others
    return describe(audio, rate, notes, damaged)


def describe(audio, rate, notes=(), damaged=False):
    """The info of int16 (tracks, length), and itself."""
    seconds = audio[:, :audio.shape[1] // rate * rate].reshape(len(audio), -1, rate)     # (tracks, seconds, samples)
    silent = (seconds.max(2) <= QUIET) & (seconds.min(2) >= -QUIET)
    return {"length": audio.shape[1], "silent": silent.sum(1).tolist(), "notes": list(notes), "damaged": damaged}, audio


def work(rate, memory, seconds):
    """Reads jobs, one JSON line each; answers with a line of JSON and the samples. Ends with its input, or if a job takes far too long
    and nobody stops it."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a decoder prints must not come between the samples
    if sys.platform == "linux":
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    alarm = getattr(signal, "alarm", lambda seconds: None)  # Windows has none
    answers.write(b'{"ready": true}\n')
    for line in sys.stdin.buffer:
        alarm(seconds + 10)
        try:
            info, audio = decode(json.loads(line), rate)
        except Broken as e:
            info, audio = {"reason": str(e)}, b""
        except (MemoryError, RuntimeError, ImportError, SystemError) as e:  # torch: a RuntimeError, or, if it cannot even be loaded, the last two
            greedy = not isinstance(e, RuntimeError) or "memory" in str(e).lower()
            info, audio = {"reason": f"needs more than {memory >> 20} MB of memory (--memory)" if greedy else repr(e), "ends": greedy}, b""
        except OSError as e:
            kind = "fatal" if e.errno in NOT_THE_FILES else "reason"
            info, audio = {kind: f"cannot be read: {e.strerror or e}" + (f" ({e.filename or tempfile.gettempdir()})" if kind == "fatal" else "")}, b""
        except Exception as e:  # an error of ours or of a library: the file is reported, the others go on
            info, audio = {"reason": f"{type(e).__name__}: {e}"}, b""
        answers.write(json.dumps(info).encode() + b"\n")
        view = memoryview(audio).cast("B")
        while view:
            view = view[answers.write(view):]
        alarm(0)
        if info.get("ends"):  # its heap is full, and what it could not load is half loaded: the next file gets a new process
            return


if __name__ == "__main__":
    work(*map(int, sys.argv[1:]))
