"""
Atomic writes, locks, and the errno values that several modules treat alike.
"""
import contextlib
import errno
import os

try:
    import fcntl
except ImportError:
    import msvcrt  # Windows
    fcntl = None

FULL = {errno.ENOSPC, errno.EDQUOT}             # the disk is full, or the user's quota is
UNWRITABLE = FULL | {errno.EFBIG, errno.EACCES, errno.EROFS}    # retrying a write cannot help
MACHINE = FULL | {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOENT, errno.ENODEV,
                  errno.ENOTCONN, errno.ESTALE}     # the machine's fault, not the file's
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}       # as on some network drives

_locks = []     # a lock whose caller drops the return value must not be garbage-collected


@contextlib.contextmanager
def naming(path):
    """Adds the path to an OSError without one: the error of a full disk does not name it."""
    try:
        yield
    except OSError as e:
        is_named = e.filename and not str(e.filename).endswith(".tmp")
        raise (e if is_named else OSError(e.errno, e.strerror, str(path))) from None


def lock(path, what, wait=False):
    """Takes an exclusive lock on the file `path` and returns it: close() or `with` releases it.

    Child processes that inherit open files (close_fds=False) hold it too. ValueError if another
    process holds the lock of `what`, such as a folder; with `wait` it waits instead.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    lock_file = open(path, "a")
    _locks.append(lock_file)
    os.set_inheritable(lock_file.fileno(), True)
    try:
        if fcntl:
            fcntl.flock(lock_file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        else:
            msvcrt.locking(lock_file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        lock_file.close()
        raise ValueError(f"{what} is in use by another process (lock file {path}): wait for it, or "
                         "stop it") from None
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise
        print(f"note: {what} is not locked, as its file system does not support locks: do not "
              "run two processes on it")
    return lock_file


@contextlib.contextmanager
def atomic(path, mode, **options):
    """Opens a file that appears at `path` once it is complete. An error leaves no file behind."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with naming(path), open(temporary, mode, **options) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def write_atomically(text, path):
    with atomic(path, "w", encoding="utf-8") as f:
        f.write(text)


def save_atomically(obj, path):
    """torch.save, atomically."""
    import torch  # lazy: scripts without a network start faster
    with atomic(path, "wb") as f:
        try:
            torch.save(obj, f)
        except RuntimeError as e:
            # on a full disk closing the archive fails too, which hides the OSError
            raise (e.__context__ if isinstance(e.__context__, OSError) else e) from None
