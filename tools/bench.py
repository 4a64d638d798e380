"""
Speed of training and inference on this machine, beside what the machine can do.

    python -m tools.bench                                       # full width, random waves
    python -m tools.bench --networks=separator,v1 --size=demo   # narrow networks
    python -m tools.bench --networks=separator --data=data/musdb    # real data, and its wait
    python -m tools.bench --networks=v1 --dtype=bfloat16 --compile=True
    python -m tools.bench --networks=separator --profile=True   # also the slowest operators

One row per network: median step in milliseconds; crops per second; TFLOP/s; the same relative to
one large matrix product, and to the bare convolutions of the same shapes in PyTorch, both measured
in the same process; peak memory; share of the time spent waiting for data; and inference speed in
seconds of music per second. Ratios may exceed 100 %: direct convolution is counted, and Winograd's
algorithm multiplies less. Each network runs in a process of its own. Run nothing else meanwhile.
OMP_NUM_THREADS sets the number of threads.
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
from common import device as devices
from common import settings
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
profile = False         # also print the slowest operators of a step
device = ""             # cpu, cuda, mps; empty: cuda if there is one
dtype = "float32"       # float32, bfloat16, float16: of the convolutional parts only
compile = False         # torch.compile, as in training
workers = 2             # threads that prefetch data
# -----------------------------------------------------------------------------

DEMO = os.path.join(os.path.dirname(__file__), "..", "config", "demo_tags.py")
STEMS = ["vocals", "other", "drums", "bass"]
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
        return model.Separator(STEMS, widths, "avg"), 8
    tail_widths = None if name.startswith("ast") else tail_widths
    return model.Classifier(50, True, name, widths=widths, tail_widths=tail_widths), 16


def batches(net, kind, count, on):
    """Infinite batches (waves, targets) of `count` crops, from `data` or random."""
    if not data:
        torch.manual_seed(1)
        wave = 0.1 * torch.randn(count, getattr(net, "crop", model.CROP)).to(on)        # (B, N)
        if kind == "separator":
            return itertools.repeat((wave, torch.stack([wave] * len(net.sources), 1)))
        return itertools.repeat((wave, (torch.rand(count, 50) < 0.1).float().to(on)))
    prepared = Prepared(data, "stems" if kind == "separator" else "clips")
    devices.keep_on_gpu(prepared, on)
    if kind == "separator":
        mixes = Mixes(prepared, "train", net.sources, 1)
        return prefetch(lambda k: mixes.batch(k * count, count), itertools.count(), workers)
    clips = Clips(prepared, "train", "tags")
    clips.crop = net.crop
    return prefetch(lambda k: clips.batch(k, clips.order(k)[:count]), itertools.count(), workers)


def synchronize(on):
    if on.startswith("cuda"):
        torch.cuda.synchronize()


def warm_up(on):
    """Untimed calls; on a GPU the fourth captures a CUDA graph."""
    return 4 if on.startswith("cuda") else 2


def median_seconds(work, on, count, before):
    """Median duration of work() in seconds over `count` calls, after `before` untimed ones."""
    durations = []
    for _ in range(before + count):
        synchronize(on)
        began = time.perf_counter()
        work()
        synchronize(on)
        durations.append(time.perf_counter() - began)
    return statistics.median(durations[before:])


def record_convolutions(net, wave):
    """[(convolution, input shape, whether the input needs a gradient)] of a forward pass."""
    found, hooks = [], []

    def record(module, args, _):
        found.append((module, args[0].shape, args[0].requires_grad))

    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            hooks.append(module.register_forward_hook(record))
    net(wave)
    for hook in hooks:
        hook.remove()
    return found


def bare_seconds(convolutions, on, amp_dtype):
    """Duration of the convolutions alone, forward and backward, in PyTorch."""
    total, on_gpu = 0.0, on.startswith("cuda")
    repeats = 10 if on_gpu else 1       # a kernel launch takes as long as one of them
    for module, shape, needs_gradient in convolutions:
        x = torch.randn(shape, device=on, dtype=amp_dtype or torch.float32)
        x = x.to(memory_format=torch.channels_last).requires_grad_(needs_gradient)
        kind = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.ConvTranspose2d
        bare = kind(
            module.in_channels, module.out_channels, module.kernel_size, module.stride,
            module.padding).to(on, amp_dtype, memory_format=torch.channels_last)
        gradient = torch.randn_like(bare(x))
        wanted = [t for t in (x, *bare.parameters()) if t.requires_grad]

        def work(bare=bare, x=x, gradient=gradient, wanted=wanted):
            for _ in range(repeats):
                torch.autograd.grad(bare(x), wanted, gradient)

        if on_gpu:
            work = CudaGraph(work, [])
        total += median_seconds(work, on, max(3, steps // 2), warm_up(on)) / repeats
    return total


def peak_gib(on):
    if on.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 2 ** 10       # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def measure(name, on):
    """The row of one network, as strings."""
    torch.manual_seed(1)
    net, count = build(name)
    kind = "separator" if name.startswith("separator") else "classifier"
    net, count = net.to(on).train(), batch_size or count
    net.amp_dtype = AMP_DTYPES[dtype]
    on_gpu = on.startswith("cuda")
    crop = getattr(net, "crop", model.CROP)
    flops = count * devices.count_flops(net, crop, on)
    devices.accelerate(net, on)
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, eps=1e-7, fused=on_gpu)
    source, meter = iter(batches(net, kind, count, on)), Meter()

    def learn(wave, target):
        if kind == "separator":
            loss = model.l1_loss(net(wave), target)
        else:
            loss = model.crop_losses(net(wave), target, net.multilabel).mean()
        loss.backward()
        return loss.detach()

    if on_gpu:
        learn = CudaGraph(learn, net.parameters())

    def step():
        meter.add(learn(*meter.next_batch(source, on)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    if compile:
        devices.compile_parts([net.unet] if kind == "separator" else net.train_parts().values(), on)

    # training
    for _ in range(warm_up(on) + 1):
        step()
    meter.reset()
    seconds = median_seconds(step, on, steps, 0)
    waiting, memory = meter.waited / (time.time() - meter.began), peak_gib(on)
    if profile:
        print_profile(step, on_gpu)

    # the same convolutions in a plain network
    plain = build(name)[0].to(on).train()
    convolutions = record_convolutions(plain, torch.zeros(count, crop, device=on))
    bare = bare_seconds(convolutions, on, net.amp_dtype)
    rate = devices.matmul_rate(on, net.amp_dtype)

    # inference
    net.eval()
    wave = 0.1 * torch.randn(song * model.SAMPLE_RATE)
    use = model.separate if kind == "separator" else model.tag
    with torch.compiler.set_stance("force_eager"):
        inference = median_seconds(lambda: use(net, wave), on, 3, 1)
    achieved = flops / seconds
    return (name, f"{1000 * seconds:.4g}", f"{count / seconds:.1f}", f"{achieved / 1e12:.3f}",
            f"{achieved / rate:.0%}", f"{1000 * bare:.4g}", f"{bare / seconds:.0%}",
            f"{memory:.1f}", f"{waiting:.0%}", f"{song / inference:.0f}")


def print_profile(step, on_gpu):
    from torch.profiler import profile as profiler
    with profiler() as profiled:
        step()
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=order, row_limit=25))


def main():
    config, _ = settings.configure(globals(), configs=False)
    settings.check_numbers(config)
    settings.at_least(1, steps=steps, song=song)
    settings.at_least(0, batch_size=batch_size, workers=workers)
    settings.choose("size", size, ["full", "demo"])
    settings.choose("dtype", dtype, AMP_DTYPES)
    for name in networks:
        settings.choose("networks", name, ["separator", "separator4", *model.VARIANTS])
    on, *_ = devices.setup_device(device)
    torch.backends.cudnn.benchmark = True       # as in training

    # each network in a process of its own: peak memory is that of the process
    if CHILD in os.environ:
        print(line(measure(networks[0], on)), flush=True)
        return 0
    machine = f"{torch.get_num_threads()} threads"
    if on.startswith("cuda"):
        machine = torch.cuda.get_device_name()
    print(f"{on}, {machine}, PyTorch {torch.__version__}, {dtype}, {size} width\n")
    print(line(HEADS) + "\n|" + " --- |" * len(HEADS), flush=True)
    for name in networks:
        child = [sys.executable, "-m", "tools.bench", *sys.argv[1:], f"--networks={name}"]
        status = subprocess.run(child, env=os.environ | {CHILD: "1"}).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    settings.script(main)
