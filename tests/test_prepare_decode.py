"""
Decoding in worker processes: bad files are skipped, errors of the machine end the run.
"""
import os
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import RATE, sound, tone, wav_header

from audio.files import Broken
from prepare import decode


def results(*paths, workers=1, seconds=60, memory=4 << 30):
    """{name: (record, samples)} of files, decoded in worker processes."""
    jobs = [(Path(path).name, [{"file": str(path)}]) for path in paths]
    made = decode.decode_all(jobs, RATE, workers, seconds, memory)
    return {name: (record, samples) for name, record, samples in made}


def decode_one(*sources):
    """(record, samples) of one item, decoded in this process."""
    return decode.decode_tracks([s if isinstance(s, (dict, str)) or s is None
                                 else {"file": str(s)} for s in sources], RATE)


@pytest.fixture
def good(tmp_path):
    sf.write(tmp_path / "good.wav", tone(440, RATE, 5), RATE)
    return tmp_path / "good.wav"


# -----------------------------------------------------------------------------
# one item

def test_output_is_int16_at_16_khz(tmp_path):
    sf.write(tmp_path / "a.flac", tone(440, 44100, 5), 44100)
    record, samples = decode_one(tmp_path / "a.flac")
    assert samples.dtype == np.dtype("<i2") and samples.shape == (1, 5 * RATE)
    assert record["length"] == 5 * RATE and record["silent"] == [0] and not record["damage"]
    np.testing.assert_allclose(samples[0, 800:-800] / 32768, tone(440, RATE, 5)[800:-800],
                               atol=2e-4)


def test_nan_and_huge_samples_are_refused(tmp_path):
    for name, wave, reason in (("nan", np.full(RATE * 5, np.nan), "NaN"),
                               ("loud", tone(440, RATE, 5, 9000.0), "times full scale")):
        sf.write(tmp_path / f"{name}.wav", wave.astype(np.float32), RATE, subtype="FLOAT")
        with pytest.raises(Broken, match=reason):
            decode_one(tmp_path / f"{name}.wav")


def test_clipping_is_noted(tmp_path):
    sf.write(tmp_path / "hot.wav", tone(440, RATE, 5, 3.0).astype(np.float32), RATE,
             subtype="FLOAT")
    record, _ = decode_one(tmp_path / "hot.wav")
    assert "full scale" in record["notes"][0] and not record["damage"]


def test_missing_stem_is_silence_and_missing_mixture_is_the_sum(tmp_path):
    for name, hertz in (("a", 440), ("b", 660)):
        sf.write(tmp_path / f"{name}.wav", tone(hertz, RATE, 5, 0.2), RATE)
    record, samples = decode_one("sum", tmp_path / "a.wav", None, tmp_path / "b.wav", None)
    np.testing.assert_allclose(samples[0], samples[1].astype(int) + samples[3], atol=2)
    assert record["silent"] == [0, 0, 5, 0, 5] and not samples[2].any()


def test_slightly_shorter_stems_are_padded(tmp_path):
    sf.write(tmp_path / "a.wav", tone(440, RATE, 5), RATE)
    sf.write(tmp_path / "b.wav", tone(440, RATE, 5.2), RATE)
    record, samples = decode_one(tmp_path / "a.wav", tmp_path / "b.wav")
    assert samples.shape == (2, 83200) and "differ by up to 0.2 s" in record["notes"][0]
    assert not record["damage"]


def test_song_with_a_truncated_stem_is_refused(tmp_path, good):
    raw = good.read_bytes()
    (tmp_path / "cut.wav").write_bytes(raw[:len(raw) // 2])
    with pytest.raises(Broken, match="cut.wav: .*2.5 s; track lengths differ"):
        decode_one(good, tmp_path / "cut.wav")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_split_zip_gives_the_same_samples(tmp_path, good, method):
    with zipfile.ZipFile(tmp_path / "all.zip", "w", method) as z:
        z.write(good, "f/a.wav")
    raw = (tmp_path / "all.zip").read_bytes()
    parts = [str(tmp_path / f"all.zip.00{k + 1}") for k in range(3)]
    for k, part in enumerate(parts):
        Path(part).write_bytes(raw[k * len(raw) // 3:(k + 1) * len(raw) // 3])
    packed = decode_one({"zip": parts, "file": "f/a.wav"})
    assert np.array_equal(packed[1], decode_one(good)[1])


def test_damaged_archive_is_reported(tmp_path, good):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.write(good, "a.wav")
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    raw[len(raw) // 2] ^= 255
    (tmp_path / "a.zip").write_bytes(raw)
    with pytest.raises(Broken, match="cannot be extracted"):
        decode_one({"zip": [str(tmp_path / "a.zip")], "file": "a.wav"})


# -----------------------------------------------------------------------------
# worker processes

def test_order_and_samples_do_not_depend_on_the_number_of_workers(tmp_path):
    paths = [tmp_path / f"{k}.flac" for k in range(12)]
    for k, path in enumerate(paths):
        sound(path, 1 + k % 3, 44100, seed=k)
    alone, three = results(*paths), results(*paths, workers=3)
    assert list(alone) == list(three) == [path.name for path in paths]
    assert all(alone[n][0] == three[n][0] and np.array_equal(alone[n][1], three[n][1])
               for n in alone)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_hanging_decoder_is_stopped(tmp_path, good):
    os.mkfifo(tmp_path / "hang.wav")  # opening it blocks
    began = time.monotonic()
    decoded = results(tmp_path / "hang.wav", good, seconds=4)
    assert "longer than 4 s" in decoded["hang.wav"][0]["reason"] and decoded["hang.wav"][0]["again"]
    assert decoded["good.wav"][0]["length"] == 5 * RATE
    assert time.monotonic() - began < 30


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_memory_limit(tmp_path, good):
    samples = np.random.default_rng(0).integers(-9000, 9000, 50_000_000)
    (tmp_path / "greedy.wav").write_bytes(wav_header(4000, 1, 50_000_000, samples))  # 3.5 hours
    decoded = results(tmp_path / "greedy.wav", good, memory=500 << 20)
    assert "500 MB" in decoded["greedy.wav"][0]["reason"]
    assert decoded["good.wav"][0]["length"] == 5 * RATE


def crash(sources, rate, seconds):
    """A decoder that crashes at crash.wav and is killed at killed.wav."""
    import faulthandler
    if sources[0]["file"].endswith("crash.wav"):
        faulthandler._sigsegv()
    if sources[0]["file"].endswith("killed.wav"):
        os.kill(os.getpid(), 9)
    return decode_here(sources, rate, seconds)


decode_here = decode.decode


def test_crashing_decoder_costs_one_file(tmp_path, good, monkeypatch):
    monkeypatch.setattr(decode, "decode", crash)
    decoded = results(tmp_path / "crash.wav", good)
    record, _ = decoded["crash.wav"]
    assert "SIGSEGV" in record["reason"] and record["again"]
    assert decoded["good.wav"][0]["length"] == 5 * RATE


def test_killed_decoder_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "decode", crash)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match="killed three times"):
        results(tmp_path / "killed.wav")


def test_vanished_file_ends_the_run(tmp_path):
    with pytest.raises(OSError, match="unplugged.wav cannot be read"):
        results(tmp_path / "unplugged.wav")
