"""
Reading and writing audio files: formats, blocks, damage, full disks.

    python -m pytest -q tests/test_audio_files.py
"""
import errno
import io

import numpy as np
import pytest
import soundfile as sf
from conftest import RATE, encode, tone

from audio import files
from audio.files import Broken, to_int16


def level(wave):
    """Of a sine, in dB relative to full scale, without the edges."""
    middle = np.asarray(wave, np.float64)[len(wave) // 8:-len(wave) // 8]
    return 20 * np.log10(np.sqrt(2 * np.mean(middle ** 2)) + 1e-12)


def test_to_int16_rounds_and_clips():
    wave = np.array([-1.5, -1, -0.5 / 32768, 0, 0.6 / 32768, 0.99999, 1, 2], np.float32)
    assert to_int16(wave).tolist() == [-32768, -32768, 0, 0, 1, 32767, 32767, 32767]


# -----------------------------------------------------------------------------
# formats

@pytest.mark.parametrize("extension, subtype", [
    ("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "PCM_U8"), ("wav", "FLOAT"), ("wav", "DOUBLE"),
    ("flac", "PCM_16"), ("flac", "PCM_24"), ("aiff", "PCM_16"), ("au", "PCM_16"), ("caf", "PCM_16"),
    ("w64", "PCM_16"), ("rf64", "PCM_16")])
@pytest.mark.parametrize("rate, channels", [(44100, 2), (16000, 1), (48000, 4)])
def test_lossless_formats(tmp_path, extension, subtype, rate, channels):
    wave = tone(440, rate, 2)
    sides = np.stack([wave * (1 + 0.5 * (-1) ** c) for c in range(channels)], 1)    # (N, C)
    sf.write(tmp_path / f"a.{extension}", sides, rate, subtype=subtype)
    mono, read_rate, damage = files.read(tmp_path / f"a.{extension}")
    assert read_rate == rate and not damage
    step = 2 ** -7 if subtype == "PCM_U8" else 2 ** -15
    np.testing.assert_allclose(mono, sides.mean(1), atol=step)


@pytest.mark.parametrize("name, codec", [
    ("a.m4a", "aac"), ("a.aac", "aac"), ("a.mp4", "aac"), ("a.opus", "libopus"),
    ("a.webm", "libopus"), ("a.wma", "wmav2"), ("a.m4a", "alac"), ("a.wv", "wavpack"),
    ("a.tta", "tta"), ("a.mka", "flac"), ("a.mp3", "libmp3lame"), ("a.ac3", "ac3"),
    ("a.ogg", "flac")])
def test_formats_encoded_by_ffmpeg(tmp_path, name, codec):
    wave = tone(440, 48000, 5)
    encode(tmp_path / name, np.stack([wave, wave / 2], 1), 48000, codec)
    mono, rate, damage = files.read(tmp_path / name)
    assert rate == 48000 and not damage
    assert abs(len(mono) - len(wave)) <= 2 * 2048
    assert level(mono) == pytest.approx(level(0.75 * wave), abs=0.6)


def test_streams_of_a_stem_file(tmp_path):
    encode(tmp_path / "a.stem.mp4", tone(440, 44100, 3), 44100, "aac", streams=5)
    for k in range(5):
        wave, _, damage = files.read(tmp_path / "a.stem.mp4", k)
        assert level(wave) == pytest.approx(level(tone(440, 44100, 3) / (k + 1)), abs=0.2)
        assert not damage
    with pytest.raises(Broken, match="5 audio streams, stream 6"):
        files.read(tmp_path / "a.stem.mp4", 5)


def test_playlists_open_no_other_files(tmp_path):
    sf.write(tmp_path / "a.wav", tone(440, RATE, 1), RATE)
    for text in (f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/a.wav\n",
                 f"ffconcat version 1.0\nfile {tmp_path}/a.wav\n"):
        (tmp_path / "list.mp3").write_text(text)
        with pytest.raises(Broken):
            files.read(tmp_path / "list.mp3")


# -----------------------------------------------------------------------------
# blocks, and writing

def blocks_of(file):
    """(samples (C, N), rate, damage) of Blocks."""
    with files.Blocks(file) as song:
        return np.concatenate(list(song), 1), song.rate, song.damage


def written(codec, rate, samples, f=None):
    """The bytes of a file with int16 samples (C, N)."""
    f = io.BytesIO() if f is None else f
    with files.writer(f, codec, rate, len(samples)) as write:
        for at in range(0, samples.shape[1], 5000):
            write(samples[:, at:at + 5000])
    return f.getvalue()


@pytest.mark.parametrize("channels", range(1, 9))
@pytest.mark.parametrize("codec", ["wav", "flac", "opus"])
def test_all_channels_are_written_and_read(codec, channels):
    samples = np.random.default_rng(0).normal(0, 3000, (channels, 30_077)).astype("<i2")
    blocks, rate, damage = blocks_of(io.BytesIO(written(codec, 48_000, samples)))
    assert rate == 48_000 and not damage and len(blocks) == channels
    if codec != "opus":
        assert np.array_equal(blocks * 32768, samples)
    mono, _, _ = files.read(io.BytesIO(written(codec, 48_000, samples)))
    np.testing.assert_allclose(mono, blocks.mean(0), atol=1e-6)


@pytest.mark.parametrize("codec, channels", [("mp3", 2), ("opus", 2), ("opus", 6), ("opus", 8)])
@pytest.mark.parametrize("rate", [44_100, 96_000])
def test_lossy_codecs_keep_channels_pitch_and_level(codec, channels, rate):
    waves = np.stack([tone(40 + 20 * c, rate, 3) for c in range(channels)])
    blocks, read_rate, damage = blocks_of(io.BytesIO(written(codec, rate, to_int16(waves))))
    assert read_rate == {"mp3": min(rate, 48_000), "opus": 48_000}[codec] and not damage
    assert blocks.shape[1] == pytest.approx(3 * read_rate, abs=2000)
    for c, block in enumerate(blocks):
        assert np.abs(np.fft.rfft(block[:read_rate])).argmax() == 40 + 20 * c
        assert level(block) == pytest.approx(20 * np.log10(0.5), abs=1)


@pytest.mark.parametrize("codec, channels", [("mp3", 3), ("opus", 9), ("flac", 9), ("wav", 9)])
def test_too_many_channels_are_refused(codec, channels):
    with pytest.raises(ValueError, match=f"{codec} cannot store {channels} channels"):
        written(codec, RATE, np.zeros((channels, 10), "<i2"))


class FullDisk(io.BytesIO):
    def __init__(self, capacity):
        super().__init__()
        self.capacity = capacity

    def write(self, data):
        if self.tell() + len(data) > self.capacity:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("codec", files.ENCODERS)
def test_full_disk_is_an_os_error(codec, capfd):
    samples = np.random.default_rng(0).normal(0, 3000, (2, 200_000)).astype("<i2")
    size = len(written(codec, 48_000, samples))
    for capacity in (0, size // 2, size - 1):           # the last one is full at closing time
        with pytest.raises(OSError) as error:
            written(codec, 48_000, samples, FullDisk(capacity))
        assert error.value.errno == errno.ENOSPC
    assert capfd.readouterr() == ("", "")
