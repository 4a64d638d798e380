"""
The authors' weights by name, downloaded from a local server.

    python -m pytest -q tests/test_weights_released.py
"""
import hashlib
import os
import re

import pytest
import torch
from conftest import (
    NARROW,
    REAL,
    SHARED,
    TAIL,
    Server,
    needs_real,
    noise,
    randomise,
    write_tensorflow as write,
)

import model
import weights
from common import download
from weights import released

NETS = {
    "vocals": model.Separator(["vocals"], NARROW),
    "multisource": model.Separator(["vocals", "other", "drums", "bass"], NARROW, "avg"),
    "mtat_tail": model.Classifier(50, True, "tail", tail_widths=TAIL),
    "fma_tune+": model.Classifier(16, False, "v1", 5, ["a"], NARROW,
                                  tail_widths=[4, 8, 8, 8, 8, 8, 8], mel_of_log=True),
}
INDEX = SHARED / "fixtures" / "msspt_released_index"
needs_index = pytest.mark.skipif(not INDEX.is_dir(), reason="needs the fixtures")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{name: contents of the two files} of NETS."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, net in NETS.items():
        write(randomise(net), folder / name)
    return {name: [(folder / (name + ending)).read_bytes() for ending in released.ENDINGS]
            for name in NETS}


@pytest.fixture
def folder(server, checkpoints, tmp_path, monkeypatch):
    """The folder for downloads; the server has the files of NETS, and their ids are known."""
    for name, contents in checkpoints.items():
        for ending, content in zip(released.ENDINGS, contents, strict=True):
            Server.files[released.PLACES[name].replace("+", "%2B") + ending] = content
        ids = [hashlib.sha1(b"blob %d\0%b" % (len(c), c)).hexdigest() for c in contents]
        monkeypatch.setitem(released.BLOBS, name, ids)
    monkeypatch.setattr(released, "BASE", server)
    monkeypatch.setattr(released, "PAUSES", (0.01,))
    monkeypatch.setattr(released, "FOLDER", str(tmp_path / "released"))
    return tmp_path / "released"


@pytest.mark.parametrize("name", NETS)
def test_downloads_once_and_loads(folder, name):
    net, meta = weights.load(f"released:{name}")
    wave = noise(1, model.CROP)
    with torch.no_grad():
        assert torch.equal(net(wave), NETS[name](wave))
    requests = len(Server.requests)
    weights.load(f"released:{name}")
    assert requests == len(Server.requests) > 0


def test_sources_and_classes(folder):
    assert weights.load("released:vocals")[0].sources == ["vocals"]
    assert weights.load("released:multisource")[0].args["pool"] == "avg"
    _, tags = weights.load("released:mtat_tail")
    _, genres = weights.load("released:fma_tune+")
    assert tags["classes"][:2] == ["guitar", "classical"] and len(set(tags["classes"])) == 50
    assert genres["classes"][0] == "Electronic" and genres["task"] == "genre"
    assert genres["as_published"] == "max pooling, mel filters on the logarithm of the mixture"
    assert tags["config"] == {"data": "data/mtat"} and tags["source"] == "released"


@pytest.mark.parametrize("ending", released.ENDINGS)
def test_wrong_download_is_refused_and_not_kept(folder, ending):
    Server.mood[released.PLACES["vocals"] + ending] = ["wrong"]
    with pytest.raises(ValueError, match=f"checkpoint-20{ending}.*gitblob"):
        weights.load("released:vocals")
    names = {name for _, _, names in os.walk(folder) for name in names}
    assert f"checkpoint-20{ending}" not in names and not [n for n in names if ".part" in n]
    weights.load("released:vocals")


def test_local_file_is_verified_on_every_read(folder):
    weights.load("released:vocals")
    data = folder / (released.PLACES["vocals"] + released.ENDINGS[1])
    raw = data.read_bytes()
    data.write_bytes(raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:])
    with pytest.raises(ValueError, match="data-00000-of-00001: checksum"):
        weights.load("released:vocals")


def test_swapped_local_files_are_refused(folder, checkpoints):
    for name, other in (("vocals", "mtat_tail"), ("mtat_tail", "vocals")):
        for ending, content in zip(released.ENDINGS, checkpoints[other], strict=True):
            path = folder / (released.PLACES[name] + ending)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{released.PLACES[name]}.*released:{name}"):
            weights.load(f"released:{name}")


def test_interrupted_download_resumes(folder, checkpoints, monkeypatch):
    place = released.PLACES["multisource"] + released.ENDINGS[1]
    content = Server.files[place] = checkpoints["multisource"][1] + bytes(600_000)
    blob = hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
    monkeypatch.setitem(released.BLOBS, "multisource", (released.BLOBS["multisource"][0], blob))
    Server.mood[place] = ["drop"]
    weights.load("released:multisource")
    assert [wanted for command, name, wanted in Server.requests if name == place] == [
        None, None, "bytes=300000-"]


def test_message_without_a_network(folder, monkeypatch):
    monkeypatch.setattr(released, "BASE", "http://127.0.0.1:9/")
    with pytest.raises(ValueError, match=r"9/separators/bass/checkpoint-20.index.*"
                                         r"released/separators/bass.*data-00000-of-00001"):
        weights.load("released:bass")


def test_unknown_name_gets_a_suggestion():
    with pytest.raises(ValueError, match="'mtat_vocal'.*mtat_vocals"):
        weights.load("released:mtat_vocal")


@needs_real
def test_tags_are_in_the_published_order():
    published = (REAL / "mtat" / "published_clean_split" / "top50_tags.txt").read_text().split("\n")
    ours = [re.sub(r" (.)", lambda m: m[1].upper(), tag) for tag in released.TAGS]
    assert ours == [tag for tag in published if tag]


@needs_index
def test_ids_are_those_of_the_authors_repository():
    rows = [line.split("\t") for line in (INDEX / "BLOBS.tsv").read_text().splitlines()[1:]]
    ours = {f"models/{released.PLACES[name]}{ending}": blob
            for name, ids in released.BLOBS.items()
            for ending, blob in zip(released.ENDINGS, ids, strict=True)}
    assert ours == dict(rows) and len(rows) == 38


@needs_index
@pytest.mark.parametrize("name, file", [
    ("vocals", "separators_vocals"), ("multisource", "separators_multisource"),
    ("mtat_tail", "downstream_models_MTAT_tail"), ("mtat_vocals", "downstream_models_MTAT_vocals"),
    ("fma_multisource", "downstream_models_FMA_multisource")])
def test_real_index_files_have_these_ids(server, tmp_path, name, file):
    Server.files["a.index"] = (INDEX / f"{file}.index").read_bytes()
    download.fetch([(server + "a.index", f"gitblob:{released.BLOBS[name][0]}")], str(tmp_path))
    assert (tmp_path / "a.index").exists()
