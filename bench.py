"""
How fast training and inference are here, and how far from what this machine can do.

    python bench.py                                     # all networks at full width, random sound
    python bench.py --networks=separator,v1 --size=demo # narrow ones
    python bench.py --networks=separator --data=data/musdb  # with real data, and the wait for it
    python bench.py --networks=v1 --dtype=bfloat16 --compile=True
    python bench.py --networks=separator --profile=True     # also which operators take the time

One line per network: median of the steps, in milliseconds; crops a second; arithmetic in TFLOP/s;
its share of what one large matrix product reaches, and of what the bare convolutions of the same
shapes reach, both measured in the same process; largest memory; share of the time that waits for
data; and in use, seconds of music per second. Shares can be above 100 %: what is counted are the
plain sums, and Winograd's algorithm multiplies less. Each network has a process of its own. Run
nothing else meanwhile. OMP_NUM_THREADS sets the threads.
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

import finetune_cls
import model
import pretrain_sep
import runtime
import training
from data import Clips, Mixes, Prepared, prefetch

# -----------------------------------------------------------------------------
# settings
networks = ["separator", "separator4", "v1", "v3", "tail"]
size = "full"           # full: the paper's channels; demo: those of config/demo_*.py
batch_size = 0          # crops per step; 0: the paper's, 8 for separators and 16 for classifiers
data = ""               # prepared stems or clips; empty: random sound
steps = 7               # timed steps, after some that are not
song = 60               # seconds of the song that is separated or tagged
profile = False         # also print the operators of a step that take most time
device = ""             # cpu, cuda, mps; empty: cuda if there is one
dtype = "float32"       # float32, bfloat16, float16: of the convolutions only
compile = False         # torch.compile, as in training
cuda_graph = True       # as in training
workers = 2             # threads that read data ahead
# -----------------------------------------------------------------------------

STEMS = ["vocals", "other", "drums", "bass"]
NARROW = {"widths": [4, 16, 16, 32, 32, 32]}
NARROW_TAIL = {"tail_widths": [16, 16, 32, 32, 32, 32, 64]}
HEADS = ("network", "ms/step", "crops/s", "TFLOP/s", "of matmul", "bare conv. ms", "of bare conv.",
         "GiB", "waiting", "music s/s")
MEASURES = "BENCH_MEASURES"     # in the environment of the processes that measure


def line(texts):
    return "| " + " | ".join(f"{text:>13}" for text in texts) + " |"


def build(name):
    """(network, crops per step) of a name in `networks`."""
    narrow = NARROW if size == "demo" else {}
    if name == "separator":
        return model.Separator(["vocals"], **narrow), 8
    if name == "separator4":
        return model.Separator(STEMS, pool="avg", **narrow), 8
    if size == "demo" and not name.startswith("ast"):
        narrow = NARROW | NARROW_TAIL
    return model.Classifier(50, True, name, **narrow), 16


def batches(net, kind, count, on):
    """Endless batches (waves, targets) of so many crops, from `data` or of noise."""
    if not data:
        torch.manual_seed(1)
        wave = 0.1 * torch.randn(count, getattr(net, "crop", model.CROP)).to(on)        # (B, N)
        if kind == "separator":
            return itertools.repeat((wave, torch.stack([wave] * len(net.sources), 1)))
        return itertools.repeat((wave, (torch.rand(count, 50) < 0.1).float().to(on)))
    prepared = Prepared(data, "stems" if kind == "separator" else "clips")
    training.keep_on_gpu(prepared, on, True)
    if kind == "separator":
        mixes = Mixes(prepared, "train", net.sources, 1)
        return prefetch(lambda k: mixes.batch(k * count, count), itertools.count(), workers)
    clips = Clips(prepared, "train", "tags")
    clips.crop = net.crop
    if len(clips.classes) != 50:
        runtime.die(f"{data} has {len(clips.classes)} tags, and these networks 50: name data/mtat")
    return prefetch(lambda k: clips.batch(k, clips.order(k)[:count]), itertools.count(), workers)


def wait_for(on):
    if on.startswith("cuda"):
        torch.cuda.synchronize()


def untimed(on):
    """How many calls are made before those that count; on a GPU the fourth records a graph."""
    return 4 if on.startswith("cuda") else 2


def median_seconds(work, on, count, before):
    """The median time that work() takes, in seconds, after `before` calls that do not count."""
    took = []
    for _ in range(before + count):
        wait_for(on)
        began = time.perf_counter()
        work()
        wait_for(on)
        took.append(time.perf_counter() - began)
    return statistics.median(took[before:])


def convolutions_of(net, step):
    """[(convolution, shape of its input, whether that needs a gradient)] of a step."""
    seen, hooks = [], []

    def note(module, args, _):
        seen.append((module, args[0].shape, args[0].requires_grad))

    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            hooks.append(module.register_forward_hook(note))
    step()
    for hook in hooks:
        hook.remove()
    return seen


def bare_seconds(seen, on, amp_dtype):
    """What the convolutions alone take, forward and backward, one after the other."""
    total, on_gpu = 0.0, on.startswith("cuda")
    repeats = 10 if on_gpu else 1       # starting anything on a GPU takes as long as one of them
    for module, shape, needs_gradient in seen:
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
            work = training.Graphed(work, [])
        total += median_seconds(work, on, max(3, steps // 2), untimed(on)) / repeats
    return total


def peak_gib(on):
    if on.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 2 ** 10       # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def measure(name, on):
    """The line of one network, as texts."""
    torch.manual_seed(1)
    net, count = build(name)
    kind = "separator" if name.startswith("separator") else "classifier"
    net, count = net.to(on).train(), batch_size or count
    net.amp_dtype = runtime.AMP_DTYPES[dtype]
    on_gpu = on.startswith("cuda")
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, eps=1e-7, fused=on_gpu)
    source, meter = iter(batches(net, kind, count, on)), training.Meter()

    def learn(wave, target):
        if kind == "separator":
            loss = pretrain_sep.l1_loss(net(wave), target)
        else:
            loss = finetune_cls.crop_losses(net(wave), target, net.multilabel).mean()
        loss.backward()
        return loss.detach()

    if cuda_graph and on_gpu:
        learn = training.Graphed(learn, net.parameters())

    def step():
        meter.add(learn(*meter.next_batch(source, on)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # what there is to do, and a step that is not timed
    flops = count * training.flops_per_crop(net, getattr(net, "crop", model.CROP), on)
    seen = convolutions_of(net, step)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    if compile:
        parts = [net.unet] if kind == "separator" else net.train_parts().values()
        runtime.compile_parts(parts, on)

    # training
    for _ in range(untimed(on)):
        step()
    meter.reset()
    seconds = median_seconds(step, on, steps, 0)
    waiting, memory = meter.waited / (time.time() - meter.began), peak_gib(on)
    if profile:
        print_profile(step, on_gpu)
    bare = bare_seconds(seen, on, net.amp_dtype)
    rate = training.matmul_rate(on, net.amp_dtype)

    # use
    net.eval()
    wave = 0.1 * torch.randn(song * model.SAMPLE_RATE)
    use = model.separate if kind == "separator" else model.tag
    with torch.compiler.set_stance("force_eager"):
        in_use = median_seconds(lambda: use(net, wave), on, 3, 1)
    done = flops / seconds
    return (name, f"{1000 * seconds:.4g}", f"{count / seconds:.1f}", f"{done / 1e12:.3f}",
            f"{done / rate:.0%}", f"{1000 * bare:.4g}", f"{bare / seconds:.0%}", f"{memory:.1f}",
            f"{waiting:.0%}", f"{song / in_use:.0f}")


def print_profile(step, on_gpu):
    from torch.profiler import profile as recorded
    with recorded() as found:
        step()
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=25))


def main():
    config, _ = runtime.configure(globals(), configs=False)
    runtime.check_numbers(config)
    runtime.at_least(1, steps=steps, song=song)
    runtime.at_least(0, batch_size=batch_size, workers=workers)
    runtime.choose("size", size, ["full", "demo"])
    runtime.choose("dtype", dtype, runtime.AMP_DTYPES)
    for name in networks:
        runtime.choose("networks", name, ["separator", "separator4", *model.VARIANTS])
    on, *_ = runtime.start(device)
    torch.backends.cudnn.benchmark = True       # as in training

    # one network after the other, each in a process of its own, or memory would be that of all
    if MEASURES in os.environ:
        print(line(measure(networks[0], on)), flush=True)
        return 0
    what = f"{torch.get_num_threads()} threads"
    if on.startswith("cuda"):
        what = torch.cuda.get_device_name()
    print(f"{on}, {what}, PyTorch {torch.__version__}, {dtype}, {size} width\n")
    print(line(HEADS) + "\n|" + " --- |" * len(HEADS), flush=True)
    for name in networks:
        one = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], f"--networks={name}"]
        status = subprocess.run(one, env=os.environ | {MEASURES: "1"}).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    runtime.script(main)
