"""
Where the datasets come from, how they get here, and what lies in a folder.

Downloads are resumed where they broke off, and checked before they have their name. Archives are read as they are.
"""
import errno
import hashlib
import http.client
import os
import re
import shutil
import struct
import time
import urllib.error
import urllib.request
import zipfile

from tqdm import tqdm

from decode import open_source, open_zip

MTAT = "https://mirg.city.ac.uk/datasets/magnatagatune/"
FMA = "https://os.unil.cloud.switch.ch/fma/"
# name: [(address, checksum)]
SOURCES = {
    "mtat": [(MTAT + "annotations_final.csv", "sha256:99b94e95825d4fa576386a5367b9c96e0ec636e9f9c240aceb492f4728f68c3c"),
             (MTAT + "clip_info_final.csv", "sha256:cb6108a10d3a91f0bfd7d2fbec2382559d15f20c8d28093f14e12162a47a3e78"),
             (MTAT + "mp3.zip.001", "sha256:f857fe185968773058cc71662c2ef5d8f2d4b7338e3c122cfd52f82dcb9760b9"),
             (MTAT + "mp3.zip.002", "sha256:fc2e1ec441755556ed1398b1808f1b08b6034372f8bc27394510c0c58cdb52ce"),
             (MTAT + "mp3.zip.003", "sha256:83a689824c17e82f6eb81cdbc4e4ca239a4cfc1fb41f1a5c80b861caec90450f")],
    "fma_small": [(FMA + "fma_metadata.zip", "sha1:f0df49ffe5f2a6008d7dc83c6915b31835dfe733"),
                  (FMA + "fma_small.zip", "sha1:ade154f733639d52e35e32f5593efe5be76c6d70")],
    "fma_medium": [(FMA + "fma_metadata.zip", "sha1:f0df49ffe5f2a6008d7dc83c6915b31835dfe733"),
                   (FMA + "fma_medium.zip", "sha1:c67b69ea232021025fca9231fc1c7c1a063ab50b")],
    "musdb": [("https://zenodo.org/records/1117372/files/musdb18.zip", "md5:af06762477334799bfc5abf237648207")],
    "musdb_hq": [("https://zenodo.org/record/3338373/files/musdb18hq.zip",
                  "sha256:baac80d0483c61d74b2e5f3be75fa557eec52898339e6aa45c1fa48833c5d21d")],
}
# what makes a download unnecessary where it lies unpacked
UNPACKED = {"mp3.zip": r"[0-9a-f]/[^/]+\.mp3",
            "fma_metadata.zip": r"tracks\.csv", "fma_small.zip": r"fma_small/.*\d{6}\.mp3", "fma_medium.zip": r"fma_medium/.*\d{6}\.mp3",
            "musdb18.zip": r"[^/]+\.stem\.mp4", "musdb18hq.zip": r"mixture\.wav", "MUSDB18-7-STEMS.zip": r"[^/]+\.stem\.mp4"}
PAUSES = (1, 2, 5, 15, 30, 60)      # seconds between attempts that bring nothing; each that brings something starts over
HEADERS = {"User-Agent": "prepare_data.py"}     # some servers refuse the one that Python gives itself
TIMEOUT = 60                        # seconds without a byte


def fetch_missing(sources, folder):
    """Downloads what `folder` lacks, packed or unpacked."""
    there = inventory(folder, archives=False) if os.path.isdir(folder) else {}

    def unpacked(url):
        archive = re.sub(r"\.\d{3}$", "", url.rsplit("/", 1)[1])
        pattern = UNPACKED[archive]
        if not url.endswith(archive) and os.path.exists(os.path.join(folder, archive)):
            return True  # its parts, joined by hand
        return any(re.search(f"(^|/){pattern}$", file) for file in there)
    download([(url, checksum) for url, checksum in sources if url.endswith(".csv") or not unpacked(url)], folder)


