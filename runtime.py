"""
What the scripts need around their own work: settings, a device, whole files, meter and log.

    config, names = runtime.configure(globals())    # own assignments < config/*.py < --key=value
    runtime.script(main)                            # errors become one line and exit status 1
"""
import ast
import contextlib
import ctypes
import difflib
import errno
import functools
import math
import mmap
import os
import signal
import sys
import tokenize
import types

import torch
import torch.distributed as dist

import kernels

try:
    import fcntl
except ImportError:     # Windows has none
    fcntl = None


FULL = (errno.ENOSPC, errno.EDQUOT)     # the disk is full, or this user's share of it


def die(message):
    """Ends the script with one line that says what is wrong and what to do."""
    raise SystemExit(f"error: {message}")


def clock(seconds):
    """3725 -> '1h02m'."""
    s = int(seconds + 0.5)
    if s >= 6000:
        return f"{s // 3600}h{s // 60 % 60:02d}m"
    return f"{s}s" if s < 100 else f"{s // 60}m{s % 60:02d}s"


# -----------------------------------------------------------------------------
# around main()

def script(main):
    """Runs main() and ends the process with the exit status that it returns (None is 0).

    What goes wrong on a user's machine ends with one line and exit status 1. Other errors are
    mistakes in the program, and keep their traceback.
    """
    # a file name may hold letters that the console cannot show
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
    except OSError as e:
        told = f"{e.filename}: {e.strerror}" if e.filename else e
        if e.errno in FULL:
            told = f"{told}; make room there, and the same command goes on"
        die(told)
    except ImportError as e:
        die(f"{e}: install what requirements.txt lists (pip install -r requirements.txt)")
    except ValueError as e:
        die(e)
    except KeyboardInterrupt:
        die("stopped")
    except (MemoryError, RuntimeError) as e:
        # that memory ran out, of the CPU or a GPU, PyTorch tells only by its words
        words = ("out of memory", "not enough memory", "can't allocate memory")
        if not isinstance(e, MemoryError) and not any(w in str(e) for w in words):
            raise
        keys = [f"--{key}" for key in ("batch_size", "workers") if key in main.__globals__]
        die(f"out of memory: lower {' or '.join(keys) or 'the length of what it works on'}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(status)


def cores():
    """How many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


class Stop:
    """Notes the first Ctrl-C or SIGTERM in `asked`. The second one ends the process at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.asked = True
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, signal.SIG_DFL)
        # print() may be in use at this moment: write past it
        os.write(2, b"\nstopping after this step; a second signal leaves at once\n")


# -----------------------------------------------------------------------------
# configuration: plain assignments, overridden by Python files of assignments and by --key=value

@functools.cache
def documented_keys(path):
    """{key: (default, comment)} of the lower-case literal assignments at the top of a script."""
    with tokenize.open(path) as f:
        source = f.read()
    tokens = tokenize.generate_tokens(iter(source.splitlines(True)).__next__)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    keys = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        name = node.targets[0].id
        try:
            value = ast.literal_eval(node.value)
        except ValueError:
            continue  # computed, not a setting
        if name.islower():
            keys[name] = (value, comments.get(node.end_lineno, ""))
    return keys


def defaults(path):
    """{key: default} of a script."""
    return {key: default for key, (default, _) in documented_keys(path).items()}


def _typed(key, value, default, where):
    """value as the type of default: int and float where nothing is lost, tuple to list."""
    kind = type(default)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is list and type(value) in (list, tuple):
        return [_typed(key, v, default[0], where) if default else v for v in value]
    if type(value) is not kind:
        name = "True or False" if kind is bool else f"{kind.__name__}, like {default!r}"
        die(f"{where}: {key} must be {name}, got {value!r}")
    return value


def _parse(text, default):
    """The value that the text of --key=text stands for. A wrong type is found by _typed()."""
    if isinstance(default, str):
        return text
    if not isinstance(default, list) or text.startswith("["):
        return _literal(text)
    parts = text.split(",") if text else []
    names = default and isinstance(default[0], str)
    return parts if names else [_literal(part) for part in parts]


