"""
Reading prepared data: mixes, clips, what does not fit; and the demo's synthetic music.

    python -m pytest -q tests/test_data.py
"""
import json
import os

import numpy as np
import pytest
import torch
from conftest import index_of, prepare

import data
import model
from prepare import demo as synthetic


@pytest.fixture(scope="module")
def small(demo):
    return (data.Prepared(str(demo / "demo_songs"), "stems"),
            data.Prepared(str(demo / "demo_clips"), "clips"))


# -----------------------------------------------------------------------------
# the demo's music

def test_clips_are_labelled_with_what_sounds_in_them():
    for i in range(12):
        rng = np.random.default_rng([7, i])
        song = synthetic.sketch(rng, full=i % 2 == 0)
        tracks, tags = synthetic.render(song, 6 * 16000, rng), synthetic.labels(song)
        assert set(tags) <= set(synthetic.TAGS) and song["genre"] in synthetic.GENRES
        assert ("voice" in tags) == bool(np.any(tracks["vocals"]))
        assert ("drums" in tags) == np.any(tracks["drums"])
        assert ("no voice" in tags) != ("voice" in tags)
        total = sum(tracks[t] for t in data.TRACKS[1:])
        np.testing.assert_allclose(tracks["mixture"], total, atol=1e-12)
        assert max(np.abs(t).max() for t in tracks.values()) <= 0.9 + 1e-9


def test_the_demo_depends_on_its_seed_alone(demo, tmp_path, capsys):
    arguments = ["demo", "--songs=3,2,2", "--song_seconds=15", "--clips=10,4,12"]
    assert prepare(tmp_path, *arguments) == 0
    for name in ("demo_songs", "demo_clips"):
        assert index_of(demo / name)["items"] == index_of(tmp_path / name)["items"]
        ours, theirs = (root / name / "audio.int16" for root in (demo, tmp_path))
        assert ours.read_bytes() == theirs.read_bytes()
    assert prepare(tmp_path, *arguments) == 0
    assert capsys.readouterr().out.count("nothing new to decode") == 2
    assert "synthetic stems of 15 s, seed 1, not" in prepare(tmp_path, *arguments, "--seed=2")


# -----------------------------------------------------------------------------
# mixes

def test_mixes_are_sums_and_follow_from_seed_and_number(small):
    four = data.Mixes(small[0], "train", ["vocals", "other", "drums", "bass"], seed=3)
    mixture, stems = four.batch(10, 3)
    assert mixture.shape == (3, model.CROP) and stems.shape == (3, 4, model.CROP)
    torch.testing.assert_close(stems.sum(1), mixture, atol=1e-6, rtol=0)
    again, _ = four.batch(12, 1)
    assert torch.equal(again[0], mixture[2])
    assert not torch.equal(four.batch(13, 1)[0], again)
    other = data.Mixes(small[0], "train", four.sources, seed=4)
    assert not torch.equal(other.batch(12, 1)[0], again)


def test_a_mix_of_one_source_against_a_plain_loop(small):
    songs = small[0]
    one = data.Mixes(songs, "train", ["bass"], seed=3)
    rng = np.random.default_rng([3, 0, 5])
    offset = int(rng.integers(96_000 - model.CROP + 1))
    places = rng.choice(len(one.segments), 4, replace=False)
    assert len(set(places.tolist())) == 4
    target, whole = np.zeros(model.CROP), np.zeros(model.CROP)
    for k, place in enumerate(places):
        song, at = one.segments[place]
        crops = {t: songs.read(song, t).astype(np.float64)[at + offset:][:model.CROP]
                 for t in data.TRACKS[1:]}
        if k < 2:
            target += crops["bass"]
            whole += crops["bass"]
        else:
            whole += crops["drums"] + crops["other"] + crops["vocals"]
    (mixture,), (sources,) = one.batch(5, 1)
    np.testing.assert_allclose(sources[0], target, atol=1e-6)
    np.testing.assert_allclose(mixture, whole, atol=1e-6)


# -----------------------------------------------------------------------------
# clips

def test_crops_are_pieces_of_their_clips(small):
    clips = data.Clips(small[1], "train", "genre", seed=1)
    waves, targets = clips.batch(0, [4, 7])
    alone, _ = clips.batch(0, [7])
    assert torch.equal(waves[1], alone[0])
    assert not torch.equal(clips.batch(1, [7])[0], alone)
    assert targets.shape == (2, 4) and (targets.sum(1) == 1).all()
    whole = clips.clip(7)[0]
    starts = (whole[:len(whole) - model.CROP + 1] == alone[0, 0]).nonzero().flatten().tolist()
    assert any(torch.equal(whole[at:at + model.CROP], alone[0]) for at in starts)
    assert torch.equal(clips.crops(7, 7), whole[:model.CROP][None])


def test_an_epoch_is_a_seeded_order_of_all_clips(small):
    clips = data.Clips(small[1], "train", "genre", seed=1)
    assert sorted(clips.order(0)) == list(range(10))
    assert list(clips.order(0)) != list(clips.order(1))


def test_a_clip_that_is_shorter_than_a_crop_ends_in_silence(small):
    clips = data.Clips(small[1], "train", "genre", seed=1)
    clips.items[0] = {**clips.items[0], "length": 1000}
    assert clips.batch(0, [0])[0][0, 1000:].abs().max() == 0
    assert clips.crops(0, 7).shape == (1, model.CROP)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no GPU"))])
