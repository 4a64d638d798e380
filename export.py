"""
Networks for other programs: ONNX, and safetensors.

    python export.py ckpt/vocals.pt                     # ckpt/vocals.onnx, ckpt/vocals_wave.onnx
    python export.py ckpt/mtat.pt released:vocals       # several
    python export.py ckpt/vocals.pt --to=safetensors    # ckpt/vocals.safetensors

NAME.onnx takes magnitudes (batch, frames, 256), of model.stft without the last bin. It gives the
masks of a separator (batch, sources, frames, 256) or the scores of a classifier (batch, classes).
NAME_wave.onnx takes waves (batch, samples) at 16 kHz, and gives sources or scores. Batches may have
any size. Frames are 64 k for a separator, which are 10,240 k + 352 samples. Cut songs into windows
that overlap, as model.separate does. A classifier takes one crop. Names and settings are in the
metadata, as JSON under "about". Needs onnx and onnxscript.

A .safetensors file is a checkpoint that loads wherever a .pt does. Needs safetensors.
"""
import contextlib
import io
import json
import logging
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

import eval
import model
import runtime
from runtime import die

# -----------------------------------------------------------------------------
# settings
to = "onnx"             # onnx or safetensors
out = ""                # folder to write to; empty: that of the checkpoint
overwrite = False       # replace files that are there
# -----------------------------------------------------------------------------

KEPT = ("kind", "args", "classes", "task", "step", "config", "commit", "val_loss")


# -----------------------------------------------------------------------------
# what is exported: without complex numbers, which ONNX lacks

class Masks(nn.Module):
    """Magnitudes (B, T, 256) -> masks (B, S, T, 256)."""

    def __init__(self, net):
        super().__init__()
        self.unet = net.unet

    def forward(self, magnitude):
        return self.unet(model.log_compress(magnitude)[:, None])[0]


class Sources(nn.Module):
    """Waves (B, N) -> sources (B, S, N), as Separator, with the inverse STFT as a convolution."""

    def __init__(self, net):
        super().__init__()
        self.masks = Masks(net)
        # the inverse STFT of each single real or imaginary part is one row of the kernel
        ones = torch.eye(model.WIN // 2 + 1, dtype=torch.complex64)             # (257, 257)
        parts = torch.cat([ones, 1j * ones])[:, None]                           # (514, 1, 257)
        self.register_buffer("kernel", model.istft(parts)[:, None])             # (514, 1, 512)

    def forward(self, wave):
        spec = torch.view_as_real(model.stft(wave))                             # (B, T, 257, 2)
        real, imaginary = spec[..., 0], spec[..., 1]                            # (B, T, 257)
        magnitude = (real ** 2 + imaginary ** 2).sqrt()
        masks = self.masks(magnitude[..., :model.BINS])                         # (B, S, T, 256)
        masks = F.pad(masks, (0, 1), value=1.0)                                 # (B, S, T, 257)
        both = torch.cat([masks * real[:, None], masks * imaginary[:, None]], -1)
        frames = both.flatten(0, 1).transpose(1, 2)                             # (B S, 514, T)
        waves = F.conv_transpose1d(frames, self.kernel, stride=model.HOP)       # (B S, 1, N)
        return waves.view(*masks.shape[:2], -1)


class Scores(nn.Module):
    """Waves (B, N) or magnitudes (B, T, 256) of a crop -> scores (B, classes)."""

    def __init__(self, net, of_waves):
        super().__init__()
        self.net, self.of_waves = net, of_waves

    def forward(self, x):
        logits = self.net.crop_logits(x) if self.of_waves else self.net.logits(x)
        return torch.sigmoid(logits) if self.net.multilabel else torch.softmax(logits, -1)


# -----------------------------------------------------------------------------
# writing

def exported(net, of_waves):
    """(what is exported, an input of it, which of its sizes are free)."""
    batch, k = torch.export.Dim("batch"), torch.export.Dim("k", max=10_000)
    if isinstance(net, model.Classifier):
        example = torch.rand(2, net.crop) if of_waves else torch.rand(2, net.frames, model.BINS)
        return Scores(net, of_waves), example, {0: batch}
    if of_waves:
        return Sources(net), torch.rand(2, model.CROP), {0: batch, 1: 64 * model.HOP * k + 352}
    return Masks(net), torch.rand(2, model.FRAMES, model.BINS), {0: batch, 1: 64 * k}


def write_onnx(net, about, path, of_waves):
    """Writes one network. What onnxruntime makes of it is compared in the tests."""
    print(f"{path}: exporting takes half a minute", flush=True)
    # it tells of every operator of torchvision that it does without
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    part, example, free = exported(net, of_waves)
    names = ("wave" if of_waves else "magnitude"), about["gives"]
    with contextlib.redirect_stdout(io.StringIO()):     # it tells its steps
        program = torch.onnx.export(
            part.eval(), (example,), dynamo=True, dynamic_shapes=(free,), verbose=False,
            input_names=names[:1], output_names=names[1:])
    program.model.metadata_props["about"] = json.dumps(about)
    with runtime.atomic(path, "wb") as f:
        f.write(program.model_proto.SerializeToString())


def write_safetensors(net, about, path):
    from safetensors.torch import save
    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    with runtime.atomic(path, "wb") as f:
        f.write(save(weights, {"about": json.dumps(about)}))


def read_safetensors(path):
    """What write_safetensors has written, as model.read_checkpoint has it of a .pt."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as e:
        raise ValueError(f"{path}: reading it needs a package: pip install safetensors") from e
    try:
        with safe_open(path, "pt") as f:
            saved = json.loads((f.metadata() or {})["about"])
            saved["model"] = {name: f.get_tensor(name) for name in f.keys()}
    except (SafetensorError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is not a checkpoint of this project ({e!r:.100})") from e
    return saved


def about_network(net, meta):
    """The header: plain values only."""
    about = {key: meta[key] for key in KEPT if key in meta}
    if meta["kind"] == "separator":
        about |= {"gives": "sources", "sources": net.sources}
    else:
        about["gives"] = "scores"
    return about | {"sample_rate": model.SAMPLE_RATE}


def main():
    _, paths = runtime.configure(globals(), configs=False)
    runtime.choose("to", to, ["onnx", "safetensors"])
    if not paths:
        die("name one or more checkpoints: python export.py ckpt/vocals.pt")
    if out.endswith((".onnx", ".safetensors")):
        die(f"out={out} must be a folder: the files are called as the checkpoints are")
    bases = set()
    for path in paths:
        net, meta = model.load(path)
        folder = out or ("" if path.startswith("released:") else os.path.dirname(path))
        base = os.path.join(folder, eval.run_name(path))
        os.makedirs(folder or ".", exist_ok=True)
        if base in bases:
            die(f"two of these checkpoints would both be written to {base}")
        bases.add(base)
        endings = [".safetensors"] if to == "safetensors" else [".onnx", "_wave.onnx"]
        for ending in endings:
            if os.path.exists(base + ending) and not overwrite:
                die(f"{base}{ending} exists: --overwrite=True replaces it, --out=FOLDER writes "
                    "elsewhere")
        about = about_network(net, meta)
        for ending in endings:
            if to == "safetensors":
                write_safetensors(net, about, base + ending)
            else:
                write_onnx(net, about, base + ending, "wave" in ending)
            size = os.path.getsize(base + ending)
            print(f"{base}{ending}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    runtime.script(main)
