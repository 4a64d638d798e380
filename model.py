"""
The networks of "Pre-Training Music Classification Models via Music Source Separation" (Garoufis et al., arXiv 2310.15845), and load().

    import model
    net, meta = model.load("ckpt/vocals.pt")         # one of our checkpoints, or a released TensorFlow prefix such as separators/vocals/checkpoint-1
    stems = net(wave)                                # Separator: (B, N) in [-1, 1] at 16 kHz mono -> (B, S, N)
    logits = net(wave)                               # Classifier: (B, N) -> (B, classes)

Spectrograms, logarithms, mel and resynthesis are always float32; only `unet` and `tail`, the convolutional parts, are ever compiled or
run in reduced precision (set `net.amp_dtype`). Letters in shapes: B batch, N samples, S sources, C channels, T frames, F frequency bins.
"""
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

import tf_checkpoint
from runtime import read_checkpoint

SAMPLE_RATE = 16000
WIN, HOP, BINS = 512, 160, 256                       # the network sees bins 0..255; the Nyquist bin 256 is passed through
FRAMES = 384                                         # time frames of a crop, halved six times by the U-Net and seven by the tail
CROP = (FRAMES - 1) * HOP + WIN                      # 61,792 samples, 3.86 s
EDGE = WIN - HOP                                     # this many samples at either end of a crop are not covered by every overlapping window
MELS, MEL_LOW, MEL_HIGH = 128, 100.0, 7800.0
EPS = 1e-4                                           # added before every logarithm

# tail channels, and how the decoder outputs join the tail (SPEC of arXiv v1 and v3 of the paper)
VARIANTS = {
    "tail": ((64, 64, 128, 128, 128, 128, 256), None),
    "v1": ((64, 128, 128, 128, 128, 128, 256), "concat"),
    "v3": ((64, 64, 128, 128, 128, 128, 256), "add"),
    "v3_concat": ((64, 64, 128, 128, 128, 128, 256), "concat"),
}


# -----------------------------------------------------------------------------
# from waves to spectrograms and back

def stft(wave):
    """(B, N) -> (B, T, 257) complex: periodic Hann 512, hop 160, no padding."""
    window = torch.hann_window(WIN, device=wave.device)
    return torch.stft(wave.float(), WIN, HOP, window=window, center=False, return_complex=True).transpose(1, 2)


def istft(spec):
    """(..., T, 257) complex -> (..., N). Inverse of stft() but for the first and last 352 samples, which fade in and out.

    Frames are weighted by the window over the *constant* sum of overlapping squared windows: dividing by the true sum, which goes
    to zero at the ends, would blow errors up there (tf.signal.inverse_stft with its inverse window does the same)."""
    window = torch.hann_window(WIN, device=spec.device)
    total = F.pad(window ** 2, (0, -WIN % HOP)).view(-1, HOP).sum(0).repeat(math.ceil(WIN / HOP))[:WIN]
    frames = F.pad(torch.fft.irfft(spec, WIN) * (window / total), (0, -WIN % HOP))                  # (..., T, 640)
    frames = frames.unflatten(-1, (-1, HOP))                                                        # (..., T, 4, 160)
    n_frames, overlaps = frames.shape[-3], frames.shape[-2]
    hops = frames.new_zeros(*frames.shape[:-3], n_frames + overlaps - 1, HOP)
    for k, part in enumerate(frames.unbind(-2)):
        hops[..., k:k + n_frames, :] += part
    return hops.flatten(-2)[..., :(n_frames - 1) * HOP + WIN]


def mel_filters():
    """(256, 128): HTK triangles drawn in mel, 100 to 7800 Hz, no area normalisation, over 256 bins placed at linspace(0, 8000, 256)."""
    def mel(hz):
        return 1127.0 * torch.log1p(hz / 700.0)
    edges = torch.linspace(*mel(torch.tensor([MEL_LOW, MEL_HIGH], dtype=torch.float64)).tolist(), MELS + 2, dtype=torch.float64)
    bins = mel(torch.linspace(0, SAMPLE_RATE / 2, BINS, dtype=torch.float64))[:, None]
    up, down = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.minimum(up, down).clamp(min=0).float()


def log_compress(x):
    return torch.log10(x + EPS)


# -----------------------------------------------------------------------------
# the U-Net (Kong et al. 2021, the plain baseline)

def norm(channels, momentum):
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=momentum)


