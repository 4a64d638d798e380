"""
Trains a U-Net to separate one source, or all four, from random mixes of stems (stage 1).

    python pretrain_sep.py config/vocals.py                 # one GPU, or the CPU if there is none
    python pretrain_sep.py config/vocals.py --resume=True   # go on after a stop, to the same bits
    python pretrain_sep.py config/demo_sep.py               # narrow and short, for the demo's songs
    torchrun --standalone --nproc_per_node=4 pretrain_sep.py config/vocals.py
                                                            # four GPUs divide the same batch

Writes ckpt/<config>.pt (best validation loss), ckpt/<config>.resume (to go on from) and
ckpt/<config>.jsonl (the log). Ctrl-C and SIGTERM save after the current step, then stop.
"""
import math
import time

import torch
from torch.nn.parallel import DistributedDataParallel

import model
import runtime
import training
from data import Mixes, Prepared, prefetch
from fused import synchronise
from runtime import die

# -----------------------------------------------------------------------------
# settings: the paper's recipe for vocals; override them in config/*.py or with --key=value
# files
data = "data/musdb"             # prepared songs with stems
out = ""                        # best checkpoint; empty: ckpt/<config>.pt
resume = False                  # go on from the .resume file of that run
overwrite = False               # replace a run that is there
# network
sources = ["vocals"]            # one stem or several; on the command line --sources=vocals,bass
widths = [16, 32, 64, 128, 192, 192]  # channels of the six encoder blocks
pool = "max"                    # max or avg; the authors' four-source separator averages
bn_momentum = 0.01              # of the BatchNorm statistics; 0.01 here is 0.99 in Keras
sync_batchnorm = False          # statistics of all processes together, not of each one's part
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
report = False                  # after each validation, a page with the curves so far
track = ""                      # send the log to tensorboard or wandb too
# system
device = ""                     # cpu, cuda, cuda:1, mps; empty: cuda if there is one
dtype = "float32"               # float32, bfloat16, float16: of the convolutions only
compile = True                  # torch.compile the U-Net, on a GPU; a CPU has kernels
cuda_graph = True               # on one GPU, if accumulate is 1: start a pass's kernels at once
workers = 2                     # threads that mix ahead; 0: none
data_on_gpu = True              # keep the audio in GPU memory, if that has room for it twice
# -----------------------------------------------------------------------------


def check_settings(config, world):
    """Ends the script at a setting that cannot work, before anything is trained or saved."""
    runtime.check_numbers(config, "learning_rate", "lr_decay", "widths")
    runtime.at_least(1, batch_size=batch_size, accumulate=accumulate, val_every=val_every,
                     val_mixes=val_mixes, log_every=log_every, lr_decay_every=lr_decay_every)
    runtime.at_least(0, steps=steps, workers=workers, grad_clip=grad_clip)
    runtime.within(0, 1, bn_momentum=bn_momentum)
    runtime.choose("pool", pool, ["max", "avg"])
    runtime.choose("dtype", dtype, runtime.AMP_DTYPES)
    if not 1 <= len(widths) <= 6:
        die(f"widths must be one to six positive numbers of channels, got {widths}")
    if batch_size % (accumulate * world):
        die(f"batch_size={batch_size} must be a multiple of accumulate x processes = "
            f"{accumulate * world}")


