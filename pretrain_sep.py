"""
Trains a U-Net to separate one source, or all four, from random mixes of stems (stage 1).

    python pretrain_sep.py config/vocals.py                 # one GPU, or the CPU if there is none
    python pretrain_sep.py config/vocals.py --resume=True   # continue after a stop: same bits
    python pretrain_sep.py config/demo_sep.py               # narrow and short, for the demo's songs
    torchrun --standalone --nproc_per_node=4 pretrain_sep.py config/vocals.py
                                                            # four GPUs share each batch

Writes ckpt/<config>.pt (best validation loss), ckpt/<config>.resume (last state) and
ckpt/<config>.jsonl (log). Ctrl-C and SIGTERM save after the current step, then stop.
"""
import math
import time

import torch

import model
from common import device as devices, run as runs, settings
from common.settings import die
from data import Mixes, Prepared, prefetch

# -----------------------------------------------------------------------------
# settings: the paper's recipe for vocals; override them in config/*.py or with --key=value
# files
data = "data/musdb"             # prepared songs with stems
out = ""                        # best checkpoint; empty: ckpt/<config>.pt
resume = False                  # continue from the .resume file of that run
overwrite = False               # replace an existing run
# network
sources = ["vocals"]            # one stem or several; on the command line --sources=vocals,bass
widths = [16, 32, 64, 128, 192, 192]  # channels of the six encoder blocks
pool = "max"                    # max or avg; the authors' four-source separator averages
bn_momentum = 0.01              # of the BatchNorm statistics; 0.01 here is 0.99 in Keras
sync_batchnorm = False          # BatchNorm statistics over all GPUs instead of per GPU
# optimisation
steps = 300_000                 # optimiser steps
batch_size = 8                  # mixes per step, over all processes and accumulation
accumulate = 1                  # passes per batch; more of them need less memory
learning_rate = 1e-3            # Adam; paper: vocals 1e-3, bass 1e-4, drums 2e-4, other, all 3e-4
lr_decay = 0.9                  # learning rate times this ...
lr_decay_every = 15_000         # ... every so many steps
grad_clip = 0.0                 # largest gradient norm; 0: no clipping, as in the paper
seed = 1                        # of weights and mixes
# validation and log
val_every = 1_000               # steps between validations (and checkpoints)
val_mixes = 400                 # fixed random mixes of the validation songs
log_every = 50                  # steps between log lines
track = ""                      # send the log to tensorboard or wandb too
# system
device = ""                     # cpu, cuda, cuda:1, mps; empty: cuda if there is one
dtype = "float32"               # float32, bfloat16, float16: of the convolutions only
compile = True                  # torch.compile the U-Net on a GPU
workers = 2                     # threads that prefetch mixes; 0: none
# -----------------------------------------------------------------------------


def check_settings(config, world):
    settings.check_numbers(config, "learning_rate", "lr_decay", "widths")
    settings.at_least(1, batch_size=batch_size, accumulate=accumulate, val_every=val_every,
                      val_mixes=val_mixes, log_every=log_every, lr_decay_every=lr_decay_every)
    settings.at_least(0, steps=steps, workers=workers, grad_clip=grad_clip)
    settings.within(0, 1, bn_momentum=bn_momentum)
    settings.choose("pool", pool, ["max", "avg"])
    settings.choose("dtype", dtype, devices.AMP_DTYPES)
    if not 1 <= len(widths) <= 6:
        die(f"widths must be one to six numbers of channels, got {widths}")
    if batch_size % (accumulate * world):
        die(f"batch_size={batch_size} must be a multiple of accumulate x processes = "
            f"{accumulate * world}")


