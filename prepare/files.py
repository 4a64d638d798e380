"""
What lies in a folder, zip archives included.

A source is {"file": path} or {"file": member, "zip": [paths of the parts]}: archives are read as
they are. "stream" may name one of several audio streams.
"""
import csv
import functools
import io
import os
import re
import struct
import unicodedata
import zipfile

from audio import Broken

AUDIO = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".aif", ".aiff", ".aifc", ".au",
         ".snd", ".caf", ".w64", ".rf64", ".bw64", ".bwf", ".m4a", ".m4b", ".mp4", ".aac", ".ac3",
         ".wma", ".webm", ".mka", ".mkv", ".mov", ".wv", ".ape", ".tta", ".amr", ".3gp"}


def nfc(text):
    """The composed form: the same name may be written in two ways, by two systems."""
    return unicodedata.normalize("NFC", text)


def is_audio(name):
    return os.path.splitext(name)[1].lower() in AUDIO


# -----------------------------------------------------------------------------
# zip archives

class Parts(io.RawIOBase):
    """The parts of a split archive as one file to read."""

    def __init__(self, paths):
        self.files = [open(path, "rb") for path in paths]
        self.ends, self.at = [0], 0
        for path in paths:
            self.ends.append(self.ends[-1] + os.path.getsize(path))

    def readable(self):
        return True

    seekable = readable

    def tell(self):
        return self.at

    def seek(self, offset, whence=os.SEEK_SET):
        self.at = offset + (0, self.at, self.ends[-1])[whence]
        return self.at

    def readinto(self, buffer):
        for f, start, end in zip(self.files, self.ends, self.ends[1:], strict=False):
            if self.at < end:
                f.seek(self.at - start)
                n = f.readinto(memoryview(buffer)[:end - self.at])
                self.at += n
                return n
        return 0


@functools.lru_cache(4)
def open_zip(paths):
    """A zip file in one or several parts. zipfile.BadZipFile if it is not one."""
    if len(paths) == 1:
        return zipfile.ZipFile(paths[0])
    return zipfile.ZipFile(io.BufferedReader(Parts(paths), 1 << 20))


def open_source(source):
    """An open binary file. Broken if it cannot be taken out of its archive."""
    if "zip" not in source:
        return open(source["file"], "rb")
    try:
        return io.BytesIO(open_zip(tuple(source["zip"])).read(source["file"]))
    except MemoryError:
        raise
    except Exception as e:  # zipfile and its decompressors have no common class of error
        raise Broken(f"cannot be taken out of its archive ({e})") from e


def stamp(source):
    """[size, time of change] of a file; of an archive's member [size, "crc", checksum].

    None if the file is not there: a link to nowhere.
    """
    if "zip" in source:
        member = open_zip(tuple(source["zip"])).getinfo(source["file"])
        return [member.file_size, "crc", member.CRC]
    try:
        found = os.stat(source["file"])
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


# -----------------------------------------------------------------------------
# what lies in a folder

def walk(root):
    """The files under a folder, in order.

    Linked folders come last, and only if they lead to something else: a link from one class to
    another must not take its files away.
    """
    def stop(e):
        raise ValueError(f"the folder {e.filename} cannot be read ({e.strerror}): make it "
                         "readable, or move it away")

    seen, starts = set(), [root]
    for start in starts:
        for base, folders, names in os.walk(start, onerror=stop):
            if os.path.realpath(base) in seen:
                print(f"passed over {base}: it leads to files that are there already")
                folders.clear()
                continue
            seen.add(os.path.realpath(base))
            if not folders and not names:
                print(f"passed over {base}: it is empty")
            folders[:] = sorted(f for f in folders if f[0] != "." and f != "__MACOSX")
            inside = [os.path.join(base, f) for f in folders]
            starts.extend(path for path in inside if os.path.islink(path))
            yield from (os.path.join(base, name) for name in sorted(names) if name[0] != ".")