def two_convs(c_in, c_out, momentum):
    """2 x [BatchNorm, LeakyReLU, Conv3x3]: the normalisation comes before the convolution, also on the one-channel input."""
    return nn.Sequential(norm(c_in, momentum), nn.LeakyReLU(0.01), nn.Conv2d(c_in, c_out, 3, padding=1),
                         norm(c_out, momentum), nn.LeakyReLU(0.01), nn.Conv2d(c_out, c_out, 3, padding=1))


class DecoderBlock(nn.Module):
    def __init__(self, c_in, c_out, momentum):
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_out, 2, stride=2)
        self.convs = two_convs(c_out, c_out, momentum)

    def forward(self, x):
        return self.convs(self.up(x))                                                               # (B, C, 2T, 2F)


class UNet(nn.Module):
    """(B, 1, T, 256) log-magnitudes -> masks (B, S, T, 256) and the six decoder outputs, coarsest first. T a multiple of 64.

    Output d = 0..5 of the decoder is (B, C, T / 2^(5 - d), 256 / 2^(5 - d))."""

    def __init__(self, n_sources, widths, pool, momentum):
        super().__init__()
        ups = widths[::-1]
        self.pool = {"max": F.max_pool2d, "avg": F.avg_pool2d}[pool]
        self.encoder = nn.ModuleList(two_convs(a, b, momentum) for a, b in zip((1, *widths), widths))
        # skips are the pooled outputs, so block i > 0 sees ups[i - 1] channels from below and as many as encoder block 5 - i from the side
        below = [widths[-1]] + [ups[i - 1] + widths[-1 - i] for i in range(1, len(ups))]
        self.decoder = nn.ModuleList(DecoderBlock(a, b, momentum) for a, b in zip(below, ups))
        self.head = nn.Sequential(two_convs(widths[0] + 1, 2 * widths[0], momentum), nn.Conv2d(2 * widths[0], n_sources, 3, padding=1))

    def forward(self, spec):
        x, pooled, outputs = spec, [], []
        for block in self.encoder:
            x = self.pool(block(x), 2)                                                              # (B, C, T/2, F/2), ...
            pooled.append(x)
        for i, block in enumerate(self.decoder):
            x = block(x if i == 0 else torch.cat([x, pooled[-1 - i]], 1))                           # (B, C, T/32, F/32), ..., (B, C, T, F)
            outputs.append(x)
        masks = torch.sigmoid(self.head(torch.cat([x, spec], 1)))                                   # (B, S, T, F)
        return masks, outputs


def glorot_(module):
    """Keras' initialisation: Glorot-uniform kernels, zero biases (BatchNorm starts at 1 and 0 in both worlds)."""
    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)


