"""
Prepared data: mixes, clips, invalid folders; and the demo's synthetic music.
"""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, index_of, prepare

import data
import model
from prepare import demo as synthetic


@pytest.fixture(scope="module")
def small(demo):
    return (data.Prepared(str(demo / "demo_songs"), "stems"),
            data.Prepared(str(demo / "demo_clips"), "clips"))


# -----------------------------------------------------------------------------
# the demo's music


def test_demo_labels_match_the_audio():
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


def test_demo_depends_only_on_its_seed(demo, tmp_path, capsys):
    arguments = ["demo", "--songs=3,2,2", "--song_seconds=15", "--clips=10,4,12"]
    assert prepare(tmp_path, *arguments) == 0
    for name in ("demo_songs", "demo_clips"):
        assert index_of(demo / name)["items"] == index_of(tmp_path / name)["items"]
        ours, theirs = (root / name / "audio.int16" for root in (demo, tmp_path))
        assert ours.read_bytes() == theirs.read_bytes()
    assert prepare(tmp_path, *arguments) == 0
    assert capsys.readouterr().out.count("nothing new to decode") == 2
    assert "seed 1" in prepare(tmp_path, *arguments, "--seed=2")


# -----------------------------------------------------------------------------
# mixes

def test_mixes_are_sums_and_depend_on_seed_and_number(small):
    four = data.Mixes(small[0], "train", ["vocals", "other", "drums", "bass"], seed=3)
    mixture, stems = four.batch(10, 3)
    assert mixture.shape == (3, model.CROP) and stems.shape == (3, 4, model.CROP)
    torch.testing.assert_close(stems.sum(1), mixture, atol=1e-6, rtol=0)
    again, _ = four.batch(12, 1)
    assert torch.equal(again[0], mixture[2])
    assert not torch.equal(four.batch(13, 1)[0], again)
    other = data.Mixes(small[0], "train", four.sources, seed=4)
    assert not torch.equal(other.batch(12, 1)[0], again)


def test_mix_of_one_source_equals_a_plain_loop(small):
    songs = small[0]
    one = data.Mixes(songs, "train", ["bass"], seed=3)
    rng = np.random.default_rng([3, 0, 5])
    offset = int(rng.integers(96_000 - model.CROP + 1))
    segments = rng.choice(len(one.segments), 4, replace=False)
    assert len(set(segments.tolist())) == 4
    target, whole = np.zeros(model.CROP), np.zeros(model.CROP)
    for k, segment in enumerate(segments):
        song, at = one.segments[segment]
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

def test_crops_are_parts_of_their_clips(small):
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


def test_epoch_is_a_seeded_permutation(small):
    clips = data.Clips(small[1], "train", "genre", seed=1)
    assert sorted(clips.order(0)) == list(range(10))
    assert list(clips.order(0)) != list(clips.order(1))


def test_short_clips_are_padded_with_silence(small):
    clips = data.Clips(small[1], "train", "genre", seed=1)
    clips.items[0] = {**clips.items[0], "length": 1000}
    assert clips.batch(0, [0])[0][0, 1000:].abs().max() == 0
    assert clips.crops(0, 7).shape == (1, model.CROP)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])
def test_crops_are_identical_on_every_device(small, device):
    songs, labelled = (data.Prepared(one.path, kind)
                       for one, kind in zip(small, ("stems", "clips"), strict=True))
    makers = [data.Mixes(songs, "train", ["bass"], seed=3).batch,
              data.Mixes(songs, "train", ["vocals", "other", "drums", "bass"], seed=3).batch]
    clips = data.Clips(labelled, "train", "genre", seed=1)
    last = max(range(len(clips)), key=lambda n: clips.items[n]["offset"])
    clips.items[last] = {**clips.items[last], "length": 1000}
    clips.crop = 2 * model.CROP                     # beyond the end of the audio
    makers.append(lambda epoch, count: clips.batch(epoch, [last, 0, 1][:count]))
    on_cpu = [make(4, 3) for make in makers]
    for one in (songs, labelled):
        one.keep_on(device)
    for make, wanted in zip(makers, on_cpu, strict=True):
        for a, b in zip(make(4, 3), wanted, strict=True):
            assert torch.equal(a.cpu(), b)


