"""
The networks of "Pre-Training Music Classification Models via Music Source Separation"
(Garoufis et al., arXiv 2310.15845), in plain torch.nn, and how to apply them to whole songs.

    import model, weights
    net, meta = weights.load("ckpt/vocals.pt")
    stems = model.separate(net, wave, rate)     # a Separator: a song (C, N) -> (S, C, N)
    scores = model.tag(net, wave, rate)         # a Classifier: a song (C, N) -> (classes,)
    logits = net(wave)                          # a batch (B, N) at 16 kHz -> (B, classes)

All models take 16 kHz mono waves, floating point in [-1, 1]. Spectrograms, logarithms, mel and
resynthesis are always float32; only the convolutional parts, `unet` and `tail`, are compiled or
run in reduced precision (set `net.amp_dtype`).

Letters in shapes: B batch, N samples, S sources, C channels, T frames, F frequency bins, M mel
bands, K crops or windows, P patches, D width of the transformer.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from audio.resample import resample

SAMPLE_RATE = 16000
WIN, HOP = 512, 160
BINS = 256                          # the network sees bins 0..255; the Nyquist bin passes through
FRAMES = 384                        # of a crop: halved six times by the U-Net, seven by the tail
CROP = (FRAMES - 1) * HOP + WIN     # 61,792 samples, 3.86 s
EDGE = WIN - HOP                    # samples at either end of a crop without full overlap
WINDOW, OVERLAP = 1152, 192         # frames of the windows that whole songs are separated in
MELS, MEL_LOW, MEL_HIGH = 128, 100.0, 7800.0
EPS = 1e-4                          # added before every logarithm
WIDTHS = (16, 32, 64, 128, 192, 192)
PATCH, DROPOUT = 16, 0.1            # of the transformer: frames and mel bands of a patch
AST_FRAMES = 768                    # frames of a crop of the transformer

VARIANTS = {    # channels of the tail blocks, and how the decoder outputs join them
    "tail": ((64, 64, 128, 128, 128, 128, 256), None),
    "v1": ((64, 128, 128, 128, 128, 128, 256), "concat"),
    "v3": ((64, 64, 128, 128, 128, 128, 256), "add"),
    "v3_concat": ((64, 64, 128, 128, 128, 128, 256), "concat"),
    "ast": ((), "patches"),         # a transformer instead of the convolutional tail ...
    "ast_tail": ((), None),         # ... and without the U-Net
}


# -----------------------------------------------------------------------------
# from waves to spectrograms and back

def stft(wave):
    """(B, N) -> (B, T, 257) complex: periodic Hann 512, hop 160, no padding."""
    window = torch.hann_window(WIN, dtype=torch.float32, device=wave.device)
    spec = torch.stft(wave.float(), WIN, HOP, window=window, center=False, return_complex=True)
    return spec.transpose(1, 2)                                     # (B, T, 257)


def magnitudes(wave):
    """(B, N) -> (B, T, 256): the input of the networks."""
    return stft(wave)[..., :BINS].abs()


def istft(spec):
    """(..., T, 257) complex -> (..., N): inverts stft() except at the ends.

    The first and last 352 samples fade in and out: frames are weighted by the window over the
    *constant* sum of overlapping squared windows (as tf.signal.inverse_stft_window_fn). The true
    sum goes to zero at the ends, and dividing by it would amplify errors there.
    """
    window = torch.hann_window(WIN, dtype=torch.float32, device=spec.device)
    squares = F.pad(window ** 2, (0, -WIN % HOP)).view(-1, HOP)     # (4, 160)
    total = squares.sum(0).repeat(len(squares))[:WIN]               # (512,)
    frames = torch.fft.irfft(spec, WIN) * (window / total)          # (..., T, 512)
    return OverlapAdd.apply(frames, HOP)                            # (..., N)


class OverlapAdd(torch.autograd.Function):
    """Sum of frames (..., T, W) that start `hop` samples apart -> (..., (T - 1) hop + W).

    F.fold would copy the gradient; here it is a view.
    """

    @staticmethod
    def forward(ctx, frames, hop):
        n_frames, ctx.length, ctx.hop = *frames.shape[-2:], hop
        parts = frames.split(hop, -1)                               # each (..., T, <= hop)
        hops = frames.new_zeros(*frames.shape[:-2], n_frames + len(parts) - 1, hop)
        for k, part in enumerate(parts):
            hops[..., k:k + n_frames, :part.shape[-1]] += part
        return hops.flatten(-2)[..., :(n_frames - 1) * hop + ctx.length]

    @staticmethod
    def backward(ctx, dy):
        return dy.unfold(-1, ctx.length, ctx.hop), None             # (..., T, W)


def mel_filters():
    """(256, 128): HTK triangles drawn in mel, 100 to 7800 Hz, no area normalisation.

    The 256 bins are placed at linspace(0, 8000, 256), as in the authors' code.
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
    """log10(x + 1e-4), elementwise."""
    return torch.log10(x + EPS)


