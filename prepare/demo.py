"""
The demo's synthetic music: short songs from a seed, made with NumPy.

    python prepare_data.py demo     # data/demo_songs to separate, data/demo_clips to tag

Drums, bass, other and vocals play on one grid of sixteenths, in one key, at random tempo and
levels. Bass and accompaniment share their low notes, accompaniment and voice their whole range:
pitch alone does not separate the sources.

The tags are a miniature of MagnaTagATune's 50: instruments, kinds of voice, no voice, genres,
tempo, loudness and mood. The genre depends on drums and bass. There are few labelled clips.
"""
import functools

import numpy as np

from audio.files import to_int16
from data import SPLITS, TRACKS
from model import SAMPLE_RATE
from prepare.decode import describe
from prepare.store import Listing

songs = [40, 8, 6]      # demo: number of songs with stems for train, valid, test
song_seconds = 24       # demo: length of a song
clips = [96, 40, 200]   # demo: number of labelled clips for train, valid, test
clip_seconds = 6        # demo: length of a clip

DRUMS = {  # hits on a bar of 16 sixteenths: kick, snare, hat
    "four on the floor": ((0, 4, 8, 12), (4, 12), (2, 6, 10, 14)),
    "backbeat": ((0, 8, 10), (4, 12), (0, 2, 4, 6, 8, 10, 12, 14)),
    "breakbeat": ((0, 3, 10), (4, 7, 9, 12, 15), (0, 2, 4, 6, 8, 10, 12, 13, 14, 15)),
    "no drums": ((), (), ()),
}
BASSES = {  # a note every so many sixteenths, its length in sixteenths, attack and decay in s
    "held bass": (16, 15.5, 0.02, 3.0), "octave bass": (2, 1.8, 0.005, 0.3),
    "walking bass": (4, 3.6, 0.01, 0.5)}
FIGURES = ("pad", "arpeggio", "stabs")
GENRES = {"house": ("four on the floor", "octave bass"), "rock": ("backbeat", "held bass"),
          "jungle": ("breakbeat", "walking bass"), "ambient": ("no drums", "held bass")}
TAGS = ("drums", *FIGURES, "voice", "low voice", "high voice", "voice in front", "no voice",
        *GENRES, "fast", "loud", "minor key")
VOWELS = (  # formants in Hz, Peterson & Barney 1952
    (730, 1090, 2440), (530, 1840, 2480), (270, 2290, 3010), (570, 840, 2410), (300, 870, 2240))
TABLE = 2048            # samples of one period


def listing(seed, songs, song_seconds, clips, clip_seconds):
    """The listings of demo_songs and demo_clips."""
    if len(songs) != 3 or len(clips) != 3 or min(*songs, *clips, song_seconds, clip_seconds) < 1:
        raise ValueError("songs and clips must be three positive numbers each, for train, valid "
                         "and test, and the lengths positive")
    return [folder_listing("stems", "song", seed, songs, song_seconds),
            folder_listing("clips", "clip", seed, clips, clip_seconds)]


