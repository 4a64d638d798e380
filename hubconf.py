"""
The networks without this repository at hand, through torch.hub.

    import torch
    net = torch.hub.load("OWNER/REPOSITORY", "separator", "vocals")
    tagger = torch.hub.load("OWNER/REPOSITORY", "tagger", "mtat")

With a copy of the repository: torch.hub.load(FOLDER, "separator", "vocals", source="local").
The authors' weights are fetched once, into torch.hub's own folder.
"""
import os

import torch

import model
import released

dependencies = ["torch", "torchaudio", "numpy", "av", "filelock", "tqdm"]


def separator(source="vocals", device="cpu"):
    """A separator in eval mode, to be used with net.separate(wave, rate).

    source: vocals, bass, drums, other, multisource; or the path of a checkpoint.
    """
    net, _ = _load(source, source, "separator", device)
    net.separate = lambda wave, rate=model.SAMPLE_RATE: model.separate(net, wave, rate)
    return net


def tagger(dataset="mtat", source="vocals", device="cpu"):
    """A classifier in eval mode, to be used with net.tag(wave, rate); net.classes are the names.

    dataset: mtat or fma, and source what its U-Net has learnt to separate; or the path of a
    checkpoint.
    """
    net, meta = _load(dataset, f"{dataset}_{source}", "classifier", device)
    net.classes = meta["classes"]
    net.tag = lambda wave, rate=model.SAMPLE_RATE, hop=0.0: model.tag(net, wave, rate, hop)
    return net


def _load(path, name, kind, device):
    if name in released.PLACES:
        released.FOLDER = os.path.join(torch.hub.get_dir(), "checkpoints", "released")
        path = f"released:{name}"
    net, meta = model.load(path, device)
    if meta["kind"] != kind:
        raise ValueError(f"{path} is a {meta['kind']}, not a {kind}")
    return net, meta
