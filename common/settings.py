"""
Settings of a script, and the wrapper around its main().

    config, names = settings.configure(globals())   # defaults < config/*.py < --key=value
    settings.script(main)                           # an error is one line and exit status 1
"""
import ast
import contextlib
import difflib
import functools
import io
import math
import os
import sys
import tokenize
import types

from common.files import FULL

MOVED = {       # former keys, and what to do instead
    "report": "draw the page with python -m reports.page FILE",
    "name": "eval.py writes no summary file, table.py does",
    "print": "use --dry_run=True", "format": "use --codec=",
    **dict.fromkeys(("data_on_gpu", "cuda_graph"), "the script decides by itself"),
    **dict.fromkeys(("frames", "batch_scale", "halvings", "sgd_rates", "patience", "warmup"),
                    "fixed by the recipe in finetune_cls.py")}


def die(message):
    """Exits with status 1 and one line on stderr: what is wrong, and what to do."""
    raise SystemExit(f"error: {message}")


def clock(seconds):
    """3725 -> '1h02m'."""
    s = int(seconds + 0.5)
    if s >= 6000:
        return f"{s // 3600}h{s // 60 % 60:02d}m"
    return f"{s}s" if s < 100 else f"{s // 60}m{s % 60:02d}s"


def script(main):
    """Runs main() and exits with the status that it returns (None is 0).

    Errors of the user's machine or input are one line and status 1; bugs keep their traceback.
    """
    # a file name may contain characters that the console cannot display
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
    except (OSError, ImportError, ValueError, KeyboardInterrupt, MemoryError, RuntimeError) as e:
        message = explain(e, main.__globals__)
        if message is None:
            raise
        die(message)
    finally:
        dist = sys.modules.get("torch.distributed")     # imported only by scripts that train
        if dist and dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(status)


def explain(e, settings):
    """One line about an exception in a script with these `settings`; None if it is a bug."""
    if isinstance(e, OSError):
        message = f"{e.filename}: {e.strerror}" if e.filename else str(e)
        if e.errno in FULL:
            message += "; free some space and run the same command again"
        return message
    if isinstance(e, ImportError):
        alone = f", or pip install {e.name}" if e.name else ""      # an optional package
        return f"{e}: pip install -r requirements.txt{alone}"
    if isinstance(e, (ValueError, KeyboardInterrupt)):
        return str(e) or "stopped"
    # PyTorch has no exception class for lack of CPU memory
    phrases = ("out of memory", "not enough memory", "can't allocate memory")
    if isinstance(e, MemoryError) or any(phrase in str(e) for phrase in phrases):
        keys = [f"--{key}" for key in ("batch_size", "workers") if key in settings]
        return f"out of memory: lower {' or '.join(keys) or 'the length of the audio'}"
    return None


@functools.cache
def documented_keys(path):
    """{key: (default, comment)} of the lower-case literal assignments at the top of a script."""
    with tokenize.open(path) as f:
        source = f.read()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments, first = {}, 0
    for token in (t for t in tokens if t.type == tokenize.COMMENT):
        (row, column), text = token.start, token.string.lstrip("# ")
        if column and not token.line[:column].strip():      # continues the comment above
            comments[first] += f" {text}"
        else:
            comments[row], first = text, row
    keys = {}
    for node in ast.parse(source).body:
        name = getattr(node.targets[0], "id", "") if isinstance(node, ast.Assign) else ""
        if name.islower():
            with contextlib.suppress(ValueError):   # a computed value is not a setting
                keys[name] = ast.literal_eval(node.value), comments.get(node.end_lineno, "")
    return keys


def defaults(path):
    """{key: default} of a script."""
    return {key: default for key, (default, _) in documented_keys(path).items()}


def configure(scope, argv=None, configs=True, more=()):
    """Overrides the settings in `scope`, the globals() of a script; returns (config, rest).

    Precedence, lowest first: defaults in the script, config files in the given order, --key=value.
    rest: the names of the config files; with configs=False all positional arguments. Assignments in
    the Python files of `more` are keys too, in config only. Exits for unknown keys or wrong types.
    """
    argv = sys.argv[1:] if argv is None else argv
    own = documented_keys(scope["__file__"])
    keys = dict(own)
    for path in more:
        keys = {**keys, **documented_keys(path), **keys}    # the first one counts
    if "--help" in argv or "-h" in argv:
        print(scope["__doc__"].strip())
        if keys:
            print("\nkeys, as --key=value:")
        for key, (default, comment) in keys.items():
            print(f"{f'  {key} = {default!r}':40}  # {comment}")
        raise SystemExit(0)

    config = {key: default for key, (default, _) in keys.items()}
    rest = [os.path.expanduser(arg) for arg in argv if not arg.startswith("-")]
    if configs:
        for path in rest:
            for key, value in run_config(path).items():
                config[key] = _typed(key, value, _default(key, keys, path), path)
        rest = [os.path.splitext(os.path.basename(path))[0] for path in rest]
    for option in [arg for arg in argv if arg.startswith("-")]:
        key, equals, text = option.removeprefix("--").partition("=")
        if not option.startswith("--") or not equals:
            die(f"{option}: options are written --key=value, like --resume=True")
        default = _default(key, keys, f"--{key}")
        config[key] = _typed(key, _parse(text, default), default, f"--{key}")
    scope.update({key: config[key] for key in own})
    return config, rest


def run_config(path):
    """The assignments of a config file as a dictionary."""
    scope = {"__file__": path}
    try:
        with tokenize.open(path) as f:
            exec(compile(f.read(), path, "exec"), scope)
    except Exception as e:  # a config file is arbitrary Python
        hint = "" if path.endswith(".py") else " (options are written --key=value)"
        die(f"config file {path}: {type(e).__name__}: {e}{hint}")
    imported = [k for k, v in scope.items() if isinstance(v, types.ModuleType) or callable(v)]
    return {k: v for k, v in scope.items() if not k.startswith("_") and k not in imported}


def _default(key, keys, where):
    """The default of a known key."""
    if key not in keys:
        near = difflib.get_close_matches(key, keys, 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists all keys"
        die(f"{where}: unknown key {key!r}: {MOVED.get(key, hint)}")
    return keys[key][0]


def _parse(text, default):
    """The value of --key=text; _typed() checks its type."""
    if isinstance(default, str):
        return text
    if isinstance(default, list) and not text.startswith("["):
        like = default[0] if default else 0
        return [_parse(part, like) for part in text.split(",")] if text else []
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _typed(key, value, default, where):
    """Converts value to the type of default if that is exact: int to float, tuple to list."""
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
    return os.path.expanduser(value) if kind is str and value.startswith("~/") else value


def choose(key, value, allowed):
    if value not in allowed:
        die(f"{key} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def at_least(least, **settings):
    within(least, math.inf, **settings)


def within(low, high, **settings):
    for key, value in settings.items():
        if not low <= value <= high:
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            die(f"{key} must be {bounds}, got {value}")


def check_numbers(config, *positive):
    """Exits if a number is not finite, one of `positive` not above 0, or seed not 32 bits."""
    for key, value in config.items():
        for number in value if isinstance(value, list) else [value]:
            finite = not isinstance(number, float) or math.isfinite(number)
            if not finite or (key in positive and (isinstance(number, str) or number <= 0)):
                above = " above 0" if key in positive else ""
                die(f"{key} must be a finite number{above}, got {value}")
    within(0, 2 ** 32 - 1, seed=config.get("seed", 0))