def inventory(root, skip=()):
    """{name: source} of the files under a folder and inside its zip archives.

    Names are relative, with / between folders, in composed Unicode. Unpacked files come first.
    skip: base names of archives that need not be opened.
    """
    files, packed = {}, {}
    for full in walk(root):
        zipped = re.fullmatch(r"(.+\.zip)(\.\d{3})?", full, re.DOTALL)
        if zipped and os.path.isfile(full):
            if os.path.basename(zipped[1]) not in skip:
                packed.setdefault(zipped[1], []).append(full)
        elif not full.endswith((".part", ".tmp")):
            name = nfc(os.path.relpath(full, root).replace(os.sep, "/"))
            if name in files:
                raise ValueError(f"{full} and {files[name]['file']} have one name, in two "
                                 "spellings of Unicode: rename or delete one")
            files[name] = {"file": full}
    for archive, paths in packed.items():
        for member in members(archive, paths):
            files.setdefault(nfc(member), {"file": member, "zip": paths})
    return files


def members(archive, paths):
    """The names of the files in an archive. ValueError if a part of it is missing or damaged."""
    parts = [f"{archive}.{k + 1:03d}" for k in range(len(paths))]
    if paths != parts and paths != [archive]:
        if archive in paths:
            raise ValueError(f"{archive} lies beside its own parts: move away one or the other")
        there = ", ".join(os.path.basename(path) for path in paths)
        raise ValueError(f"of {archive} there are {there}: a part is missing, or too many")
    try:
        names = open_zip(tuple(paths)).namelist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error) as e:
        raise ValueError(f"{', '.join(paths)} is not a complete zip archive ({e}): are all its "
                         "parts there?") from e
    hidden = re.compile(r"(^|/)(\.|__MACOSX/)")
    return sorted(name for name in names if not name.endswith("/") and not hidden.search(name))


def contents(files, name, needed=True):
    """The bytes of a file by its last name, wherever it lies.

    If it is not there: ValueError if it is needed, else None.
    """
    for file, source in files.items():
        if file.split("/")[-1] == name:
            with open_source(source) as f:
                return f.read()
    if needed:
        raise ValueError(f"no {name} there: --path must be the folder in which the dataset lies "
                         "with its tables")
    return None


def table(raw, delimiter=",", name=""):
    """Yields (line number, cells) of the rows of a CSV file given as bytes, without blank ones.

    ValueError, which begins with `name`, if it is not UTF-8 text, or if a row has another number
    of cells than the first.
    """
    csv.field_size_limit(1 << 24)  # FMA's biographies are long
    width = 0
    try:
        text = io.StringIO(raw.decode("utf-8-sig"), newline="")
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            width = width or len(row)
            if len(row) != width:
                raise ValueError(f"{name}line {rows.line_num} has {len(row)} cells instead of "
                                 f"{width}: is the file complete?")
            yield rows.line_num, row
    except UnicodeDecodeError as e:
        raise ValueError(f"{name}not UTF-8 text ({e}): save it as UTF-8") from e
    except csv.Error as e:
        raise ValueError(f"{name}line {rows.line_num}: {e}: is the file complete?") from e


def by_name(files, name_of, wanted):
    """{name: [source]} of the audio files whose name_of(file) is wanted.

    Of several copies the unpacked one is taken. ValueError if they differ in size.
    """
    found = {}
    for file, source in files.items():
        name = name_of(file)
        if name in wanted and is_audio(file):
            refuse_other(name, found.setdefault(name, source), source)
    return {name: [source] for name, source in found.items()}


def refuse_other(name, first, second):
    """ValueError if two copies of what should be one file differ in size: one is cut off."""
    def place(source):
        return source["file"] + (f" in {source['zip'][0]}" if "zip" in source else "")

    same_kind = os.path.splitext(first["file"])[1] == os.path.splitext(second["file"])[1]
    if same_kind and (stamp(first) or [0])[0] != (stamp(second) or [0])[0]:
        raise ValueError(f"two files that differ would be {name}: {place(first)} and "
                         f"{place(second)}: move the wrong one out of --path")