def autocast(x, dtype):
    """Reduced precision for the convolutions when dtype is given; nothing when it is None."""
    return torch.autocast(x.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def check_wave(wave):
    if wave.dim() != 2 or wave.shape[1] == 0 or not wave.is_floating_point():
        raise ValueError(f"waves are (batch, samples) in floating point, -1 to 1, got {tuple(wave.shape)} in {wave.dtype}")


class Separator(nn.Module):
    """wave (B, N) in [-1, 1], 16 kHz mono -> sources (B, S, N): sigmoid masks on the magnitudes, the mixture's phase.

    61,792 samples go through the network as they are, without padding; the first and last 352 samples then fade in and out.
    Any other length is padded, run in windows of 384 frames that overlap by half, and joined by a triangular weight on the masks."""

    def __init__(self, sources, widths=(16, 32, 64, 128, 192, 192), pool="max", bn_momentum=0.01):
        super().__init__()
        self.args = dict(sources=list(sources), widths=list(widths), pool=pool, bn_momentum=bn_momentum)
        self.sources, self.amp_dtype = list(sources), None
        self.unet = UNet(len(sources), tuple(widths), pool, bn_momentum)
        glorot_(self)
        self.to(memory_format=torch.channels_last)                                                  # faster convolutions, same shapes

    def masks(self, spec):
        """(B, 384, 257) complex -> (B, S, 384, 256) in [0, 1]."""
        x = log_compress(spec[..., :BINS].abs())[:, None]                                           # (B, 1, T, F)
        with autocast(x, self.amp_dtype):
            return self.unet(x)[0].float()

    def apply_masks(self, spec, masks):
        """Spectrogram (B, T, 257), masks (B, S, T, 256) -> waves (B, S, N); the Nyquist bin is not masked."""
        spec = spec[:, None] * F.pad(masks, (0, 1), value=1.0)                                      # (B, S, T, 257)
        return istft(spec)

    def forward(self, wave):
        check_wave(wave)
        if wave.shape[1] == CROP:
            spec = stft(wave)                                                                       # (B, 384, 257)
            return self.apply_masks(spec, self.masks(spec))
        half, n = FRAMES // 2, wave.shape[1]
        windows = max(1, math.ceil((n + 2 * EDGE - CROP) / (half * HOP)) + 1)
        padding = CROP + (windows - 1) * half * HOP - EDGE - n
        spec = stft(F.pad(wave, (EDGE, padding)))                                                   # (B, 192 (windows + 1), 257)
        ramp = torch.arange(1, half + 1, device=wave.device, dtype=torch.float32)
        triangle = torch.cat([ramp, ramp.flip(0)])[:, None]                                         # (384, 1)
        masks = spec.new_zeros(len(wave), len(self.sources), spec.shape[1], BINS, dtype=torch.float32)
        weight = masks.new_zeros(spec.shape[1], 1)
        for at in range(0, windows * half, half):
            masks[:, :, at:at + FRAMES] += triangle * self.masks(spec[:, at:at + FRAMES])
            weight[at:at + FRAMES] += triangle
        return self.apply_masks(spec, masks / weight)[..., EDGE:EDGE + n]                           # (B, S, N)


# -----------------------------------------------------------------------------
# the tail (Won et al. 2020's short-chunk VGG with two convolutions per resolution) and the whole classifier

class TailBlock(nn.Module):
    """[x, decoder output] -> 2 x [Conv3x3, BatchNorm, ReLU], max pool. `join` is how a decoder output comes in: None, concat or add."""

    def __init__(self, c_in, c_out, c_skip, join, pool, momentum):
        super().__init__()
        self.join, self.pool = join, pool
        if join == "add":
            self.adapter = nn.Conv2d(c_skip, c_in, 1)
        c_in = c_in + c_skip if join == "concat" else c_in
        self.convs = nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), norm(c_out, momentum), nn.ReLU(),
                                   nn.Conv2d(c_out, c_out, 3, padding=1), norm(c_out, momentum), nn.ReLU())

    def forward(self, x, skip=None):
        if self.join:
            skip = F.max_pool2d(skip, (1, 2))                                                       # (B, C, T', F'/2): mel is half as fine
            x = torch.cat([x, skip], 1) if self.join == "concat" else x + self.adapter(skip)
        return F.max_pool2d(self.convs(x), self.pool)


class Tail(nn.Module):
    """Mel spectrograms (B, S + 1, 384, 128) and decoder outputs -> logits (B, classes)."""

    def __init__(self, c_in, n_classes, widths, join, skip_widths, dropout, momentum):
        super().__init__()
        joins = [join if 1 <= i <= len(skip_widths) else None for i in range(len(widths))]
        self.blocks = nn.ModuleList(
            TailBlock(a, b, skip_widths[i - 1] if joins[i] else 0, joins[i], (3, 2) if i == 6 else 2, momentum)
            for i, (a, b) in enumerate(zip((c_in, *widths), widths)))
        flat = 2 * widths[-1]                                                                       # 2 time steps are left of 384
        self.dense = nn.Linear(flat, flat)
        self.dense_norm = nn.BatchNorm1d(flat, eps=1e-3, momentum=momentum)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(flat, n_classes)

    def forward(self, x, skips=()):
        for i, block in enumerate(self.blocks):
            x = block(x, skips[i - 1] if block.join else None)                                      # (B, C, T / 2^(i + 1), M / 2^(i + 1))
        x = self.dense(x.flatten(1))                                                                # (B, 512)
        return self.out(self.dropout(F.relu(self.dense_norm(x))))                                   # (B, classes)


