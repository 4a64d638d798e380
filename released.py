"""
The authors' released weights by name. They are fetched once, into ckpt/released/.

    python released.py                                      # lists the names
    python finetune_cls.py --init=released:vocals           # a separator to start from
    python eval.py released:mtat_vocals                     # a classifier, on data/mtat
    python finetune_cls.py config/mtat.py --variant=v3 --init=released:vocals \\
        --tail=released:mtat_tail                           # join two

Each name stands for the two files of a TensorFlow checkpoint. A download goes on where it broke
off. Every tensor is compared with the checksum in the index before a file is used.
"""
import difflib
import os

from filelock import FileLock

import download
import model
import runtime
import tf_checkpoint
from prepare import fma

BASE = "https://raw.githubusercontent.com/cgaroufis/MSSPT/main/models/"
FOLDER = os.path.join("ckpt", "released")
PAUSES = (1,)       # seconds; a name should not take minutes to say that there is no network

# the numbers of the checkpoints; tune+ is the whole network from scratch
SEPARATORS = dict.fromkeys(("vocals", "bass", "drums", "other", "multisource"), 20)
MTAT = {"vocals": 25, "bass": 42, "drums": 23, "other": 29, "multisource": 33, "tail": 28,
        "tune+": 33}
FMA = {"vocals": 13, "bass": 12, "drums": 5, "other": 9, "multisource": 10, "tail": 17,
       "tune+": 11}
PLACES = {
    **{name: f"separators/{name}/checkpoint-{n}" for name, n in SEPARATORS.items()},
    **{f"mtat_{name}": f"downstream_models/MTAT/{name}/checkpoint-{n}" for name, n in MTAT.items()},
    **{f"fma_{name}": f"downstream_models/FMA/{name}/checkpoint-{n}" for name, n in FMA.items()},
}
# what the taggers answer, in their order, as MagnaTagATune spells it
TAGS = [
    "guitar", "classical", "slow", "techno", "strings", "drums", "electronic", "rock", "fast",
    "piano", "ambient", "beat", "violin", "vocal", "synth", "female", "indian", "opera", "male",
    "singing", "vocals", "no vocals", "harpsichord", "loud", "quiet", "flute", "woman",
    "male vocal", "no vocal", "pop", "soft", "sitar", "solo", "man", "classic", "choir", "voice",
    "new age", "dance", "male voice", "female vocal", "beats", "harp", "cello", "no voice",
    "weird", "country", "female voice", "metal", "choral"]


def fetch(name):
    """The prefix of a released checkpoint on this machine, downloaded if it is not there.

    ValueError with what to do if there is no such name, no network, or the bytes are wrong.
    """
    if name not in PLACES:
        near = difflib.get_close_matches(name, PLACES, 1, 0.4)
        hint = f", did you mean {near[0]}?" if near else ""
        raise ValueError(f"no released weights are called {name!r}{hint} (python released.py lists "
                         "the names)")
    prefix = os.path.join(FOLDER, *PLACES[name].split("/"))
    folder, url = os.path.dirname(prefix), BASE + PLACES[name].replace("+", "%2B")
    os.makedirs(folder, exist_ok=True)
    with FileLock(os.path.join(folder, ".lock")):       # the runs of a table may ask at once
        both = (".index", ".data-00000-of-00001")
        new = [end for end in both if not os.path.exists(prefix + end)]
        try:
            download.fetch([(url + end, "") for end in new], folder, pauses=PAUSES)
        except ValueError as e:
            raise ValueError(f"{e} (of its two files, {' and '.join(new)}, none may be missing). "
                             "A network of your own needs none of this: name its .pt file") from e
        if new:
            check(prefix, new)
            print(f"released:{name}: every tensor has the checksum of the index")
    return prefix


def check(prefix, new):
    """Deletes the new files and raises ValueError if a checksum does not hold."""
    try:
        tf_checkpoint.read(prefix)
    except ValueError as e:
        for end in new:
            os.remove(prefix + end)
        if len(new) == 2:
            raise
        raise ValueError(f"{e}; if that does not help, delete {prefix}.* and try again") from e


def load(name, device="cpu"):
    """(model in eval mode, meta) as model.load, with the names that the files lack."""
    net, meta = model.load(fetch(name), device)
    meta["source"] = "released"
    dataset, _, row = name.rpartition("_")
    multilabel, four = dataset == "mtat", row == "multisource"
    classes = (TAGS if multilabel else fma.GENRES) if dataset else None
    expected = "classifier" if dataset else "separator", len(classes or ()), four
    found = meta["kind"], net.args.get("n_classes", 0), len(net.args["sources"]) == 4
    if found != expected:
        raise ValueError(f"{FOLDER}/{PLACES[name]} is another network than released:{name} should "
                         "be: delete its two files, and the same command downloads them again")
    if not dataset:
        net.sources = net.args["sources"] if four else [row]
        net.args["sources"] = net.sources
        meta["config"] = {"data": "data/musdb"}
        return net, meta
    meta["classes"] = classes
    meta["task"] = "tags" if multilabel else "genre"
    meta["config"] = {"data": f"data/{dataset}"}
    return net, meta


def main():
    _, names = runtime.configure(globals(), configs=False)
    for name in names:
        fetch(name)
    if not names:
        for name, place in PLACES.items():
            there = os.path.exists(os.path.join(FOLDER, place + ".index"))
            print(f"released:{name:18}{'here' if there else '':6}{BASE}{place}.index")


if __name__ == "__main__":
    runtime.script(main)
