"""
The authors' released weights by name. They are downloaded once, to ckpt/released/.

    python -m weights.released                              # list the names
    python -m weights.released vocals                       # download one
    python finetune_cls.py --init=released:vocals           # start from a separator
    python eval.py released:mtat_vocals                     # evaluate a classifier, on data/mtat

Each name stands for the two files of a TensorFlow checkpoint. Interrupted downloads resume, and are
accepted only if the content has the git blob id of the authors' file.
"""
import difflib
import os
from urllib.parse import quote

from common import download, files, settings
from weights.tensorflow import load as load_tensorflow

BASE = "https://raw.githubusercontent.com/cgaroufis/MSSPT/main/models/"
FOLDER = os.path.join("ckpt", "released")
PAUSES = (1,)       # seconds between attempts: without a network, fail at once
ENDINGS = (".index", ".data-00000-of-00001")

PLACES, BLOBS = {}, {}      # {name: path below BASE}, {name: git blob ids of both files}
with open(os.path.join(os.path.dirname(__file__), "released.tsv"), encoding="ascii") as _table:
    for _name, _step, *_ids in map(str.split, _table.read().splitlines()[1:]):
        _dataset, _, _row = _name.rpartition("_")       # tune+ is the row from scratch
        _folder = f"downstream_models/{_dataset.upper()}" if _dataset else "separators"
        PLACES[_name] = f"{_folder}/{_row}/checkpoint-{_step}"
        BLOBS[_name] = _ids

# classes in the order of the authors' outputs, as MagnaTagATune and FMA spell them
TAGS = (
    "guitar, classical, slow, techno, strings, drums, electronic, rock, fast, piano, ambient, beat,"
    " violin, vocal, synth, female, indian, opera, male, singing, vocals, no vocals, harpsichord, "
    "loud, quiet, flute, woman, male vocal, no vocal, pop, soft, sitar, solo, man, classic, choir, "
    "voice, new age, dance, male voice, female vocal, beats, harp, cello, no voice, weird, country,"
    " female voice, metal, choral").split(", ")
GENRES = (
    "Electronic, Instrumental, Hip-Hop, Country, Spoken, Old-Time / Historic, Classical, Blues, "
    "International, Pop, Folk, Jazz, Experimental, Easy Listening, Rock, Soul-RnB").split(", ")


def fetch(name):
    """The local path prefix of a released checkpoint; downloads what is missing.

    ValueError if the name is unknown, the download fails, or a file is not the published one.
    """
    if name not in PLACES:
        near = difflib.get_close_matches(name, PLACES, 1, 0.4)
        hint = f", did you mean {near[0]}?" if near else ""
        raise ValueError(f"no released weights are called {name!r}{hint} (python -m "
                         "weights.released lists the names)")
    prefix = os.path.join(FOLDER, *PLACES[name].split("/"))
    folder, url = os.path.dirname(prefix), BASE + quote(PLACES[name])
    both = " and ".join(os.path.basename(prefix) + ending for ending in ENDINGS)
    with files.lock(os.path.join(folder, ".lock"), folder, wait=True):
        download.fetch(
            [(url + ending, f"gitblob:{blob}")
             for ending, blob in zip(ENDINGS, BLOBS[name], strict=True)],
            folder, f" ({both}), or give the .pt file of a network of your own", PAUSES)
    return prefix


def load(name):
    """(net, meta) of weights.tensorflow, with the sources, classes and dataset of the paper."""
    net, meta = load_tensorflow(fetch(name))
    dataset, _, row = name.rpartition("_")
    classes = {"mtat": TAGS, "fma": GENRES}.get(dataset)
    kind = "classifier" if dataset else "separator"
    expected = kind, len(classes or ()), row == "multisource"
    actual = meta["kind"], net.args.get("n_classes", 0), len(net.args["sources"]) == 4
    if actual != expected:      # files copied there by hand
        raise ValueError(f"{FOLDER}/{PLACES[name]}.* are not the files of released:{name}: delete "
                         "both, and the same command downloads them")
    meta |= {"source": "released", "config": {"data": f"data/{dataset or 'musdb'}"}}
    if dataset:
        meta |= {"classes": classes, "task": "tags" if dataset == "mtat" else "genre"}
    elif row != "multisource":
        net.sources = net.args["sources"] = [row]
    return net, meta


def main():
    _, names = settings.configure(globals(), configs=False)
    for name in names:
        fetch(name)
    if not names:
        for name, place in PLACES.items():
            local = os.path.exists(os.path.join(FOLDER, place + ".index"))
            print(f"released:{name:18}{'here' if local else '':6}{BASE}{place}.index")


if __name__ == "__main__":
    settings.script(main)
