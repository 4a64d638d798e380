"""
What every script here needs around its own work: a configuration, a device, a log, and files that are complete or not there.

    config, rest = configure(globals())      # the script's own assignments < config/*.py < --key=value
"""
import ast
import ctypes
import difflib
import json
import os
import sys
import time
import tokenize
import types

import torch
import torch.distributed as dist


def die(message):
    """Ends the script with one line that says what is wrong and what to do."""
    raise SystemExit(f"error: {message}")


# -----------------------------------------------------------------------------
# configuration: plain assignments, overridden by Python files of assignments, overridden by --key=value

def _documented_keys(path):
    """{key: (default, comment)} of the lower-case literal assignments at the top level of a script."""
    with tokenize.open(path) as f:
        source = f.read()
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(iter(source.splitlines(True)).__next__)
                if t.type == tokenize.COMMENT}
    keys = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.islower():
            try:
                keys[node.targets[0].id] = (ast.literal_eval(node.value), comments.get(node.end_lineno, ""))
            except ValueError:
                pass  # computed, not a setting
    return keys


def _typed(key, value, default, where):
    """value as the type of default: int where it loses nothing, int to float, tuple to list; else the script ends with a line."""
    kind = type(default)
    if kind is int and type(value) is float and value.is_integer() or kind is float and type(value) is int:
        return kind(value)
    if kind is list and type(value) in (list, tuple):
        return [_typed(key, v, default[0], where) if default else v for v in value]
    if type(value) is not kind:
        die(f"{where}: {key} must be {'true or false (True / False)' if kind is bool else kind.__name__}, like {default!r}, got {value!r}")
    return value


def _parse(key, text, default):
    """The value that the text of --key=text stands for."""
    if isinstance(default, str):
        return text
    if isinstance(default, list) and text and not text.startswith("["):
        text = repr(text.split(",")) if default and isinstance(default[0], str) else f"[{text}]"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # of the wrong type: _typed says so


