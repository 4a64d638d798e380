"""
Any audio file: formats, odd but healthy files, damaged files, resampling.

    python -m pytest -q tests/test_audio.py
"""
import io
import struct

import numpy as np
import pytest
import soundfile as sf
from conftest import RATE, REAL, encode, needs_real, tone, wav_header

import audio
import containers
from audio import Broken, resample, to_int16


def level(wave):
    """Of a tone, in dB of full scale; without the edges."""
    middle = np.asarray(wave, np.float64)[len(wave) // 8:-len(wave) // 8]
    return 20 * np.log10(np.sqrt(2 * np.mean(middle ** 2)) + 1e-12)


def is_whole(path, length, tolerance=0):
    """Whether all of a file is read, and nothing said about it."""
    wave, _, damage = audio.read(path)
    assert not damage, damage
    return abs(len(wave) - length) <= tolerance


# -----------------------------------------------------------------------------
# resampling

@pytest.mark.parametrize("rate", [44100, 48000, 22050, 96000, 44101])
def test_nothing_above_the_new_nyquist_comes_through(rate):
    for hertz in (8001, 8010, 8050, 8100, 8300, 9000, 10500, 15990, 16000, 20000):
        if hertz < rate / 2:
            wave = tone(hertz, rate, 2, 1.0).astype(np.float32)
            assert level(resample(wave, rate, RATE)) < -80, hertz


@pytest.mark.parametrize("rate", [44100, 48000, 22050, 11025, 8000, 44101, 37800, 16000])
def test_tones_below_it_stay_what_they_are(rate):
    for hertz in (50, 440, 3000, 7000):
        if hertz < 0.45 * rate:
            wave = resample(tone(hertz, rate, 1.5).astype(np.float32), rate, RATE)
            expected = tone(hertz, RATE, 1.5)[800:len(wave) - 800]
            assert len(wave) == int(np.ceil(int(rate * 1.5) * RATE / rate))
            np.testing.assert_allclose(wave[800:-800], expected, atol=2e-4)


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
def test_lossless_formats_give_the_mean_of_the_channels(
        tmp_path, extension, subtype, rate, channels):
    wave = tone(440, rate, 2)
    sides = np.stack([wave * (1 + 0.5 * (-1) ** c) for c in range(channels)], 1)    # (N, C)
    sf.write(tmp_path / f"a.{extension}", sides, rate, subtype=subtype)
    got, its_rate, damage = audio.read(tmp_path / f"a.{extension}")
    assert its_rate == rate and not damage
    step = 2 ** -7 if subtype == "PCM_U8" else 2 ** -15
    np.testing.assert_allclose(got, sides.mean(1), atol=step)


@pytest.mark.parametrize("name, codec", [
    ("a.m4a", "aac"), ("a.aac", "aac"), ("a.mp4", "aac"), ("a.opus", "libopus"),
    ("a.webm", "libopus"), ("a.wma", "wmav2"), ("a.m4a", "alac"), ("a.wv", "wavpack"),
    ("a.tta", "tta"), ("a.mka", "flac"), ("a.mp3", "libmp3lame"), ("a.ac3", "ac3"),
    ("a.ogg", "flac")])
def test_what_ffmpeg_encodes_is_read(tmp_path, name, codec):
    wave = tone(440, 48000, 5)
    encode(tmp_path / name, np.stack([wave, wave / 2], 1), 48000, codec)
    got, rate, damage = audio.read(tmp_path / name)
    assert rate == 48000 and not damage
    assert abs(len(got) - len(wave)) <= 2 * 2048
    assert level(got) == pytest.approx(level(0.75 * wave), abs=0.6)


def test_each_stream_of_a_stem_file_is_read(tmp_path):
    encode(tmp_path / "a.stem.mp4", tone(440, 44100, 3), 44100, "aac", streams=5)
    for k in range(5):
        wave, _, damage = audio.read(tmp_path / "a.stem.mp4", k)
        assert level(wave) == pytest.approx(level(tone(440, 44100, 3) / (k + 1)), abs=0.2)
        assert not damage
    with pytest.raises(Broken, match="has 5 audio streams, number 6 is wanted"):
        audio.read(tmp_path / "a.stem.mp4", 5)


def test_a_playlist_opens_no_other_file(tmp_path):
    sf.write(tmp_path / "a.wav", tone(440, RATE, 1), RATE)
    for text in (f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/a.wav\n",
                 f"ffconcat version 1.0\nfile {tmp_path}/a.wav\n"):
        (tmp_path / "list.mp3").write_text(text)
        with pytest.raises(Broken):
            audio.read(tmp_path / "list.mp3")


# -----------------------------------------------------------------------------
# healthy files that look odd: all samples, no word

CHUNK = b"id3 " + struct.pack("<I", 60001) + bytes(60002)     # odd: padded


@pytest.fixture(scope="module")
def wav():
    """A wav file of 3 s: bytes up to the size of its data, and its samples."""
    f = io.BytesIO()
    sf.write(f, tone(440, RATE, 3), RATE, format="WAV", subtype="PCM_16")
    raw = f.getvalue()
    at = raw.index(b"data")
    return raw[:at + 4], raw[at + 8:]


def sizes(head, riff, data):
    """The head of a wav file with other sizes of the file and of its data."""
    return head[:4] + struct.pack("<I", riff) + head[8:] + struct.pack("<I", data)


@pytest.mark.parametrize("riff, data", [
    (0xFFFFFFFF, 0xFFFFFFFF), (0, 0), (0, 96000), (0x7FFFFFFF, 0x7FFFFFDB),
    (0x7FFFF024, 0x7FFFF000), (0x80000024, 0x80000000)])
def test_a_wav_written_to_a_pipe_is_whole(tmp_path, wav, riff, data):
    head, samples = wav
    (tmp_path / "a.wav").write_bytes(sizes(head, riff, data) + samples)
    assert is_whole(tmp_path / "a.wav", 48000)


@pytest.mark.parametrize("counted", [True, False])
def test_chunks_behind_the_samples_of_a_wav_are_no_sound(tmp_path, wav, counted):
    head, samples = wav
    size = len(head) + len(samples) - 4
    more = len(CHUNK) if counted else 0
    (tmp_path / "a.wav").write_bytes(sizes(head, size + more, 96000) + samples + CHUNK)
    assert is_whole(tmp_path / "a.wav", 48000)


def test_chunks_behind_the_samples_of_an_aiff_are_no_sound(tmp_path):
    sf.write(tmp_path / "a.aiff", tone(440, RATE, 3), RATE)
    raw = (tmp_path / "a.aiff").read_bytes()
    size = struct.pack(">I", len(raw) - 8 + 60008)
    chunk = b"ID3 " + struct.pack(">I", 60000) + bytes(60000)
    (tmp_path / "a.aiff").write_bytes(raw[:4] + size + raw[8:] + chunk)
    assert is_whole(tmp_path / "a.aiff", 48000)


@pytest.mark.parametrize("name", [b"RF64", b"BW64"])
def test_a_wav_with_sizes_of_64_bits_is_whole(tmp_path, wav, name):
    head, samples = wav
    long = b"ds64" + struct.pack("<IQQQI", 28, len(samples) + 80, len(samples), 48000, 0)
    raw = name + b"\xff" * 4 + b"WAVE" + long + head[12:] + b"\xff" * 4 + samples
    (tmp_path / "a.wav").write_bytes(raw)
    assert is_whole(tmp_path / "a.wav", 48000)
    (tmp_path / "a.wav").write_bytes(raw[:50000])
    assert "cut off" in audio.read(tmp_path / "a.wav")[2][0]


def test_an_adpcm_wav_with_an_odd_byte_rate_is_whole(tmp_path):
    encode(tmp_path / "a.wav", tone(440, RATE, 3), RATE, "adpcm_ms")
    raw = bytearray((tmp_path / "a.wav").read_bytes())
    length = len(audio.read(tmp_path / "a.wav")[0])
    raw[28:32] = struct.pack("<I", 3)
    (tmp_path / "a.wav").write_bytes(raw)
    assert is_whole(tmp_path / "a.wav", length) and length >= 48000


def test_an_mp3_in_a_wav_is_whole(tmp_path):
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
BEHIND = {
    "ID3v1": ID3V1, "APEv2": apev2(5000, True), "APEv2 without a header": apev2(5000, False),
    "both": apev2(90_000, True) + ID3V1, "words": b"LYRICSBEGIN" + bytes(89) + b"000100LYRICS200",
    "ID3v2": b"ID3\4\0\x10\0\0\x20\0" + bytes(4096) + b"3DI\4\0\x10\0\0\x20\0"}


@pytest.mark.parametrize("tag", BEHIND)
@pytest.mark.parametrize("extension", ["mp3", "flac"])
def test_a_tag_behind_the_sound_changes_nothing(tmp_path, extension, tag):
    sf.write(tmp_path / f"plain.{extension}", tone(440, RATE, 5), RATE)
    raw = (tmp_path / f"plain.{extension}").read_bytes()
    (tmp_path / f"tagged.{extension}").write_bytes(raw + BEHIND[tag])
    plain, tagged = (audio.read(tmp_path / f"{n}.{extension}") for n in ("plain", "tagged"))
    assert np.array_equal(plain[0], tagged[0]) and len(plain[0]) == 5 * RATE
    assert not tagged[2]


@pytest.mark.parametrize("extension", ["mp3", "flac", "wav"])
def test_a_picture_in_front_changes_nothing(tmp_path, extension):
    sf.write(tmp_path / f"plain.{extension}", tone(440, RATE, 5), RATE)
    raw = (tmp_path / f"plain.{extension}").read_bytes()
    picture = (b"Xing" + bytes(508)) * 3200                                     # 1.6 MB
    size = bytes([len(picture) >> shift & 127 for shift in (21, 14, 7, 0)])
    (tmp_path / f"tagged.{extension}").write_bytes(b"ID3\3\0\0" + size + picture + raw)
    if extension == "wav":
        return  # FFmpeg does not look for a wav behind a tag
    assert is_whole(tmp_path / f"tagged.{extension}", 5 * RATE)


def test_a_flac_of_unknown_or_too_short_length_is_whole(tmp_path):
    sf.write(tmp_path / "a.flac", tone(440, 44100, 3), 44100)
    raw = bytearray((tmp_path / "a.flac").read_bytes())
    raw[21] &= 0xF0
    for length in (0, 1000):
        raw[22:26] = length.to_bytes(4, "big")  # the last of 36 bits
        (tmp_path / "a.flac").write_bytes(raw)
        assert is_whole(tmp_path / "a.flac", 3 * 44100)


def vbr_mp3(path):
    """Loud noise, then a quiet tone, at a variable bit rate: a guess from its start is short."""
    rng = np.random.default_rng(0)
    wave = np.concatenate([rng.uniform(-0.9, 0.9, 44100), tone(300, 44100, 20, 0.1)])
    sf.write(path, wave, 44100, format="MP3", bitrate_mode="VARIABLE", compression_level=0)
    return len(wave)


@pytest.mark.parametrize("frames", [100, None])
def test_an_mp3_whose_header_says_too_little_is_whole(tmp_path, frames):
    length = vbr_mp3(tmp_path / "a.mp3")
    raw = (tmp_path / "a.mp3").read_bytes()
    at = raw.index(b"Xing")
    if frames:
        raw = raw[:at + 8] + frames.to_bytes(4, "big") + raw[at + 12:]
    else:
        raw = raw[:at] + bytes(120) + raw[at + 120:]
    (tmp_path / "a.mp3").write_bytes(raw)
    assert is_whole(tmp_path / "a.mp3", length, 3 * 1152)


def test_two_mp3s_joined_with_a_tag_between_are_whole(tmp_path):
    sf.write(tmp_path / "a.mp3", tone(440, 44100, 5), 44100)
    raw = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "two.mp3").write_bytes(raw + ID3V1 + raw)
    assert is_whole(tmp_path / "two.mp3", 10 * 44100, 4 * 1152)


