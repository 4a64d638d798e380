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

FULL = {errno.ENOSPC, errno.EDQUOT}             # the disk is full, or the user's quota used up
UNWRITABLE = FULL | {errno.EFBIG, errno.EACCES, errno.EROFS}    # retrying a write cannot help
MACHINE = FULL | {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOENT, errno.ENODEV,
                  errno.ENOTCONN, errno.ESTALE}     # the machine's fault, not the file's
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}       # as on some network drives

_held = []      # keeps locks alive whose caller drops the return value


@contextlib.contextmanager
def naming(path):
    """Adds the path to an OSError without one: the error of a full disk does not name it."""
    try:
        yield
    except OSError as e:
        if e.filename and not str(e.filename).endswith(".tmp"):
            raise
        raise OSError(e.errno, e.strerror, str(path)) from e


def lock(path, what, wait=False):
    """Takes an exclusive lock on the file `path` and returns it: close() or `with` releases it.

    Child processes that inherit open files (close_fds=False) hold the lock as well, so a restarted
    script cannot interfere with children of one that was killed. `what` says what is locked, such
    as a folder. ValueError if another process holds the lock; with `wait` it waits instead.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    held = open(path, "a")
    _held.append(held)
    try:
        if fcntl:
            fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        else:
            msvcrt.locking(held.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        held.close()
        raise ValueError(f"{what} is in use by another process (lock file {path}): wait for it, or "
                         "stop it") from None
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise
        print(f"note: {what} is not locked, its file system has no locks: do not run two "
              "processes on it")
    os.set_inheritable(held.fileno(), True)
    return held


@contextlib.contextmanager
def atomic(path, mode, **options):
    """Opens a file that appears at `path` only when it is complete; on an error nothing is left."""
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
    import torch  # here: scripts without a network start faster
    with atomic(path, "wb") as f:
        try:
            torch.save(obj, f)
        except RuntimeError as e:
            # on a full disk closing the archive fails too, which hides the reason
            raise (e.__context__ if isinstance(e.__context__, OSError) else e) from None