def _known(key, keys, where):
    if key not in keys:
        near = difflib.get_close_matches(key, keys, 1, 0.4)
        die(f"{where}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else "") + " (--help lists all keys)")


def _run_config(path):
    """The assignments of a config file, as a dictionary."""
    if not os.path.isfile(path):
        die(f"no config file {path}" + ("" if path.endswith(".py") else "; options are written --key=value"))
    scope = {"__file__": path}
    try:
        with tokenize.open(path) as f:
            exec(compile(f.read(), path, "exec"), scope)
    except Exception as e:  # a config file is any Python: whatever it raises is a mistake in it, told with its place
        die(f"{path}: {type(e).__name__}: {e}")
    return {k: v for k, v in scope.items() if not k.startswith("_") and not isinstance(v, types.ModuleType) and not callable(v)}


def configure(scope, argv=None, configs=True):
    """Overrides the settings in `scope` (the globals() of a script) and returns (config, other positional arguments).

    Order of precedence: defaults in the script, config files in the order given, --key=value. With configs=False positional
    arguments are the script's own. --help prints every key. SystemExit with one line for unknown keys and wrong types."""
    argv = sys.argv[1:] if argv is None else argv
    keys = _documented_keys(scope["__file__"])
    if "--help" in argv or "-h" in argv:
        print((scope["__doc__"] or "").strip() + "\n\nkeys, as --key=value:")
        for key, (default, comment) in keys.items():
            print(f"  {key} = {default!r}".ljust(40) + (f"  # {comment}" if comment else ""))
        raise SystemExit(0)
    config, rest, names = {key: default for key, (default, _) in keys.items()}, [], []
    for path in [a for a in argv if not a.startswith("-")]:
        if not configs:
            rest.append(path)
            continue
        for key, value in _run_config(path).items():
            _known(key, keys, path)
            config[key] = _typed(key, value, keys[key][0], path)
        names.append(os.path.splitext(os.path.basename(path))[0])
    for arg in [a for a in argv if a.startswith("-")]:
        key, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or not equals:
            die(f"{arg}: options are written --key=value" + (f", like --{key}=True" if type(config.get(key)) is bool else ""))
        _known(key, keys, f"--{key}")
        config[key] = _typed(key, _parse(key, text, keys[key][0]), keys[key][0], f"--{key}")
    scope.update(config)
    return config, (rest if not configs else names)


def choose(key, value, allowed):
    if value not in allowed:
        die(f"{key} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def at_least(least, **settings):
    for key, value in settings.items():
        if value < least:
            die(f"{key} must be at least {least}, got {value}")


# -----------------------------------------------------------------------------
# device, processes, precision, compilation

def start(device):
    """(device, rank, world size); joins the other processes when launched by torchrun. device '' takes CUDA where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.startswith("cuda") and not torch.cuda.is_available():
        die(f"device={device}, but this PyTorch sees no CUDA device: use --device=cpu")
    if world > 1 and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    elif world > 1 and device != "cpu":
        die(f"device={device} with {world} processes: use --device=cuda, and each takes a GPU of its own")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        die(f"device={device} does not work here: {str(e).splitlines()[0]}")
    if world > 1:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if device == "cpu":
        keep_freed_memory()
    return device, rank, world


def keep_freed_memory():
    """Tells glibc not to hand freed tensors back to the kernel, which gives them out again zeroed, page by page: a training step takes
    1.6 times as long that way (LOG.md). Other C libraries do not have mallopt and are left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # as size_t: never


def amp_dtype(dtype):
    """None for float32; only the convolutional parts of a network run in the other two (see model.py)."""
    choose("dtype", dtype, ["float32", "bfloat16", "float16"])
    return None if dtype == "float32" else getattr(torch, dtype)


def compile_parts(parts, device):
    """Compiles the modules in place, if torch.compile works here at all; else says so in one line and leaves them eager.

    torch.compile() itself never fails, its first call does (no C++ compiler, no Triton, old GPU): so it is tried on a small net first."""
    probe = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.LeakyReLU()).to(device)
    try:
        torch.compile(probe, dynamic=False)(torch.zeros(2, 1, 8, 8, device=device)).sum().backward()
    except Exception as e:  # the back ends fail in many ways of their own; each means: not here
        print(f"torch.compile does not work here ({type(e).__name__}: {str(e).strip().splitlines()[0][:100]}): running without it")
        return
    print("compiling: the first step of training takes a minute or more (--compile=False does without)")
    for part in parts:
        part.compile(dynamic=False)  # in place: the names of the weights stay as they are


def sum_over_ranks(values, device):
    """The element-wise sum of a list of numbers over all processes."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


# -----------------------------------------------------------------------------
# files

def save_atomically(thing, path):
    """torch.save under another name, then rename: what stands at `path` is always a whole file."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as f:
        torch.save(thing, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_atomically(text, path):
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def read_checkpoint(path):
    """The dictionary in a .pt or .resume file: tensors and plain values, nothing that could run code. ValueError if it is anything else."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load has no error type of its own: zip, pickle, key and runtime errors all occur for broken files
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(e).__name__}): is it complete, and one of ours?") from e
    if not isinstance(saved, dict) or not {"kind", "model", "args"} <= saved.keys():
        raise ValueError(f"{path} is not a checkpoint of this project (no kind, args and model in it)")
    return saved


def cpu_weights(net):
    """The state dictionary on the CPU, so that a plain torch.load reads it anywhere."""
    return {name: value.cpu() for name, value in net.state_dict().items()}


def check_finite(net):
    """A network with NaN or infinity in its weights or BatchNorm statistics is never saved."""
    bad = [name for name, value in net.state_dict().items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        die(f"{len(bad)} tensors are no longer finite ({bad[0]}, ...): lower learning_rate, or use --dtype=bfloat16 or float32; nothing was saved")


def claim_output(out, resume, overwrite):
    """The resume file's contents, or None to start anew. Ends the script rather than write over a run that is there."""
    last = out.removesuffix(".pt") + ".resume"
    if not out.endswith(".pt"):
        die(f"out={out} must end in .pt")
    if resume:
        if not os.path.isfile(last):
            die(f"resume=True, but there is no {last} to go on from")
        saved = read_checkpoint(last)
        if not {"config", "best", "optimizer", "scaler"} <= saved.keys():
            die(f"{last} holds a network, but not what resuming needs")
        return saved
    found = [p for p in (out, last, out.removesuffix(".pt") + ".jsonl") if os.path.exists(p)]
    if found and not overwrite:
        die(f"{found[0]} exists: --resume=True goes on with that run, --overwrite=True replaces it, --out=ckpt/NAME.pt writes elsewhere")
    return None  # what is there is replaced by the first save of the new run, no sooner


def same_run(old, new):
    """Ends the script if a resumed run was started with other settings than these, but for those that do not change its course."""
    free = ["resume", "overwrite", "out", "steps", "device", "compile", "log_every", "workers"]
    free += ["data"] if "trained_on" in old else ["trained_on"]  # what training sees of the data, wherever it lies; older runs did not say
    changed = [f"{k}: {old.get(k)!r} -> {new[k]!r}" for k in new if old.get(k) != new[k] and k not in free]
    if [c.partition(":")[0] for c in changed] == ["trained_on"]:
        die(f"the splits or labels in {new['data']} are not those that this run was started with: give it another --out, or --overwrite=True")
    if changed:
        die(f"this run was started with other settings ({'; '.join(changed)}): give the same ones to resume it")


class Log:
    """One entry to the screen and to a JSON-lines file. On resuming, entries from after the saved step are dropped: they come again."""

    def __init__(self, path, resumed_at=None):
        self.path, self.start = path, time.time()
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        kept = []
        if resumed_at is not None and os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                whole = [line for line in f if line.endswith("\n")]
            order = [(entry["step"], "val_loss" in entry) for entry in map(json.loads, whole)]
            kept = [line for line, at in zip(whole, order) if at < (resumed_at, True)]  # validation follows saving, so it comes again
        write_atomically("".join(kept), path)

    def __call__(self, line, **entry):
        print(line, flush=True)
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps({**entry, "seconds": round(time.time() - self.start, 2)}) + "\n")


def clock(seconds):
    """3725 -> '1h02m'."""
    s = int(seconds + 0.5)
    return f"{s}s" if s < 100 else f"{s // 60}m{s % 60:02d}s" if s < 6000 else f"{s // 3600}h{s // 60 % 60:02d}m"
