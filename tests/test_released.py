"""
The authors' weights by name, from a server that is not theirs.

    python -m pytest -q tests/test_released.py
"""
import os
import re

import pytest
import torch
from conftest import NARROW, REAL, TAIL, Server, needs_real, noise, randomise, write_tensorflow

import download
import eval as evaluation
import model
import released

NETS = {
    "vocals": model.Separator(["vocals"], NARROW),
    "multisource": model.Separator(["vocals", "other", "drums", "bass"], NARROW, "avg"),
    "mtat_tail": model.Classifier(50, True, "tail", tail_widths=TAIL),
    "fma_tune+": model.Classifier(16, False, "v1", 5, ["a"], NARROW,
                                  tail_widths=[4, 8, 8, 8, 8, 8, 8], mel_of_log=True),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{path on the server: bytes} of NETS."""
    folder, found = tmp_path_factory.mktemp("made"), {}
    for name, net in NETS.items():
        write_tensorflow(randomise(net), folder / "made")
        for ending in (".index", ".data-00000-of-00001"):
            place = released.PLACES[name].replace("+", "%2B") + ending
            found[place] = (folder / f"made{ending}").read_bytes()
    return found


@pytest.fixture
def published(server, made, tmp_path, monkeypatch):
    """The folder for the downloads; the server has the files of NETS."""
    Server.files.update(made)
    monkeypatch.setattr(released, "BASE", server)
    monkeypatch.setattr(released, "PAUSES", (0.01,))
    monkeypatch.setattr(released, "FOLDER", str(tmp_path / "released"))
    return tmp_path / "released"


@pytest.mark.parametrize("name", NETS)
def test_a_name_is_fetched_once_and_gives_the_network(published, name):
    net, meta = model.load(f"released:{name}")
    wave = noise(1, model.CROP)
    with torch.no_grad():
        assert torch.equal(net(wave), NETS[name](wave))
    requests = len(Server.seen)
    model.load(f"released:{name}")
    assert requests == len(Server.seen) > 0


def test_names_of_sources_and_classes_come_along(published):
    assert model.load("released:vocals")[0].sources == ["vocals"]
    assert model.load("released:multisource")[0].args["pool"] == "avg"
    _, tags = model.load("released:mtat_tail")
    _, genres = model.load("released:fma_tune+")
    assert tags["classes"][:2] == ["guitar", "classical"] and len(set(tags["classes"])) == 50
    assert genres["classes"][0] == "Electronic" and genres["task"] == "genre"
    assert genres["as_published"] == "max pooling, mel filters on the logarithm of the mixture"
    assert tags["config"] == {"data": "data/mtat"}


def test_wrong_bytes_are_never_kept(published):
    Server.mood[released.PLACES["vocals"] + ".data-00000-of-00001"] = ["wrong"]
    with pytest.raises(ValueError, match="checksum of layer 0"):
        model.load("released:vocals")
    assert {name for _, _, names in os.walk(published) for name in names} == {".lock"}
    model.load("released:vocals")


def test_another_network_is_told(published):
    pair = [released.PLACES[name] for name in ("vocals", "mtat_tail")]
    for ending in (".index", ".data-00000-of-00001"):
        one, other = (Server.files[place + ending] for place in pair)
        Server.files |= {pair[0] + ending: other, pair[1] + ending: one}
    for name in ("vocals", "mtat_tail"):
        with pytest.raises(ValueError, match=f"is another network than released:{name}"):
            model.load(f"released:{name}")


def test_a_download_that_broke_off_goes_on(published):
    place = released.PLACES["multisource"] + ".data-00000-of-00001"
    Server.files[place] = Server.files[place] + bytes(600_000)
    Server.mood[place] = ["drop"]
    model.load("released:multisource")
    assert [wanted for command, name, wanted in Server.seen if name == place] == [
        None, None, "bytes=300000-"]


def test_without_a_network_it_says_which_file_to_put_where(published, monkeypatch):
    monkeypatch.setattr(released, "BASE", "http://127.0.0.1:9/")
    with pytest.raises(ValueError, match=r"9/separators/bass/checkpoint-20.index.*put the file "
                                         r"into .*released/separators/bass by hand"):
        model.load("released:bass")


def test_an_unknown_name_is_told_with_the_nearest():
    with pytest.raises(ValueError, match="'mtat_vocal'.*did you mean mtat_vocals?"):
        model.load("released:mtat_vocal")


def test_results_are_called_like_the_weights():
    assert evaluation.run_name("released:mtat_tune+") == "released_mtat_tune+"
    assert evaluation.checkpoints(["released:mtat_tail"]) == ["released:mtat_tail"]


@needs_real
def test_tags_are_in_the_published_order():
    published = (REAL / "mtat" / "published_clean_split" / "top50_tags.txt").read_text().split("\n")
    ours = [re.sub(r" (.)", lambda m: m[1].upper(), tag) for tag in released.TAGS]
    assert ours == [tag for tag in published if tag]


def test_pauses_of_downloads_are_not_ours():
    assert max(download.PAUSES) > max(released.PAUSES)
