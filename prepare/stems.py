"""
Your own songs: a folder each, with vocals.wav, drums.wav, bass.wav, other.wav (or flac, mp3, ...).

    python prepare_data.py stems --path=FOLDER --name=mine
"""
import os

from data import TRACKS
from prepare.files import is_audio
from prepare.splits import split_of_folder
from prepare.store import Listing


def listing(files, path=""):
    """Every folder with stems is a song. Folders train/, valid/, test/ decide the split.

    A stem that is not there is silence. A mixture that is not there is the sum of the stems.
    """
    songs, left_out = song_sources(files, whole=False)
    if not songs:
        such = f": {left_out[0]['name']} {left_out[0]['reason']}" if left_out else ""
        raise ValueError(f"no song folders with vocals.wav, drums.wav, bass.wav or other.wav "
                         f"under {path}{such}")
    splits = [split_of_folder(song) for song in songs]
    if None in splits and any(splits):
        odd = list(songs)[splits.index(None)]
        raise ValueError(f"some songs lie in train/, valid/ or test/, but {odd} does not")
    items = [{"name": song, "split": split} for song, split in zip(songs, splits, strict=True)]
    return Listing(f"songs of {path}", f"songs of {os.path.abspath(path)}", "stems", items, songs,
                   left_out, published=False)


def song_sources(files, whole):
    """({song: [source of each of TRACKS]}, left_out) of the folders that hold songs.

    If songs need not be `whole`, a stem that is not there is silence, unless another file may be
    it; and a mixture that is not there is the sum.
    """
    songs = {}
    for name in sorted(filter(is_audio, files)):
        song, _, file = name.rpartition("/")
        if song:
            track = file.rpartition(".")[0].lower()
            songs.setdefault(song, {}).setdefault(track, []).append(name)
    found, left_out = {}, []
    for song, tracks in sorted(songs.items()):
        problem = problem_of(tracks, whole)
        if problem:
            left_out.append({"name": song, "reason": problem, "expected": False})
            continue
        absent = {"mixture": "sum"}  # the other stems are silence where they are not there
        found[song] = [files[tracks[t][0]] if t in tracks else absent.get(t) for t in TRACKS]
    return found, left_out


def problem_of(tracks, whole):
    """Why a folder with these {track: [names]} is no song, or None."""
    for track in TRACKS:
        if len(tracks.get(track, [])) > 1:
            return f"has two files for {track}"
    lacking = [track for track in TRACKS if track not in tracks]
    unknown = [name for track in tracks.keys() - set(TRACKS) for name in tracks[track]]
    if whole and lacking:
        return f"has no {', '.join(lacking)}"
    if lacking == list(TRACKS[1:]) and not unknown:
        return "has a mixture, but no stems"

    # a stem may be silent, unless another file may be the stem
    stems = [track for track in lacking if track != "mixture"]
    if stems and unknown:
        other = min(name.split("/")[-1] for name in unknown)
        return f"has no {', '.join(stems)}, but {other}: give it its name, or move it away"
    return None
