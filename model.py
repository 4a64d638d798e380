"""
The networks of "Pre-Training Music Classification Models via Music Source Separation"
(Garoufis et al., arXiv 2310.15845), and how to load and use them.

    import model
    net, meta = model.load("ckpt/vocals.pt")    # or "released:vocals", or a TensorFlow prefix
    stems = model.separate(net, wave, rate)     # a Separator: a song (C, N) -> (S, C, N)
    scores = model.tag(net, wave, rate)         # a Classifier: a song (C, N) -> (classes,)
    logits = net(wave)                          # the same (B, N) -> (B, classes), 16 kHz mono

A wave is floating point in [-1, 1]. The networks hear 16 kHz, mono. Spectrograms, logarithms, mel
and resynthesis are always float32. Only `unet` and `tail`, the convolutional parts, are ever
compiled or run in reduced precision (set `net.amp_dtype`).

Letters in shapes: B batch, N samples, S sources, C channels, T frames, F frequency bins, M mel
bands, K crops or windows.
"""
import math
import os
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

import tf_checkpoint
from fused import Conv3x3, NormLeaky, NormsAndConvs, OverlapAdd, Up, pool
from tail import Tail, Transformer

SAMPLE_RATE = 16000
WIN, HOP = 512, 160
BINS = 256                          # the network sees bins 0..255; the Nyquist bin passes through
FRAMES = 384                        # of a crop: halved six times by the U-Net, seven by the tail
CROP = (FRAMES - 1) * HOP + WIN     # 61,792 samples, 3.86 s
EDGE = WIN - HOP                    # so many samples at either end of a crop lack some windows
WINDOW, OVERLAP = 1152, 192         # frames of the windows that whole songs are separated in
MELS, MEL_LOW, MEL_HIGH = 128, 100.0, 7800.0
EPS = 1e-4                          # added before every logarithm
WIDTHS = (16, 32, 64, 128, 192, 192)

# per variant: the channels of the tail blocks, and how the decoder outputs join them
VARIANTS = {
    "tail": ((64, 64, 128, 128, 128, 128, 256), None),
    "v1": ((64, 128, 128, 128, 128, 128, 256), "concat"),
    "v3": ((64, 64, 128, 128, 128, 128, 256), "add"),
    "v3_concat": ((64, 64, 128, 128, 128, 128, 256), "concat"),
    "ast": ((), "patches"),         # a transformer in place of the convolutions ...
    "ast_tail": ((), None),         # ... and alone
}
AST_FRAMES = 768                    # of a crop of the transformer


# -----------------------------------------------------------------------------
# from waves to spectrograms and back

def stft(wave):
    """(B, N) -> (B, T, 257) complex: periodic Hann 512, hop 160, no padding."""
    window = torch.hann_window(WIN, device=wave.device)
    spec = torch.stft(wave.float(), WIN, HOP, window=window, center=False, return_complex=True)
    return spec.transpose(1, 2)                                     # (B, T, 257)


def magnitudes(wave):
    """(B, N) -> (B, T, 256): what the networks see."""
    return stft(wave)[..., :BINS].abs()


def istft(spec):
    """(..., T, 257) complex -> (..., N): the inverse of stft(), but for the ends.

    The first and last 352 samples fade in and out. Frames are weighted by the window over the
    *constant* sum of overlapping squared windows. The true sum goes to zero at the ends, and
    dividing by it would blow errors up there. (tf.signal.inverse_stft with its inverse window
    does the same.)
    """
    window = torch.hann_window(WIN, device=spec.device)
    squares = F.pad(window ** 2, (0, -WIN % HOP)).view(-1, HOP)     # (4, 160)
    total = squares.sum(0).repeat(len(squares))[:WIN]               # (512,)
    frames = torch.fft.irfft(spec, WIN) * (window / total)          # (..., T, 512)
    return OverlapAdd.apply(frames, HOP)                            # (..., N)


