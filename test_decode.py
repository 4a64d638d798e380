"""
Tests of decoding, resampling and the processes that do it: on files made here, and on real and broken ones beside the project if there are any.

    python -m pytest -q test_decode.py
"""
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

import decode
from decode import Broken, resample, to_int16
from workers import Workers

REAL = Path(__file__).resolve().parent.parent / "shared" / "realdata"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not there")
needs_ffmpeg = pytest.mark.skipif(not (shutil.which("ffmpeg") and shutil.which("ffprobe")), reason="ffmpeg is not installed")
RATE = 16000


def tone(hertz, rate, seconds, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


def clip(file, least=0.0):
    return {"name": str(file), "tracks": [{"file": str(file)}], "least": least}


def level(wave):
    """Of a tone, in dB of full scale; without the edges."""
    middle = np.asarray(wave, np.float64)[len(wave) // 8:-len(wave) // 8]
    return 20 * np.log10(np.sqrt(2 * np.mean(middle ** 2)) + 1e-12)


# -----------------------------------------------------------------------------
# resampling

@pytest.mark.parametrize("rate", [44100, 48000, 22050, 96000, 44101])
def test_nothing_above_the_new_nyquist_comes_through(rate):
    for hertz in (8001, 8010, 8050, 8100, 8300, 9000, 10500, 15990, 16000, 20000):
        if hertz < rate / 2:
            assert level(resample(tone(hertz, rate, 2, 1.0).astype(np.float32), rate, RATE)) < -80, hertz


@pytest.mark.parametrize("rate", [44100, 48000, 22050, 11025, 8000, 44101, 37800, 16000])
def test_tones_below_it_stay_what_they_are(rate):
    for hertz in (50, 440, 3000, 7000):
        if hertz < 0.45 * rate:
            wave = resample(tone(hertz, rate, 1.5).astype(np.float32), rate, RATE)
            assert len(wave) == int(np.ceil(int(rate * 1.5) * RATE / rate))
            np.testing.assert_allclose(wave[800:-800], tone(hertz, RATE, 1.5)[800:len(wave) - 800], atol=2e-4)


def test_to_int16_rounds_and_clips():
    assert to_int16(np.array([-1.5, -1, -0.5 / 32768, 0, 0.6 / 32768, 0.99999, 1, 2], np.float32)).tolist() == [-32768, -32768, 0, 0, 1, 32767, 32767, 32767]


# -----------------------------------------------------------------------------
# files

@pytest.mark.parametrize("extension, options, tolerance", [
    ("wav", {"subtype": "PCM_16"}, 2e-4), ("wav", {"subtype": "PCM_24"}, 2e-4), ("wav", {"subtype": "FLOAT"}, 2e-4), ("flac", {}, 2e-4),
    ("aiff", {}, 2e-4), ("au", {}, 2e-4), ("ogg", {}, 2e-2), ("mp3", {}, 2e-2)])
@pytest.mark.parametrize("rate, channels", [(44100, 2), (16000, 1), (22050, 1), (48000, 4), (8000, 2)])
def test_every_format_rate_and_number_of_channels(tmp_path, extension, options, tolerance, rate, channels):
    if extension == "mp3" and channels > 2:
        return  # the format has no more
    wave = tone(440, rate, 2)
    sides = np.stack([wave * (1 + 0.5 * (-1) ** c) for c in range(channels)], 1) if channels > 1 else wave
    sf.write(tmp_path / f"a.{extension}", sides, rate, **options)
    info, audio = decode.decode(clip(tmp_path / f"a.{extension}"), RATE)
    assert audio.dtype == np.dtype("<i2") and audio.shape == (1, info["length"]) and abs(info["length"] - 2 * RATE) <= 1152 * RATE / rate * 2
    expected = tone(440, RATE, 2)
    got = audio[0] / 32768
    assert level(got) == pytest.approx(level(expected), abs=0.1)  # the mean of the channels
    if extension != "mp3":  # whose decoder may begin a few hundred samples late
        np.testing.assert_allclose(got[1000:30000], expected[1000:30000], atol=tolerance)


def vbr_mp3(path):
    """Loud noise, then a quiet tone, at a variable bit rate: whoever extrapolates from the beginning ends early."""
    rng = np.random.default_rng(0)
    wave = np.concatenate([rng.uniform(-0.9, 0.9, 44100), tone(300, 44100, 20, 0.1)])
    sf.write(path, wave, 44100, format="MP3", bitrate_mode="VARIABLE", compression_level=0)
    return len(wave)


def with_picture(raw, size=100 << 14):
    return b"ID3\3\0\0" + bytes([0, size >> 14, 0, 0]) + (b"Xing" + bytes(1020)) * (size >> 10) + raw


def test_the_header_of_an_mp3_is_not_believed(tmp_path):
    length = vbr_mp3(tmp_path / "a.mp3")
    raw = (tmp_path / "a.mp3").read_bytes()
    at = raw.find(b"Xing")
    assert 0 < at < 200
    short = raw[:at + 8] + (100).to_bytes(4, "big") + raw[at + 12:]   # says 100 frames
    none = raw[:at] + bytes(120) + raw[at + 120:]                    # says nothing
    (tmp_path / "short.mp3").write_bytes(short)
    (tmp_path / "none.mp3").write_bytes(none)
    assert len(sf.read(tmp_path / "short.mp3")[0]) < 0.3 * length    # what libsndfile makes of it
    for name in ("a", "short", "none"):
        wave, rate, notes = decode.read_audio({"file": str(tmp_path / f"{name}.mp3")})
        assert abs(len(wave) - length) <= 3 * 1152 and rate == 44100 and not notes, name
    long = raw[:at + 8] + (10 ** 6).to_bytes(4, "big") + raw[at + 12:]
    (tmp_path / "long.mp3").write_bytes(long)
    wave, _, notes = decode.read_audio({"file": str(tmp_path / "long.mp3")})
    assert abs(len(wave) - length) <= 3 * 1152 and "header says" in notes[0]
    for name, music in (("none", none), ("short", short)):                          # behind a picture of 1.6 MB, which is not music
        (tmp_path / "picture.mp3").write_bytes(with_picture(music))
        wave, _, notes = decode.read_audio({"file": str(tmp_path / "picture.mp3")})
        assert abs(len(wave) - length) <= 3 * 1152 and not notes, name
    sf.write(tmp_path / "other.mp3", tone(300, 22050, 5), 22050)
    (tmp_path / "both.mp3").write_bytes(none + (tmp_path / "other.mp3").read_bytes())
    wave, _, notes = decode.read_audio({"file": str(tmp_path / "both.mp3")})        # the rate changes: the end is not read, and said to be missing
    assert abs(len(wave) - length) <= 3 * 1152 and "decoding stopped" in notes[0]


@pytest.mark.parametrize("bit_rate", ["CONSTANT", "VARIABLE"])
def test_a_damaged_mp3_is_read_on_behind_the_damage(tmp_path, bit_rate):
    wave = np.concatenate([np.random.default_rng(0).uniform(-0.3, 0.3, 10 * 44100), tone(3000, 44100, 5)])
    sf.write(tmp_path / "whole.mp3", wave, 44100, bitrate_mode=bit_rate)
    raw, rng = (tmp_path / "whole.mp3").read_bytes(), np.random.default_rng(1)
    lost_by_libsndfile = 0
    for at in rng.integers(2000, len(raw) * 6 // 10, 20).tolist():
        for damaged in (raw[:at] + raw[at + 1:], raw[:at] + rng.bytes(3000) + raw[at:], raw[:at] + raw[at + 700:]):
            (tmp_path / "damaged.mp3").write_bytes(damaged)
            lost_by_libsndfile += len(decode.decode_blocks(io.BytesIO(damaged))[0]) < 14 * 44100
            got, rate, _ = decode.read_audio({"file": str(tmp_path / "damaged.mp3")})
            assert rate == 44100 and abs(len(got) - len(wave)) <= 5 * 1152
            assert np.abs(np.fft.rfft(got[-44100:])).argmax() == pytest.approx(3000, abs=2)   # the end of it is the end
    assert lost_by_libsndfile > 10
    front = (b"\0", rng.bytes(5000), raw[1000:2200])                  # not at the beginning of a frame: libsndfile takes it for no mp3
    for junk in front:
        (tmp_path / "damaged.mp3").write_bytes(junk + raw)
        assert abs(len(decode.read_audio({"file": str(tmp_path / "damaged.mp3")})[0]) - len(wave)) <= 15 * 1152
    (tmp_path / "damaged.wav").write_bytes(b"\0" + raw)
    with pytest.raises(Broken):
        decode.read_audio({"file": str(tmp_path / "damaged.wav")})


def test_a_tag_at_the_end_does_not_bring_back_the_padding_of_an_mp3(tmp_path):
    wave = tone(440, 16000, 5)
    sf.write(tmp_path / "plain.mp3", wave, 16000)
    raw = (tmp_path / "plain.mp3").read_bytes()
    (tmp_path / "tagged.mp3").write_bytes(raw + b"TAG" + bytes(125))
    plain, tagged = (decode.read_audio({"file": str(tmp_path / name)}) for name in ("plain.mp3", "tagged.mp3"))
    assert len(plain[0]) == len(wave) and np.array_equal(plain[0], tagged[0]) and not tagged[2]
    rng = np.random.default_rng(0)
    for tail, damaged in ((b"APETAGEX" + rng.bytes(90_000), False), (b"LYRICSBEGIN" + bytes(20_000) + b"LYRICS200TAG" + bytes(125), False),
                          (bytes(90_000), True), (rng.bytes(90_000), True)):              # a picture, words; a download that was not finished
        (tmp_path / "tagged.mp3").write_bytes(raw + tail)
        got, _, notes = decode.read_audio({"file": str(tmp_path / "tagged.mp3")})
        assert np.array_equal(plain[0], got) and bool(notes) == damaged


def test_a_wav_without_samples_is_not_read_on_into_its_tags(tmp_path):
    sf.write(tmp_path / "a.wav", tone(440, 16000, 1), 16000)
    raw = (tmp_path / "a.wav").read_bytes()
    at = raw.index(b"data")
    unclosed = raw[:at + 4] + bytes(4) + raw[at + 8:]                     # a recorder that was not closed: the samples follow
    (tmp_path / "unclosed.wav").write_bytes(unclosed)
    assert len(decode.read_audio({"file": str(tmp_path / "unclosed.wav")})[0]) == 16000
    (tmp_path / "silence.wav").write_bytes(raw[:at + 4] + bytes(4) + bytes(100_000_000) + raw[at + 8:])
    began = time.monotonic()
    assert len(decode.read_audio({"file": str(tmp_path / "silence.wav")})[0]) == 50_000_000 + 16000
    assert time.monotonic() - began < 5
    (tmp_path / "tags.wav").write_bytes(raw[:at + 4] + bytes(4) + b"id3 " + (60000).to_bytes(4, "little") + np.random.default_rng(0).bytes(60000))
    assert len(decode.read_audio({"file": str(tmp_path / "tags.wav")})[0]) == 0


def test_a_flac_of_unknown_length(tmp_path):
    sf.write(tmp_path / "a.flac", tone(440, 44100, 3), 44100)
    raw = bytearray((tmp_path / "a.flac").read_bytes())
    raw[21] &= 0xF0
    raw[22:26] = bytes(4)  # the number of samples: 36 bits from here
    (tmp_path / "a.flac").write_bytes(raw)
    assert len(decode.read_audio({"file": str(tmp_path / "a.flac")})[0]) == 3 * 44100


def test_headers_that_say_too_little(tmp_path):
    wave = 0.3 * np.random.default_rng(0).standard_normal(5 * 44100)
    for name, at, value in (("a.wav", 40, bytes(4)), ("a.au", 8, (1000).to_bytes(4, "big")), ("a.flac", 21, b"\xf0" + (1000).to_bytes(4, "big"))):
        sf.write(tmp_path / name, wave, 44100)
        raw = bytearray((tmp_path / name).read_bytes())
        raw[at:at + len(value)] = bytes([raw[at] & 0xF0]) + value[1:] if name == "a.flac" else value
        (tmp_path / name).write_bytes(raw)
        assert len(sf.read(tmp_path / name)[0]) <= 1000
        assert len(decode.read_audio({"file": str(tmp_path / name)})[0]) == 5 * 44100, name


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "aiff", "mp3"])
def test_of_a_truncated_file_the_beginning_is_read(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    rng = np.random.default_rng(1)
    sf.write(path, 0.3 * rng.standard_normal(10 * 44100), 44100)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    wave, rate, notes = decode.read_audio({"file": str(path)})
    assert 4.5 * rate < len(wave) < 5.6 * rate
    assert notes


def write_wav_header(path, rate, channels, frames, samples):
    """A 16-bit wav file whose header may say anything."""
    import struct
    size = frames * channels * 2
    path.write_bytes(b"RIFF" + struct.pack("<I", (36 + size) % 2 ** 32) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, channels, rate,
                     rate * channels * 2 % 2 ** 32, channels * 2, 16) + b"data" + struct.pack("<I", size % 2 ** 32) + samples.astype("<i2").tobytes())


def test_files_that_cannot_be_used_say_why(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(-9000, 9000, 200_000)

    def reason(name, least=3.862):
        with pytest.raises(Broken) as e:
            decode.decode(clip(tmp_path / name, least), RATE)
        return str(e.value)
    (tmp_path / "empty.mp3").write_bytes(b"")
    assert "0 bytes" in reason("empty.mp3")
    (tmp_path / "text.wav").write_text("<html>404</html>" * 100)
    assert "not audio" in reason("text.wav")
    (tmp_path / "junk.mp3").write_bytes(rng.bytes(50_000))
    assert "not audio" in reason("junk.mp3") or "too short" in reason("junk.mp3")
    sf.write(tmp_path / "nan.wav", np.full(RATE * 5, np.nan, np.float32), RATE, subtype="FLOAT")
    assert "not numbers" in reason("nan.wav")
    sf.write(tmp_path / "silent.flac", np.zeros(RATE * 5), RATE)
    assert "silent" in reason("silent.flac")
    assert decode.decode({**clip(tmp_path / "silent.flac"), "published": True}, RATE)[0]["notes"] == ["is silent"]
    sf.write(tmp_path / "short.wav", tone(440, 44100, 2), 44100)
    assert "too short: 2.000 s" in reason("short.wav")
    sf.write(tmp_path / "nothing.wav", np.zeros(0), 44100)
    assert "too short" in reason("nothing.wav", 0)
    write_wav_header(tmp_path / "fast.wav", 2_000_000, 1, 200_000, noise)
    assert "sample rate" in reason("fast.wav")
    write_wav_header(tmp_path / "slow.wav", 3, 1, 200_000, noise)
    assert "sample rate" in reason("slow.wav")
    sf.write(tmp_path / "hot.wav", tone(440, RATE, 5, 3.0).astype(np.float32), RATE, subtype="FLOAT")
    assert "beyond full scale" in decode.decode(clip(tmp_path / "hot.wav"), RATE)[0]["notes"][0]
    sf.write(tmp_path / "loud.wav", noise.astype(np.float32), RATE, subtype="FLOAT")   # scaled as if it were int16
    assert "times full scale" in reason("loud.wav")
    write_wav_header(tmp_path / "lies.wav", 16000, 1, 2_000_000_000, noise)   # claims 35 hours, holds 12.5 s: read
    info, _ = decode.decode(clip(tmp_path / "lies.wav"), RATE)
    assert info["length"] == 200_000 and "header" in info["notes"][0]


def test_a_zip_in_parts_is_read_like_its_files(tmp_path):
    sf.write(tmp_path / "a.wav", tone(440, RATE, 5), RATE)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile(tmp_path / "all.zip", "w", method) as z:
            z.write(tmp_path / "a.wav", "f/a.wav")
        raw = (tmp_path / "all.zip").read_bytes()
        parts = [str(tmp_path / f"{method}.zip.00{k + 1}") for k in range(3)]
        for k, part in enumerate(parts):
            Path(part).write_bytes(raw[k * len(raw) // 3:(k + 1) * len(raw) // 3])
        source = {"zip": parts, "file": "f/a.wav"}
        whole = decode.read_audio({"file": str(tmp_path / "a.wav")})[0]
        assert np.array_equal(decode.read_audio(source)[0], whole)
    tagged = with_picture((tmp_path / "a.wav").read_bytes(), 1 << 14)  # out of memory libsndfile would read this far, less the tag's length
    with zipfile.ZipFile(tmp_path / "tagged.zip", "w") as z:
        z.writestr("a.wav", tagged)
    assert np.array_equal(decode.read_audio({"zip": [str(tmp_path / "tagged.zip")], "file": "a.wav"})[0], whole)
    damaged = bytearray(raw)
    damaged[len(raw) // 2] ^= 255
    (tmp_path / "damaged.zip").write_bytes(damaged)
    with pytest.raises(Broken, match="archive"):
        decode.read_audio({"zip": [str(tmp_path / "damaged.zip")], "file": "f/a.wav"})


# -----------------------------------------------------------------------------
# processes

@pytest.fixture
def pool():
    made = []

    def make(*args, **kwargs):
        made.append(Workers(*args, **kwargs))
        return made[-1]
    yield make
    for workers in made:
        workers.close()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a file that can be waited for in vain")
def test_a_decoder_that_hangs_is_stopped_and_one_that_crashes_costs_one_file(tmp_path, pool):
    good, hang = tmp_path / "good.wav", tmp_path / "hang.wav"
    sf.write(good, tone(440, RATE, 5), RATE)
    os.mkfifo(hang)  # opening it waits for ever
    workers = pool(1, RATE, seconds=1)
    expected = decode.decode(clip(good), RATE)
    began = time.monotonic()
    info, audio = workers.decode(clip(hang))
    assert "longer than 1 s" in info["reason"] and audio is None and time.monotonic() - began < 5
    info, audio = workers.decode(clip(good))
    assert info == expected[0] and np.array_equal(audio, expected[1])

    workers = pool(1, RATE, seconds=60)
    killed = []

    def crash_twice():
        while len(killed) < 2:  # it is tried again once, in a new process
            process = workers.all[0].process
            if process and process.pid not in killed:
                time.sleep(0.3)
                os.kill(process.pid, signal.SIGSEGV)
                killed.append(process.pid)
            time.sleep(0.01)
    threading.Thread(target=crash_twice, daemon=True).start()
    info, audio = workers.decode(clip(hang))
    assert info == {"reason": "crashes the decoder (SIGSEGV)"} and audio is None
    assert workers.decode(clip(good))[0] == expected[0]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_a_decoder_that_asks_for_absurd_memory_is_stopped(tmp_path, pool):
    write_wav_header(tmp_path / "greedy.wav", 1000, 1, 40_000_000, np.random.default_rng(0).integers(-9000, 9000, 40_000_000))  # 11 hours
    sf.write(tmp_path / "good.wav", tone(440, 44100, 5), 44100)
    workers = pool(1, RATE, memory=1 << 30)
    reason = workers.decode(clip(tmp_path / "greedy.wav"))[0]["reason"]
    assert "memory" in reason or "longer than 4 hours" in reason
    write_wav_header(tmp_path / "greedy.wav", 4000, 1, 50_000_000, np.random.default_rng(0).integers(-9000, 9000, 50_000_000))  # 3.5 hours
    assert "needs more than 1024 MB of memory" in workers.decode(clip(tmp_path / "greedy.wav"))[0]["reason"]
    assert workers.decode(clip(tmp_path / "good.wav"))[0]["length"] == 5 * RATE


def test_what_is_wrong_with_the_machine_ends_the_run_and_is_not_held_against_the_file(tmp_path, pool):
    with pytest.raises(OSError, match="goes on once this is mended"):  # it was there when the run began
        pool(1, RATE).decode(clip(tmp_path / "unplugged.wav"))


@needs_ffmpeg
def test_a_killed_ffmpeg_does_not_shorten_a_song(tmp_path, pool, monkeypatch):
    for k in range(5):
        sf.write(tmp_path / f"{k}.wav", tone(300, 44100, 7), 44100)
    inputs = [a for k in range(5) for a in ("-i", str(tmp_path / f"{k}.wav"))] + [a for k in range(5) for a in ("-map", str(k))]
    subprocess.run(["ffmpeg", "-v", "error", *inputs, "-c:a", "aac", str(tmp_path / "a.stem.mp4")], check=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ffmpeg").write_text(f'#!/bin/sh\n{shutil.which("ffmpeg")} "$@" | head -c 600000\nkill -9 $$\n')
    (tmp_path / "bin" / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    job = {"name": "song", "tracks": [{"file": str(tmp_path / "a.stem.mp4"), "stream": k, "of": 5} for k in range(5)], "least": 0}
    with pytest.raises(OSError, match="killed three times"):
        pool(1, RATE).decode(job)


def test_a_worker_that_cannot_start_is_not_the_fault_of_the_file(pool, monkeypatch):
    monkeypatch.setattr("workers.DECODE", "no_such_file.py")
    with pytest.raises(OSError, match="does not start"):
        pool(1, RATE).decode(clip("a.wav"))


# -----------------------------------------------------------------------------
# stem files, real files

def samples_by_ffmpeg(path):
    done = subprocess.run(["ffmpeg", "-v", "error", "-i", str(path), "-map", "0:a:0", "-f", "s16le", "-ac", "1", "-"], capture_output=True)
    return len(done.stdout) // 2


@needs_real
@needs_ffmpeg
def test_every_odd_and_broken_file_is_read_as_ffmpeg_reads_it_or_reported():
    files = sorted(p for p in (REAL / "bad_audio").rglob("*") if p.is_file() and p.name != "LICENSE")
    assert len(files) > 30
    read = 0
    for path in files:
        try:
            wave, _, notes = decode.read_audio({"file": str(path)})
        except Broken as e:
            assert str(e)
            continue
        read += 1
        assert notes or abs(len(wave) - samples_by_ffmpeg(path)) <= 2 * 1152, path.name
    assert read >= 12


@needs_real
@needs_ffmpeg
def test_real_clips_have_the_samples_that_ffmpeg_reads(tmp_path):
    for path in [*(REAL / "mtat" / "audio").glob("*.mp3"), *(REAL / "stems" / "mdn_multitrack").glob("*.mp3")]:
        wave, rate, notes = decode.read_audio({"file": str(path)})
        done = subprocess.run(["ffmpeg", "-v", "error", "-i", str(path), "-f", "f32le", "-"], capture_output=True)
        reference = np.frombuffer(done.stdout, "<f4").reshape(len(wave), -1).mean(1)
        assert not notes and np.abs(wave - reference).max() < 1e-4


@needs_ffmpeg
def test_a_stem_file_gives_its_five_streams(tmp_path, pool):
    inputs, maps = [], []
    for k in range(5):
        sf.write(tmp_path / f"{k}.wav", np.stack([tone(300 * (k + 1), 44100, 7), 0.5 * tone(300 * (k + 1), 44100, 7)], 1), 44100)
        inputs += ["-i", str(tmp_path / f"{k}.wav")]
        maps += ["-map", str(k)]
    song = tmp_path / "-odd name.stem.mp4"
    subprocess.run(["ffmpeg", "-v", "error", *inputs, *maps, "-c:a", "aac", "-b:a", "256k", str(song)], check=True)
    job = {"name": "song", "tracks": [{"file": str(song), "stream": k, "of": 5} for k in range(5)], "least": 6}
    info, audio = pool(1, RATE).decode(job)
    assert audio.shape[0] == 5 and abs(info["length"] - 7 * RATE) < 2 * 1024 and not info["notes"]
    for k in range(5):
        got, expected = audio[k] / 32768, 0.75 * tone(300 * (k + 1), RATE, 8)[:info["length"]]
        assert np.abs(got - expected)[2000:100_000].max() < 0.02
    with zipfile.ZipFile(tmp_path / "songs.zip", "w") as z:
        z.write(song, "train/a.stem.mp4")
    packed = {**job, "tracks": [{"zip": [str(tmp_path / "songs.zip")], "file": "train/a.stem.mp4", "stream": k, "of": 5} for k in range(5)]}
    assert np.array_equal(decode.decode(packed, RATE)[1], audio)
    with pytest.raises(Broken, match="1 audio streams"):
        decode.decode({**job, "tracks": [{"file": str(tmp_path / "0.wav"), "stream": 0, "of": 5}]}, RATE)


@needs_real
@needs_ffmpeg
def test_a_real_stem_file_against_stempeg():
    import stempeg
    song = next((REAL / "stems").rglob("*.stem.mp4"))
    reference, rate = stempeg.read_stems(str(song))                                      # (5, N, 2)
    tracks = [{"file": str(song), "stream": k, "of": 5} for k in range(5)]
    info, audio = decode.decode({"name": "song", "tracks": tracks, "least": 6}, RATE)
    for k in range(5):
        expected = to_int16(resample(reference[k].mean(1).astype(np.float32), int(rate), RATE))
        assert np.abs(audio[k].astype(int) - expected.astype(int)).max() <= 1
    assert json.dumps(info)