class Classifier(nn.Module):
    """wave (B, N) in [-1, 1], 16 kHz mono -> logits (B, classes) for sigmoid (multilabel) or softmax.

    61,792 samples are one crop. Longer waves are cut into crops of 384 frames with 50 % overlap, what is left over at the end is
    dropped, and shorter ones are padded with zeros; the logits then are those of the mean score over crops.

    variant: tail, v1 (skips concatenated), v3 (skips added through 1x1 adapters), v3_concat; skips: 0..5 decoder outputs, coarse ones
    last. The tail sees log10(mel(mask * |X|) + 1e-4) of each source, then log10(mel(|X|) + 1e-4) of the mixture; with mel_of_log it sees
    mel(log10(|X| + 1e-4)) instead, the slip of the authors' v1 code that their weights were trained with."""

    def __init__(self, n_classes, multilabel, variant="v1", skips=5, sources=("vocals",), widths=(16, 32, 64, 128, 192, 192), pool="max",
                 tail_widths=None, dropout=0.5, mel_of_log=False, bn_momentum=0.01):
        super().__init__()
        if variant not in VARIANTS or not 0 <= skips <= 5:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)} and skips 0 to 5, got {variant!r} and {skips}")
        tail_widths, join = tail_widths or VARIANTS[variant][0], VARIANTS[variant][1]
        if len(widths) != 6 or len(tail_widths) != 7 or min(*widths, *tail_widths) < 1:
            raise ValueError(f"widths must be six and tail_widths seven positive numbers, got {list(widths)} and {list(tail_widths)}")
        self.args = dict(n_classes=n_classes, multilabel=multilabel, variant=variant, skips=skips, sources=list(sources), widths=list(widths),
                         pool=pool, tail_widths=list(tail_widths), dropout=dropout, mel_of_log=mel_of_log, bn_momentum=bn_momentum)
        self.multilabel, self.mel_of_log, self.amp_dtype = multilabel, mel_of_log, None
        self.skips = skips if join else 0
        self.unet = UNet(len(sources), tuple(widths), pool, bn_momentum) if join else None
        # tail block i = 1..skips takes decoder output 5 - i, which is as wide as encoder block i
        self.tail = Tail(len(sources) + 1 if join else 1, n_classes, tuple(tail_widths), join, list(widths)[1:1 + self.skips], dropout, bn_momentum)
        self.register_buffer("mel", mel_filters(), persistent=False)
        glorot_(self)
        self.to(memory_format=torch.channels_last)                                                  # faster convolutions, same shapes

    def crop_logits(self, wave):
        """(B, 61792) -> (B, classes)."""
        magnitude = stft(wave)[..., :BINS].abs()[:, None]                                           # (B, 1, T, F)
        mixture = log_compress(magnitude) @ self.mel if self.mel_of_log else log_compress(magnitude @ self.mel)
        if self.unet is None:
            with autocast(wave, self.amp_dtype):
                return self.tail(mixture).float()
        with autocast(wave, self.amp_dtype):
            masks, outputs = self.unet(log_compress(magnitude))                                     # (B, S, T, F), 6 x (B, C, T', F')
        sources = log_compress((masks.float() * magnitude) @ self.mel)                              # (B, S, T, M)
        with autocast(wave, self.amp_dtype):
            return self.tail(torch.cat([sources, mixture], 1), [outputs[5 - i] for i in range(1, self.skips + 1)]).float()

    def forward(self, wave):
        check_wave(wave)
        if wave.shape[1] == CROP:
            return self.crop_logits(wave)
        wave = F.pad(wave, (0, max(0, CROP - wave.shape[1])))
        crops = wave.unfold(1, CROP, FRAMES // 2 * HOP)                                             # (B, K, 61792)
        logits = torch.stack([torch.cat([self.crop_logits(some) for some in clip.split(16)]) for clip in crops])    # (B, K, classes)
        return mean_score_logits(logits, self.multilabel)

    def train_parts(self):
        return {"unet": self.unet, "tail": self.tail} if self.unet else {"tail": self.tail}


def mean_score_logits(logits, multilabel):
    """(B, K, classes) -> (B, classes): logits whose sigmoid / softmax is the mean over K of the scores, without leaving log space."""
    if not multilabel:
        return torch.logsumexp(F.log_softmax(logits, -1), 1) - math.log(logits.shape[1])
    return torch.logsumexp(F.logsigmoid(logits), 1) - torch.logsumexp(F.logsigmoid(-logits), 1)


# -----------------------------------------------------------------------------
# checkpoints

KINDS = {"separator": Separator, "classifier": Classifier}


def load(path, device="cpu"):
    """(model in eval mode, meta) of a checkpoint: ours (.pt) or the prefix of a released TensorFlow one.

    meta: kind (separator | classifier), args of the model, step, config, classes (names or None), ... FileNotFoundError if there is
    nothing at path, ValueError if what is there is not a checkpoint of these networks."""
    path = str(path)
    if tf_checkpoint.is_checkpoint(path.removesuffix(".index")):
        net, meta = _load_tensorflow(path.removesuffix(".index"))
    elif os.path.isfile(path):
        net, meta = _load_ours(path)
    else:
        raise FileNotFoundError(f"no checkpoint at {path}: neither that file nor {path}.index exists")
    return net.to(device).eval(), meta


def _load_ours(path):
    saved = read_checkpoint(path)
    try:
        net = KINDS[saved["kind"]](**saved["args"])
        net.load_state_dict(saved.pop("model"))
    except (KeyError, IndexError, TypeError, RuntimeError) as e:
        raise ValueError(f"{path} does not fit the networks of this version: {str(e).splitlines()[0]}") from e
    return net, saved


def weighted_layers(net):
    """Modules with weights in the order of definition, which is the layer order of the authors' Keras models."""
    return [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.BatchNorm1d, nn.Linear))]