def test_crops_that_are_cut_on_a_device_have_the_same_bits(small, device):
    songs, labelled = (data.Prepared(one.path, kind)
                       for one, kind in zip(small, ("stems", "clips"), strict=True))
    makers = [data.Mixes(songs, "train", ["bass"], seed=3).batch,
              data.Mixes(songs, "train", ["vocals", "other", "drums", "bass"], seed=3).batch]
    clips = data.Clips(labelled, "train", "genre", seed=1)
    last = max(range(len(clips)), key=lambda n: clips.items[n]["offset"])
    clips.items[last] = {**clips.items[last], "length": 1000}
    clips.crop = 2 * model.CROP                     # beyond the end of the audio
    makers.append(lambda epoch, count: clips.batch(epoch, [last, 0, 1][:count]))
    found = [make(4, 3) for make in makers]
    for one in (songs, labelled):
        one.keep_on(device)
    for make, wanted in zip(makers, found, strict=True):
        for a, b in zip(make(4, 3), wanted, strict=True):
            assert torch.equal(a.cpu(), b)


def test_prefetching_keeps_the_order_and_passes_errors_on():
    for workers in (0, 3):
        squares = list(data.prefetch(lambda n: n * n, range(20), workers))
        assert squares == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(data.prefetch(lambda n: 1 // n, range(3), 2))


# -----------------------------------------------------------------------------
# what does not fit

ODD = {"name": "a", "split": "train", "offset": 0, "length": 9.0}


@pytest.mark.parametrize("change, message", [
    ({"sample_rate": 44100}, "44100 Hz"), ({"kind": "clips"}, "separation needs songs"),
    ({"format": 99}, "format 99"), ({"n_samples": 10 ** 9}, "does not fit its index"),
    ({"items": [ODD]}, "whole numbers"), ({"items": [{"name": "a"}]}, "lacks length, offset")])
def test_an_index_that_does_not_fit_is_refused(demo, tmp_path, change, message):
    index = index_of(demo / "demo_songs")
    (tmp_path / "index.json").write_text(json.dumps({**index, **change}))
    os.symlink(demo / "demo_songs" / "audio.int16", tmp_path / "audio.int16")
    with pytest.raises(ValueError, match=message):
        data.Prepared(str(tmp_path), "stems")


def test_a_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="make it with prepare_data.py"):
        data.Prepared(str(tmp_path / "nowhere"), "clips")
    (tmp_path / "index.json").write_text("[1")
    with pytest.raises(ValueError, match="is damaged"):
        data.Prepared(str(tmp_path), "clips")


def test_labels_that_do_not_fit_are_refused(small, monkeypatch):
    with pytest.raises(ValueError, match="no task 'mood', only tags, genre"):
        data.Clips(small[1], "train", "mood")
    item = small[1].items("train")[0]
    for labels, message in (([99], "numbers from 0 to 3"), ([0, 1], "exactly one class")):
        monkeypatch.setitem(item, "genre", labels)
        with pytest.raises(ValueError, match=message):
            data.Clips(small[1], "train", "genre")


def test_what_was_trained_on_is_recognised(small, monkeypatch):
    before = small[1].trained_on()
    item = small[1].items("test")[0]
    monkeypatch.setitem(item, "tags", [0])
    assert small[1].trained_on() == before      # the test split is not trained on
    monkeypatch.setitem(item, "split", "train")
    assert small[1].trained_on() != before


# -----------------------------------------------------------------------------
# shares of the labels, folds

def test_a_share_of_the_labels_has_every_class_in_its_share():
    rng = np.random.default_rng(0)
    targets = (rng.random((400, 6)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.01]).astype(int)
    targets[0, 5] = 1
    kept = data.some_of(targets, 0.25)
    assert sorted(set(kept)) == kept.tolist() and abs(len(kept) - 100) <= 8
    for counted, wanted in zip(targets[kept].sum(0), targets.sum(0) / 4, strict=True):
        assert counted >= 1 and abs(counted - wanted) <= max(2, 0.2 * wanted)


def test_the_same_labels_are_chosen_for_every_seed(small):
    chosen = [[item["name"] for item in data.Clips(small[1], "train", task, seed, 0.5).items]
              for task, seed in (("genre", 1), ("genre", 2), ("tags", 1))]
    assert chosen[0] == chosen[1] and len(chosen[0]) == 5
    clips = data.Clips(small[1], "train", "tags", 0, 0.5)
    assert len(clips.targets) == len(clips.items) == len(chosen[2])


def test_each_fold_is_tested_once_and_the_next_one_validates(demo, tmp_path):
    (tmp_path / "audio.int16").symlink_to(demo / "demo_clips" / "audio.int16")
    index = index_of(demo / "demo_clips")
    for number, item in enumerate(index["items"]):
        item["fold"] = number % 4
    (tmp_path / "index.json").write_text(json.dumps(index))
    tested, hashes = [], set()
    for fold in range(4):
        prepared = data.Prepared(str(tmp_path), "clips", fold)
        tested += [item["name"] for item in prepared.items("test")]
        assert {item["fold"] for item in prepared.items("valid")} == {(fold + 1) % 4}
        hashes.add(prepared.trained_on())
    assert sorted(tested) == sorted(item["name"] for item in index["items"])
    assert len(hashes) == 4
    for fold, path in ((4, tmp_path), (0, demo / "demo_clips")):
        with pytest.raises(ValueError, match="needs clips with folds"):
            data.Prepared(str(path), "clips", fold)