def test_prefetch_keeps_the_order_and_raises_errors():
    for workers in (0, 3):
        squares = list(data.prefetch(lambda n: n * n, range(20), workers))
        assert squares == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(data.prefetch(lambda n: 1 // n, range(3), 2))


def test_loader_threads_use_one_core_and_leave_the_main_thread_alone():
    before = torch.get_num_threads()
    assert set(data.prefetch(lambda n: torch.get_num_threads(), range(8), 2)) == {1}
    assert torch.get_num_threads() == before


# -----------------------------------------------------------------------------
# invalid folders

ODD = {"name": "a", "split": "train", "offset": 0, "length": 9.0}


@pytest.mark.parametrize("change, message", [
    ({"sample_rate": 44100}, "sample_rate 44100"), ({"kind": "clips"}, "not 'stems'"),
    ({"format": 99}, "format 99"), ({"n_samples": 10 ** 9}, "does not match its index"),
    ({"items": [ODD]}, "integers offset and length"), ({"items": [{"name": "a"}]}, "needs name")])
def test_invalid_index_is_refused(demo, tmp_path, change, message):
    index = index_of(demo / "demo_songs")
    (tmp_path / "index.json").write_text(json.dumps({**index, **change}))
    os.symlink(demo / "demo_songs" / "audio.int16", tmp_path / "audio.int16")
    with pytest.raises(ValueError, match=message):
        data.Prepared(str(tmp_path), "stems")


def test_missing_or_damaged_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        data.Prepared(str(tmp_path / "nowhere"), "clips")
    (tmp_path / "index.json").write_text("[1")
    with pytest.raises(ValueError, match="is damaged"):
        data.Prepared(str(tmp_path), "clips")


def test_invalid_labels_are_refused(small, monkeypatch):
    with pytest.raises(ValueError, match="'mood': choose one of tags, genre"):
        data.Clips(small[1], "train", "mood")
    item = small[1].items("train")[0]
    for labels, message in (([99], "number from 0 to 3"), ([0, 1], "exactly one")):
        monkeypatch.setitem(item, "genre", labels)
        with pytest.raises(ValueError, match=message):
            data.Clips(small[1], "train", "genre")


def test_hash_of_the_training_data(small, monkeypatch):
    before = small[1].trained_on()
    item = small[1].items("test")[0]
    monkeypatch.setitem(item, "tags", [0])
    assert small[1].trained_on() == before      # the test split is not trained on
    monkeypatch.setitem(item, "split", "train")
    assert small[1].trained_on() != before


# -----------------------------------------------------------------------------
# subsets and folds

def test_subset_keeps_the_share_of_every_class():
    rng = np.random.default_rng(0)
    targets = (rng.random((400, 6)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.01]).astype(int)
    targets[0, 5] = 1
    kept = data.stratified_subset(targets, 0.25)
    assert sorted(set(kept)) == kept.tolist() and abs(len(kept) - 100) <= 8
    for counted, wanted in zip(targets[kept].sum(0), targets.sum(0) / 4, strict=True):
        assert counted >= 1 and abs(counted - wanted) <= max(2, 0.2 * wanted)


def test_subset_does_not_depend_on_the_seed(small):
    chosen = [[item["name"] for item in data.Clips(small[1], "train", task, seed, 0.5).items]
              for task, seed in (("genre", 1), ("genre", 2), ("tags", 1))]
    assert chosen[0] == chosen[1] and len(chosen[0]) == 5
    clips = data.Clips(small[1], "train", "tags", 0, 0.5)
    assert len(clips.targets) == len(clips.items) == len(chosen[2])


def test_each_fold_is_test_once_and_valid_once(demo, tmp_path):
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


def test_audio_larger_than_memory_can_be_opened(tmp_path):
    samples = 1 << 39       # 1 TiB, sparse: only a read-only map of it is free
    with open(tmp_path / "audio.int16", "wb") as f:
        f.truncate(2 * samples)
    item = {"name": "a", "split": "train", "offset": samples - 100, "length": 100, "tags": [0]}
    (tmp_path / "index.json").write_text(json.dumps({
        "format": 1, "kind": "clips", "sample_rate": 16000, "n_samples": samples, "items": [item],
        "classes": {"tags": ["x"]}, "multilabel": ["tags"]}))
    prepared = data.Prepared(str(tmp_path), "clips")
    assert not prepared.read(item).any()


@pytest.mark.parametrize("key, value", [("classes", None), ("classes", ["a"]), ("multilabel", 3)])
def test_an_index_without_classes_names_the_key(demo, tmp_path, key, value):
    index = index_of(demo / "demo_clips") | {key: value}
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=key):
        data.Prepared(str(tmp_path), "clips")


def test_loader_threads_leave_the_threads_of_the_caller():
    code = """
import torch, data
torch.set_num_threads(2)
list(data.prefetch(lambda n: torch.ones(10).sum(), range(4), 2))
print(torch.get_num_threads())"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "2", done.stderr