def _load_tensorflow(prefix):
    kind, args = tensorflow_architecture(tf_checkpoint.read_index(prefix), prefix)
    net = KINDS[kind](**args)
    modules, layers = weighted_layers(net), tf_checkpoint.read(prefix)
    names = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var", "kernel": "weight", "bias": "bias"}
    for n, (module, layer) in enumerate(zip(modules, layers, strict=True)):
        for key, value in layer.items():
            value, ours = torch.from_numpy(value), getattr(module, names[key], None)
            if key == "kernel" and value.dim() == 4:
                value = value.permute(3, 2, 0, 1)                        # (h, w, in, out) -> (out, in, h, w), transposed ones alike
            elif key == "kernel" and module is getattr(getattr(net, "tail", None), "dense", None):
                value = value.view(2, 1, -1, value.shape[1]).permute(3, 2, 0, 1).flatten(1)     # Keras flattens (time, mel, channel)
            elif key == "kernel":
                value = value.T
            if ours is None or ours.shape != value.shape:
                raise ValueError(f"{prefix}: layer {n} {key} is {tuple(value.shape)}, expected {None if ours is None else tuple(ours.shape)}")
            ours.data.copy_(value)
    return net, {"kind": kind, "args": net.args, "classes": None, "step": None, "config": {}, "source": "tensorflow"}


def tensorflow_architecture(layers, prefix="the checkpoint"):
    """(kind, constructor arguments) read off the shapes in the index of a released checkpoint. ValueError if it is another network.

    Shapes cannot tell the pooling: the authors' four-source separator averages, all the rest takes the maximum."""
    kernels = [(n, *layer["kernel"]["shape"]) for n, layer in enumerate(layers) if len(layer.get("kernel", {}).get("shape", ())) == 4]
    dense = [layer["kernel"]["shape"] for layer in layers if len(layer.get("kernel", {}).get("shape", ())) == 2]
    has_unet = "gamma" in layers[0] and len(layers) >= 59
    args, tail = {}, kernels
    if has_unet:
        unet, tail = [k for k in kernels if k[0] < 59], [k for k in kernels if k[0] >= 59]
        n_sources = unet[-1][4] if unet else 0
        args = dict(sources=["vocals", "other", "drums", "bass"] if n_sources == 4 else [f"source{i + 1}" for i in range(n_sources)],
                    widths=[k[4] for k in unet[1:12:2]], pool="avg" if n_sources == 4 and not tail else "max")
    if has_unet and not tail and len(layers) == 59:
        return "separator", args
    convs, adapters = [k for k in tail if k[1] == 3], [k for k in tail if k[1] == 1]
    if len(dense) != 2 or len(convs) != 14:
        raise ValueError(f"{prefix} is not a separator or classifier of the paper: {len(layers)} layers, {len(convs)} convolutions in the tail")
    widths = [k[4] for k in convs[1::2]]
    wider = sum(convs[2 * i][3] > widths[i - 1] for i in range(1, 7))                              # blocks that take concatenated skips
    variant = "tail" if not has_unet else "v1" if widths[1] == 2 * widths[0] else "v3" if adapters else "v3_concat"
    return "classifier", dict(args, n_classes=dense[1][1], multilabel=dense[1][1] == 50, variant=variant, tail_widths=widths,
                              skips=len(adapters) or wider, mel_of_log=variant == "v1")
