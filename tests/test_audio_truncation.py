"""
Odd, truncated and damaged audio files.

    python -m pytest -q tests/test_audio_truncation.py
"""
import io
import struct

import numpy as np
import pytest
import soundfile as sf
from conftest import RATE, REAL, encode, needs_real, tone, wav_header
from test_audio_files import blocks_of, level, written

from audio import truncation
from audio.files import Broken, read


def is_whole(path, length, tolerance=0):
    """Whether all of a file is read and no damage is reported."""
    wave, _, damage = read(path)
    assert not damage, damage
    return abs(len(wave) - length) <= tolerance


# -----------------------------------------------------------------------------
# intact files that look odd: all samples, no damage

CHUNK = b"id3 " + struct.pack("<I", 60001) + bytes(60002)     # odd size: padded


@pytest.fixture(scope="module")
def wav():
    """(header without the size of the data, data) of a wav file of 3 s."""
    f = io.BytesIO()
    sf.write(f, tone(440, RATE, 3), RATE, format="WAV", subtype="PCM_16")
    raw = f.getvalue()
    at = raw.index(b"data")
    return raw[:at + 4], raw[at + 8:]


def sizes(head, riff, data):
    """The header of a wav file with these sizes of the file and of its data."""
    return head[:4] + struct.pack("<I", riff) + head[8:] + struct.pack("<I", data)


@pytest.mark.parametrize("riff, data", [
    (0xFFFFFFFF, 0xFFFFFFFF), (0, 0), (0, 96000), (0x7FFFFFFF, 0x7FFFFFDB),
    (0x7FFFF024, 0x7FFFF000), (0x80000024, 0x80000000)])
def test_wav_written_to_a_pipe(tmp_path, wav, riff, data):
    head, samples = wav
    (tmp_path / "a.wav").write_bytes(sizes(head, riff, data) + samples)
    assert is_whole(tmp_path / "a.wav", 48000)


@pytest.mark.parametrize("counted", [True, False])
def test_trailing_wav_chunks_are_skipped(tmp_path, wav, counted):
    head, samples = wav
    size = len(head) + len(samples) - 4
    more = len(CHUNK) if counted else 0
    (tmp_path / "a.wav").write_bytes(sizes(head, size + more, 96000) + samples + CHUNK)
    assert is_whole(tmp_path / "a.wav", 48000)


def test_trailing_aiff_chunks_are_skipped(tmp_path):
    sf.write(tmp_path / "a.aiff", tone(440, RATE, 3), RATE)
    raw = (tmp_path / "a.aiff").read_bytes()
    size = struct.pack(">I", len(raw) - 8 + 60008)
    chunk = b"ID3 " + struct.pack(">I", 60000) + bytes(60000)
    (tmp_path / "a.aiff").write_bytes(raw[:4] + size + raw[8:] + chunk)
    assert is_whole(tmp_path / "a.aiff", 48000)


@pytest.mark.parametrize("name", [b"RF64", b"BW64"])
def test_wav_with_64_bit_sizes(tmp_path, wav, name):
    head, samples = wav
    long = b"ds64" + struct.pack("<IQQQI", 28, len(samples) + 80, len(samples), 48000, 0)
    raw = name + b"\xff" * 4 + b"WAVE" + long + head[12:] + b"\xff" * 4 + samples
    (tmp_path / "a.wav").write_bytes(raw)
    assert is_whole(tmp_path / "a.wav", 48000)
    (tmp_path / "a.wav").write_bytes(raw[:50000])
    assert "truncated" in read(tmp_path / "a.wav")[2][0]


def test_adpcm_wav_with_a_wrong_byte_rate(tmp_path):
    encode(tmp_path / "a.wav", tone(440, RATE, 3), RATE, "adpcm_ms")
    raw = bytearray((tmp_path / "a.wav").read_bytes())
    length = len(read(tmp_path / "a.wav")[0])
    raw[28:32] = struct.pack("<I", 3)
    (tmp_path / "a.wav").write_bytes(raw)
    assert is_whole(tmp_path / "a.wav", length) and length >= 48000