# -----------------------------------------------------------------------------
# the U-Net (Kong et al. 2021, the plain baseline)

def conv_block(c_in, c_out, momentum):
    """2 x [BatchNorm, LeakyReLU, Conv3x3]: (B, C, T, F) -> (B, C', T, F)."""
    def layers(a, b):
        return (nn.BatchNorm2d(a, eps=1e-3, momentum=momentum), nn.LeakyReLU(0.01, inplace=True),
                nn.Conv2d(a, b, 3, padding=1))
    return nn.Sequential(*layers(c_in, c_out), *layers(c_out, c_out))


class DecoderBlock(nn.Module):
    """2x2 transposed convolution with stride 2, then a conv_block()."""

    def __init__(self, c_in, c_out, momentum):
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_out, 2, stride=2)
        self.convs = conv_block(c_out, c_out, momentum)

    def forward(self, x):
        return self.convs(self.up(x))                               # (B, C, 2T, 2F)


class UNet(nn.Module):
    """Log-magnitudes (B, 1, T, 256) -> masks (B, S, T, 256) and the six decoder outputs.

    T must be a multiple of 64. The decoder outputs come coarsest first: output d = 0..5 is
    (B, C, T / 2^(5 - d), 256 / 2^(5 - d)).
    """

    def __init__(self, n_sources, widths, pool, momentum):
        super().__init__()
        first, ups = widths[0], widths[::-1]
        self.pool = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}[pool](2)
        self.encoder = nn.ModuleList(
            conv_block(a, b, momentum) for a, b in zip((1, *widths[:-1]), widths, strict=True))
        # decoder block i > 0 takes the output of the previous one and the pooled skip
        c_in = [widths[-1]] + [ups[i - 1] + widths[-1 - i] for i in range(1, len(ups))]
        self.decoder = nn.ModuleList(
            DecoderBlock(a, b, momentum) for a, b in zip(c_in, ups, strict=True))
        self.head = nn.Sequential(conv_block(first + 1, 2 * first, momentum),
                                  nn.Conv2d(2 * first, n_sources, 3, padding=1))

    def forward(self, spec):
        x, skips, outputs = spec, [], []
        for block in self.encoder:
            x = self.pool(block(x))                                 # (B, C, T/2, F/2), ...
            skips.append(x)
        for i, block in enumerate(self.decoder):
            if i > 0:
                x = torch.cat([x, skips[-1 - i]], 1)
            x = block(x)                                            # (B, C, T/32, F/32), ...
            outputs.append(x)                                       # ..., (B, C, T, F)
        masks = torch.sigmoid(self.head(torch.cat([x, spec], 1)))   # (B, S, T, F)
        return masks, outputs


def glorot_(module):
    """Keras' defaults: Glorot-uniform kernels, zero biases; BatchNorm's are PyTorch's too."""
    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)


