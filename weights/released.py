"""
The authors' released weights by name. They are downloaded once, to ckpt/released/.

    python -m weights.released                              # list the names
    python -m weights.released vocals                       # download one
    python finetune_cls.py --init=released:vocals           # start from a separator
    python eval.py released:mtat_vocals                     # evaluate a classifier, on data/mtat
    python finetune_cls.py config/mtat.py --variant=v3 --init=released:vocals \\
        --tail=released:mtat_tail                           # join two

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

# name, step, and the git blob ids of both files, 40 digits each; tune+ was trained from scratch
FILES = """
vocals 20 5f1fafb109d9357f38258ac9f62fd3536f4e24f7581b0fd83018fb460f7f239bdb136d38ed85c4ec
bass 20 ac3fcb133e9c6c27d6740aaca328eb8f6de285233ac22f68f21df33c74c4bda60d4da79ea4c8940c
drums 20 8a04a736e4ef0dd9f3c185106841badbb500361a0d21fb5bdefe9a420ed275be8a47648df4eaf535
other 20 98f22b1e4e829376633465b6f78fec056b031c3d30f8fd8dac07489b212a7ccbfaf5d357a634a166
multisource 20 543040d9d1880eb13ccfb67853bc9001dd64119f9d6a6e026b5352dfd7bab8df5e7e1bb43789745d
mtat_vocals 25 d11bbefd654ba5817886061bbd7a7892b876c74f7475e6ea99d860362b9cb3af93f0e41a86556576
mtat_bass 42 db15f230902221ed4372568bfe7a000e655f6bea591bd493385224c3dc40f1782126348674370a81
mtat_drums 23 a86caccf48a88d2c318ea1cd707d70f4a363e2eccf700f320114e5f396358af4b2108871b86faec0
mtat_other 29 83fc58834179f9ac0a5a598f46d39284501fb213d8328bd31548217a2aaaa226daf46439506e6fdb
mtat_multisource 33 3dfb746a889206b1e78db86fe15f86e479697ba2d14facd97309f83496ea437da38c878f43a9f400
mtat_tail 28 b75fc15cc581688666d89fffe98d71a310fffa925a592fa33a75e3d76515e0d1c933c184818ed2d3
mtat_tune+ 33 f76079139946f381de6875158d47d3328f55cea9be87874c8446ed08e2dc8c2df68c67d8496762cf
fma_vocals 13 0ed857ae17804b9f4db17b6963ae24b52564014a12d1480c31ee15a01ef5feebd0e03cda1f6769e2
fma_bass 12 e78baed447112ab881f1130348ddd36122bf8444a4316dbf8b21e48f58604b7f618a9cfcf9a5bdcd
fma_drums 5 f6cb8966afd0fc3219b6ea70d278a8917dddecdadd5a6f8059a57e377c6a4f62af29d1673ba3ab1a
fma_other 9 817d1d9c9ae826027ee2dffb8d3f4c40bfd226f932c1430dc7573c3f4a2e2ec2afb9630f674004cf
fma_multisource 10 da8553155a101206fbf80f2663619af59e322c30ca8d2f9a57a2cd6529e43e98a82cbcf9d72b88f9
fma_tail 17 f93b6641bf521c6e61cbcdd5f8803e4575f75c858dda7c8474f6454c3cd01f9b31bc716c5cabd7f0
fma_tune+ 11 9f88e6570bc3752fc6510460850171c16bed5f668967470d1c03fb0015ae9ee93317cf9ed3694d62
"""
PLACES, BLOBS = {}, {}      # {name: path below BASE}, {name: the two ids}
for _name, _step, _ids in map(str.split, FILES.strip().splitlines()):
    _dataset, _, _row = _name.rpartition("_")
    _folder = f"downstream_models/{_dataset.upper()}" if _dataset else "separators"
    PLACES[_name] = f"{_folder}/{_row}/checkpoint-{_step}"
    BLOBS[_name] = _ids[:40], _ids[40:]

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
    expected = "classifier" if dataset else "separator", len(classes or ()), row == "multisource"
    found = meta["kind"], net.args.get("n_classes", 0), len(net.args["sources"]) == 4
    if found != expected:       # both files were put there by hand
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
