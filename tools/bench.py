"""
Speed of training and inference, relative to the peak of this machine.

    python -m tools.bench                                       # full width, random waves
    python -m tools.bench --networks=separator,v1 --size=demo   # narrow networks
    python -m tools.bench --networks=separator --data=data/musdb    # also the time lost on loading
    python -m tools.bench --networks=v1 --dtype=bfloat16 --compile=True

Per network: median step; TFLOP/s, also relative to one large matrix product and to the bare
convolutions in PyTorch; peak memory; time spent waiting for data; inference speed in seconds of
music per second. Ratios may exceed 100 %: direct convolution is counted, and Winograd's algorithm
multiplies less. OMP_NUM_THREADS sets the number of threads. Run nothing else meanwhile.
"""
import itertools
import os
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn as nn

import model
from common import device as devices, settings
from common.device import AMP_DTYPES, CudaGraph
from common.run import Meter
from data import Clips, Mixes, Prepared, prefetch

# -----------------------------------------------------------------------------
# settings
networks = ["separator", "separator4", "v1", "v3", "tail"]
size = "full"           # full: the paper's channels; demo: those of config/demo_*.py
batch_size = 0          # crops per step; 0: the paper's, 8 for separators and 16 for classifiers
data = ""               # prepared stems, or clips with 50 tags; empty: random waves
steps = 7               # timed steps, after the warm-up
song = 60               # seconds of the song that is separated or tagged
device = ""             # cpu, cuda, mps; empty: cuda if there is one
dtype = "float32"       # float32, bfloat16, float16: of the convolutional parts only
compile = False         # torch.compile, as in training
workers = 2             # threads that prefetch data
# -----------------------------------------------------------------------------

DEMO = os.path.join(os.path.dirname(__file__), "..", "config", "demo_tags.py")
HEADS = ("network", "ms/step", "crops/s", "TFLOP/s", "of matmul", "bare conv. ms", "of bare conv.",
         "GiB", "waiting", "music s/s")
CHILD = "BENCH_CHILD"           # in the environment of the processes that measure


def line(cells):
    return "| " + " | ".join(f"{cell:>13}" for cell in cells) + " |"


def build(name):
    """(network, crops per step) of a name in `networks`."""
    demo = settings.run_config(DEMO) if size == "demo" else {}
    widths, tail_widths = demo.get("widths", model.WIDTHS), demo.get("tail_widths")
    if name == "separator":
        return model.Separator(["vocals"], widths), 8
    if name == "separator4":
        return model.Separator(["vocals", "other", "drums", "bass"], widths, "avg"), 8
    tail_widths = None if name.startswith("ast") else tail_widths
    return model.Classifier(50, True, name, widths=widths, tail_widths=tail_widths), 16


def batches(net, separates, count, dev):
    """Infinite batches (waves, targets) of `count` crops, from `data` or random."""
    if not data:
        torch.manual_seed(1)
        wave = 0.1 * torch.randn(count, getattr(net, "crop", model.CROP)).to(dev)       # (B, N)
        target = torch.stack([wave] * len(net.sources), 1) if separates else (
            (torch.rand(count, 50) < 0.1).float().to(dev))
        return itertools.repeat((wave, target))
    prepared = Prepared(data, "stems" if separates else "clips")
    devices.keep_on_gpu(prepared, dev)
    if separates:
        mixes = Mixes(prepared, "train", net.sources, 1)
        return prefetch(lambda k: mixes.batch(k * count, count), itertools.count(), workers)
    clips = Clips(prepared, "train", "tags")
    clips.crop = net.crop
    return prefetch(lambda k: clips.batch(k, clips.order(k)[:count]), itertools.count(), workers)


def warm_up(dev):
    """Untimed calls; on a GPU the fourth captures a CUDA graph."""
    return 4 if dev.startswith("cuda") else 2


def median_seconds(work, dev, count, before):
    """Median duration of work() in seconds over `count` calls, after `before` untimed ones."""
    synchronize = torch.cuda.synchronize if dev.startswith("cuda") else lambda: None
    durations = []
    for _ in range(before + count):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        durations.append(time.perf_counter() - began)
    return statistics.median(durations[before:])


def record_convolutions(net, wave):
    """[(convolution, input shape, whether the input needs a gradient)] of a forward pass."""
    convolutions = []

    def record(module, args, _):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            convolutions.append((module, args[0].shape, args[0].requires_grad))

    hook = nn.modules.module.register_module_forward_hook(record)
    net(wave)
    hook.remove()
    return convolutions