def test_mp3_in_wav(tmp_path):
    encode(tmp_path / "a.mp3", tone(440, 44100, 3), 44100, "libmp3lame")
    mp3 = (tmp_path / "a.mp3").read_bytes()
    mp3 = mp3[mp3.index(b"\xff\xfb"):]
    form = struct.pack("<HHIIHHHHIHHH", 0x55, 1, 44100, 16000, 1, 0, 12, 1, 2, 1152, 1, 1393)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data"
    body += struct.pack("<I", len(mp3)) + mp3 + bytes(len(mp3) % 2) + CHUNK
    (tmp_path / "a.wav").write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert is_whole(tmp_path / "a.wav", 3 * 44100, 3 * 1152)


def apev2(size, with_header):
    items = bytes(size)
    foot = struct.pack("<III", 2000, size + 32, 1)
    head = b"APETAGEX" + foot + struct.pack("<I", 0xA0000000) + bytes(8) if with_header else b""
    return head + items + b"APETAGEX" + foot + struct.pack("<I", len(head) << 26) + bytes(8)


ID3V1 = b"TAG" + bytes(125)
TRAILING = {
    "ID3v1": ID3V1, "APEv2": apev2(5000, True), "APEv2 without header": apev2(5000, False),
    "both": apev2(90_000, True) + ID3V1, "Lyrics3": b"LYRICSBEGIN" + bytes(89) + b"000100LYRICS200",
    "ID3v2": b"ID3\4\0\x10\0\0\x20\0" + bytes(4096) + b"3DI\4\0\x10\0\0\x20\0"}


@pytest.mark.parametrize("tag", TRAILING)
@pytest.mark.parametrize("extension", ["mp3", "flac"])
def test_trailing_tags_are_skipped(tmp_path, extension, tag):
    sf.write(tmp_path / f"plain.{extension}", tone(440, RATE, 5), RATE)
    raw = (tmp_path / f"plain.{extension}").read_bytes()
    (tmp_path / f"tagged.{extension}").write_bytes(raw + TRAILING[tag])
    plain, tagged = (read(tmp_path / f"{n}.{extension}") for n in ("plain", "tagged"))
    assert np.array_equal(plain[0], tagged[0]) and len(plain[0]) == 5 * RATE
    assert not tagged[2]


@pytest.mark.parametrize("extension", ["mp3", "flac", "wav"])
def test_leading_picture_is_skipped(tmp_path, extension):
    sf.write(tmp_path / f"plain.{extension}", tone(440, RATE, 5), RATE)
    raw = (tmp_path / f"plain.{extension}").read_bytes()
    picture = (b"Xing" + bytes(508)) * 3200                                     # 1.6 MB
    size = bytes([len(picture) >> shift & 127 for shift in (21, 14, 7, 0)])
    (tmp_path / f"tagged.{extension}").write_bytes(b"ID3\3\0\0" + size + picture + raw)
    if extension == "wav":
        return  # FFmpeg does not search for a wav file after a tag
    assert is_whole(tmp_path / f"tagged.{extension}", 5 * RATE)


def test_flac_with_unknown_or_too_short_length(tmp_path):
    sf.write(tmp_path / "a.flac", tone(440, 44100, 3), 44100)
    raw = bytearray((tmp_path / "a.flac").read_bytes())
    raw[21] &= 0xF0
    for length in (0, 1000):
        raw[22:26] = length.to_bytes(4, "big")  # the last of 36 bits
        (tmp_path / "a.flac").write_bytes(raw)
        assert is_whole(tmp_path / "a.flac", 3 * 44100)


def vbr_mp3(path):
    """Loud noise, then a quiet sine: its start suggests a much shorter file."""
    rng = np.random.default_rng(0)
    wave = np.concatenate([rng.uniform(-0.9, 0.9, 44100), tone(300, 44100, 20, 0.1)])
    sf.write(path, wave, 44100, format="MP3", bitrate_mode="VARIABLE", compression_level=0)
    return len(wave)


@pytest.mark.parametrize("frames", [100, None])
def test_mp3_header_with_too_few_frames(tmp_path, frames):
    length = vbr_mp3(tmp_path / "a.mp3")
    raw = (tmp_path / "a.mp3").read_bytes()
    at = raw.index(b"Xing")
    if frames:
        raw = raw[:at + 8] + frames.to_bytes(4, "big") + raw[at + 12:]
    else:
        raw = raw[:at] + bytes(120) + raw[at + 120:]
    (tmp_path / "a.mp3").write_bytes(raw)
    assert is_whole(tmp_path / "a.mp3", length, 3 * 1152)