def download(sources, folder):
    """Brings the files that `folder` lacks; one that lies there already is checked. ValueError or OSError with what to do if it cannot."""
    os.makedirs(folder, exist_ok=True)
    wanted = [(url, checksum, os.path.join(folder, url.rsplit("/", 1)[1])) for url, checksum in sources]
    for url, checksum, path in wanted:
        if os.path.exists(path):
            check(path, checksum, f"delete it to download it again from {url}")
    missing = [(url, checksum, path) for url, checksum, path in wanted if not os.path.exists(path)]
    sizes = [length_of(url) for url, _, _ in missing]
    for (url, _, _), size in zip(missing, sizes):
        print(f"to download: {url}" + (f", {size / 1e9:.2f} GB" if size else ""))
    need_space(folder, sum(filter(None, sizes)) - sum(have(path) for _, _, path in missing))
    for (url, checksum, path), size in zip(missing, sizes):
        fetch(url, path, size)
        check(path + ".part", checksum, "the same command downloads it again", delete=True)
        os.replace(path + ".part", path)
        remember(path, checksum)


def have(path):
    return os.path.getsize(path + ".part") if os.path.exists(path + ".part") else 0


def need_space(folder, size):
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(f"{folder} needs {size / 1e9:.2f} GB for the download, the disk has {free / 1e9:.2f} GB free: "
                         "free some space, or link data/raw to a larger disk")


