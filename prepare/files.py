"""
The files of a dataset: in a folder, and inside its zip archives.

A source is {"file": path} or {"file": member, "zip": [paths of the parts]}: archives are read
without unpacking them. "stream" selects one of several audio streams.
"""
import csv
import functools
import io
import lzma
import os
import re
import struct
import unicodedata
import zipfile
import zlib
from itertools import accumulate

from audio.files import Broken

AUDIO = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".aif", ".aiff", ".aifc", ".au",
         ".snd", ".caf", ".w64", ".rf64", ".bw64", ".bwf", ".m4a", ".m4b", ".mp4", ".aac", ".ac3",
         ".wma", ".webm", ".mka", ".mkv", ".mov", ".wv", ".ape", ".tta", ".amr", ".3gp"}
# zipfile's and its decompressors'; NotImplementedError is a RuntimeError
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, struct.error)


def nfc(text):
    """Composed Unicode (NFC): systems differ in how they encode accents in file names."""
    return unicodedata.normalize("NFC", text)


def is_audio(name):
    return os.path.splitext(name)[1].lower() in AUDIO


class Parts(io.RawIOBase):
    """The parts of a split archive as one readable file."""

    def __init__(self, paths):
        self.files, self.at = [open(path, "rb") for path in paths], 0
        self.ends = [0, *accumulate(os.path.getsize(path) for path in paths)]

    def readable(self):
        return True

    seekable = readable

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
    """A zip file in one or several parts. One of ZIP_ERRORS if it is not one."""
    return zipfile.ZipFile(io.BufferedReader(Parts(paths), 1 << 20))


def open_source(source):
    """An open binary file. Broken if it cannot be extracted from its archive."""
    if "zip" not in source:
        return open(source["file"], "rb")
    try:
        return io.BytesIO(open_zip(tuple(source["zip"])).read(source["file"]))
    except ZIP_ERRORS as e:
        raise Broken(f"cannot be extracted from its archive ({e})") from e


def stamp(source):
    """[size, mtime in ns] of a file, [] for a dangling link, None for a source that is no file.

    [size, "crc", checksum] of an archive member.
    """
    if not isinstance(source, dict):
        return None
    if "zip" in source:
        member = open_zip(tuple(source["zip"])).getinfo(source["file"])
        return [member.file_size, "crc", member.CRC]
    try:
        status = os.stat(source["file"])
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def walk(root):
    """The files under a folder, sorted.

    Links to folders are followed last, and only to folders not visited yet: a file belongs to the
    class it is stored in, not to one that links to it.
    """
    def refuse(e):
        raise e     # it names the folder

    visited, starts = set(), [root]
    for start in starts:
        for base, folders, names in os.walk(start, onerror=refuse):
            if os.path.realpath(base) in visited:
                print(f"skipped {base}: a link to files that are listed already")
                folders.clear()
                continue
            visited.add(os.path.realpath(base))
            if not folders and not names:
                print(f"skipped {base}: empty")
            folders[:] = sorted(f for f in folders if f[0] != "." and f != "__MACOSX")
            inside = [os.path.join(base, f) for f in folders]
            starts.extend(path for path in inside if os.path.islink(path))
            yield from (os.path.join(base, name) for name in sorted(names) if name[0] != ".")


def inventory(root, skip=()):
    """{name: source} of the files under a folder and inside its zip archives.

    Names are relative, with / as separator, in composed Unicode. Unpacked files take precedence.
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
                raise ValueError(f"{full} and {files[name]['file']} have the same name, in two "
                                 "Unicode spellings: rename or delete one")
            files[name] = {"file": full}
    for archive, paths in packed.items():
        for member in members(archive, paths):
            files.setdefault(nfc(member), {"file": member, "zip": paths})
    return files


def members(archive, paths):
    """The names of the files in an archive. ValueError if a part of it is missing or damaged."""
    names = []
    problem = "a part is missing, or an archive is beside its own parts: keep one complete copy"
    if paths in ([archive], [f"{archive}.{k + 1:03d}" for k in range(len(paths))]):
        try:
            names, problem = open_zip(tuple(paths)).namelist(), ""
        except ZIP_ERRORS as e:
            problem = f"not a complete zip archive ({e})"
    if problem:
        raise ValueError(f"{archive} ({', '.join(map(os.path.basename, paths))}): {problem}")
    hidden = re.compile(r"(^|/)(\.|__MACOSX/)")
    return sorted(name for name in names if not name.endswith("/") and not hidden.search(name))


def contents(files, name, needed=True):
    """The bytes of the first file with this base name; if it is not needed, None without one."""
    for file, source in files.items():
        if file.split("/")[-1] == name:
            with open_source(source) as f:
                return f.read()
    if needed:
        raise ValueError(f"{name} not found: --path must be the folder of the dataset with its "
                         "tables")
    return None


def table(raw, delimiter=",", name=""):
    """Yields (line number, cells) of the rows of a CSV file given as bytes, except blank ones.

    ValueError, prefixed by `name`, if it is not UTF-8 or the number of cells per row varies.
    """
    csv.field_size_limit(1 << 24)  # FMA's biographies are long
    width, rows = 0, None
    try:
        text = io.StringIO(raw.decode("utf-8-sig"), newline="")
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        for row in rows:
            if any(cell.strip() for cell in row):
                width = width or len(row)
                if len(row) != width:
                    raise csv.Error(f"{len(row)} cells instead of {width}")
                yield rows.line_num, row
    except (UnicodeDecodeError, csv.Error) as e:
        where = f"line {rows.line_num}: " if rows else "not UTF-8: "
        raise ValueError(f"{name}{where}{e}: is the file complete?") from e


def by_name(files, name_of, items):
    """{name: [source]} of the items: the audio files whose name_of(file) is the item's name.

    An unpacked copy takes precedence over a packed one. ValueError if their sizes differ.
    """
    sources, names = {}, {item["name"] for item in items}
    for file, source in files.items():
        name = name_of(file)
        if name in names and is_audio(file):
            check_copies(name, sources.setdefault(name, [source])[0], source)
    return sources


def check_copies(name, first, second):
    """ValueError if two copies of one file differ in size: one is truncated."""
    same_kind = os.path.splitext(first["file"])[1] == os.path.splitext(second["file"])[1]
    if same_kind and stamp(first)[:1] != stamp(second)[:1]:
        places = [" in ".join([s["file"], *s.get("zip", [])[:1]]) for s in (first, second)]
        raise ValueError(f"{name} has two copies of different size, {' and '.join(places)}: move "
                         "the truncated one out of --path")
