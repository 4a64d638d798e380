"""
Resumable downloads: a file gets its name only after its checksum has been verified.
"""
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request

from tqdm import tqdm

from common.files import UNWRITABLE

PAUSES = (1, 2, 5, 15, 30, 60)  # seconds between attempts without progress
TIMEOUT = 60                    # seconds without data
HEADERS = {"User-Agent": "music-sep-pretrain"}    # some servers reject Python's default


def fetch(wanted, folder, hint="", pauses=None):
    """Downloads the files of [(url, "algorithm:digest" or "size:bytes")] that `folder` lacks.

    Algorithms are those of hashlib, and gitblob, the id of a file in a git repository. An empty
    checksum accepts any content. Resumes interrupted downloads. ValueError or OSError with what to
    do if it fails; `hint` adds an alternative. `pauses`: seconds between attempts without progress.
    """
    os.makedirs(folder, exist_ok=True)
    missing = []
    for url, checksum in wanted:
        path = os.path.join(folder, url.rsplit("/", 1)[1])
        joined = re.sub(r"\.\d{3}$", "", path)  # the user may have joined a split archive
        if not os.path.exists(path) and not os.path.exists(joined):
            missing.append((url, checksum, path))
    hint = f"put the file into {folder} by hand{hint}"
    sizes = [length_of(url, hint) for url, *_ in missing]
    for (url, *_), size in zip(missing, sizes, strict=True):
        print(f"to download: {url}" + (f", {size / 1e9:.2f} GB" if size else ""))
    needed = sum(size or 0 for size in sizes) - sum(downloaded(path) for *_, path in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder} needs {needed / 1e9:.2f} GB for the download, the disk has "
                         f"{free / 1e9:.2f} GB free: free some, or link it to a larger disk")
    for (url, checksum, path), size in zip(missing, sizes, strict=True):
        fetch_one(url, path, size, hint, PAUSES if pauses is None else pauses)
        if checksum:
            verify(path, checksum)
        os.replace(path + ".part", path)


def downloaded(path):
    """Size of path.part in bytes, 0 if there is none."""
    return os.path.getsize(path + ".part") if os.path.exists(path + ".part") else 0


def length_of(url, hint):
    """Size in bytes of the file at the URL, or None if the server does not declare it."""
    request = urllib.request.Request(url, method="HEAD", headers=HEADERS)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return int(response.headers["Content-Length"])
    except (OSError, TypeError, ValueError, http.client.HTTPException) as e:
        if getattr(e, "code", None) in (404, 410):
            raise_gone(url, e, hint)
    return None  # fetch_one() retries and reports errors


def raise_gone(url, e, hint):
    raise ValueError(f"{url} no longer exists ({e.code} {e.reason}): find it elsewhere, and "
                     f"{hint}") from e


def fetch_one(url, path, size, hint, all_pauses):
    """Downloads url, of `size` bytes if known, to path.part.

    Retries after a broken connection, a busy server or a wrong response, with growing pauses.
    """
    pauses = list(all_pauses)
    while True:
        before = downloaded(path)
        try:
            problem = "" if size and before == size else fetch_rest(url, path, size)
            if not problem:
                return
        except urllib.error.HTTPError as e:
            if e.code not in (408, 416, 425, 429) and e.code < 500:
                raise_gone(url, e, hint)
            problem = f"{e.code} {e.reason}"
            if e.code == 416 and before:  # path.part is longer than the file
                os.remove(path + ".part")
        except (OSError, http.client.HTTPException) as e:
            if getattr(e, "errno", None) in UNWRITABLE:
                raise ValueError(f"{path}.part cannot be written ({e.strerror}): fix this and run "
                                 "the same command again, it resumes") from e
            problem = str(getattr(e, "reason", e)) or type(e).__name__

        if downloaded(path) > before:   # progress: start over with short pauses
            pauses = list(all_pauses)
        have = f"{downloaded(path) / 1e6:.1f} MB"
        if not pauses:
            raise ValueError(f"{url}: {problem}, {1 + len(all_pauses)} times, after {have}: check "
                             f"your internet connection and run the same command again; or {hint}")
        pause = pauses.pop(0)
        print(f"{url}: {problem} at {have}, retrying in {pause} s", flush=True)
        time.sleep(pause)


def fetch_rest(url, path, size):
    """Resumes path.part over one connection. Returns "" once it is complete, else the problem."""
    start = downloaded(path)
    headers = HEADERS | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        sent_range = response.headers.get("Content-Range", "")
        if start and response.status == 200:
            start = 0  # a server without range requests sends the whole file again
        elif start and not sent_range.startswith(f"bytes {start}-"):
            return f"the server sends {sent_range or 'no range'} instead of byte {start} onwards"
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if not size and length.isdecimal() else size
        with (open(path + ".part", "r+b" if start else "wb") as f,
              tqdm(desc=os.path.basename(path), initial=start, total=total, unit="B",
                   unit_scale=True, mininterval=1) as bar):
            f.seek(start)
            f.truncate()
            while block := response.read1(1 << 20):
                f.write(block)
                bar.update(len(block))
            f.flush()
            os.fsync(f.fileno())
            return "" if total is None or f.tell() >= total else "the connection broke off"


def verify(path, checksum):
    """Deletes path.part and raises ValueError unless it has the checksum."""
    part, size = path + ".part", os.path.getsize(path + ".part")
    algorithm, _, expected = checksum.partition(":")
    actual = str(size)
    if algorithm != "size":
        git = algorithm == "gitblob"    # SHA-1 of a header and the content
        digest = hashlib.new("sha1" if git else algorithm, usedforsecurity=False)
        digest.update(b"blob %d\0" % size if git else b"")
        with open(part, "rb") as f, tqdm(desc=f"checking {os.path.basename(path)}", unit="B",
                                         total=size, unit_scale=True) as bar:
            while block := f.read(1 << 22):
                digest.update(block)
                bar.update(len(block))
        actual = digest.hexdigest()
    if actual != expected:
        os.remove(part)
        raise ValueError(f"{path} is not the published file ({algorithm} {actual[:12]}, not "
                         f"{expected[:12]}): the same command downloads it again")
