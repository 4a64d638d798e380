"""
The networks through torch.hub, without a checkout of this repository.

    net = torch.hub.load("OWNER/REPOSITORY", "separator", "vocals")
    tagger = torch.hub.load("OWNER/REPOSITORY", "tagger", "mtat")

With a local copy: torch.hub.load(FOLDER, "separator", "vocals", source="local"). The authors'
weights are downloaded once, to torch.hub's own folder. Nothing is compiled.
"""
import os
import types

import torch

import model
import weights
from weights import released

dependencies = ["torch", "numpy", "tqdm", "google_crc32c"]


def separator(source="vocals", device="cpu"):
    """A separator in eval mode, with a method net.separate(wave, rate): see model.separate.

    source: vocals, bass, drums, other, multisource; or the path of a checkpoint.
    """
    net, _ = _load(source, source, "separator", device)
    net.separate = types.MethodType(model.separate, net)
    return net


def tagger(dataset="mtat", source="vocals", device="cpu"):
    """A classifier in eval mode, with net.classes and net.tag(wave, rate, hop): see model.tag.

    dataset: mtat or fma, and source what its U-Net separates; or the path of a checkpoint.
    """
    net, meta = _load(dataset, f"{dataset}_{source}", "classifier", device)
    net.classes = meta["classes"]
    net.tag = types.MethodType(model.tag, net)
    return net


def _load(path, name, kind, device):
    if name in released.PLACES:
        released.FOLDER = os.path.join(torch.hub.get_dir(), "checkpoints", "released")
        path = f"released:{name}"
    net, meta = weights.load(path, device)
    if meta["kind"] != kind:
        raise ValueError(f"{path} is a {meta['kind']}, not a {kind}")
    return net, meta