def folder_listing(kind, unit, seed, counts, seconds):
    splits = [split for split, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
    items = [{"name": f"{unit} {i}", "split": split} for i, split in enumerate(splits)]
    classes = None
    if kind == "clips":
        classes = {"tags": list(TAGS), "genre": list(GENRES)}
        for i, item in enumerate(items):
            song = sketch(generator(kind, seed, i))
            item["genre"] = [classes["genre"].index(song["genre"])]
            item["tags"] = sorted(TAGS.index(tag) for tag in labels(song))
    return Listing("synthetic music", f"synthetic {kind} of {seconds} s, seed {seed}", kind, items,
                   {item["name"]: [i] for i, item in enumerate(items)}, classes=classes,
                   count=list(counts), name=f"demo_{unit}s",
                   make=functools.partial(make, kind, seed, seconds))


def generator(kind, seed, number):
    """The random generator of one item."""
    return np.random.default_rng([seed, ("stems", "clips").index(kind), number])


def make(kind, seed, seconds, source):
    """(record, int16 (tracks, length)) of one item."""
    rng = generator(kind, seed, source[0])
    song = sketch(rng, full=kind == "stems")
    waves = render(song, seconds * SAMPLE_RATE, rng)
    tracks = TRACKS if kind == "stems" else TRACKS[:1]
    samples = to_int16(np.stack([waves[track] for track in tracks]))            # (tracks, length)
    return describe(samples, SAMPLE_RATE), samples


def sketch(rng, full=False):
    """The random parameters of a song as a dictionary. full: all four sources play."""
    genre = list(GENRES)[rng.integers(len(GENRES))]
    drums, bass = GENRES[genre]
    if rng.random() < 0.15:  # exceptions from the genre
        drums = list(DRUMS)[rng.integers(len(DRUMS))]
    if rng.random() < 0.15:
        bass = list(BASSES)[rng.integers(len(BASSES))]
    minor = bool(rng.random() < 0.5)
    if full and drums == "no drums":
        drums = list(DRUMS)[rng.integers(3)]
    voices = ("low voice", "high voice") if full else ("low voice", "high voice", None)
    scale = (0, 2, 3, 5, 7, 8, 10) if minor else (0, 2, 4, 5, 7, 9, 11)
    return dict(
        genre=genre, drums=drums, bass=bass, figure=FIGURES[rng.integers(3)], minor=minor,
        voice=voices[rng.integers(len(voices))], bpm=rng.uniform(80, 160),
        root=int(rng.integers(12)), scale=scale,
        chords=[0, *rng.permutation([1, 3, 4, 5])[:3].tolist()],
        gains=10 ** (rng.uniform(-10, 0, 4) / 20))


def labels(song):
    """The tags of a song."""
    voice = song["voice"]
    levels = 20 * np.log10(song["gains"])           # dB of drums, bass, other, vocals: -10 to 0
    applies = {
        song["figure"]: True, song["genre"]: True, voice or "no voice": True, "voice": voice,
        "voice in front": voice and levels.argmax() == 3, "drums": song["drums"] != "no drums",
        "fast": song["bpm"] > 120, "loud": levels.mean() > -5, "minor key": song["minor"]}
    return [tag for tag in TAGS if applies.get(tag)]


def hertz(song, degree, low):
    """Frequency of a scale degree; 0 is the root, the first one at or above MIDI note `low`."""
    root = low + (song["root"] - low) % 12
    note = root + 12 * (degree // 7) + song["scale"][degree % 7]
    return 440.0 * 2 ** ((note - 69) / 12)


def wavetable(amplitudes):
    """One period of TABLE samples with these amplitudes of the harmonics, at unit power."""
    spectrum = np.zeros(TABLE // 2 + 1, complex)
    phases = np.exp(2j * np.pi * np.arange(len(amplitudes)) ** 2 / 7)  # lowers the peaks
    spectrum[1:len(amplitudes) + 1] = np.asarray(amplitudes) * phases
    table = np.fft.irfft(spectrum)                                              # (TABLE,)
    return table / (np.sqrt((table ** 2).mean()) + 1e-9)


def add_note(out, start, seconds, table, frequency, attack, decay, gain=1.0, vibrato=0.0,
             glide=1.0):
    """Adds a note to `out` at sample `start`: linear attack, exponential decay, short release.

    vibrato: its depth as a fraction of the frequency. glide: initial frequency, relative.
    """
    n = min(int(seconds * SAMPLE_RATE), len(out) - start)
    if n <= 0:
        return
    t = np.arange(n) / SAMPLE_RATE
    bend = np.ones(n)
    if vibrato:         # most notes have neither, and computing sines is slow
        bend += vibrato * np.sin(2 * np.pi * 5.5 * t)
    if glide != 1:
        bend += (glide - 1) * np.exp(-t / 0.05)
    phase = np.cumsum(frequency * bend) * (TABLE / SAMPLE_RATE)
    release = np.minimum(1, (n - np.arange(n)) / (0.01 * SAMPLE_RATE))
    envelope = np.minimum(1, t / attack) * np.exp(-t / decay) * release
    out[start:start + n] += gain * envelope * table[phase.astype(np.int64) % TABLE]


def steps(song, n):
    """(number, first sample, root of the chord) of each sixteenth of n samples."""
    length = 60 / song["bpm"] / 4 * SAMPLE_RATE
    return [(k, int(k * length), song["chords"][k // 16 % 4]) for k in range(int(n / length))]


def drums(song, n, rng):
    out = np.zeros(n)
    t = np.arange(SAMPLE_RATE // 4) / SAMPLE_RATE
    noise = rng.standard_normal((2, len(t)))
    low, tone = rng.uniform(42, 65), rng.uniform(150, 230)
    sweep = np.sin(2 * np.pi * (low * t - 6 * np.exp(-t / 0.02)))
    kick = sweep * np.exp(-t / rng.uniform(0.06, 0.12))
    body = 0.6 * np.sin(2 * np.pi * tone * t) * np.exp(-t / 0.04)
    snare = body + 0.35 * noise[0] * np.exp(-t / rng.uniform(0.04, 0.09))
    hiss = 0.25 * np.diff(noise[1], 2, prepend=[0, 0])
    hat = hiss * np.exp(-t / rng.uniform(0.01, 0.04)) * 0.5
    for k, at, _ in steps(song, n):
        for hit, places in zip((kick, snare, hat), DRUMS[song["drums"]], strict=True):
            if k % 16 in places:
                count = min(len(hit), n - at)
                out[at:at + count] += rng.uniform(0.7, 1.0) * hit[:count]
    return 1.6 * out


def bass(song, n, rng):
    out, sixteenth = np.zeros(n), 60 / song["bpm"] / 4
    harmonics = np.arange(1, 9)
    falling = harmonics ** -rng.uniform(1.0, 2.2)
    table = wavetable(falling * np.where(harmonics % 2 == 0, rng.choice([0.1, 1.0]), 1.0))
    walk = rng.integers(0, 5, 64)
    every, length, attack, decay = BASSES[song["bass"]]
    for k, at, degree in steps(song, n)[::every]:
        if song["bass"] == "octave bass":
            degree += 7 * (k // 2 % 2)
        elif song["bass"] == "walking bass":
            degree += int(walk[k // 4 % 64])
        add_note(out, at, length * sixteenth, table, hertz(song, degree, 28), attack, decay)
    return 0.45 * out


def other(song, n, rng):
    out, sixteenth = np.zeros(n), 60 / song["bpm"] / 4
    table = wavetable(np.arange(1, 17) ** -rng.uniform(0.8, 2.0) * rng.uniform(0.2, 1, 16))
    low, detune = int(rng.integers(45, 58)), rng.uniform(1.002, 1.006)
    pattern = rng.integers(0, 4, 16)
    for k, at, root in steps(song, n):
        chord = [hertz(song, root + degree, low) for degree in (0, 2, 4, 7)]    # Hz
        if song["figure"] == "pad" and k % 16 == 0:
            for note in chord[:3]:
                for off in (1, detune):
                    add_note(out, at, 16 * sixteenth, table, off * note, 0.15, 4.0, 0.5)
        elif song["figure"] == "arpeggio":
            add_note(out, at, 3 * sixteenth, table, chord[pattern[k % 16]], 0.004, 0.15, 1.2)
        elif song["figure"] == "stabs" and k % 8 in (3, 6):
            for note in chord[:3]:
                add_note(out, at, 1.2 * sixteenth, table, note, 0.004, 0.2, 0.9)
    return 0.3 * out


def vocals(song, n, rng):
    out, sixteenth = np.zeros(n), 60 / song["bpm"] / 4
    if song["voice"] is None:
        return out
    low, *sizes = (45, 0.85, 1.0) if song["voice"] == "low voice" else (58, 1.05, 1.25)
    size = rng.uniform(*sizes)      # relative formant frequencies
    degree, free_at = int(rng.integers(0, 8)), 0
    for k, at, _ in steps(song, n):
        if k < free_at or rng.random() < 0.25:
            continue
        length = int(rng.choice([2, 3, 4, 6]))
        degree = int(np.clip(degree + rng.integers(-2, 3), 0, 10))
        free_at = k + length + int(rng.random() < 0.2) * 4
        frequency = hertz(song, degree, low)

        # a vowel: harmonics near its formants are loud
        partials = frequency * np.arange(1, max(2, int(5000 / frequency)))      # Hz
        formants = size * np.array(VOWELS[rng.integers(5)])
        gains = sum(gain / (1 + ((partials - formant) / 90) ** 2)
                    for formant, gain in zip(formants, (1, 0.6, 0.3), strict=True))
        consonant = min(int(0.05 * SAMPLE_RATE), n - at)
        if rng.random() < 0.5:
            hiss = np.diff(rng.standard_normal(consonant), prepend=0)
            out[at:at + consonant] += 0.3 * hiss * np.hanning(consonant)
        add_note(out, at + consonant // 2, length * sixteenth, wavetable(gains + 0.01), frequency,
                 0.04, 3.0, 1.0, 0.012, rng.uniform(0.9, 1.0))
    return 0.4 * out


def render(song, n, rng):
    """{track: (n,) float}: four stems and the mixture, their sum, whose peak is at most 0.9."""
    sources = zip((drums, bass, other, vocals), song["gains"], strict=True)
    stems = {source.__name__: gain * source(song, n, rng) for source, gain in sources}
    peaks = [np.abs(stem).max() for stem in stems.values()]
    scale = 0.9 / max(0.9, np.abs(sum(stems.values())).max(), *peaks)
    stems = {name: scale * stem for name, stem in stems.items()}
    return {"mixture": sum(stems.values()), **stems}
