"""
Checkpoints of any kind: .pt, .safetensors, TensorFlow's, and the authors' by name.

    import weights
    net, meta = weights.load("ckpt/vocals.pt")      # or released:vocals, or a TensorFlow prefix
"""
import fnmatch
import json
import os
import re

import torch

import model
from common import files
from weights import tensorflow

KINDS = {"separator": model.Separator, "classifier": model.Classifier}
KEPT = ("kind", "args", "classes", "task", "step", "config", "commit", "val_loss")


def load(path, device="cpu"):
    """(net in eval mode on `device`, meta) of a checkpoint.

    path: a .pt or .safetensors file, the prefix of a TensorFlow checkpoint (or one of its files),
    or released:NAME. meta has kind (separator or classifier), args of the class in model.py, step,
    config, classes (names or None), and more. FileNotFoundError, or ValueError for other files.
    """
    path = str(path)
    prefix = re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", path)
    if path.startswith("released:"):
        from weights import released  # here, as `python -m weights.released` imports this file
        net, meta = released.load(path.removeprefix("released:"))
    elif os.path.exists(f"{prefix}.index"):
        net, meta = tensorflow.load(prefix)
    elif not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}, and no {prefix}.index")
    else:
        meta = read_checkpoint(path)
        try:
            net = KINDS[meta["kind"]](**meta["args"])
            net.load_state_dict(meta.pop("model"))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            raise ValueError(f"{path} does not fit model.py: {e!r:.200}") from e
    return net.to(device).eval(), meta


def read_checkpoint(path):
    """{kind, args, model: {name: tensor}, ...} of a .pt, .resume or .safetensors file.

    No code in the file is executed. ValueError if it is anything else.
    """
    path = str(path)
    if path.lower().endswith((".keras", ".h5", ".hdf5")):
        raise ValueError(f"{path} is a Keras file: load it in TensorFlow with Keras 2, save it "
                         "with model.save_weights('NAME', save_format='tf'), and give NAME")
    if path.endswith(".safetensors"):
        import safetensors  # here: an optional package
    try:
        if path.endswith(".safetensors"):
            with safetensors.safe_open(path, "pt") as f:
                saved = json.loads(f.metadata()["about"])
                saved["model"] = {name: f.get_tensor(name) for name in f.keys()}
        else:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        saved["kind"], saved["args"], saved["model"]
    except Exception as e:  # zip, pickle, JSON, safetensors: there is no common error type
        raise ValueError(f"{path} is not a checkpoint of this project, or is incomplete "
                         f"({type(e).__name__})") from e
    return saved


def about(net, meta):
    """The header of an exported network, as values that JSON can hold."""
    header = {key: meta[key] for key in KEPT if key in meta}
    header |= {"gives": "scores", "sample_rate": model.SAMPLE_RATE}
    if meta["kind"] == "separator":
        header |= {"gives": "sources", "sources": net.sources}
    return header


def save_safetensors(net, meta, path):
    """Writes a checkpoint that load() reads. The header is JSON, under "about"."""
    from safetensors.torch import save  # here: an optional package
    tensors = {name: value.contiguous() for name, value in net.state_dict().items()}
    with files.atomic(path, "wb") as f:
        f.write(save(tensors, {"about": json.dumps(about(net, meta))}))


def name_of(path):
    """The name of a checkpoint in results; FOLDER_PREFIX for a TensorFlow checkpoint."""
    path = str(path)
    if path.startswith("released:"):
        return path.replace(":", "_")
    stem, ending = os.path.splitext(os.path.basename(path))
    if ending in (".pt", ".safetensors"):
        return stem
    return f"{os.path.basename(os.path.dirname(os.path.abspath(path)))}_{stem}"


def load_matching(net, state, source, allow_missing=()):
    """Copies tensors {name: tensor} into a module. ValueError unless all names and shapes match.

    allow_missing: patterns, such as "out.*", of names that may be missing in `state`.
    """
    own = net.state_dict()
    problems = {
        "missing": [name for name in own if name not in state
                    and not any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_missing)],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [f"{name} {tuple(state[name].shape)} instead of {tuple(w.shape)}"
                             for name, w in own.items() if state.get(name, w).shape != w.shape]}
    faults = [f"{len(names)} {problem} ({', '.join(names[:3])})"
              for problem, names in problems.items() if names]
    if faults:
        raise ValueError(f"{source} does not fit this network: tensors {'; '.join(faults)}")
    net.load_state_dict({**own, **state})
    new = len(own) - len(state)
    print(f"{len(state)} of {len(own)} tensors from {source}" + (f", {new} new" if new else ""))


def inflate(kernel, n):
    """Kernel (C, 1, h, w) -> (C, n, h, w) / n: n equal inputs give the output of one."""
    return kernel.expand(-1, n, -1, -1) / n
