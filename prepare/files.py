"""
What lies in a folder, zip archives included, and how datasets get there.

A source is {"file": path} or {"file": member, "zip": [paths of the parts]}: archives are read as
they are. "stream" may name one of several audio streams.
"""
import contextlib
import csv
import errno
import functools
import hashlib
import http.client
import io
import os
import re
import shutil
import struct
import time
import unicodedata
import urllib.error
import urllib.request
import zipfile

from tqdm import tqdm

from audio import Broken

AUDIO = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".aif", ".aiff", ".aifc", ".au",
         ".snd", ".caf", ".w64", ".rf64", ".bw64", ".bwf", ".m4a", ".m4b", ".mp4", ".aac", ".ac3",
         ".wma", ".webm", ".mka", ".mkv", ".mov", ".wv", ".ape", ".tta", ".amr", ".3gp"}
PAUSES = (1, 2, 5, 15, 30, 60)  # seconds between attempts that bring nothing
TIMEOUT = 60                    # seconds without a byte
HEADERS = {"User-Agent": "prepare_data.py"}  # some servers refuse the one that Python gives itself
# errors of writing that no further attempt will mend
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS}


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
                         "readable, or move it out of --path")

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


# -----------------------------------------------------------------------------
# downloads: a file has its name only once its checksum held

def fetch(wanted, folder):
    """Downloads what `folder` lacks of [(address, "algorithm:digest" or "size:bytes")].

    Goes on where an earlier download broke off. ValueError or OSError with what to do if it fails.
    """
    os.makedirs(folder, exist_ok=True)
    missing = []
    for url, checksum in wanted:
        path = os.path.join(folder, url.rsplit("/", 1)[1])
        joined = re.sub(r"\.\d{3}$", "", path)  # an archive in parts may have been joined by hand
        if not os.path.exists(path) and not os.path.exists(joined):
            missing.append((url, checksum, path))
    sizes = [length_of(url) for url, *_ in missing]
    for (url, *_), size in zip(missing, sizes, strict=True):
        print(f"to download: {url}" + (f", {size / 1e9:.2f} GB" if size else ""))
    here = sum(have(path) for *_, path in missing)
    need_space(folder, sum(size or 0 for size in sizes) - here)
    for (url, checksum, path), size in zip(missing, sizes, strict=True):
        fetch_one(url, path, size)
        check(path, checksum)
        os.replace(path + ".part", path)


def have(path):
    return os.path.getsize(path + ".part") if os.path.exists(path + ".part") else 0


def need_space(folder, size):
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(f"{folder} needs {size / 1e9:.2f} GB for the download, the disk has "
                         f"{free / 1e9:.2f} GB free: free some, or link data/raw to a larger disk")


def length_of(url):
    """Bytes of what is at the address, or None if the server does not tell without sending it."""
    request = urllib.request.Request(url, method="HEAD", headers=HEADERS)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return int(answer.headers["Content-Length"])
    except urllib.error.HTTPError as e:
        if e.code in (404, 410):
            raise gone(url, e) from e
    except (OSError, TypeError, ValueError, http.client.HTTPException):
        pass  # fetch_one tries again, and says what is wrong
    return None


def gone(url, e):
    return ValueError(f"{url} is not there any more ({e.code} {e.reason}): find the file "
                      "elsewhere and put it into data/raw, or give --path=FOLDER with the dataset")


def fetch_one(url, path, size):
    """url, of `size` bytes if that is known, to path.part.

    Tries again after a broken connection, a busy server or a wrong answer, with growing pauses.
    """
    pauses = list(PAUSES)
    while True:
        before = have(path)
        problem = "the connection broke off"
        try:
            if size and before == size or fetch_rest(url, path, size):
                return
        except urllib.error.HTTPError as e:
            if e.code not in (408, 416, 425, 429) and e.code < 500:
                raise gone(url, e) from e
            problem = f"{e.code} {e.reason}"
            if e.code == 416 and before:  # more is there than the file has
                os.remove(path + ".part")
        except (OSError, http.client.HTTPException) as e:
            if getattr(e, "errno", None) in FULL:
                raise ValueError(f"{path}.part cannot be written ({e.strerror}): mend that, and "
                                 "the same command goes on from here") from e
            problem = str(getattr(e, "reason", e)) or type(e).__name__

        # what brought something starts over with short pauses
        if have(path) > before:
            pauses = list(PAUSES)
        there = f"{have(path) / 1e6:.1f} MB"
        if not pauses:
            raise ValueError(f"{url}: {problem}, and {len(PAUSES)} attempts more brought nothing: "
                             f"is there a network? The same command goes on from the {there} "
                             "that are there; --path=FOLDER takes the dataset from elsewhere")
        pause = pauses.pop(0)
        print(f"{url}: {problem} at {there}, again in {pause} s", flush=True)
        time.sleep(pause)


def fetch_rest(url, path, size):
    """One connection. True if the file is complete, False if it ended early."""
    start = have(path)
    headers = dict(HEADERS)
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    with contextlib.ExitStack() as stack:
        answer = stack.enter_context(urllib.request.urlopen(request, timeout=TIMEOUT))
        sent = answer.headers.get("Content-Range", "")
        if start and answer.status == 200:
            start = 0  # a server without ranges sends all of it again
        elif start and not sent.startswith(f"bytes {start}-"):
            raise http.client.HTTPException(
                f"the server sends {sent or 'all'} instead of what follows byte {start}")
        length = answer.headers.get("Content-Length", "")
        total = size
        if not total and length.isdecimal():
            total = start + int(length)
        need_space(os.path.dirname(path), (total or start) - start)

        f = stack.enter_context(open(path + ".part", "r+b" if start else "wb"))
        f.seek(start)
        f.truncate()
        name = os.path.basename(path)
        bar = stack.enter_context(tqdm(desc=name, initial=start, total=total, unit="B",
                                       unit_scale=True, mininterval=1))
        while block := answer.read1(1 << 20):
            f.write(block)
            bar.update(len(block))
        f.flush()
        os.fsync(f.fileno())
        return total is None or f.tell() >= total


def check(path, checksum):
    """Deletes path.part and raises ValueError unless it has the checksum."""
    part = path + ".part"
    algorithm, _, right = checksum.partition(":")
    if algorithm == "size":
        found = str(os.path.getsize(part))
    else:
        digest = hashlib.new(algorithm, usedforsecurity=False)
        with open(part, "rb") as f, tqdm(desc=f"checking {os.path.basename(path)}", unit="B",
                                         total=os.path.getsize(part), unit_scale=True) as bar:
            while block := f.read(1 << 22):
                digest.update(block)
                bar.update(len(block))
        found = digest.hexdigest()
    if found != right:
        os.remove(part)
        raise ValueError(f"{path} is not the file that the dataset's authors published "
                         f"({algorithm} {found[:12]}, not {right[:12]}): the same command "
                         "downloads it again")
