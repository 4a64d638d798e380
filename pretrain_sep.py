"""
Trains a U-Net to separate one source, or all four, from random mixes of stems (the paper, stage 1).

    python pretrain_sep.py config/vocals.py                                    # one GPU, or the CPU if there is none
    torchrun --standalone --nproc_per_node=4 pretrain_sep.py config/vocals.py  # four GPUs: the same batch, divided
    python pretrain_sep.py config/vocals.py --resume=True                      # go on after a stop, as if there had been none
    python pretrain_sep.py config/demo_sep.py                                  # narrow and short, on `python prepare_data.py demo`

Writes ckpt/<config>.pt (best validation loss), ckpt/<config>.resume (to go on from) and ckpt/<config>.jsonl (the log).
"""
import math
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import model
import runtime
from data import Mixes, Prepared, prefetch
from runtime import clock, die

# -----------------------------------------------------------------------------
# settings: the paper's recipe for vocals; override them in config/*.py or with --key=value
# files
data = "data/musdb"             # prepared songs with stems
out = ""                        # best checkpoint; empty: ckpt/<config>.pt
resume = False                  # go on from the .resume file beside `out`
overwrite = False               # replace a run that is there
# network
sources = ["vocals"]            # one stem, or several; a list on the command line is --sources=vocals,bass
widths = [16, 32, 64, 128, 192, 192]  # channels of the six encoder blocks
pool = "max"                    # max or avg; the authors' four-source separator averages
bn_momentum = 0.01              # of the BatchNorm statistics; 0.01 here is 0.99 in Keras
# optimisation
steps = 300_000                 # optimiser steps
batch_size = 8                  # mixes per step, over all processes and accumulation
accumulate = 1                  # split each batch into this many forward and backward passes
learning_rate = 1e-3            # Adam; the paper: vocals 1e-3, bass 1e-4, drums 2e-4, other 3e-4, multisource 3e-4
lr_decay = 0.9                  # learning rate times this ...
lr_decay_every = 15_000         # ... every so many steps
grad_clip = 0.0                 # largest gradient norm; 0: no clipping, as in the paper
seed = 1                        # of weights and mixes
# validation and log
val_every = 1_000               # steps between validations (and checkpoints)
val_mixes = 400                 # fixed random mixes of the validation songs
log_every = 50                  # steps between log lines
# system
device = ""                     # cpu, cuda, cuda:1, mps; empty: cuda if there is one
dtype = "float32"               # float32, bfloat16, float16 of the convolutions; STFT and loss stay float32
compile = True                  # torch.compile the U-Net
workers = 2                     # threads that mix ahead; 0: none
# -----------------------------------------------------------------------------


