"""
Downloads that go on where they broke off: a file has its name only once its checksum held.
"""
import contextlib
import errno
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request

from tqdm import tqdm

PAUSES = (1, 2, 5, 15, 30, 60)  # seconds between attempts that bring nothing
TIMEOUT = 60                    # seconds without a byte
HEADERS = {"User-Agent": "music-sep-pretrain"}    # some servers refuse Python's own
# errors of writing that no further attempt will mend
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS}


def fetch(wanted, folder, hint="", pauses=None):
    """Downloads what `folder` lacks of [(address, "algorithm:digest" or "size:bytes")].

    Without a checksum ("") what comes is taken as it is. Goes on where an earlier download broke
    off. ValueError or OSError with what to do if it fails; `hint` adds another way out. `pauses`
    are the seconds between attempts that bring nothing.
    """
    os.makedirs(folder, exist_ok=True)
    missing = []
    for url, checksum in wanted:
        path = os.path.join(folder, url.rsplit("/", 1)[1])
        joined = re.sub(r"\.\d{3}$", "", path)  # an archive in parts may have been joined by hand
        if not os.path.exists(path) and not os.path.exists(joined):
            missing.append((url, checksum, path))
    hint = f"put the file into {folder} by hand{hint}"
    sizes = [length_of(url, hint) for url, *_ in missing]
    for (url, *_), size in zip(missing, sizes, strict=True):
        print(f"to download: {url}" + (f", {size / 1e9:.2f} GB" if size else ""))
    here = sum(have(path) for *_, path in missing)
    need_space(folder, sum(size or 0 for size in sizes) - here)
    for (url, checksum, path), size in zip(missing, sizes, strict=True):
        fetch_one(url, path, size, hint, PAUSES if pauses is None else pauses)
        if checksum:
            check(path, checksum)
        os.replace(path + ".part", path)


def have(path):
    return os.path.getsize(path + ".part") if os.path.exists(path + ".part") else 0


def need_space(folder, size):
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(f"{folder} needs {size / 1e9:.2f} GB for the download, the disk has "
                         f"{free / 1e9:.2f} GB free: free some, or link it to a larger disk")


def length_of(url, hint):
    """Bytes of what is at the address, or None if the server does not tell without sending it."""
    request = urllib.request.Request(url, method="HEAD", headers=HEADERS)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return int(answer.headers["Content-Length"])
    except urllib.error.HTTPError as e:
        if e.code in (404, 410):
            raise gone(url, e, hint) from e
    except (OSError, TypeError, ValueError, http.client.HTTPException):
        pass  # fetch_one tries again, and says what is wrong
    return None


def gone(url, e, hint):
    return ValueError(f"{url} is not there any more ({e.code} {e.reason}): find it elsewhere, and "
                      f"{hint}")


def fetch_one(url, path, size, hint, all_pauses):
    """url, of `size` bytes if that is known, to path.part.

    Tries again after a broken connection, a busy server or a wrong answer, with growing pauses.
    """
    pauses = list(all_pauses)
    while True:
        before = have(path)
        problem = "the connection broke off"
        try:
            if size and before == size or fetch_rest(url, path, size):
                return
        except urllib.error.HTTPError as e:
            if e.code not in (408, 416, 425, 429) and e.code < 500:
                raise gone(url, e, hint) from e
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
            pauses = list(all_pauses)
        there = f"{have(path) / 1e6:.1f} MB"
        if not pauses:
            raise ValueError(f"{url}: {problem}, {1 + len(all_pauses)} times, with {there} there: "
                             f"is there a network? The same command goes on; or {hint}")
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
        raise ValueError(f"{path} is not the file that its authors published "
                         f"({algorithm} {found[:12]}, not {right[:12]}): the same command "
                         "downloads it again")