def _literal(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _known(key, keys, where):
    if key not in keys:
        near = difflib.get_close_matches(key, keys, 1, 0.4)
        hint = f", did you mean {near[0]!r}?" if near else ""
        die(f"{where}: unknown key {key!r}{hint} (--help lists all keys)")


def _run_config(path):
    """The assignments of a config file, as a dictionary."""
    if not os.path.isfile(path):
        hint = "" if path.endswith(".py") else "; options are written --key=value"
        die(f"no config file {path}{hint}")
    scope = {"__file__": path}
    try:
        with tokenize.open(path) as f:
            exec(compile(f.read(), path, "exec"), scope)
    except Exception as e:  # a config file is any Python: what it raises is told with its place
        die(f"{path}: {type(e).__name__}: {e}")
    imported = [k for k, v in scope.items() if isinstance(v, types.ModuleType) or callable(v)]
    return {k: v for k, v in scope.items() if not k.startswith("_") and k not in imported}


def _expand_home(value):
    """The value, with `~/` at the start of a text as the home folder."""
    is_path = isinstance(value, str) and value.startswith("~/")
    return os.path.expanduser(value) if is_path else value


def configure(scope, argv=None, configs=True, more=()):
    """Overrides the settings in `scope`, the globals() of a script; returns (config, rest).

    Order of precedence: defaults in the script, config files in the order given, --key=value.
    rest: the names of the config files; with configs=False all positional arguments. `more` lists
    further Python files whose assignments are keys too, in config only. --help prints every key.
    SystemExit with one line for unknown keys and wrong types.
    """
    argv = sys.argv[1:] if argv is None else argv
    own = documented_keys(scope["__file__"])
    keys = dict(own)
    for path in more:
        keys |= {key: its for key, its in documented_keys(path).items() if key not in keys}
    if "--help" in argv or "-h" in argv:
        print(scope["__doc__"].strip() + "\n\nkeys, as --key=value:" * bool(keys))
        for key, (default, comment) in keys.items():
            print(f"{f'  {key} = {default!r}':40}  # {comment}")
        raise SystemExit(0)

    config = {key: default for key, (default, _) in keys.items()}
    rest = [_expand_home(arg) for arg in argv if not arg.startswith("-")]
    if configs:
        for path in rest:
            for key, value in _run_config(path).items():
                _known(key, keys, path)
                config[key] = _expand_home(_typed(key, value, keys[key][0], path))
        rest = [os.path.splitext(os.path.basename(path))[0] for path in rest]
    for option in [arg for arg in argv if arg.startswith("-")]:
        key, value = _parse_option(option, keys)
        config[key] = _expand_home(value)
    scope.update({key: config[key] for key in own})
    return config, rest


def _parse_option(option, keys):
    """(key, value) of --key=value."""
    key, equals, text = option.removeprefix("--").partition("=")
    if not option.startswith("--") or not equals:
        hint = f", like --{key}=True" if type(keys.get(key, [0])[0]) is bool else ""
        die(f"{option}: options are written --key=value{hint}")
    _known(key, keys, f"--{key}")
    default = keys[key][0]
    return key, _typed(key, _parse(text, default), default, f"--{key}")


def choose(key, value, allowed):
    if value not in allowed:
        die(f"{key} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def at_least(least, **settings):
    for key, value in settings.items():
        if value < least:
            die(f"{key} must be at least {least}, got {value}")


def within(low, high, **settings):
    for key, value in settings.items():
        if not low <= value <= high:
            die(f"{key} must be from {low} to {high}, got {value}")


def check_numbers(config, *positive):
    """No number may be NaN or infinite, the `positive` must be above 0, a seed has 32 bits."""
    for key, value in config.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                die(f"{key} must be a finite number, got {value}")
            if key in positive and number <= 0:
                die(f"{key} must be above 0, got {value}")
    within(0, 2 ** 32 - 1, seed=config.get("seed", 0))


# -----------------------------------------------------------------------------
# device, processes, precision, compilation

HEAP = 4 << 30          # bytes of memory that Linux may give out in large pages

# what the convolutional parts of a network run in, see model.py
AMP_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def start(device):
    """(device, rank, world size); joins the other processes when torchrun started this one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        die(f"device={device}, but this PyTorch sees no CUDA device: use --device=cpu")
    rank, world, local_rank = _place_among_processes()
    if world > 1 and device == "cuda":
        device = f"cuda:{local_rank}"
    elif world > 1 and device != "cpu":
        die(f"device={device} with {world} processes: use --device=cuda, and each takes a GPU of "
            "its own")
    if device == "cpu":
        keep_freed_memory()
    try:
        place = torch.empty(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        die(f"device={device} does not work here: {str(e).splitlines()[0]}")
    if place.type == "cuda":
        torch.cuda.set_device(place)        # graphs are recorded on the device that is set
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if rank > 0:        # what all have to say is said once; errors are not held back
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")
    if device == "cpu":
        kernels.kernel()    # compiled now if it is not there: later its note would be in the way
    return device, rank, world


def _place_among_processes():
    """(rank, world size, rank on this machine), from what torchrun leaves in the environment."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1":
        return 0, 1, 0
    # schedulers set WORLD_SIZE too; waiting for processes that nobody started would never end
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [key for key in needed if key not in os.environ]
    if missing:
        print(f"note: WORLD_SIZE={world} is ignored, as {', '.join(missing)} is not set: this is "
              "one process (torchrun starts several)", flush=True)
        return 0, 1, 0
    return int(os.environ["RANK"]), int(world), int(os.environ["LOCAL_RANK"])


def keep_freed_memory():
    """Tells glibc to keep freed memory, and Linux to give out the first 4 GiB in large pages.

    Else the kernel gets it, and gives it out again zeroed: a training step takes 1.6 times as long.
    PyTorch has large pages too (THP_MEM_ALLOC_ENABLE), but then begins each tensor at a page, which
    leaves gaps: the tail takes up to a GiB more. Other C libraries are left alone.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(-4, 0)         # M_MMAP_MAX: all is in the heap
    libc.mallopt(-1, -1)        # M_TRIM_THRESHOLD, as size_t: never

    # Only what the heap holds already can be marked. So it grows first, which takes no memory.
    # Without room for that there are no large pages: if malloc asked in vain, glibc would move this
    # thread to another heap, which gives memory back.
    try:
        mmap.mmap(-1, HEAP + mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, OverflowError):
        return
    libc.malloc.restype = ctypes.c_void_p
    begin, page = libc.malloc(ctypes.c_size_t(HEAP)), mmap.PAGESIZE
    if begin:
        first = (begin + page - 1) // page * page
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(HEAP - page), 14)  # MADV_HUGEPAGE
        libc.free(ctypes.c_void_p(begin))


def compile_parts(parts, device):
    """Compiles the modules in place, if torch.compile works here; else says so in one line.

    On a CPU this takes over a minute, and the steps are no faster than with our kernels.
    """
    # torch.compile() never fails, its first call does (no C++ compiler, no Triton, an old GPU)
    probe = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.LeakyReLU()).to(device)
    try:
        torch.compile(probe, dynamic=False)(torch.zeros(2, 1, 8, 8, device=device)).sum().backward()
    except Exception as e:  # the back ends fail in many ways of their own; each means: not here
        reason = f"{type(e).__name__}: {str(e).strip()}".splitlines()[0][:120]
        print(f"torch.compile does not work here ({reason}): running without it")
        return
    print("compiling: the first step takes a minute or more (--compile=False does without)")
    for part in parts:
        part.compile(dynamic=False)  # in place: the names of the weights stay as they are


# -----------------------------------------------------------------------------
# files

@contextlib.contextmanager
def naming(path):
    """A full disk does not say where it is full: an error without a path gets this one."""
    try:
        yield
    except OSError as e:
        if e.filename and not str(e.filename).endswith(".tmp"):
            raise
        raise OSError(e.errno, e.strerror, str(path)) from e


def hold(folder):
    """Holds the folder until this process, and all that it has started, is gone."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        die(f"{folder} is a file, and a folder is needed to write to")
    os.makedirs(folder, exist_ok=True)
    lock = os.open(os.path.join(folder, ".lock"), os.O_CREAT | os.O_RDWR, 0o666)
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        die(f"another process is at work in {folder}: wait for it, or stop it")
    os.set_inheritable(lock, True)


@contextlib.contextmanager
def atomic(path, mode, **options):
    """Opens a file that comes to stand at `path` only when it is whole; else nothing is left."""
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


def save_atomically(thing, path):
    """torch.save under another name, then rename: what stands at `path` is always whole."""
    with atomic(path, "wb") as f:
        try:
            torch.save(thing, f)
        except RuntimeError as e:
            # on a full disk closing the archive fails too, and hides the reason
            raise (e.__context__ if isinstance(e.__context__, OSError) else e) from None


def finite_weights(net):
    """The state dictionary on the CPU. NaN or infinity in it ends the script: it is never saved."""
    weights = {name: value.cpu() for name, value in net.state_dict().items()}
    bad = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        die(f"{len(bad)} tensors are no longer finite ({bad[0]}, ...): lower learning_rate, or use "
            "--dtype=bfloat16 or float32; nothing was saved")
    return weights