def test_concatenated_mp3s_with_a_tag_in_between(tmp_path):
    sf.write(tmp_path / "a.mp3", tone(440, 44100, 5), 44100)
    raw = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "two.mp3").write_bytes(raw + ID3V1 + raw)
    assert is_whole(tmp_path / "two.mp3", 10 * 44100, 4 * 1152)


def test_clip_cut_from_a_longer_mp3(tmp_path):
    """Its first frames refer to bits of frames that are missing, as in MagnaTagATune."""
    encode(tmp_path / "a.mp3", tone(440, RATE, 20), RATE, "libmp3lame", bit_rate=32_000)
    raw = (tmp_path / "a.mp3").read_bytes()
    frame = 144  # 32 kbit/s at 16 kHz: 576 samples
    at = raw.index(b"\xff\xf3", 5000)
    (tmp_path / "cut.mp3").write_bytes(raw[at:at + 200 * frame])
    assert is_whole(tmp_path / "cut.mp3", 200 * 576, 2 * 576)


def test_wav_not_closed_by_its_recorder(tmp_path, wav):
    head, samples = wav
    for silence in (b"", bytes(10_000_000)):
        (tmp_path / "a.wav").write_bytes(sizes(head, 36, 0) + silence + samples)
        assert is_whole(tmp_path / "a.wav", 48000 + len(silence) // 2)


def test_large_files_are_memory_mapped(tmp_path, monkeypatch):
    samples = np.random.default_rng(0).normal(0, 3000, (1, 50_000)).astype("<i2")
    raw = written("mp3", 16_000, samples)
    tagged = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + raw + b"TAG" + bytes(125)
    (tmp_path / "a.mp3").write_bytes(tagged)
    whole, rate, damage = read(tmp_path / "a.mp3")
    monkeypatch.setattr(truncation, "LARGE", 100)
    mapped, mapped_rate, mapped_damage = read(tmp_path / "a.mp3")
    assert np.array_equal(mapped, whole)
    assert (rate, damage) == (mapped_rate, mapped_damage) == (16_000, [])


# -----------------------------------------------------------------------------
# damaged files: read as far as possible, and reported

def test_empty_wav_is_refused(tmp_path, wav):
    for rest in (b"", CHUNK):
        (tmp_path / "a.wav").write_bytes(sizes(wav[0], 60050, 0) + rest)
        with pytest.raises(Broken, match="contains no audio"):
            read(tmp_path / "a.wav")


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "aiff", "mp3", "au", "w64", "caf"])
def test_truncated_file_is_read_and_reported(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    sf.write(path, 0.3 * np.random.default_rng(1).standard_normal(10 * 44100), 44100)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    wave, rate, damage = read(path)
    assert 4.4 * rate < len(wave) < 5.6 * rate
    assert damage


@pytest.mark.parametrize("name, codec", [
    ("a.mka", "flac"), ("a.wma", "wmav2"), ("a.wv", "wavpack")])
def test_truncated_container_is_read_and_reported(tmp_path, name, codec):
    encode(tmp_path / name, 0.3 * np.random.default_rng(1).standard_normal(480000), 48000, codec)
    raw = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(raw[:len(raw) // 2])
    wave, _, damage = read(tmp_path / name)
    assert 4 * 48000 < len(wave) < 6 * 48000
    assert damage


def test_mp3_header_with_too_many_frames_is_truncated(tmp_path):
    vbr_mp3(tmp_path / "a.mp3")
    raw = (tmp_path / "a.mp3").read_bytes()
    at = raw.index(b"Xing")
    (tmp_path / "a.mp3").write_bytes(raw[:at + 8] + (10 ** 6).to_bytes(4, "big") + raw[at + 12:])
    assert "header declares" in read(tmp_path / "a.mp3")[2][0]


@pytest.mark.parametrize("mode, level", [("CONSTANT", 0.5), ("VARIABLE", 0.5)])
def test_mp3_is_read_past_damage(tmp_path, mode, level):
    rng = np.random.default_rng(0)
    wave = np.concatenate([rng.uniform(-0.3, 0.3, 10 * 44100), tone(3000, 44100, 5)])
    sf.write(tmp_path / "a.mp3", wave, 44100, bitrate_mode=mode, compression_level=level)
    raw = (tmp_path / "a.mp3").read_bytes()
    reported = 0
    for at in rng.integers(2000, len(raw) * 6 // 10, 20).tolist():
        for damaged in (raw[:at] + raw[at + 1:], raw[:at] + raw[at + 700:],
                        raw[:at] + rng.bytes(3000) + raw[at:]):
            got, rate, damage = read(io.BytesIO(damaged))
            reported += bool(damage)
            assert rate == 44100 and abs(len(got) - len(wave)) <= 10 * 1152
            peak = np.abs(np.fft.rfft(got[-44100:])).argmax()
            assert peak == pytest.approx(3000, abs=2)  # the end is aligned
    assert reported >= 50  # of 60: a lost byte may cause no more than a click


@pytest.mark.parametrize("first, second", [(1, 2), (2, 1)])
def test_mp3_that_changes_its_channels_is_read_whole(tmp_path, first, second):
    """Both halves have the same mean of the channels."""
    raw = b""
    for k, channels in enumerate((first, second)):
        sides = np.stack([tone(440, 44100, 5, 0.6), tone(440, 44100, 5, 0.2)], 1)
        wave = sides if channels == 2 else sides.mean(1)
        encode(tmp_path / f"{k}.mp3", wave, 44100, "libmp3lame")
        raw += (tmp_path / f"{k}.mp3").read_bytes()
    wave, rate, _ = read(io.BytesIO(raw))
    assert rate == 44100 and len(wave) > 9.8 * 44100
    halves = level(wave[4410:5 * 44100]), level(wave[-4 * 44100:])
    assert halves[0] == pytest.approx(halves[1], abs=0.5)


def test_blocks_convert_frames_with_other_channels():
    rng = np.random.default_rng(0)
    parts = {n: written("mp3", 44_100, rng.normal(0, 3000, (n, 44_100 * 2)).astype("<i2"))
             for n in (1, 2)}
    for order in ((1, 2), (2, 1)):
        raw = b"".join(parts[n] for n in order)
        whole, _, _ = read(io.BytesIO(raw))
        blocks, rate, damage = blocks_of(io.BytesIO(raw))
        assert len(blocks) == order[0] and abs(blocks.shape[1] - len(whole)) < 2000
        assert blocks.shape[1] > 3.9 * rate and "converted" in damage[-1]


def test_longest_part_at_one_sample_rate_is_read(tmp_path):
    sf.write(tmp_path / "a.mp3", tone(440, 44100, 10), 44100)
    sf.write(tmp_path / "b.mp3", tone(440, 22050, 5), 22050)
    both = (tmp_path / "a.mp3").read_bytes() + (tmp_path / "b.mp3").read_bytes()
    wave, rate, damage = read(io.BytesIO(both))
    assert rate == 44100 and len(wave) == pytest.approx(441000, abs=4 * 1152)
    assert "another sample rate" in damage[0]


def test_broken_files_name_the_reason():
    rng = np.random.default_rng(0)
    samples = rng.integers(-9000, 9000, 200_000)
    for raw, reason in ((b"", "is empty"), (b"<html>404</html>" * 100, "not audio"),
                        (rng.bytes(50_000), "not audio|contains no audio"),
                        (wav_header(2_000_000, 1, 200_000, samples), "sample rate"),
                        (wav_header(3, 1, 200_000, samples), "sample rate")):
        with pytest.raises(Broken, match=reason):
            read(io.BytesIO(raw))


def test_header_that_claims_hours():
    samples = np.random.default_rng(0).integers(-9000, 9000, 200_000)
    wave, _, damage = read(io.BytesIO(wav_header(16000, 1, 900_000_000, samples)))
    assert len(wave) == 200_000 and "truncated" in damage[0]


# -----------------------------------------------------------------------------
# real files

@needs_real
def test_real_music_has_no_damage():
    songs = [*(REAL / "mtat" / "audio").glob("*.mp3"), *(REAL / "stems").rglob("*.mp3"),
             *sorted((REAL / "emotify").rglob("*.mp3"))[::16]]
    assert len(songs) > 20
    reports = {song.name: read(song)[2] for song in songs}
    assert {name: damage for name, damage in reports.items() if damage} == {}


@needs_real
def test_every_odd_and_broken_file_is_read_or_reported():
    files = [p for p in (REAL / "bad_audio").rglob("*") if p.is_file() and p.name != "LICENSE"]
    assert len(files) > 30
    decoded = 0
    for path in files:
        try:
            wave, *_ = read(path)
            decoded += len(wave) > 0
        except Broken as e:
            assert str(e)
    assert decoded >= 12