def mel_filters():
    """(256, 128): HTK triangles drawn in mel, 100 to 7800 Hz, no area normalisation.

    The 256 bins are placed at linspace(0, 8000, 256), as the authors place them.
    """
    def mel(hz):
        return 1127.0 * torch.log1p(hz / 700.0)

    low, high = mel(torch.tensor([MEL_LOW, MEL_HIGH], dtype=torch.float64)).tolist()
    edges = torch.linspace(low, high, MELS + 2, dtype=torch.float64)
    bins = mel(torch.linspace(0, SAMPLE_RATE / 2, BINS, dtype=torch.float64))[:, None]
    up = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])           # (256, 128)
    down = (edges[2:] - bins) / (edges[2:] - edges[1:-1])           # (256, 128)
    return torch.minimum(up, down).clamp(min=0).float()


def log_compress(x):
    return torch.log10(x + EPS)


# -----------------------------------------------------------------------------
# the U-Net (Kong et al. 2021, the plain baseline)

def two_convs(c_in, c_out, momentum):
    """2 x [BatchNorm, LeakyReLU, Conv3x3]: normalised before the convolution, the input too."""
    return NormsAndConvs(OrderedDict({              # numbered as in older checkpoints
        "0": NormLeaky(c_in, 0.01, momentum), "2": Conv3x3(c_in, c_out),
        "3": NormLeaky(c_out, 0.01, momentum), "5": Conv3x3(c_out, c_out)}))


class DecoderBlock(nn.Module):
    def __init__(self, c_in, c_out, momentum):
        super().__init__()
        self.up = Up(c_in, c_out)
        self.convs = two_convs(c_out, c_out, momentum)

    def forward(self, x):
        return self.convs(self.up(x))                               # (B, C, 2T, 2F)


class UNet(nn.Module):
    """Log-magnitudes (B, 1, T, 256) -> masks (B, S, T, 256) and the six decoder outputs.

    T must be a multiple of 64. The decoder outputs come coarsest first: output d = 0..5 is
    (B, C, T / 2^(5 - d), 256 / 2^(5 - d)).
    """

    def __init__(self, n_sources, widths, pool_kind, momentum):
        super().__init__()
        first, ups = widths[0], widths[::-1]
        self.pool_kind = pool_kind
        self.encoder = nn.ModuleList(
            two_convs(a, b, momentum) for a, b in zip((1, *widths[:-1]), widths, strict=True))
        # from below ups[i - 1] channels, from the side the pooled ones of encoder block 5 - i
        below = [widths[-1]] + [ups[i - 1] + widths[-1 - i] for i in range(1, len(ups))]
        self.decoder = nn.ModuleList(
            DecoderBlock(a, b, momentum) for a, b in zip(below, ups, strict=True))
        self.head = nn.Sequential(
            two_convs(first + 1, 2 * first, momentum),
            Conv3x3(2 * first, n_sources))

    def forward(self, spec):
        x, pooled, outputs = spec, [], []
        for block in self.encoder:
            x = pool(block(x), (2, 2), self.pool_kind)              # (B, C, T/2, F/2), ...
            pooled.append(x)
        for i, block in enumerate(self.decoder):
            if i > 0:
                x = torch.cat([x, pooled[-1 - i]], 1)
            x = block(x)                                            # (B, C, T/32, F/32), ...
            outputs.append(x)                                       # ..., (B, C, T, F)
        masks = torch.sigmoid(self.head(torch.cat([x, spec], 1)))   # (B, S, T, F)
        return masks, outputs


def glorot_(module):
    """Keras' initialisation: Glorot-uniform kernels and zero biases; BatchNorm needs nothing."""
    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)


