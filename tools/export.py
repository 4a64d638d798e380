"""
Export of networks to ONNX and safetensors.

    python -m tools.export ckpt/vocals.pt           # ckpt/vocals.onnx, ckpt/vocals_wave.onnx
    python -m tools.export ckpt/mtat.pt released:vocals     # several
    python -m tools.export ckpt/vocals.pt --to=safetensors  # can be used wherever a .pt file can

NAME.onnx: magnitudes (batch, frames, 256), as from model.magnitudes, to masks (batch, sources,
frames, 256) or scores (batch, classes). NAME_wave.onnx: waves (batch, samples) at 16 kHz to sources
or scores. A separator takes 64 k frames or 10,240 k + 352 samples: cut songs into overlapping
windows, as model.separate does. A classifier takes one crop. Names and settings are in the
metadata, as JSON under "about". Needs onnx and onnxscript, or safetensors.
"""
import contextlib
import io
import itertools
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

class Sources(nn.Module):
    """Waves (B, N) -> sources (B, S, N); or magnitudes (B, T, 256) -> masks (B, S, T, 256).

    As Separator, with the inverse STFT as a convolution.
    """

    def __init__(self, net, from_wave):
        super().__init__()
        self.unet, self.from_wave = net.unet, from_wave
        # the inverse STFT of each real and each imaginary unit vector is one row of the kernel
        ones = torch.eye(model.WIN // 2 + 1, dtype=torch.complex64)             # (257, 257)
        parts = torch.cat([ones, 1j * ones])[:, None]                           # (514, 1, 257)
        self.register_buffer("kernel", model.istft(parts)[:, None])             # (514, 1, 512)

    def masks(self, magnitude):
        return self.unet(model.log_compress(magnitude)[:, None])[0]             # (B, S, T, 256)

    def forward(self, x):
        if not self.from_wave:
            return self.masks(x)
        spec = torch.view_as_real(model.stft(x))                                # (B, T, 257, 2)
        real, imaginary = spec[..., 0], spec[..., 1]                            # (B, T, 257)
        masks = self.masks((real ** 2 + imaginary ** 2).sqrt()[..., :model.BINS])
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


def parts(net, from_wave):
    """(module to export, example input, {dimension: range of sizes})."""
    batch, k = torch.export.Dim("batch"), torch.export.Dim("k", max=10_000)
    if isinstance(net, model.Classifier):
        example = torch.rand(2, net.crop) if from_wave else torch.rand(2, net.frames, model.BINS)
        return Scores(net, from_wave), example, {0: batch}
    example = torch.rand(2, model.CROP) if from_wave else torch.rand(2, model.FRAMES, model.BINS)
    length = 64 * model.HOP * k + 352 if from_wave else 64 * k
    return Sources(net, from_wave), example, {0: batch, 1: length}


def save_onnx(net, meta, path, from_wave):
    """Writes one network. The tests compare the outputs of onnxruntime."""
    print(f"{path}: exporting takes half a minute", flush=True)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)     # hides notes on torchvision
    about, (module, example, dynamic) = weights.about(net, meta), parts(net, from_wave)
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
    targets = {}            # {path to write: (checkpoint, ending)}
    for path, ending in itertools.product(paths, endings):
        folder = out or ("" if path.startswith("released:") else os.path.dirname(path))
        target = os.path.join(folder, weights.name_of(path) + ending)
        if target in targets or os.path.exists(target) and not overwrite:
            die(f"{target} exists, or is the export of two of these checkpoints: "
                "--overwrite=True replaces existing files, --out=FOLDER writes elsewhere")
        targets[target] = path, ending
    for target, (path, ending) in targets.items():
        net, meta = weights.load(path)
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        if to == "safetensors":
            weights.save_safetensors(net, meta, target)
        else:
            save_onnx(net, meta, target, from_wave=ending == "_wave.onnx")
        print(f"{target}: {os.path.getsize(target) / 1e6:.1f} MB")


if __name__ == "__main__":
    settings.script(main)