def autocast(x, dtype):
    """Autocast to dtype; float32 if it is None."""
    return torch.autocast(x.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def check_wave(wave):
    if wave.dim() != 2 or wave.shape[1] == 0 or not wave.is_floating_point():
        raise ValueError("a batch of waves is a floating-point tensor (batch, samples), got "
                         f"{tuple(wave.shape)} {wave.dtype}")


class Separator(nn.Module):
    """Waves (B, N) -> sources (B, S, N): sigmoid masks times magnitudes, the mixture's phase.

    A crop of 61,792 samples is processed directly; its first and last 352 samples fade in and
    out. Any other length goes through separate(), without gradients. ValueError for other shapes.
    """

    def __init__(self, sources, widths=WIDTHS, pool="max", bn_momentum=0.01):
        super().__init__()
        self.args = dict(sources=list(sources), widths=list(widths), pool=pool,
                         bn_momentum=bn_momentum)
        self.sources, self.amp_dtype = list(sources), None
        self.unet = UNet(len(sources), widths, pool, bn_momentum)
        glorot_(self)
        self.to(memory_format=torch.channels_last)                  # faster, the same shapes

    def masks(self, spec):
        """(B, T, 257) complex -> (B, S, T, 256) in [0, 1], T a multiple of 64."""
        x = log_compress(spec[..., :BINS].abs())[:, None]           # (B, 1, T, F)
        with autocast(x, self.amp_dtype):
            return self.unet(x)[0].float()

    def apply_masks(self, spec, masks):
        """(B, T, 257), (B, S, T, 256) -> waves (B, S, N); the Nyquist bin is not masked."""
        # make the small real masks contiguous here, not the large complex product
        masks = F.pad(masks.contiguous(), (0, 1), value=1.0)        # (B, S, T, 257)
        return istft(spec[:, None] * masks)                         # (B, S, N)

    def forward(self, wave):
        check_wave(wave)
        if wave.shape[1] == CROP:
            spec = stft(wave)                                       # (B, 384, 257)
            return self.apply_masks(spec, self.masks(spec))
        return torch.stack([separate(self, song) for song in wave]).to(wave.device)     # (B, S, N)


def l1_loss(estimate, target):
    """Mean |error| of crops (B, S, N), without the 352 samples at each end that fade."""
    if estimate.shape != target.shape:      # broadcasting would hide the mistake
        raise ValueError(f"shapes differ: {estimate.shape} and {target.shape}")
    return (estimate - target)[..., EDGE:-EDGE].abs().mean()


# -----------------------------------------------------------------------------
# the tail (Won et al. 2020's short-chunk VGG, two convolutions per resolution)

class TailBlock(nn.Module):
    """2 x [Conv3x3, BatchNorm, ReLU], max pooling.

    join: how a decoder output is merged: None (not at all), concat (channels), add (1x1 conv.).
    """

    def __init__(self, c_in, c_out, c_skip, join, size, momentum):
        super().__init__()
        self.join, self.skip_pool = join, nn.MaxPool2d((1, 2))
        if join == "add":
            self.adapter = nn.Conv2d(c_skip, c_in, 1)
        if join == "concat":
            c_in = c_in + c_skip

        def layers(a, b):
            return (nn.Conv2d(a, b, 3, padding=1),
                    nn.BatchNorm2d(b, eps=1e-3, momentum=momentum), nn.ReLU(inplace=True))
        self.convs = nn.Sequential(
            *layers(c_in, c_out), *layers(c_out, c_out), nn.MaxPool2d(size))

    def forward(self, x, skip=None):
        if self.join:
            skip = self.skip_pool(skip)                             # (B, C, T', F'/2), as mel
        if self.join == "concat":
            x = torch.cat([x, skip], 1)                             # (B, C + C', T', M')
        elif self.join == "add":
            x = x + self.adapter(skip)
        return self.convs(x)                                        # (B, C, T'/t, M'/f)


class Tail(nn.Module):
    """Mel spectrograms (B, S + 1, 384, 128) and decoder outputs -> logits (B, classes)."""

    def __init__(self, c_in, n_classes, widths, join, skip_widths, dropout, momentum):
        super().__init__()
        self.blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            joined = join is not None and 1 <= i <= len(skip_widths)
            c_skip = skip_widths[i - 1] if joined else 0
            size = (2, 2) if i < len(widths) - 1 else (3, 2)        # 3 in time: 384 = 3 x 2^7
            self.blocks.append(
                TailBlock(c_in, width, c_skip, join if joined else None, size, momentum))
            c_in = width
        flat = 2 * widths[-1]                                       # 2 steps in time remain
        self.dense = nn.Linear(flat, flat)
        self.dense_norm = nn.BatchNorm1d(flat, eps=1e-3, momentum=momentum)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(flat, n_classes)

    def forward(self, x, skips=()):
        for i, block in enumerate(self.blocks):
            x = block(x, skips[i - 1] if block.join else None)      # (B, C, T/2, M/2), ...
        x = F.relu(self.dense_norm(self.dense(x.flatten(1))))       # (B, 512)
        return self.out(self.dropout(x))                            # (B, classes)


# -----------------------------------------------------------------------------
# the transformer (Gong et al. 2021's AST, a ViT)

class Attention(nn.Module):
    """Multi-head self-attention: (B, P + 1, D) -> (B, P + 1, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in (self.query, self.key, self.value))  # (B, heads, P + 1, D / heads)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=DROPOUT if self.training else 0.0)
        return self.out(x.transpose(1, 2).flatten(2))               # (B, P + 1, D)


class Layer(nn.Module):
    """Pre-norm transformer layer: x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x))."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(DROPOUT),
                                 nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))            # (B, P + 1, D)