def length_of(url):
    """Bytes of what is at the address, or None if the server does not tell without sending it."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD", headers=HEADERS), timeout=TIMEOUT) as answer:
            return int(answer.headers["Content-Length"])
    except urllib.error.HTTPError as e:
        if e.code in (404, 410):
            raise gone(url, e) from e
        return None
    except (OSError, TypeError, ValueError, http.client.HTTPException):
        return None  # fetch tries again, and says what is wrong


def gone(url, e):
    return ValueError(f"{url} is not there any more ({e.code} {str(e.reason).splitlines()[0]}): find the file elsewhere and put it into data/raw, or give "
                      "--path=FOLDER where the dataset lies")


def fetch(url, path, size):
    """url, of `size` bytes if that is known, to path.part, going on from what is there. Tries again after a broken connection, a busy server
    or an answer that does not fit, with growing pauses."""
    pauses = list(PAUSES)
    while True:
        before = have(path)
        try:
            if size and before == size or fetch_rest(url, path, size):
                return
            problem = "the connection broke off"
        except urllib.error.HTTPError as e:
            if e.code not in (408, 416, 425, 429) and e.code < 500:
                raise gone(url, e) from e
            problem = f"{e.code} {e.reason}"
            if e.code == 416 and before:  # more is there than the file has
                os.remove(path + ".part")
        except (OSError, http.client.HTTPException) as e:
            if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
                raise ValueError(f"{path}.part cannot be written ({e.strerror}): mend that, and the same command goes on from the "
                                 f"{have(path) / 1e6:.1f} MB that are there") from e
            problem = str(getattr(e, "reason", e)) or type(e).__name__
        if have(path) > before:
            pauses = list(PAUSES)
        if not pauses:
            raise ValueError(f"{url}: {problem}, and {len(PAUSES)} attempts more brought nothing: is there a network? The same command goes on from "
                             f"the {have(path) / 1e6:.1f} MB that are there; --path=FOLDER takes the dataset from elsewhere")
        pause = pauses.pop(0)
        print(f"{url}: {problem} at {have(path) / 1e6:.1f} MB, again in {pause} s", flush=True)
        time.sleep(pause)


def fetch_rest(url, path, size):
    """One connection. True if the file is complete, False if it ended early."""
    start = have(path)
    request = urllib.request.Request(url, headers={**HEADERS, **({"Range": f"bytes={start}-"} if start else {})})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        if start and answer.status == 200:
            start = 0  # a server without ranges sends all of it again
        elif start and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise http.client.HTTPException(f"the server sends {answer.headers.get('Content-Range')} instead of what follows byte {start}")
        length = answer.headers.get("Content-Length", "")
        total = size or (start + int(length) if length.isdecimal() else None)
        need_space(os.path.dirname(path), (total or start) - start)
        with open(path + ".part", "r+b" if start else "wb") as f, tqdm(
                desc=os.path.basename(path), initial=start, total=total, unit="B", unit_scale=True, mininterval=1) as bar:
            f.seek(start)
            f.truncate()
            while block := answer.read1(1 << 20):
                f.write(block)
                bar.update(len(block))
            f.flush()
            os.fsync(f.fileno())
            return total is None or f.tell() >= total


def check(path, checksum, hint, delete=False):
    """ValueError unless the file has the checksum, "algorithm:digest" or "size:bytes"; a file once found right is not read again."""
    if read_note(path) == note_of(path, checksum):
        return
    algorithm, _, right = checksum.partition(":")
    found = str(os.path.getsize(path)) if algorithm == "size" else digest_of(path, algorithm)
    if found != right:
        if delete:
            os.remove(path)
        raise ValueError(f"{path} is not the file that the dataset's authors published ({algorithm} {found[:12]}, not {right[:12]}): {hint}")
    if not delete:
        remember(path, checksum)


def digest_of(path, algorithm):
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as f, tqdm(desc=f"checking {os.path.basename(path)}", total=os.path.getsize(path), unit="B", unit_scale=True,
                                     mininterval=1) as bar:
        while block := f.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def note_of(path, checksum):
    return f"{checksum} {os.path.getsize(path)} {os.stat(path).st_mtime_ns}\n"


def read_note(path):
    if not os.path.exists(path + ".checked"):
        return None
    with open(path + ".checked", encoding="utf-8") as f:
        return f.read()


def remember(path, checksum):
    with open(path + ".checked", "w", encoding="utf-8") as f:
        f.write(note_of(path, checksum))


# -----------------------------------------------------------------------------
# what lies in a folder

def walk(root):
    """The files under a folder. Linked folders come last, and only if they lead to something else: a link from one class to another must not
    take its files away."""
    seen, starts = set(), [root]

    def stop(error):
        raise ValueError(f"the folder {error.filename} cannot be read ({error.strerror}): make it readable, or move it out of --path")
    for start in starts:
        for base, folders, names in os.walk(start, onerror=stop):
            if os.path.realpath(base) in seen:
                print(f"passed over {base}: it leads to files that are there already")
                folders.clear()
                continue
            seen.add(os.path.realpath(base))
            if not folders and not names:
                print(f"passed over {base}: it is empty")
            folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
            starts.extend(os.path.join(base, f) for f in folders if os.path.islink(os.path.join(base, f)))
            yield from (os.path.join(base, file) for file in sorted(names))


def inventory(root, archives=True):
    """{relative name: source} of the files under a folder, in order, and of those inside its zip archives; unpacked ones come first."""
    files, packed = {}, {}
    for full in walk(root):
        zipped = re.fullmatch(r"(.+\.zip)(\.\d{3})?", full, re.DOTALL)
        if os.path.basename(full).startswith(".") or full.endswith((".part", ".checked")):
            continue
        if zipped and archives and os.path.isfile(full):
            packed.setdefault(zipped[1], []).append(full)
        else:
            files[os.path.relpath(full, root).replace(os.sep, "/")] = {"file": full}
    for archive, paths in packed.items():
        parts = [archive] if paths == [archive] else [f"{archive}.{k + 1:03d}" for k in range(len(paths))]
        if paths != parts and archive in paths:
            raise ValueError(f"{archive} lies beside its own parts: move away one or the other")
        if paths != parts:
            raise ValueError(f"of {archive} there are {', '.join(os.path.basename(p) for p in paths)}: a part is missing, or too many")
        try:
            members = open_zip(tuple(paths)).namelist()
        except (zipfile.BadZipFile, NotImplementedError, struct.error) as e:
            raise ValueError(f"{', '.join(paths)} is not a complete zip archive ({e}): are all its parts there?") from e
        for member in sorted(members):
            if not member.endswith("/") and not re.search(r"(^|/)(\.|__MACOSX/)", member):
                files.setdefault(member, {"zip": paths, "file": member})
    return files


def contents(files, file, needed=True):
    """The bytes of a file by its last name, wherever it lies; None, or a ValueError if it is needed, where it is not."""
    for name in files:
        if name.split("/")[-1] == file:
            with open_source(files[name]) as f:
                return f.read()
    if needed:
        raise ValueError(f"no {file} there: --path must be the folder in which the dataset lies with its tables")


def size_of(source):
    """In bytes, and when it was changed; of a zip's member its checksum instead. None if it is not there: a link to nowhere."""
    if "zip" in source:
        member = open_zip(tuple(source["zip"])).getinfo(source["file"])
        return [member.file_size, member.CRC]
    try:
        return [os.path.getsize(source["file"]), os.stat(source["file"]).st_mtime_ns]
    except OSError:
        return None