def bare_seconds(convolutions, count, dev, amp_dtype):
    """Duration of the convolutions alone on `count` crops, forward and backward, in PyTorch."""
    total, on_gpu = 0.0, dev.startswith("cuda")
    repeats = 10 if on_gpu else 1       # a kernel launch takes as long as one of them
    for module, shape, needs_gradient in convolutions:
        x = torch.randn(count, *shape[1:], device=dev, dtype=amp_dtype or torch.float32)
        x = x.to(memory_format=torch.channels_last).requires_grad_(needs_gradient)
        kind = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.ConvTranspose2d
        bare = kind(
            module.in_channels, module.out_channels, module.kernel_size, module.stride,
            module.padding).to(dev, amp_dtype, memory_format=torch.channels_last)
        gradient = torch.randn_like(bare(x))
        wanted = [t for t in (x, *bare.parameters()) if t.requires_grad]

        def work(bare=bare, x=x, gradient=gradient, wanted=wanted):
            for _ in range(repeats):
                torch.autograd.grad(bare(x), wanted, gradient)

        if on_gpu:
            work = CudaGraph(work, [])
        total += median_seconds(work, dev, max(3, steps // 2), warm_up(dev)) / repeats
    return total


def peak_gib(dev):
    if dev.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 2 ** 10       # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def measure(name, dev):
    """The row of one network, as strings."""
    torch.manual_seed(1)
    net, count = build(name)
    separates = isinstance(net, model.Separator)
    net, count = net.to(dev).train(), batch_size or count
    crop, on_gpu = getattr(net, "crop", model.CROP), dev.startswith("cuda")
    convolutions = record_convolutions(net, torch.zeros(2, crop, device=dev))   # plain as yet
    flops = count * devices.count_flops(net, crop, dev)
    net.amp_dtype = AMP_DTYPES[dtype]
    devices.accelerate(net, dev)
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, eps=1e-7, fused=on_gpu)
    source, meter = iter(batches(net, separates, count, dev)), Meter()

    def learn(wave, target):
        if separates:
            loss = model.l1_loss(net(wave), target)
        else:
            loss = model.crop_losses(net(wave), target, net.multilabel).mean()
        loss.backward()
        return loss.detach()

    if on_gpu:
        learn = CudaGraph(learn, net.parameters())
        torch.cuda.reset_peak_memory_stats()
    if compile:
        devices.compile_parts([net.unet] if separates else net.train_parts().values(), dev)

    def step():
        meter.add(learn(*meter.next_batch(source, dev)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(warm_up(dev) + 1):
        step()
    meter.reset()
    seconds = median_seconds(step, dev, steps, 0)
    waiting, memory = meter.waited / (time.time() - meter.began), peak_gib(dev)
    bare = bare_seconds(convolutions, count, dev, net.amp_dtype)
    rate = devices.matmul_rate(dev, net.amp_dtype)

    net.eval()
    wave = 0.1 * torch.randn(song * model.SAMPLE_RATE)
    infer = model.separate if separates else model.tag
    with torch.compiler.set_stance("force_eager"):
        inference = median_seconds(lambda: infer(net, wave), dev, 3, 1)
    achieved = flops / seconds
    return (name, f"{1000 * seconds:.4g}", f"{count / seconds:.1f}", f"{achieved / 1e12:.3f}",
            f"{achieved / rate:.0%}", f"{1000 * bare:.4g}", f"{bare / seconds:.0%}",
            f"{memory:.1f}", f"{waiting:.0%}", f"{song / inference:.0f}")


def main():
    settings.configure(globals(), configs=False)
    settings.at_least(1, steps=steps, song=song)
    settings.at_least(0, batch_size=batch_size, workers=workers)
    settings.choose("size", size, ["full", "demo"])
    settings.choose("dtype", dtype, AMP_DTYPES)
    for name in networks:
        settings.choose("networks", name, ["separator", "separator4", *model.VARIANTS])
    dev, *_ = devices.setup_device(device)
    torch.backends.cudnn.benchmark = True       # as in training

    # each network in a process of its own: peak memory is that of the process
    if CHILD in os.environ:
        print(line(measure(networks[0], dev)), flush=True)
        return 0
    machine = torch.cuda.get_device_name() if dev.startswith("cuda") else (
        f"{torch.get_num_threads()} threads")
    print(f"{dev}, {machine}, PyTorch {torch.__version__}, {dtype}, {size} width\n")
    print(line(HEADS) + "\n|" + " --- |" * len(HEADS), flush=True)
    for name in networks:
        child = [sys.executable, "-m", "tools.bench", *sys.argv[1:], f"--networks={name}"]
        if status := subprocess.run(child, env=os.environ | {CHILD: "1"}).returncode:
            return status
    return 0


if __name__ == "__main__":
    settings.script(main)