def autocast(x, dtype):
    """Reduced precision for the convolutions when dtype is given."""
    return torch.autocast(x.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def check_wave(wave):
    if wave.dim() != 2 or wave.shape[1] == 0 or not wave.is_floating_point():
        raise ValueError("waves are (batch, samples) in floating point, -1 to 1, got "
                         f"{tuple(wave.shape)} in {wave.dtype}")


class Separator(nn.Module):
    """Waves (B, N) -> sources (B, S, N): sigmoid masks times magnitudes, the mixture's phase.

    A crop of 61,792 samples goes through as it is; its first and last 352 samples fade in and
    out. Any other length goes through separate(), which computes no gradients. ValueError if the
    wave has another form.
    """

    def __init__(self, sources, widths=WIDTHS, pool="max", bn_momentum=0.01):
        super().__init__()
        self.args = dict(sources=list(sources), widths=list(widths), pool=pool,
                         bn_momentum=bn_momentum)
        self.sources, self.amp_dtype = list(sources), None
        self.unet = UNet(len(sources), tuple(widths), pool, bn_momentum)
        glorot_(self)
        self.to(memory_format=torch.channels_last)                  # faster, the same shapes

    def masks(self, spec):
        """(B, T, 257) complex -> (B, S, T, 256) in [0, 1], T a multiple of 64."""
        x = log_compress(spec[..., :BINS].abs())[:, None]           # (B, 1, T, F)
        with autocast(x, self.amp_dtype):
            return self.unet(x)[0].float()

    def apply_masks(self, spec, masks):
        """(B, T, 257), (B, S, T, 256) -> waves (B, S, N); the Nyquist bin is not masked."""
        # in the order of the FFT now, while they are no complex numbers yet
        masks = F.pad(masks.contiguous(), (0, 1), value=1.0)        # (B, S, T, 257)
        return istft(spec[:, None] * masks)

    def forward(self, wave):
        check_wave(wave)
        if wave.shape[1] == CROP:
            spec = stft(wave)                                       # (B, 384, 257)
            return self.apply_masks(spec, self.masks(spec))
        songs = [separate(self, song) for song in wave]
        return torch.stack(songs).to(wave.device)                   # (B, S, N)


# -----------------------------------------------------------------------------
# whole songs

def check_song(net, kind, wave):
    if not isinstance(net, kind):
        raise ValueError(f"the network is a {type(net).__name__}, not a {kind.__name__}")
    is_wave = isinstance(wave, torch.Tensor) and wave.is_floating_point()
    if not is_wave or wave.dim() not in (1, 2, 3) or 0 in wave.shape:
        found = f"{type(wave).__name__} {tuple(getattr(wave, 'shape', ()))}"
        raise ValueError("a song is a tensor (samples,), (channels, samples) or (songs, channels, "
                         "samples) in floating point, -1 to 1, such as torch.from_numpy(array) of "
                         f"a NumPy array; got {found} of {getattr(wave, 'dtype', 'no type')}")


def resample(wave, rate, to):
    """(..., N) at `rate` Hz -> (..., ceil(N to / rate)) at `to` Hz, as prepared data is."""
    if rate == to:
        return wave
    import audio  # here: songs at 16 kHz do without PyAV
    return torch.from_numpy(audio.resample(wave.float().cpu().numpy(), rate, to))


@torch.no_grad()
def separate(net, wave, rate=SAMPLE_RATE, batch=1):
    """Songs of any length at `rate` Hz -> their sources, float32 on the CPU.

    (N,) -> (S, N); (C, N) -> (S, C, N); (B, C, N) -> (B, S, C, N). The masks are those of the mean
    over the channels at 16 kHz, and are applied to each channel. So no source has what lies above
    8 kHz. `batch` windows run at a time on the device of `net`, and the memory that is needed does
    not grow with the song, but for the result. ValueError if the wave has another form.
    """
    check_song(net, Separator, wave)
    if wave.dim() == 3:
        return torch.stack([separate(net, song, rate, batch) for song in wave])
    n = wave.shape[-1]
    stems = in_windows(net, resample(wave.reshape(-1, n), rate, SAMPLE_RATE), batch)
    stems = resample(stems, SAMPLE_RATE, rate)[..., :n]             # (S, C, N)
    return stems if wave.dim() == 2 else stems[:, 0]


def in_windows(net, wave, batch):
    """(C, N) at 16 kHz -> (S, C, N): windows of 1152 frames, which share 192 with the next.

    There one mask fades into the other. Silence is put around the song, so its ends do not fade.
    """
    channels, n = wave.shape
    frames, length = WINDOW - OVERLAP, (WINDOW - 1) * HOP + WIN     # length: samples of a window
    step = frames * HOP                                             # from window to window
    windows = max(1, math.ceil((n + 2 * EDGE - length) / step) + 1)
    device = next(net.parameters()).device
    rise = torch.arange(1, OVERLAP + 1, device=device)[:, None] / (OVERLAP + 1)     # (192, 1)
    stems = torch.zeros(len(net.sources), channels, length + (windows - 1) * step)

    for first in range(0, windows, batch):
        count = min(batch, windows - first)
        start = first * step - EDGE
        stop = start + length + (count - 1) * step
        some = F.pad(wave[:, max(0, start):stop], (max(0, -start), max(0, stop - n)))
        spec = stft(some.to(device))                                # (C, 960 K + 192, 257)
        windowed = spec.mean(0).unfold(0, WINDOW, frames).transpose(1, 2)   # (K, 1152, 257)
        masks = net.masks(windowed)                                 # (K, S, 1152, 256)

        # the begin of a window is also the end of the one before; the song's first has none
        ends = masks[:, :, frames:]                                 # (K, S, 192, 256)
        if first == 0:
            carried = masks[:1, :, :OVERLAP]
        before = torch.cat([carried, ends[:-1]])                    # (K, S, 192, 256)
        begins = before * (1 - rise) + masks[:, :, :OVERLAP] * rise
        joined = torch.cat([begins, masks[:, :, OVERLAP:frames]], 2)        # (K, S, 960, 256)
        joined = joined.transpose(0, 1).flatten(1, 2)               # (S, 960 K, 256)
        carried = ends[-1:]
        if first + count == windows:
            joined = torch.cat([joined, carried[0]], 1)             # (S, T, 256)

        # the last 352 samples of a piece and the first ones of the next add up
        piece = net.apply_masks(spec[:, :joined.shape[1]], joined[None])    # (C, S, N')
        stems[:, :, start + EDGE:][..., :piece.shape[-1]] += piece.transpose(0, 1).cpu()
    return stems[:, :, EDGE:EDGE + n]                               # (S, C, N)


@torch.no_grad()
def tag(net, wave, rate=SAMPLE_RATE, hop=0.0, batch=16):
    """Songs of any length at `rate` Hz -> scores in [0, 1] on the CPU, of net's classes.

    (N,) or (C, N) -> (classes,), the mean over crops that overlap by half, as eval.py has it. With
    hop in seconds -> (K, classes): row k is the crop that begins at k hop; a rest at the end is
    dropped, a short song padded. (B, C, N) -> (B, classes) or (B, K, classes). ValueError if the
    wave or hop has another form.
    """
    check_song(net, Classifier, wave)
    if wave.dim() == 3:
        return torch.stack([tag(net, song, rate, hop, batch) for song in wave])
    step = round(hop * SAMPLE_RATE) if hop else net.frames // 2 * HOP
    if step < 1:
        raise ValueError(f"hop must be seconds above 0, or 0 for the whole song, got {hop}")
    wave = resample(wave.reshape(-1, wave.shape[-1]).mean(0), rate, SAMPLE_RATE)        # (N,)
    wave = F.pad(wave, (0, max(0, net.crop - len(wave))))
    device = next(net.parameters()).device
    crops = wave.unfold(0, net.crop, step).split(batch)             # views (<= batch, 61792)
    logits = torch.cat([net.crop_logits(part.to(device)) for part in crops])            # (K, cl.)
    scores = torch.sigmoid(logits) if net.multilabel else torch.softmax(logits, -1)
    return scores.cpu() if hop else scores.mean(0).cpu()


# -----------------------------------------------------------------------------
# the classifier

class Classifier(nn.Module):
    """Waves (B, N) -> logits (B, classes), for sigmoid (multilabel) or softmax.

    61,792 samples are one crop, `net.crop`. A longer wave is cut into crops of 384 frames that
    overlap by half; what is left over at the end is dropped. A shorter one is padded with zeros.
    The logits are those of the mean score over the crops. ValueError if the wave has another form.

    variant: tail, v1 (skips concatenated), v3 (skips added through 1x1 adapters), v3_concat; or
    ast and ast_tail, with a transformer of (width, layers, heads) and crops of 768 frames.
    skips: how many decoder outputs join the tail, 0 to 5; the finest come first.
    mel_of_log: the tail sees mel(log10(|X| + 1e-4)) of the mixture, a slip of the authors' v1
    code that their weights were trained with. Else it sees log10(mel(|X|) + 1e-4).
    Of each source it sees log10(mel(mask * |X|) + 1e-4).
    """

    def __init__(self, n_classes, multilabel, variant="v1", skips=5, sources=("vocals",),
                 widths=WIDTHS, pool="max", tail_widths=None, dropout=0.5, mel_of_log=False,
                 bn_momentum=0.01, transformer=(768, 12, 12), frames=0, batch_scale=False):
        super().__init__()
        if variant not in VARIANTS or not 0 <= skips <= 5:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)} and skips 0 to 5, "
                             f"got {variant!r} and {skips}")
        own_widths, join = VARIANTS[variant]
        is_ast = variant.startswith("ast")
        tail_widths = tail_widths or own_widths
        counts = len(widths), len(tail_widths)
        if counts != (6, len(own_widths)) or min(*widths, *tail_widths) < 1:
            raise ValueError("widths must be six and tail_widths seven positive numbers (none with "
                             f"a transformer), got {list(widths)} and {list(tail_widths)}")
        frames = frames or (AST_FRAMES if is_ast else FRAMES)
        if frames < 64 or frames % 64 or not is_ast and frames != FRAMES:
            raise ValueError(f"frames must be a multiple of 64, and {FRAMES} without a "
                             f"transformer, got {frames}")
        self.args = dict(n_classes=n_classes, multilabel=multilabel, variant=variant, skips=skips,
                         sources=list(sources), widths=list(widths), pool=pool,
                         tail_widths=list(tail_widths), dropout=dropout, mel_of_log=mel_of_log,
                         bn_momentum=bn_momentum, transformer=list(transformer), frames=frames,
                         batch_scale=batch_scale)
        self.multilabel, self.mel_of_log, self.amp_dtype = multilabel, mel_of_log, None
        self.frames, self.crop = frames, (frames - 1) * HOP + WIN
        self.unet, c_in, self.skips = None, 1, 0
        if join:
            self.unet = UNet(len(sources), tuple(widths), pool, bn_momentum)
            c_in, self.skips = len(sources) + 1, skips
        # tail block i = 1..skips takes decoder output 5 - i, which is as wide as encoder block i
        skip_widths = list(widths)[1:1 + self.skips]
        if is_ast:
            self.tail = Transformer(c_in, n_classes, frames, *transformer, skip_widths, batch_scale)
        else:
            self.tail = Tail(c_in, n_classes, tuple(tail_widths), join, skip_widths, dropout,
                             bn_momentum)
        self.register_buffer("mel", mel_filters(), persistent=False)
        glorot_(self)
        self.to(memory_format=torch.channels_last)                  # faster, the same shapes

    def features(self, magnitude):
        """Crops (B, T, 256) -> what the tail sees: (B, S + 1, T, M), and the decoder outputs."""
        magnitude = magnitude[:, None]                              # (B, 1, T, F)
        if self.mel_of_log:
            x = log_compress(magnitude) @ self.mel                  # (B, 1, T, M)
        else:
            x = log_compress(magnitude @ self.mel)                  # (B, 1, T, M)
        skips = []
        if self.unet is not None:
            with autocast(magnitude, self.amp_dtype):
                masks, outputs = self.unet(log_compress(magnitude))         # (B, S, T, F), ...
            masks = masks.float().contiguous()      # products want one source after the other
            sources = log_compress((masks * magnitude) @ self.mel)          # (B, S, T, M)
            x = torch.cat([sources, x], 1)                          # (B, S + 1, T, M)
            skips = [outputs[5 - i] for i in range(1, self.skips + 1)]
        return x, skips

    def logits(self, magnitude):
        """(B, T, 256) of a crop -> (B, classes)."""
        x, skips = self.features(magnitude)
        with autocast(magnitude, self.amp_dtype):
            return self.tail(x, skips).float()

    def crop_logits(self, wave):
        """(B, 61792) -> (B, classes)."""
        return self.logits(magnitudes(wave))

    def forward(self, wave):
        check_wave(wave)
        if wave.shape[1] == self.crop:
            return self.crop_logits(wave)
        wave = F.pad(wave, (0, max(0, self.crop - wave.shape[1])))

        # crops are views of the wave; 16 of them at a time keep the memory small
        crops = wave.unfold(1, self.crop, self.frames // 2 * HOP)   # (B, K, 61792)
        logits = []
        for clip in crops:
            parts = map(self.crop_logits, clip.split(16))
            logits.append(torch.cat(list(parts)))                   # (K, classes)
        return mean_score_logits(torch.stack(logits), self.multilabel)

    def train_parts(self):
        """{name: module}: the parts that are trained, compiled and frozen one by one."""
        if self.unet is None:
            return {"tail": self.tail}
        return {"unet": self.unet, "tail": self.tail}


def mean_score_logits(logits, multilabel):
    """(B, K, classes) -> (B, classes): logits whose sigmoid or softmax is the mean of those over K.

    All is computed in logarithms, so large logits stay exact.
    """
    if not multilabel:
        return torch.logsumexp(F.log_softmax(logits, -1), 1) - math.log(logits.shape[1])
    return torch.logsumexp(F.logsigmoid(logits), 1) - torch.logsumexp(F.logsigmoid(-logits), 1)


# -----------------------------------------------------------------------------
# checkpoints

KINDS = {"separator": Separator, "classifier": Classifier}


def load(path, device="cpu"):
    """(model in eval mode, meta) of a checkpoint: ours (.pt), or the prefix of a TensorFlow one.

    meta is a dictionary: kind (separator or classifier), args of the model, step, config, classes
    (names or None), and more. FileNotFoundError if there is nothing at path. ValueError if what
    is there is not a checkpoint of these networks.
    """
    path = str(path)
    if path.startswith("released:"):
        import released  # here: it knows the network and the datasets, which nobody else needs
        return released.load(path.removeprefix("released:"), device)
    prefix = tf_checkpoint.prefix_of(path)
    if tf_checkpoint.is_checkpoint(prefix):
        net, meta = _load_tensorflow(prefix)
    elif os.path.isfile(path):
        tf_checkpoint.refuse_keras(path)
        net, meta = _load_ours(path)
    else:
        raise FileNotFoundError(
            f"no checkpoint at {path}: neither that file nor {prefix}.index exists")
    return net.to(device).eval(), meta


def read_checkpoint(path):
    """The tensors and plain values in a .pt or .resume file; ValueError if it is anything else."""
    if str(path).endswith(".safetensors"):
        import export  # here: it knows the scripts
        return export.read_safetensors(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load has no error type of its own: zip, pickle, key, runtime
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(e).__name__}): is it "
                         "complete, and one of ours?") from e
    if not isinstance(saved, dict) or not {"kind", "model", "args"} <= saved.keys():
        raise ValueError(f"{path} is not a checkpoint of this project (no kind, args and model)")
    return saved


def _load_ours(path):
    saved = read_checkpoint(path)
    try:
        net = KINDS[saved["kind"]](**saved["args"])
        net.load_state_dict(saved.pop("model"))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise ValueError(f"{path} does not fit the networks of this version: {e!r:.200}") from e
    return net, saved


def _load_tensorflow(prefix):
    kind, args = tf_checkpoint.architecture(tf_checkpoint.read_index(prefix), prefix)
    net = KINDS[kind](**args)
    tf_checkpoint.copy_into(net, prefix)
    return net, {"kind": kind, "args": net.args, "classes": None, "step": None, "config": {},
                 "source": "tensorflow", "as_published": tf_checkpoint.as_published(net)}
