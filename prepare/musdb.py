"""
MUSDB18 (Rafii et al. 2017): 150 songs with four stems; validation songs as in the musdb package.

    python prepare_data.py musdb                    # MUSDB18, .stem.mp4 files, 4.7 GB
    python prepare_data.py musdb --hq=True          # MUSDB18-HQ, wav files, 23 GB
    python prepare_data.py musdb --download=True    # 7 seconds of each song, 0.15 GB
"""
import importlib.util
import os

from prepare.files import check_copies
from prepare.splits import split_of_folder
from prepare.stems import song_sources
from prepare.store import Listing

hq = False          # musdb: MUSDB18-HQ, wav files, 23 GB
download = False    # musdb: 7 seconds of 144 songs, 0.15 GB, for first experiments

COMPRESSED = [("https://zenodo.org/records/1117372/files/musdb18.zip",
               "md5:af06762477334799bfc5abf237648207")]
WAV = [("https://zenodo.org/record/3338373/files/musdb18hq.zip",
        "sha256:baac80d0483c61d74b2e5f3be75fa557eec52898339e6aa45c1fa48833c5d21d")]


def setup():
    """Settings of the musdb package, which cannot be imported without an ffmpeg program."""
    import yaml
    package = importlib.util.find_spec("musdb").submodule_search_locations[0]
    with open(os.path.join(package, "configs", "mus.yaml"), encoding="utf-8") as f:
        return yaml.safe_load(f)


def downloads(hq=False, download=False):
    if download:
        return "musdb_7s", [], [(setup()["sample-url"], "size:147209385")]
    return ("musdb_hq", [], WAV) if hq else ("musdb", [], COMPRESSED)


def listing(files, download=False):
    """86 / 14 / 50 songs: the validation songs are taken from train/."""
    wav = {name: source for name, source in files.items()
           if name.lower().endswith(".wav") and split_of_folder(os.path.dirname(name))}
    songs, left_out = song_sources(wav, whole=True)
    title = "MUSDB18-HQ"
    if not songs:
        title, left_out = "MUSDB18", []
        for name, source in files.items():
            if name.lower().endswith(".stem.mp4"):      # has five streams, in the order of TRACKS
                songs[name[:-len(".stem.mp4")]] = [{**source, "stream": k} for k in range(5)]
    if download:
        title = "MUSDB18, previews of 7 seconds"
    songs = unpacked_first(songs)
    validation = setup()["validation_tracks"]
    items, sources = [], {}
    for song, tracks in sorted(songs.items()):
        name, split = song.split("/")[-1], split_of_folder(song)
        if split == "train" and name in validation:
            split = "valid"
        items.append({"name": name, "split": split})
        sources[name] = tracks
    named = [{**entry, "name": entry["name"].split("/")[-1]} for entry in left_out]
    left_out = [entry for entry in named if entry["name"] not in sources]
    return Listing(title, title, "stems", items, sources, left_out,
                   count=144 if download else [86, 14, 50])


def unpacked_first(songs):
    """The songs in train/ or test/; the unpacked copy if there is a packed one as well."""
    copies = {}
    for song in sorted(songs, key=lambda song: any("zip" in source for source in songs[song])):
        split = split_of_folder(song)
        if split:
            first = copies.setdefault((split, song.split("/")[-1]), song)
            for kept, other in zip(songs[first], songs[song], strict=True):
                check_copies(song.split("/")[-1], kept, other)
    return {song: songs[song] for song in copies.values()}