def lr_at(step):
    return learning_rate * lr_decay ** (step // lr_decay_every)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def validate(net, mixes, dev, rank, world):
    """Mean loss over the fixed validation mixes, divided among the ranks."""
    net.eval()
    total = count = 0.0
    starts = range(rank * batch_size, val_mixes, world * batch_size)

    def batch(start):
        return mixes.batch(start, min(batch_size, val_mixes - start))

    for mixture, target in prefetch(batch, starts, workers):
        mixture, target = mixture.to(dev), target.to(dev)           # (B, N), (B, S, N)
        total += model.l1_loss(net(mixture), target).item() * len(mixture)
        count += len(mixture)
    net.train()
    total, count = devices.sum_over_ranks([total, count], dev)
    return total / count


def main():
    config, names = settings.configure(globals())
    dev, rank, world = devices.setup_device(device)
    on_gpu = dev.startswith("cuda")
    torch.backends.cudnn.benchmark = True       # shapes are fixed: pick the fastest kernels
    print("\n".join(f"{k} = {v!r}" for k, v in config.items()))
    check_settings(config, world)
    run = runs.Run(out or f"ckpt/{'_'.join(names or sources)}.pt", resume, overwrite, rank)

    # BatchNorm statistics depend on the batch of a rank, so resuming needs as many ranks
    songs = Prepared(data, "stems")
    devices.keep_on_gpu(songs, dev)
    config |= {"processes": world, "trained_on": songs.trained_on()}
    micro, commit = batch_size // (accumulate * world), runs.git_commit()
    train_mixes, val_set = Mixes(songs, "train", sources, seed), Mixes(songs, "valid", sources, 0)

    # `net` is saved and validated; `forward`, which may wrap it, is for training only
    torch.manual_seed(seed)
    net = model.Separator(sources, widths, pool, bn_momentum).to(dev)
    net.amp_dtype = devices.AMP_DTYPES[dtype]
    peak = devices.peak_seconds(net, model.CROP, dev) / world
    devices.accelerate(net, dev)
    optimizer = torch.optim.Adam(
        net.parameters(), learning_rate, eps=1e-7, fused=on_gpu)    # Keras' epsilon
    scaler = torch.amp.GradScaler(dev.split(":")[0], enabled=dtype == "float16")
    first, progress = 0, {"best": math.inf, "best_step": 0}
    if run.saved:
        run.check_same(config)
        first, progress = run.saved["step"], run.saved["progress"]
        runs.load_state(run.saved, net, optimizer, scaler)
    forward = devices.distribute(net, dev, sync_batchnorm)
    if compile and dev != "cpu":
        devices.compile_parts([net.unet], dev)
    run.begin(config)
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(train_mixes.segments)} "
          f"segments to train on, {len(val_set.segments)} to validate on, {dev} x {world}, {dtype}")

    # from waves to gradients; what follows, such as clipping, stays out of the CUDA graph
    def forward_backward(mixture, target):
        loss = model.l1_loss(forward(mixture), target)
        scaler.scale(loss / accumulate).backward()
        return loss.detach()

    if on_gpu and world == accumulate == 1:
        forward_backward = devices.CudaGraph(forward_backward, net.parameters())

    def micro_batch(number):
        return train_mixes.batch((number * world + rank) * micro, micro)

    batches = prefetch(micro_batch, range(first * accumulate, steps * accumulate), workers,
                       pin=on_gpu)
    meter = runs.Meter(run.saved and run.saved["meter"], peak)
    began = time.time()
    net.train()
    for step in range(first, steps + 1):

        # save first, so that nothing is lost if validation fails
        validating, stopping = step % val_every == 0 or step == steps, run.should_stop(step, dev)
        if validating or stopping:
            devices.sync_and_check(net, dev)
            checkpoint = {
                "kind": "separator", "args": net.args, "classes": None, "config": config,
                "commit": commit, "step": step, "model": runs.finite_weights(net)}
            run.save_last(checkpoint, progress, meter, optimizer, scaler)
        if stopping:
            run.exit_stopped(step)
        if validating:
            val_began = time.time()
            val_loss = validate(net, val_set, dev, rank, world)
            run.save_if_best(checkpoint, val_loss, progress)
            run.log(f"step {step:6d}/{steps} | validation loss {val_loss:.5f} "
                    f"(best {progress['best']:.5f})",
                    step=step, val_loss=val_loss, best=progress["best"])
            meter.began += time.time() - val_began      # not training time
        if step == steps:
            break

        lr = lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for part in range(accumulate):
            mixture, target = meter.next_batch(batches, dev)        # (B, N), (B, S, N)
            if world > 1:       # all-reduce gradients once per step
                forward.require_backward_grad_sync = part == accumulate - 1
            meter.add(forward_backward(mixture, target))
        if grad_clip > 0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # reading the loss waits for the GPU, so only once per log line
        done = step + 1
        if done % log_every == 0 or done == steps:
            means = meter.read(done, micro * world)
            left = (time.time() - began) / (done - first) * (steps - done)
            run.log(f"step {done:6d}/{steps} | loss {means['loss']:.5f} | lr {lr:.2e} | "
                    f"{means['clips_per_s']:.1f} clips/s | mfu {means['mfu']:.0%} | "
                    f"data wait {means['data_wait']:.0%} | ETA {settings.clock(left)}",
                    step=done, lr=lr, eta_s=round(left), **means)

    note = " (the initial weights)" if progress["best_step"] == 0 else ""
    print(f"best validation loss {progress['best']:.5f} at step {progress['best_step']}{note}; "
          f"{settings.clock(time.time() - began)}: {run.out}")
    print(f"next: python eval.py {run.out}   or   python finetune_cls.py CONFIG "
          f"--init={run.out}, such as config/mtat.py or config/demo_tags.py")


if __name__ == "__main__":
    settings.script(main)
