"""
Export of networks to ONNX and safetensors.

    python -m tools.export ckpt/vocals.pt           # ckpt/vocals.onnx, ckpt/vocals_wave.onnx
    python -m tools.export ckpt/mtat.pt released:vocals     # several
    python -m tools.export ckpt/vocals.pt --to=safetensors  # ckpt/vocals.safetensors

NAME.onnx takes magnitudes (batch, frames, 256), those of model.magnitudes. It returns the masks of
a separator (batch, sources, frames, 256) or the scores of a classifier (batch, classes).
NAME_wave.onnx takes waves (batch, samples) at 16 kHz and returns sources or scores. The batch size
is free. A separator takes 64 k frames, or 10,240 k + 352 samples: cut songs into overlapping
windows, as model.separate does. A classifier takes one crop. Names and settings are in the
metadata, as JSON under "about". Needs onnx and onnxscript.

A .safetensors file can be used wherever a .pt file can. Needs safetensors.
"""
import contextlib
import io
import json
import logging
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

import model
import weights
from common import files, settings
from common.settings import die

# -----------------------------------------------------------------------------
# settings
to = "onnx"             # onnx or safetensors
out = ""                # folder to write to; empty: that of the checkpoint
overwrite = False       # replace existing files

# -----------------------------------------------------------------------------
# the exported modules: without complex numbers, which ONNX lacks

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
        # the inverse STFT of each real and each imaginary unit vector is one row of the kernel
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

    def __init__(self, net, from_wave):
        super().__init__()
        self.net, self.from_wave = net, from_wave

    def forward(self, x):
        logits = self.net.crop_logits(x) if self.from_wave else self.net.logits(x)
        return torch.sigmoid(logits) if self.net.multilabel else torch.softmax(logits, -1)


# -----------------------------------------------------------------------------
# writing

def parts(net, from_wave):
    """(module to export, example input, {dimension: range of sizes})."""
    batch, k = torch.export.Dim("batch"), torch.export.Dim("k", max=10_000)
    if isinstance(net, model.Classifier):
        example = torch.rand(2, net.crop) if from_wave else torch.rand(2, net.frames, model.BINS)
        return Scores(net, from_wave), example, {0: batch}
    if from_wave:
        return Sources(net), torch.rand(2, model.CROP), {0: batch, 1: 64 * model.HOP * k + 352}
    return Masks(net), torch.rand(2, model.FRAMES, model.BINS), {0: batch, 1: 64 * k}


def save_onnx(net, meta, path):
    """Writes one network. The tests compare the outputs of onnxruntime."""
    print(f"{path}: exporting takes half a minute", flush=True)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)     # hides notes on torchvision
    from_wave, about = path.endswith("_wave.onnx"), weights.about(net, meta)
    module, example, dynamic = parts(net, from_wave)
    with contextlib.redirect_stdout(io.StringIO()):             # hides the progress of each pass
        program = torch.onnx.export(
            module.eval(), (example,), dynamo=True, dynamic_shapes=(dynamic,), verbose=False,
            input_names=["wave" if from_wave else "magnitude"], output_names=[about["gives"]])
    program.model.metadata_props["about"] = json.dumps(about)
    with files.atomic(path, "wb") as f:
        f.write(program.model_proto.SerializeToString())


def main():
    _, paths = settings.configure(globals(), configs=False)
    settings.choose("to", to, ["onnx", "safetensors"])
    if not paths or out.endswith((".onnx", ".safetensors")):
        die(f"expected checkpoints, and in out a folder (got {paths} and out={out!r}): "
            "python -m tools.export ckpt/vocals.pt --out=FOLDER")
    endings = [".safetensors"] if to == "safetensors" else [".onnx", "_wave.onnx"]
    targets = {}            # {path to write: checkpoint}
    for path in paths:
        folder = out or ("" if path.startswith("released:") else os.path.dirname(path))
        for ending in endings:
            target = os.path.join(folder, weights.name_of(path) + ending)
            if target in targets:
                die(f"{targets[target]} and {path} would both be written to {target}")
            if os.path.exists(target) and not overwrite:
                die(f"{target} exists: replace it with --overwrite=True, or write to another "
                    "folder with --out=FOLDER")
            targets[target] = path
    for target, path in targets.items():
        net, meta = weights.load(path)
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        save = weights.save_safetensors if to == "safetensors" else save_onnx
        save(net, meta, target)
        print(f"{target}: {os.path.getsize(target) / 1e6:.1f} MB")


if __name__ == "__main__":
    settings.script(main)
