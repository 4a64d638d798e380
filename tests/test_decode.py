"""
Decoding in processes that may die: what a file costs, and what the machine.

    python -m pytest -q tests/test_decode.py
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

from audio import Broken
from prepare import decode


def results(*paths, workers=1, seconds=60, memory=4 << 30):
    """{name: (record, samples)} of files, decoded in processes."""
    jobs = [(Path(path).name, [{"file": str(path)}]) for path in paths]
    made = decode.decode_all(jobs, RATE, workers, seconds, memory)
    return {job[0]: (record, samples) for job, record, samples in made}


def one(*sources):
    """(record, samples) of one item, decoded here."""
    return decode.decode_tracks([s if isinstance(s, (dict, str)) or s is None
                                 else {"file": str(s)} for s in sources], RATE)


@pytest.fixture
def good(tmp_path):
    sf.write(tmp_path / "good.wav", tone(440, RATE, 5), RATE)
    return tmp_path / "good.wav"


# -----------------------------------------------------------------------------
# one item

def test_a_file_becomes_int16_at_16_khz(tmp_path):
    sf.write(tmp_path / "a.flac", tone(440, 44100, 5), 44100)
    record, samples = one(tmp_path / "a.flac")
    assert samples.dtype == np.dtype("<i2") and samples.shape == (1, 5 * RATE)
    assert record["length"] == 5 * RATE and record["silent"] == [0] and not record["damage"]
    np.testing.assert_allclose(samples[0, 800:-800] / 32768, tone(440, RATE, 5)[800:-800],
                               atol=2e-4)


def test_samples_that_are_no_sound_are_refused(tmp_path):
    for name, wave, reason in (("nan", np.full(RATE * 5, np.nan), "not numbers"),
                               ("loud", tone(440, RATE, 5, 9000.0), "times full scale")):
        sf.write(tmp_path / f"{name}.wav", wave.astype(np.float32), RATE, subtype="FLOAT")
        with pytest.raises(Broken, match=reason):
            one(tmp_path / f"{name}.wav")


def test_clipped_samples_are_told(tmp_path):
    sf.write(tmp_path / "hot.wav", tone(440, RATE, 5, 3.0).astype(np.float32), RATE,
             subtype="FLOAT")
    record, _ = one(tmp_path / "hot.wav")
    assert "beyond full scale" in record["notes"][0] and not record["damage"]


def test_a_stem_that_is_not_there_is_silence_and_a_mixture_the_sum(tmp_path):
    for name, hertz in (("a", 440), ("b", 660)):
        sf.write(tmp_path / f"{name}.wav", tone(hertz, RATE, 5, 0.2), RATE)
    record, samples = one("sum", tmp_path / "a.wav", None, tmp_path / "b.wav", None)
    np.testing.assert_allclose(samples[0], samples[1].astype(int) + samples[3], atol=2)
    assert record["silent"] == [0, 0, 5, 0, 5] and not samples[2].any()


def test_stems_of_a_little_different_lengths_are_a_song(tmp_path):
    sf.write(tmp_path / "a.wav", tone(440, RATE, 5), RATE)
    sf.write(tmp_path / "b.wav", tone(440, RATE, 5.2), RATE)
    record, samples = one(tmp_path / "a.wav", tmp_path / "b.wav")
    assert samples.shape == (2, 83200) and "differ by up to 0.2 s" in record["notes"][0]
    assert not record["damage"]


def test_a_song_with_a_stem_that_is_cut_off_is_refused(tmp_path, good):
    raw = good.read_bytes()
    (tmp_path / "cut.wav").write_bytes(raw[:len(raw) // 2])
    with pytest.raises(Broken, match="cut.wav: it is cut off after 2.5 s; its tracks differ"):
        one(good, tmp_path / "cut.wav")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_zip_in_parts_is_read_like_its_files(tmp_path, good, method):
    with zipfile.ZipFile(tmp_path / "all.zip", "w", method) as z:
        z.write(good, "f/a.wav")
    raw = (tmp_path / "all.zip").read_bytes()
    parts = [str(tmp_path / f"all.zip.00{k + 1}") for k in range(3)]
    for k, part in enumerate(parts):
        Path(part).write_bytes(raw[k * len(raw) // 3:(k + 1) * len(raw) // 3])
    packed = one({"zip": parts, "file": "f/a.wav"})
    assert np.array_equal(packed[1], one(good)[1])


def test_a_damaged_archive_is_told(tmp_path, good):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.write(good, "a.wav")
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    raw[len(raw) // 2] ^= 255
    (tmp_path / "a.zip").write_bytes(raw)
    with pytest.raises(Broken, match="cannot be taken out of its archive"):
        one({"zip": [str(tmp_path / "a.zip")], "file": "a.wav"})


# -----------------------------------------------------------------------------
# processes

def test_any_number_of_processes_gives_the_same_in_the_same_order(tmp_path):
    paths = [tmp_path / f"{k}.flac" for k in range(12)]
    for k, path in enumerate(paths):
        sound(path, 1 + k % 3, 44100, seed=k)
    alone, three = results(*paths), results(*paths, workers=3)
    assert list(alone) == list(three) == [path.name for path in paths]
    assert all(alone[n][0] == three[n][0] and np.array_equal(alone[n][1], three[n][1])
               for n in alone)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a file to be waited for in vain")
def test_a_decoder_that_hangs_is_stopped(tmp_path, good):
    os.mkfifo(tmp_path / "hang.wav")  # opening it waits for ever
    began = time.monotonic()
    found = results(tmp_path / "hang.wav", good, seconds=4)
    assert "longer than 4 s" in found["hang.wav"][0]["reason"] and found["hang.wav"][0]["again"]
    assert found["good.wav"][0]["length"] == 5 * RATE
    assert time.monotonic() - began < 30


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_a_decoder_that_asks_for_absurd_memory_is_stopped(tmp_path, good):
    samples = np.random.default_rng(0).integers(-9000, 9000, 50_000_000)
    (tmp_path / "greedy.wav").write_bytes(wav_header(4000, 1, 50_000_000, samples))  # 3.5 hours
    found = results(tmp_path / "greedy.wav", good, memory=500 << 20)
    assert "needs more than 500 MB of memory" in found["greedy.wav"][0]["reason"]
    assert found["good.wav"][0]["length"] == 5 * RATE


def crash(sources, rate, seconds):
    """Stands in for a decoder that a file named crash.wav brings down."""
    import faulthandler
    if sources[0]["file"].endswith("crash.wav"):
        faulthandler._sigsegv()
    if sources[0]["file"].endswith("killed.wav"):
        os.kill(os.getpid(), 9)
    return decode_here(sources, rate, seconds)


decode_here = decode.decode


def test_a_decoder_that_crashes_costs_its_file(tmp_path, good, monkeypatch):
    monkeypatch.setattr(decode, "decode", crash)
    found = results(tmp_path / "crash.wav", good)
    assert found["crash.wav"][0] == {"reason": "crashes the decoder (SIGSEGV)", "again": True}
    assert found["good.wav"][0]["length"] == 5 * RATE


def test_a_decoder_that_the_system_kills_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "decode", crash)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match="killed three times"):
        results(tmp_path / "killed.wav")


def test_a_file_that_went_away_ends_the_run(tmp_path):
    with pytest.raises(OSError, match="goes on once this is mended"):
        results(tmp_path / "unplugged.wav")