class Adapter(nn.Module):
    """A decoder output (B, C, T / 2^(5 - d), 256 / 2^(5 - d)) -> patches (B, P, D), d = 0..4."""

    def __init__(self, channels, width, d):
        super().__init__()
        if d == 0:      # coarser in time than the patches
            self.conv = nn.ConvTranspose2d(channels, width, 2, stride=(2, 1))
        else:
            size = 2 ** (d - 1), 2 ** d
            self.conv = nn.Conv2d(channels, width, size, stride=size)

    def forward(self, skip):
        x = self.conv(skip)[..., :MELS // PATCH]                    # (B, D, T/16, 8)
        return x.flatten(2).transpose(1, 2)                         # (B, P, D)


class Transformer(nn.Module):
    """Mel spectrograms (B, S + 1, T, 128) and decoder outputs -> logits (B, classes).

    Patches of 16 x 16 become tokens, after a class token. Decoder outputs 4, 3, 2, 1, 0 are added
    to the tokens before layers 2, 4, 6, 8, 10 (counted from 0), or as many as there are. The input
    is normalised per channel by the mean and twice the standard deviation of the training set,
    which measure() sets.
    """

    def __init__(self, c_in, n_classes, frames, width, depth, heads, skip_widths):
        super().__init__()
        if min(width, depth, heads) < 1 or width % heads or len(skip_widths) > (depth - 1) // 2:
            raise ValueError(f"transformer={width},{depth},{heads} (width, layers, heads): width "
                             "must be a multiple of heads, and each decoder output needs two "
                             f"layers: with {depth} layers skips is at most {(depth - 1) // 2}")
        self.register_buffer("mean", torch.zeros(c_in, 1, 1))
        self.register_buffer("std", torch.ones(c_in, 1, 1))
        self.patches = nn.Conv2d(c_in, width, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        tokens = frames // PATCH * (MELS // PATCH) + 1
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.dropout = nn.Dropout(DROPOUT)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.adapters = nn.ModuleList(
            Adapter(channels, width, 4 - i) for i, channels in enumerate(skip_widths))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, n_classes)

    @torch.no_grad()
    def measure(self, x):
        """Sets mean and std from spectrograms (B, S + 1, T, 128) of the training set."""
        self.mean.copy_(x.mean((0, 2, 3))[:, None, None])
        self.std.copy_(x.std((0, 2, 3))[:, None, None].clamp(min=1e-6))

    def forward(self, x, skips=()):
        x = (x - self.mean) / (2 * self.std)                        # (B, S + 1, T, M)
        x = self.patches(x).flatten(2).transpose(1, 2)              # (B, P, D)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = self.dropout(x)                                         # (B, P + 1, D)
        for i, layer in enumerate(self.layers):
            joined = i // 2 - 1
            if i % 2 == 0 and 0 <= joined < len(self.adapters):
                x = x + F.pad(self.adapters[joined](skips[joined]), (0, 0, 1, 0))
            x = layer(x)
        return self.out(self.norm(x)[:, 0])                         # (B, classes)


# -----------------------------------------------------------------------------
# the classifier

class Classifier(nn.Module):
    """Waves (B, N) -> logits (B, classes), for sigmoid (multilabel) or softmax.

    One crop is 61,792 samples, `net.crop`. A longer wave is cut into crops of 384 frames with
    50 % overlap, dropping the remainder; a shorter one is zero-padded. The logits are those of
    the mean score over the crops. ValueError if the wave has another shape or dtype.

    variant: tail, v1 (skips concatenated), v3 (skips added through 1x1 adapters), v3_concat; or
    ast and ast_tail, with a transformer of (width, layers, heads) and crops of 768 frames.
    skips: how many decoder outputs join the tail, 0 to 5: tail block i takes output 5 - i.
    mel_of_log: the tail takes mel(log10(|X| + 1e-4)) of the mixture, a mistake in the authors'
    v1 code that their weights were trained with; else log10(mel(|X|) + 1e-4).
    Of each source it takes log10(mel(mask * |X|) + 1e-4).
    """

    def __init__(self, n_classes, multilabel, variant="v1", skips=5, sources=("vocals",),
                 widths=WIDTHS, pool="max", tail_widths=None, dropout=0.5, mel_of_log=False,
                 bn_momentum=0.01, transformer=(768, 12, 12)):
        super().__init__()
        own_widths, join = VARIANTS[variant]
        is_ast = variant.startswith("ast")
        tail_widths = tail_widths or own_widths
        if (len(widths), len(tail_widths)) != (6, len(own_widths)):
            raise ValueError(f"variant={variant} takes 6 widths and {len(own_widths)} tail_widths, "
                             f"got {len(widths)} and {len(tail_widths)}")
        self.args = dict(n_classes=n_classes, multilabel=multilabel, variant=variant, skips=skips,
                         sources=list(sources), widths=list(widths), pool=pool,
                         tail_widths=list(tail_widths), dropout=dropout, mel_of_log=mel_of_log,
                         bn_momentum=bn_momentum, transformer=list(transformer))
        self.multilabel, self.mel_of_log, self.amp_dtype = multilabel, mel_of_log, None
        self.frames = AST_FRAMES if is_ast else FRAMES
        self.crop = (self.frames - 1) * HOP + WIN
        self.unet, c_in, self.skips = None, 1, 0
        if join:
            self.unet = UNet(len(sources), widths, pool, bn_momentum)
            c_in, self.skips = len(sources) + 1, skips
        # tail block i = 1..skips takes decoder output 5 - i, which is as wide as encoder block i
        skip_widths = list(widths)[1:1 + self.skips]
        if is_ast:
            self.tail = Transformer(c_in, n_classes, self.frames, *transformer, skip_widths)
        else:
            self.tail = Tail(
                c_in, n_classes, tail_widths, join, skip_widths, dropout, bn_momentum)
        self.register_buffer("mel", mel_filters(), persistent=False)
        glorot_(self)
        self.to(memory_format=torch.channels_last)                  # faster, the same shapes

    def features(self, magnitude):
        """Crops (B, T, 256) -> the tail's input (B, S + 1, T, M), and the decoder outputs."""
        magnitude = magnitude[:, None]                              # (B, 1, T, F)
        x = log_compress(magnitude @ self.mel)                      # (B, 1, T, M)
        if self.mel_of_log:
            x = log_compress(magnitude) @ self.mel
        skips = []
        if self.unet is not None:
            with autocast(magnitude, self.amp_dtype):
                masks, outputs = self.unet(log_compress(magnitude))         # (B, S, T, F), ...
            masks = masks.float().contiguous()      # in NCHW, as matmul needs it
            sources = log_compress((masks * magnitude) @ self.mel)          # (B, S, T, M)
            x = torch.cat([sources, x], 1)                          # (B, S + 1, T, M)
            skips = outputs[4::-1][:self.skips]     # tail block 1 takes output 4, and so on
        return x, skips

    def logits(self, magnitude):
        """Magnitudes (B, T, 256) of crops -> (B, classes)."""
        x, skips = self.features(magnitude)
        with autocast(magnitude, self.amp_dtype):
            return self.tail(x, skips).float()

    def crop_logits(self, wave):
        """Crops (B, N) -> (B, classes)."""
        return self.logits(magnitudes(wave))

    def forward(self, wave):
        check_wave(wave)
        if wave.shape[1] == self.crop:
            return self.crop_logits(wave)
        wave = F.pad(wave, (0, max(0, self.crop - wave.shape[1])))
        crops = wave.unfold(1, self.crop, self.frames // 2 * HOP)   # (B, K, 61792), a view
        logits = []
        for clip in crops:      # 16 crops at a time keep the memory small
            logits.append(torch.cat([self.crop_logits(part) for part in clip.split(16)]))
        return mean_score_logits(torch.stack(logits), self.multilabel)      # (B, classes)

    def train_parts(self):
        """{name: module} of the parts that can be compiled and frozen separately."""
        return {"unet": self.unet, "tail": self.tail} if self.unet else {"tail": self.tail}


def mean_score_logits(logits, multilabel):
    """(B, K, classes) -> (B, classes): logits of the mean over K of sigmoid or softmax.

    In the log domain, so large logits stay exact.
    """
    if not multilabel:
        return torch.logsumexp(F.log_softmax(logits, -1), 1) - math.log(logits.shape[1])
    return torch.logsumexp(F.logsigmoid(logits), 1) - torch.logsumexp(F.logsigmoid(-logits), 1)


def crop_losses(logits, targets, multilabel):
    """Logits and 0/1 targets (B, classes) -> (B,): mean binary, or plain, cross-entropy."""
    if logits.shape != targets.shape:       # broadcasting would hide the mistake
        raise ValueError(f"shapes differ: {logits.shape} and {targets.shape}")
    if multilabel:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    return F.cross_entropy(logits, targets, reduction="none")


# -----------------------------------------------------------------------------
# whole songs

def check_song(net, kind, wave):
    if not isinstance(net, kind):
        raise ValueError(f"the network is a {type(net).__name__}, not a {kind.__name__}")
    is_wave = isinstance(wave, torch.Tensor) and wave.is_floating_point()
    if not is_wave or wave.dim() not in (1, 2, 3) or 0 in wave.shape:
        raise ValueError("a song is a floating-point tensor (samples,), (channels, samples) or "
                         "(songs, channels, samples), such as torch.from_numpy(array); got "
                         f"{type(wave).__name__} {getattr(wave, 'shape', '')} "
                         f"{getattr(wave, 'dtype', '')}")


@torch.no_grad()
def separate(net, wave, rate=SAMPLE_RATE, batch=1):
    """Songs of any length at `rate` Hz -> their sources, float32 on the CPU.

    (N,) -> (S, N); (C, N) -> (S, C, N); (B, C, N) -> (B, S, C, N). Masks are computed from the
    mean over channels at 16 kHz and applied to each channel, so no source has anything above
    8 kHz. `batch` windows run at a time on the device of `net`. Memory does not grow with the
    song, apart from input and result. ValueError if the wave has another shape or dtype.
    """
    check_song(net, Separator, wave)
    if wave.dim() == 3:
        return torch.stack([separate(net, song, rate, batch) for song in wave])
    n = wave.shape[-1]
    song = resample(wave.reshape(-1, n).float().cpu(), rate, SAMPLE_RATE)           # (C, N')
    stems = separate_windows(net, song, batch)                      # (S, C, N')
    stems = resample(stems, SAMPLE_RATE, rate)[..., :n]             # (S, C, N)
    return stems if wave.dim() == 2 else stems[:, 0]


def separate_windows(net, wave, batch):
    """(C, N) at 16 kHz -> (S, C, N), in windows of 1152 frames, 192 of them overlapping.

    Masks are cross-faded in the overlap. Silence around the song keeps its ends from fading.
    """
    channels, n = wave.shape
    frames, length = WINDOW - OVERLAP, (WINDOW - 1) * HOP + WIN     # length: samples of a window
    step = frames * HOP                                             # from window to window
    windows = max(1, math.ceil((n + 2 * EDGE - length) / step) + 1)
    device = next(net.parameters()).device
    rise = torch.arange(1, OVERLAP + 1, device=device)[:, None] / (OVERLAP + 1)     # (192, 1)
    stems = wave.new_zeros(len(net.sources), channels, length + (windows - 1) * step)

    for first in range(0, windows, batch):
        count = min(batch, windows - first)
        start = first * step - EDGE
        stop = start + length + (count - 1) * step
        padded = F.pad(wave[:, max(0, start):stop], (max(0, -start), max(0, stop - n)))
        spec = stft(padded.to(device))                              # (C, 960 K + 192, 257)
        windowed = spec.mean(0).unfold(0, WINDOW, frames).transpose(1, 2)   # (K, 1152, 257)
        masks = net.masks(windowed)                                 # (K, S, 1152, 256)

        # cross-fade with the end of the previous window; the first window fades with itself
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

        # the last 352 samples of a piece and the first of the next one add up
        piece = net.apply_masks(spec[:, :joined.shape[1]], joined[None])    # (C, S, N')
        stems[:, :, start + EDGE:][..., :piece.shape[-1]] += piece.transpose(0, 1).cpu()
    return stems[:, :, EDGE:EDGE + n]                               # (S, C, N)


@torch.no_grad()
def tag(net, wave, rate=SAMPLE_RATE, hop=0.0, batch=16):
    """Songs of any length at `rate` Hz -> scores in [0, 1] on the CPU, one per class of `net`.

    (N,) or (C, N) -> (classes,), the mean over crops with 50 % overlap, as in eval.py. With hop
    in seconds -> (K, classes): row k is the crop that starts at k hop; the remainder is dropped,
    a short song zero-padded. (B, C, N) -> (B, classes) or (B, K, classes). ValueError if the wave
    has another shape or dtype.
    """
    check_song(net, Classifier, wave)
    if wave.dim() == 3:
        return torch.stack([tag(net, song, rate, hop, batch) for song in wave])
    step = round(hop * SAMPLE_RATE) if hop else net.frames // 2 * HOP
    mono = wave.reshape(-1, wave.shape[-1]).mean(0)
    wave = resample(mono.float().cpu(), rate, SAMPLE_RATE)          # (N,)
    wave = F.pad(wave, (0, max(0, net.crop - len(wave))))
    device = next(net.parameters()).device
    crops = wave.unfold(0, net.crop, step).split(batch)             # views (<= batch, 61792)
    logits = torch.cat([net.crop_logits(part.to(device)) for part in crops])        # (K, classes)
    scores = torch.sigmoid(logits) if net.multilabel else torch.softmax(logits, -1)
    return scores.cpu() if hop else scores.mean(0).cpu()
