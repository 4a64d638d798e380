"""
Your own songs: one folder per song, with vocals.wav, drums.wav, bass.wav and other.wav.

    python prepare_data.py stems --path=FOLDER --name=mine
"""
import os

from data import TRACKS
from prepare.files import is_audio
from prepare.splits import split_of_folder
from prepare.store import Listing


def listing(files, path=""):
    """Every folder with stems, in any audio format, is a song.

    A parent folder train/, valid/ or test/ is the split. A missing stem is silence, a missing
    mixture the sum of the stems.
    """
    songs, left_out = song_sources(files, whole=False)
    if not songs:
        example = f": {left_out[0]['name']} {left_out[0]['reason']}" if left_out else ""
        raise ValueError(f"no folders with vocals.wav, drums.wav, bass.wav or other.wav under "
                         f"{path}{example}")
    items = [{"name": song, "split": split_of_folder(song)} for song in songs]
    outside = [item["name"] for item in items if not item["split"]]
    if 0 < len(outside) < len(items):
        raise ValueError(f"some songs are in train/, valid/ or test/, but {outside[0]} is not")
    return Listing(f"songs of {path}", f"songs of {os.path.abspath(path)}", "stems", items, songs,
                   left_out, published=False)


def song_sources(files, whole):
    """({song: [source of each of TRACKS]}, left_out) of the folders that contain songs.

    Unless songs must be `whole`, a missing mixture is the sum, and a missing stem is silence if no
    other file of the folder could be that stem.
    """
    folders = {}
    for name in sorted(filter(is_audio, files)):
        folder, _, file = name.rpartition("/")
        if folder:
            track = file.rpartition(".")[0].lower()
            folders.setdefault(folder, {}).setdefault(track, []).append(name)
    songs, left_out = {}, []
    for song, tracks in sorted(folders.items()):
        problem = problem_of(tracks, whole)
        if problem:
            left_out.append({"name": song, "reason": problem, "expected": False})
        else:
            sources = {track: files[names[0]] for track, names in tracks.items()}
            songs[song] = [sources.get("mixture", "sum"), *map(sources.get, TRACKS[1:])]
    return songs, left_out


def problem_of(tracks, whole):
    """Why a folder with these {track: [names]} is not a song, or None."""
    for track in TRACKS:
        if len(tracks.get(track, [])) > 1:
            return f"has two files for {track}"
    lacking = [track for track in TRACKS if track not in tracks]
    unknown = [name for track in tracks.keys() - set(TRACKS) for name in tracks[track]]
    if whole and lacking:
        return f"has no {', '.join(lacking)}"
    if lacking == list(TRACKS[1:]) and not unknown:
        return "has a mixture, but no stems"

    stems = [track for track in lacking if track != "mixture"]
    if stems and unknown:
        other = min(name.split("/")[-1] for name in unknown)
        return f"has no {', '.join(stems)}, but {other}: rename that to a stem, or move it away"
    return None
