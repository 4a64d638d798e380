"""
Resampling against torchaudio, scipy and sines.

    python -m pytest -q tests/test_audio_resample.py
"""
import math

import numpy as np
import pytest
import torch
from conftest import RATE, noise, tone

from audio.resample import BETA, ROLLOFF, WIDTH, resample


def level(wave):
    """Of a sine, in dB relative to full scale, without the edges."""
    middle = wave.double()[len(wave) // 8:-len(wave) // 8]
    return 10 * math.log10(2 * (middle ** 2).mean() + 1e-24)


def sine(hertz, rate, seconds, amplitude=1.0):
    return torch.from_numpy(tone(hertz, rate, seconds, amplitude)).float()


@pytest.mark.parametrize("rate, to", [
    (44100, 16000), (48000, 16000), (22050, 16000), (8000, 16000), (37800, 16000), (16000, 44100),
    (16000, 11025), (192_000, 16000), (1000, 16000)])
@pytest.mark.parametrize("shape", [(30_011,), (2, 3, 1000), (1, 7)])
def test_same_bits_as_torchaudio(rate, to, shape):
    transforms = pytest.importorskip("torchaudio.transforms")
    reference = transforms.Resample(
        rate, to, resampling_method="sinc_interp_kaiser", lowpass_filter_width=WIDTH,
        rolloff=ROLLOFF, beta=BETA)
    wave = noise(*shape)
    assert torch.equal(resample(wave, rate, to), reference(wave))


@pytest.mark.parametrize("rate", [44100, 8000])
def test_passband_agrees_with_scipy(rate):
    signal = pytest.importorskip("scipy.signal")
    wave = sum(sine(hertz, rate, 3.0, 0.1) for hertz in (100, 777, 2500, 3500))
    expected = signal.resample(wave.double().numpy(), 3 * RATE)         # FFT, wraps around
    ours = resample(wave, rate, RATE).numpy()
    np.testing.assert_allclose(ours[2000:-2000], expected[2000:-2000], atol=1e-4)


# 44,101 Hz takes the FFT
@pytest.mark.parametrize("rate", [44100, 48000, 22050, 96000, 44101])
def test_stopband_is_below_80_db(rate):
    for hertz in (8001, 8010, 8050, 8100, 8300, 9000, 10500, 15990, 16000, 20000):
        if hertz < rate / 2:
            assert level(resample(sine(hertz, rate, 2), rate, RATE)) < -80, hertz


@pytest.mark.parametrize("rate", [44100, 48000, 22050, 11025, 8000, 44101, 37800, 16000])
def test_sines_in_the_passband_keep_amplitude_and_phase(rate):
    for hertz in (50, 440, 3000, 7000):
        if hertz < 0.45 * rate:
            wave = resample(sine(hertz, rate, 1.5, 0.5), rate, RATE)
            expected = sine(hertz, RATE, 1.5, 0.5)[800:len(wave) - 800]
            torch.testing.assert_close(wave[800:-800], expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("rate, to", [(44100, 16000), (16000, 44100), (44101, 16000)])
def test_length_is_rounded_up_and_rows_are_independent(rate, to):
    for n in (1, 2, 3, 440, 441, 442, 9999):
        wave = noise(2, 2, n)
        together = resample(wave, rate, to)
        assert together.shape == (2, 2, math.ceil(n * to / rate))
        torch.testing.assert_close(together[1, 0], resample(wave[1, 0], rate, to),
                                   atol=1e-6, rtol=0)


def test_nothing_to_do():
    wave = noise(2, 100)
    assert resample(wave, RATE, RATE) is wave
    assert resample(wave[:, :0], 44100, RATE).shape == (2, 0)