def test_a_clip_cut_out_of_a_longer_mp3_is_whole(tmp_path):
    """Its first frames need bits of frames that are not there, as in MagnaTagATune."""
    encode(tmp_path / "a.mp3", tone(440, RATE, 20), RATE, "libmp3lame", bit_rate=32_000)
    raw = (tmp_path / "a.mp3").read_bytes()
    frame = 144  # 32 kbit/s at 16 kHz: 576 samples
    at = raw.index(b"\xff\xf3", 5000)
    (tmp_path / "cut.mp3").write_bytes(raw[at:at + 200 * frame])
    assert is_whole(tmp_path / "cut.mp3", 200 * 576, 2 * 576)


def test_a_wav_that_was_not_closed_by_its_recorder_is_whole(tmp_path, wav):
    head, samples = wav
    for silence in (b"", bytes(10_000_000)):
        (tmp_path / "a.wav").write_bytes(sizes(head, 36, 0) + silence + samples)
        assert is_whole(tmp_path / "a.wav", 48000 + len(silence) // 2)


# -----------------------------------------------------------------------------
# damaged files: what can be read, and a word

def test_a_wav_without_samples_is_not_read_on_into_its_tags(tmp_path, wav):
    for rest in (b"", CHUNK):
        (tmp_path / "a.wav").write_bytes(sizes(wav[0], 60050, 0) + rest)
        with pytest.raises(Broken, match="holds no sound"):
            audio.read(tmp_path / "a.wav")


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "aiff", "mp3", "au", "w64", "caf"])
def test_of_a_file_that_is_cut_off_the_beginning_is_read(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    sf.write(path, 0.3 * np.random.default_rng(1).standard_normal(10 * 44100), 44100)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    wave, rate, damage = audio.read(path)
    assert 4.4 * rate < len(wave) < 5.6 * rate
    assert damage


@pytest.mark.parametrize("name, codec", [
    ("a.mka", "flac"), ("a.wma", "wmav2"), ("a.wv", "wavpack")])
def test_of_other_containers_too(tmp_path, name, codec):
    encode(tmp_path / name, 0.3 * np.random.default_rng(1).standard_normal(480000), 48000, codec)
    raw = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(raw[:len(raw) // 2])
    wave, _, damage = audio.read(tmp_path / name)
    assert 4 * 48000 < len(wave) < 6 * 48000
    assert damage


def test_an_mp3_whose_header_says_too_much_is_cut_off(tmp_path):
    vbr_mp3(tmp_path / "a.mp3")
    raw = (tmp_path / "a.mp3").read_bytes()
    at = raw.index(b"Xing")
    (tmp_path / "a.mp3").write_bytes(raw[:at + 8] + (10 ** 6).to_bytes(4, "big") + raw[at + 12:])
    assert "its header says" in audio.read(tmp_path / "a.mp3")[2][0]


@pytest.mark.parametrize("mode, level", [("CONSTANT", 0.5), ("VARIABLE", 0.5)])
def test_a_damaged_mp3_is_read_on_behind_the_damage(tmp_path, mode, level):
    rng = np.random.default_rng(0)
    wave = np.concatenate([rng.uniform(-0.3, 0.3, 10 * 44100), tone(3000, 44100, 5)])
    sf.write(tmp_path / "a.mp3", wave, 44100, bitrate_mode=mode, compression_level=level)
    raw = (tmp_path / "a.mp3").read_bytes()
    told = 0
    for at in rng.integers(2000, len(raw) * 6 // 10, 20).tolist():
        for damaged in (raw[:at] + raw[at + 1:], raw[:at] + raw[at + 700:],
                        raw[:at] + rng.bytes(3000) + raw[at:]):
            got, rate, damage = audio.read(io.BytesIO(damaged))
            told += bool(damage)
            assert rate == 44100 and abs(len(got) - len(wave)) <= 10 * 1152
            peak = np.abs(np.fft.rfft(got[-44100:])).argmax()
            assert peak == pytest.approx(3000, abs=2)  # the end of it is the end
    assert told >= 50  # of 60: a lost byte may cost nothing but a click


@pytest.mark.parametrize("first, second", [(1, 2), (2, 1)])
def test_a_file_that_changes_between_mono_and_stereo_is_read_whole(tmp_path, first, second):
    """The mean of the channels is the same in both halves."""
    raw = b""
    for k, channels in enumerate((first, second)):
        sides = np.stack([tone(440, 44100, 5, 0.6), tone(440, 44100, 5, 0.2)], 1)
        wave = sides if channels == 2 else sides.mean(1)
        encode(tmp_path / f"{k}.mp3", wave, 44100, "libmp3lame")
        raw += (tmp_path / f"{k}.mp3").read_bytes()
    wave, rate, _ = audio.read(io.BytesIO(raw))
    assert rate == 44100 and len(wave) > 9.8 * 44100
    halves = level(wave[4410:5 * 44100]), level(wave[-4 * 44100:])
    assert halves[0] == pytest.approx(halves[1], abs=0.5)


def test_of_a_file_that_changes_its_rate_the_longer_part_is_read(tmp_path):
    sf.write(tmp_path / "a.mp3", tone(440, 44100, 10), 44100)
    sf.write(tmp_path / "b.mp3", tone(440, 22050, 5), 22050)
    both = (tmp_path / "a.mp3").read_bytes() + (tmp_path / "b.mp3").read_bytes()
    wave, rate, damage = audio.read(io.BytesIO(both))
    assert rate == 44100 and len(wave) == pytest.approx(441000, abs=4 * 1152)
    assert "another sample rate" in damage[0]


def test_files_that_cannot_be_used_say_why():
    rng = np.random.default_rng(0)
    samples = rng.integers(-9000, 9000, 200_000)
    for raw, reason in ((b"", "is empty"), (b"<html>404</html>" * 100, "not audio"),
                        (rng.bytes(50_000), "not audio|holds no sound"),
                        (wav_header(2_000_000, 1, 200_000, samples), "sample rate"),
                        (wav_header(3, 1, 200_000, samples), "sample rate")):
        with pytest.raises(Broken, match=reason):
            audio.read(io.BytesIO(raw))


def test_a_header_that_claims_hours_is_not_believed():
    samples = np.random.default_rng(0).integers(-9000, 9000, 200_000)
    wave, _, damage = audio.read(io.BytesIO(wav_header(16000, 1, 900_000_000, samples)))
    assert len(wave) == 200_000 and "cut off" in damage[0]


# -----------------------------------------------------------------------------
# real files

@needs_real
def test_real_music_has_no_damage():
    songs = [*(REAL / "mtat" / "audio").glob("*.mp3"), *(REAL / "songs").rglob("*.ogg"),
             *sorted((REAL / "emotify").rglob("*.mp3"))[::16], *(REAL / "stems").rglob("*.mp3")]
    assert len(songs) > 30
    said = {song.name: audio.read(song)[2] for song in songs}
    assert {name: damage for name, damage in said.items() if damage} == {}


@needs_real
def test_every_odd_and_broken_file_is_read_or_reported():
    files = [p for p in (REAL / "bad_audio").rglob("*") if p.is_file() and p.name != "LICENSE"]
    assert len(files) > 30
    read = 0
    for path in files:
        try:
            wave, *_ = audio.read(path)
            read += len(wave) > 0
        except Broken as e:
            assert str(e)
    assert read >= 12


# -----------------------------------------------------------------------------
# block by block, with all channels

def blocks_of(file):
    """(samples (C, N), rate, damage) of Blocks."""
    with audio.Blocks(file) as song:
        return np.concatenate(list(song), 1), song.rate, song.damage


def written(kind, rate, samples):
    f = io.BytesIO()
    with audio.writer(f, kind, rate, len(samples)) as write:
        for at in range(0, samples.shape[1], 5000):
            write(samples[:, at:at + 5000])
    return f.getvalue()


@pytest.mark.parametrize("channels", range(1, 9))
@pytest.mark.parametrize("kind", ["wav", "flac", "opus"])
def test_what_is_written_is_read_with_all_its_channels(kind, channels):
    samples = np.random.default_rng(0).normal(0, 3000, (channels, 30_077)).astype("<i2")
    found, rate, damage = blocks_of(io.BytesIO(written(kind, 48_000, samples)))
    assert rate == 48_000 and not damage and len(found) == channels
    if kind != "opus":
        assert np.array_equal(found * 32768, samples)
    mean, _, _ = audio.read(io.BytesIO(written(kind, 48_000, samples)))
    np.testing.assert_allclose(mean, found.mean(0), atol=1e-6)


def test_a_change_between_mono_and_stereo_loses_nothing():
    rng = np.random.default_rng(0)
    parts = {n: written("mp3", 44_100, rng.normal(0, 3000, (n, 44_100 * 2)).astype("<i2"))
             for n in (1, 2)}
    for order in ((1, 2), (2, 1)):
        raw = b"".join(parts[n] for n in order)
        whole, _, _ = audio.read(io.BytesIO(raw))
        found, rate, damage = blocks_of(io.BytesIO(raw))
        assert len(found) == order[0] and abs(found.shape[1] - len(whole)) < 2000
        assert found.shape[1] > 3.9 * rate and "converted" in damage[-1]


def test_large_files_are_read_from_the_disk(tmp_path, monkeypatch):
    samples = np.random.default_rng(0).normal(0, 3000, (1, 50_000)).astype("<i2")
    raw = written("mp3", 16_000, samples)
    tagged = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + raw + b"TAG" + bytes(125)
    (tmp_path / "a.mp3").write_bytes(tagged)
    want, rate, damage = audio.read(tmp_path / "a.mp3")
    monkeypatch.setattr(containers, "LARGE", 100)
    found, its_rate, its_damage = audio.read(tmp_path / "a.mp3")
    assert np.array_equal(found, want) and (rate, damage) == (its_rate, its_damage) == (16_000, [])