def lr_at(step):
    return learning_rate * lr_decay ** (step // lr_decay_every)


def l1_loss(estimate, target):
    """Mean |error| over (B, S, N), without the ends of the crop, which too few windows cover."""
    if estimate.shape != target.shape:
        raise ValueError(f"estimate {tuple(estimate.shape)} and target {tuple(target.shape)} differ in shape")
    return (estimate - target)[..., model.EDGE:-model.EDGE].abs().mean()


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def validate(net, mixes, rank, world):
    """Mean loss over the fixed validation mixes, which the processes divide among themselves."""
    net.eval()
    starts = list(range(0, val_mixes, batch_size))[rank::world]
    total = count = 0.0
    for mixture, target in prefetch(lambda at: mixes.batch(at, min(batch_size, val_mixes - at)), starts, workers):
        mixture, target = mixture.to(device), target.to(device)                                     # (B, N), (B, S, N)
        total += l1_loss(net(mixture), target).item() * len(mixture)
        count += len(mixture)
    net.train()
    total, count = runtime.sum_over_ranks([total, count], device)
    return total / count


def check_settings(world):
    runtime.at_least(1, batch_size=batch_size, accumulate=accumulate, val_every=val_every, val_mixes=val_mixes, log_every=log_every,
                     lr_decay_every=lr_decay_every)
    runtime.at_least(0, steps=steps, workers=workers)
    if not widths or min(widths) < 1 or len(widths) > 6:
        die(f"widths must be one to six positive numbers of channels, got {widths}")
    runtime.choose("pool", pool, ["max", "avg"])
    if batch_size % (accumulate * world):
        die(f"batch_size={batch_size} must be a multiple of accumulate x processes = {accumulate * world}")


def main(config, out):
    rank, world = process
    check_settings(world)
    songs = Prepared(data, "stems")
    # BatchNorm sees the batch of one process, so resuming needs as many
    config = {**config, "processes": world, "trained_on": songs.trained_on()}
    micro = batch_size // (accumulate * world)
    train_mixes, val_set = Mixes(songs, "train", sources, seed), Mixes(songs, "valid", sources, 0)

    # the network, and its wrappers for the training forward only: `net` itself is what is saved and validated
    torch.manual_seed(seed)
    net = model.Separator(sources, widths, pool, bn_momentum).to(device)
    net.amp_dtype = runtime.amp_dtype(dtype)
    optimizer = torch.optim.Adam(net.parameters(), learning_rate, eps=1e-7)  # Keras' epsilon
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=dtype == "float16")
    first, best = 0, math.inf
    saved = runtime.claim_output(out, resume, overwrite)
    if world > 1:
        dist.barrier()  # nobody writes before all have looked
    if saved:
        runtime.same_run(saved["config"], config)
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        first, best = saved["step"], saved["best"]
    if compile:
        runtime.compile_parts([net.unet], device)
    forward = DistributedDataParallel(net, [device] if device.startswith("cuda") else None) if world > 1 else net
    log = runtime.Log(out.removesuffix(".pt") + ".jsonl", first if saved else None) if rank == 0 else None
    if rank == 0:
        print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(train_mixes.segments)} segments to train on, "
              f"{len(val_set.segments)} to validate on, {device} x {world}, {dtype}")

    def crops(number):  # micro-batch `number` of this process
        return train_mixes.batch((number * world + rank) * micro, micro)

    batches = prefetch(crops, range(first * accumulate, steps * accumulate), workers, pin=device.startswith("cuda"))
    train_loss, n_losses, waited, began, started = 0.0, 0, 0.0, time.time(), time.time()
    net.train()
    for step in range(first, steps + 1):

        # save first, so that nothing is lost if validation fails; then validate, and keep the best
        if step % val_every == 0 or step == steps:
            if world > 1:
                for buffer in net.buffers():  # each process gathered BatchNorm statistics of its own
                    dist.broadcast(buffer, 0)
                own = sum(p.double().sum().item() for p in net.parameters())
                if abs(runtime.sum_over_ranks([own], device)[0] / world - own) > 1e-6 * max(1.0, abs(own)):
                    die("the processes hold different weights: their gradients were not exchanged")
            if rank == 0:
                runtime.check_finite(net)
                about = {"kind": "separator", "args": net.args, "classes": None, "config": config, "step": step, "model": runtime.cpu_weights(net)}
                runtime.save_atomically({**about, "best": best, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()},
                                        out.removesuffix(".pt") + ".resume")
            val_began, val_loss = time.time(), validate(net, val_set, rank, world)
            if not math.isfinite(val_loss):
                die(f"the validation loss is {val_loss} at step {step}: lower learning_rate, or use --dtype=float32 or bfloat16")
            if val_loss < best:
                best = val_loss
                if rank == 0:
                    runtime.save_atomically({**about, "val_loss": val_loss}, out)
            if rank == 0:
                log(f"step {step:6d}/{steps} | validation loss {val_loss:.5f} (best {best:.5f})", step=step, val_loss=val_loss, best=best)
            began += time.time() - val_began  # not training time
        if step == steps:
            break

        lr = lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for part in range(accumulate):
            asked = time.time()
            mixture, target = (t.to(device, non_blocking=True) for t in next(batches))              # (B, N), (B, S, N)
            waited += time.time() - asked
            if world > 1:
                forward.require_backward_grad_sync = part == accumulate - 1  # exchange gradients once per step
            loss = l1_loss(forward(mixture), target)
            scaler.scale(loss / accumulate).backward()
            train_loss, n_losses = train_loss + loss.detach(), n_losses + 1
        if grad_clip > 0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # reading the loss waits for the GPU, so it is done once per interval; a loss that was not finite stays so in the sum
        if (step + 1) % log_every == 0 or step + 1 == steps:
            train_loss = float(train_loss) / n_losses
            if not math.isfinite(train_loss):
                die(f"the loss is {train_loss} at step {step + 1}: lower learning_rate, set grad_clip, or use --dtype=float32 or bfloat16")
            if rank == 0:
                spent = time.time() - began
                rate = n_losses * micro * world / spent
                left = (time.time() - started) / (step + 1 - first) * (steps - step - 1)
                log(f"step {step + 1:6d}/{steps} | loss {train_loss:.5f} | lr {lr:.2e} | {rate:.1f} clips/s | waiting for data "
                    f"{100 * waited / spent:.0f}% | ETA {clock(left)}", step=step + 1, loss=train_loss, lr=lr, clips_per_s=round(rate, 2),
                    data_wait=round(waited / spent, 4), eta_s=round(left))
            train_loss, n_losses, waited, began = 0.0, 0, 0.0, time.time()

    if rank == 0:
        kept = model.load(out)[1]["step"]
        print(f"best validation loss {best:.5f}, after step {kept}" + (", before any training: nothing was learnt" if kept == 0 else "")
              + f"; {clock(time.time() - started)}: {out}\nnext: python eval.py {out}   or   "
              f"python finetune_cls.py CONFIG --init={out}, such as config/mtat.py or config/demo_tags.py")


if __name__ == "__main__":
    config, names = runtime.configure(globals())
    device, *process = runtime.start(device)
    if process[0] == 0:
        print("\n".join(f"{k} = {v!r}" for k, v in config.items()))
    try:
        main(config, out or f"ckpt/{'_'.join(names or sources)}.pt")
    except (ValueError, OSError) as e:
        die(e)
    except KeyboardInterrupt:
        die("stopped; --resume=True goes on from the last validation")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