def lr_at(step):
    return learning_rate * lr_decay ** (step // lr_decay_every)


def l1_loss(estimate, target):
    """Mean |error| over (B, S, N), without the ends of the crop, which too few windows cover."""
    if estimate.shape != target.shape:
        raise ValueError(f"estimate {tuple(estimate.shape)} and target {tuple(target.shape)} "
                         "differ in shape")
    return (estimate - target)[..., model.EDGE:-model.EDGE].abs().mean()


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def validate(net, mixes, device, rank, world):
    """Mean loss over the fixed validation mixes, which the processes divide among themselves."""
    net.eval()
    total = count = 0.0
    starts = list(range(0, val_mixes, batch_size))[rank::world]

    def batch(at):
        return mixes.batch(at, min(batch_size, val_mixes - at))

    for mixture, target in prefetch(batch, starts, workers):
        mixture, target = mixture.to(device), target.to(device)     # (B, N), (B, S, N)
        total += l1_loss(net(mixture), target).item() * len(mixture)
        count += len(mixture)
    net.train()
    total, count = training.sum_over_ranks([total, count], device)
    return total / count


def main():
    config, names = runtime.configure(globals())
    torch_device, rank, world = runtime.start(device)
    on_gpu = torch_device.startswith("cuda")
    torch.backends.cudnn.benchmark = True       # shapes stay: try which kernel is fastest
    print("\n".join(f"{k} = {v!r}" for k, v in config.items()))
    check_settings(config, world)
    run = training.Run(out or f"ckpt/{'_'.join(names or sources)}.pt", resume, overwrite, rank)

    # BatchNorm sees the batch of one process, so resuming needs as many processes
    songs = Prepared(data, "stems")
    training.keep_on_gpu(songs, torch_device, data_on_gpu)
    config |= {"processes": world, "trained_on": songs.trained_on()}
    micro, commit = batch_size // (accumulate * world), training.git_commit()
    train_mixes, val_set = Mixes(songs, "train", sources, seed), Mixes(songs, "valid", sources, 0)

    # the network; `net` itself is saved and validated, its wrappers are for training only
    torch.manual_seed(seed)
    net = model.Separator(sources, widths, pool, bn_momentum).to(torch_device)
    net.amp_dtype = runtime.AMP_DTYPES[dtype]
    optimizer = torch.optim.Adam(
        net.parameters(), learning_rate, eps=1e-7, fused=on_gpu)    # Keras' epsilon
    scaler = torch.amp.GradScaler(torch_device.split(":")[0], enabled=dtype == "float16")
    first, best, best_step = 0, math.inf, 0
    if run.saved:
        run.check_same(config, __file__)
        first, best = run.saved["step"], run.saved["best"]
        best_step = run.saved.get("best_step", "?")         # older runs did not note it
        net.load_state_dict(run.saved["model"])
        training.resume_optimizer(optimizer, run.saved["optimizer"])
        scaler.load_state_dict(run.saved["scaler"])
    floor = training.floor_per_crop(net, model.CROP, torch_device) / world
    if compile and torch_device != "cpu":
        runtime.compile_parts([net.unet], torch_device)
    forward = net
    if sync_batchnorm and world > 1:
        synchronise(net)
    run.begin(config)
    if world > 1:
        forward = DistributedDataParallel(net, [torch_device] if on_gpu else None)
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(train_mixes.segments)} "
          f"segments to train on, {len(val_set.segments)} to validate on, {torch_device} x "
          f"{world}, {dtype}")

    # a pass from waves to gradients; what comes after it, such as clipping, is never recorded
    def learn(mixture, target):
        loss = l1_loss(forward(mixture), target)
        scaler.scale(loss / accumulate).backward()
        return loss.detach()

    if cuda_graph and on_gpu and world == accumulate == 1:
        learn = training.Graphed(learn, net.parameters())

    def crops(number):  # micro-batch `number` of this process
        return train_mixes.batch((number * world + rank) * micro, micro)

    batches = prefetch(crops, range(first * accumulate, steps * accumulate), workers, pin=on_gpu)
    meter = training.Meter(run.saved.get("meter") if run.saved else None, floor)
    stop = runtime.Stop()
    began = time.time()
    net.train()
    for step in range(first, steps + 1):

        # processes must stop at the same step; they ask each other when a log line waits anyway
        validating, stopping = step % val_every == 0 or step == steps, stop.asked
        if world > 1:
            together = step % log_every == 0 or not on_gpu
            stopping = together and training.anyone(stopping, torch_device)

        # save first, so that nothing is lost if validation fails
        if validating or stopping:
            training.agree(net, torch_device)
            checkpoint = {
                "kind": "separator", "args": net.args, "classes": None, "config": config,
                "commit": commit, "step": step, "model": runtime.finite_weights(net)}
            state = {
                **checkpoint, "best": best, "best_step": best_step, "meter": meter.state(),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            run.save(state, run.last)
        if stopping:
            training.stop_at(step)

        # then validate, and keep the best
        if validating:
            val_began = time.time()
            val_loss = validate(net, val_set, torch_device, rank, world)
            if not math.isfinite(val_loss):
                die(f"the validation loss is {val_loss} at step {step}: lower learning_rate, or "
                    "use --dtype=float32 or bfloat16")
            if val_loss < best:
                best, best_step = val_loss, step
                run.save({**checkpoint, "val_loss": val_loss}, run.out)
            run.log(f"step {step:6d}/{steps} | validation loss {val_loss:.5f} (best {best:.5f})",
                    step=step, val_loss=val_loss, best=best)
            meter.began += time.time() - val_began      # not training time
        if step == steps:
            break

        # one optimiser step, over a batch that may come in parts
        lr = lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for part in range(accumulate):
            mixture, target = meter.next_batch(batches, torch_device)   # (B, N), (B, S, N)
            if world > 1:
                # exchange gradients once per step
                forward.require_backward_grad_sync = part == accumulate - 1
            meter.add(learn(mixture, target))
        if grad_clip > 0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # reading the loss waits for the GPU, so it is done once per line
        done = step + 1
        if done % log_every == 0 or done == steps:
            seen = meter.read(done, micro * world)
            left = (time.time() - began) / (done - first) * (steps - done)
            run.log(f"step {done:6d}/{steps} | loss {seen['loss']:.5f} | lr {lr:.2e} | "
                    f"{seen['clips_per_s']:.1f} clips/s, {seen['matmul_share']:.0%} of matmul "
                    f"| waiting for data {seen['data_wait']:.0%} | ETA {runtime.clock(left)}",
                    step=done, lr=lr, eta_s=round(left), **seen)

    note = ", before any training: nothing was learnt" if best_step == 0 else ""
    print(f"best validation loss {best:.5f}, after step {best_step}{note}; "
          f"{runtime.clock(time.time() - began)}: {run.out}")
    print(f"next: python eval.py {run.out}   or   python finetune_cls.py CONFIG "
          f"--init={run.out}, such as config/mtat.py or config/demo_tags.py")


if __name__ == "__main__":
    runtime.script(main)
