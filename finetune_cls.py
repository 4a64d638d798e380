"""
Attaches a tail to a U-Net and trains both to tag music or classify its genre (stage 2).

    python finetune_cls.py --init=ckpt/vocals.pt            # MagnaTagATune, from a separator
    python finetune_cls.py config/fma.py --init=separators/vocals/checkpoint-20  # TensorFlow's
    python finetune_cls.py config/mtat.py                   # the same from random weights
    python finetune_cls.py config/mtat.py --variant=tail --out=ckpt/mtat_tail.pt  # no U-Net
    python finetune_cls.py config/mtat.py --variant=v3 --init=ckpt/vocals.pt \\
        --tail=ckpt/mtat_tail.pt                            # join two trained halves
    python finetune_cls.py config/mtat.py config/ast.py --init=released:vocals \\
        --vit=ViT-B_16.npz                                  # a transformer instead of the tail
    python finetune_cls.py config/own_tags.py --init=ckpt/vocals.pt     # your own clips
    python finetune_cls.py config/mtat.py --resume=True     # continue after a stop: same bits
    torchrun --standalone --nproc_per_node=4 finetune_cls.py config/mtat.py     # four GPUs

Writes ckpt/<configs>.pt (best validation loss), ckpt/<configs>.resume (last state) and
ckpt/<configs>.jsonl (log). Ctrl-C and SIGTERM save after the current step, then stop.
"""
import math
import time

import torch
import torch.distributed as dist

import model
import weights
from common import device as devices, run as runs, settings
from common.settings import die
from data import Clips, Prepared, prefetch
from weights.vit import load_vit

# -----------------------------------------------------------------------------
# settings: the paper's recipe for MagnaTagATune; override them in config/*.py or with --key=value
# files
data = "data/mtat"              # prepared clips
task = "tags"                   # label set: tags (several per clip) or genre (one per clip)
fold = -1                       # cross-validation: test on this fold, validate on the next
label_fraction = 1.0            # share of the training clips to use, stratified by class
out = ""                        # best checkpoint; empty: ckpt/<configs>.pt
init = ""                       # initial weights: .pt, released:NAME or TensorFlow prefix of a
                                # separator, or of a classifier of the same variant
tail = ""                       # with variant v3 or ast: trained checkpoint of the tail alone
vit = ""                        # with variant ast or ast_tail: initial weights, .npz of a ViT
resume = False                  # continue from the .resume file of that run
overwrite = False               # replace an existing run
# network
variant = "v1"                  # tail, v1 (concatenated skips), v3 (added by adapters), v3_concat,
                                # ast (transformer), ast_tail (transformer alone)
skips = 5                       # decoder outputs that reach the tail, 0 to 5
tail_widths = []                # channels of the seven tail blocks; empty: those of the variant
dropout = 0.5                   # before the last layer
mel_of_log = False              # the authors' v1 front end: mel of the log, not log of the mel
bn_momentum = 0.01              # of the BatchNorm statistics; 0.01 here is 0.99 in Keras
sync_batchnorm = False          # BatchNorm statistics over all GPUs instead of per GPU
transformer = [768, 12, 12]     # ast: width, layers, heads
freeze = ""                     # unet or tail: keep its weights and BatchNorm statistics
# the U-Net if there is no init (with one, these come from its checkpoint)
sources = ["vocals"]            # masks: only their number matters here
widths = [16, 32, 64, 128, 192, 192]  # channels of the six encoder blocks
pool = ""                       # max or avg; empty: as in init, else max (the authors: always max)
# optimisation
recipe = "paper"                # paper: Adam, SGD from the best weights; modern: AdamW, cosine;
                                # ast: Adam with halved rates, then SGD
batch_size = 16                 # clips, one random crop of each, over all processes
chunk = 1024                    # an epoch is whole chunks of so many clips; 0: all whole batches
epochs = 200                    # at most
learning_rate = 1e-4            # Adam or AdamW
unet_lr = 1.0                   # learning rate of the U-Net, as a share of every learning rate
weight_decay = 0.01             # modern
grad_clip = 0.0                 # largest gradient norm; 0: no clipping, as in the paper
seed = 1                        # of new weights, crops and dropout
# validation and log
val_crops = 7                   # crops per validation clip, end to end
log_every = 50                  # steps between log lines
track = ""                      # send the log to tensorboard or wandb too
# system
device = ""                     # cpu, cuda, cuda:1, mps; empty: cuda if there is one
dtype = "float32"               # float32, bfloat16, float16: of the convolutions only
compile = True                  # torch.compile U-Net and tail on a GPU
workers = 2                     # threads that prefetch crops; 0: none
# -----------------------------------------------------------------------------

# constants of the recipes: paper (arXiv v1 and v3), ast (v3, its transformer), modern (ours)
PATIENCE = 10                   # paper, ast: epochs without a better loss before the next phase
SGD_RATES = {"paper": [1e-3, 1e-4, 1e-5], "ast": [1e-3]}    # of the phases after Adam's
HALVINGS = 4                    # ast: of Adam's rate, after 5 epochs and then after every 2
WARMUP = 0.1                    # modern: share of the steps with a rising rate

# variants that join a trained tail: the variant of that tail, and its first kernel
ALONE = {"v3": "tail", "ast": "ast_tail"}
FIRST_KERNEL = {"v3": "blocks.0.convs.0.weight", "ast": "patches.weight"}
NOT_IN_TAIL = ["blocks.*.adapter.*", "adapters.*", "out.*", "mean", "std"]     # set up anew


def check_settings(config, world):
    settings.check_numbers(config, "learning_rate", "widths", "tail_widths")
    settings.choose("recipe", recipe, ["paper", "modern", "ast"])
    settings.choose("variant", variant, model.VARIANTS)
    settings.choose("pool", pool, ["", "max", "avg"])
    settings.choose("dtype", dtype, devices.AMP_DTYPES)
    settings.choose("freeze", freeze, ["", "unet", "tail"])
    settings.at_least(1, val_crops=val_crops, log_every=log_every, sources=len(sources))
    settings.at_least(-1, fold=fold)
    settings.at_least(0, epochs=epochs, workers=workers, chunk=chunk, unet_lr=unet_lr,
                      weight_decay=weight_decay, grad_clip=grad_clip)
    settings.within(0, 1, dropout=dropout, bn_momentum=bn_momentum)
    settings.within(0, 5, skips=skips)
    settings.within(1e-9, 1, label_fraction=label_fraction)
    if batch_size % world or batch_size // world < 2:       # BatchNorm cannot train on one clip
        die(f"batch_size={batch_size} must be at least 2 x processes, and a multiple of them: "
            f"there are {world}")
    if variant in ALONE.values() and (init or tail or freeze):
        die(f"variant={variant} has no U-Net: init, tail and freeze do not apply")
    if tail and variant not in ALONE or vit and not variant.startswith("ast"):
        die(f"tail={tail} needs variant=v3 or ast, whose tail is the same without a U-Net, and "
            f"vit={vit} needs variant=ast or ast_tail: got {variant}")


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def validate(net, clips, dev, rank, world):
    """Mean over clips of the mean loss over their crops; clips are divided among the ranks."""
    def read(start):
        numbers = range(start, min(start + batch_size, len(clips)))
        return numbers, [clips.crops(n, val_crops) for n in numbers]        # B x (K, N)

    net.eval()
    total = 0.0
    starts = range(rank * batch_size, len(clips), world * batch_size)
    for numbers, crops in prefetch(read, starts, workers):
        counts = [len(c) for c in crops]
        targets = [clips.targets[n].expand(k, -1) for n, k in zip(numbers, counts, strict=True)]
        targets = torch.cat(targets).to(dev)                        # (B K, classes)
        parts = torch.cat(crops).split(batch_size)                  # as much memory as training
        logits = torch.cat([net(part.to(dev)) for part in parts])   # (B K, classes)
        losses = model.crop_losses(logits, targets, clips.multilabel)       # (B K,)
        means = [part.mean() for part in losses.split(counts)]
        total += sum(torch.stack(means).tolist())                   # waits for the GPU once
    return devices.sum_over_ranks([total], dev)[0] / len(clips)


def without_head(net, meta, clips):
    """The state of a trained tail, without the last layer if the classes differ.

    TensorFlow checkpoints have no class names: the number of classes decides.
    """
    same = meta["classes"] == clips.classes or (
        meta["classes"] is None and net.tail.out.out_features == len(clips.classes))
    return {name: w for name, w in net.tail.state_dict().items()
            if same or not name.startswith("out.")}


def build(clips):
    """The classifier, with the weights of `init`, `tail` and `vit`."""
    unet_args, init_variant = {"sources": sources, "widths": widths, "pool": pool or "max"}, None
    log_first = mel_of_log
    if init:
        source, meta = weights.load(init)
        init_variant = source.args.get("variant")       # None for a separator
        if init_variant not in (None, variant):
            die(f"init={init} is a classifier of variant {init_variant}, not {variant}: use a "
                "separator, or a classifier of the same variant")
        if meta["step"] == 0:
            print(f"note: {init} was saved before its first training step")
        if meta.get("as_published"):
            print(f"{init}: published weights, trained with {meta['as_published']}")
        unet_args = {key: source.args[key] for key in unet_args}
        unet_args["pool"] = pool or unet_args["pool"]
        log_first = log_first or source.args.get("mel_of_log", False)
        print("U-Net as in init: " + ", ".join(f"{k} {v}" for k, v in unet_args.items()))
    if vit and (tail or init_variant):
        die("--vit and --tail are mutually exclusive, as are --vit and a classifier as --init")
    if tail:
        tail_net, tail_meta = weights.load(tail)
        if tail_meta["args"].get("variant") != ALONE[variant]:
            die(f"tail={tail} is not a classifier of variant {ALONE[variant]}: train one with "
                f"--variant={ALONE[variant]}")
        log_first = log_first or tail_net.args["mel_of_log"]
    torch.manual_seed(seed)
    net = model.Classifier(
        len(clips.classes), clips.multilabel, variant, skips, **unet_args,
        tail_widths=tail_widths or None, dropout=dropout, mel_of_log=log_first,
        bn_momentum=bn_momentum, transformer=transformer)
    if vit:
        load_vit(net.tail, vit)
    if init:
        weights.load_matching(net.unet, source.unet.state_dict(), init)
    if init_variant:
        weights.load_matching(net.tail, without_head(source, meta, clips), init, ["out.*"])
    if tail:
        state, kernel = without_head(tail_net, tail_meta, clips), FIRST_KERNEL[variant]
        state = {name: w for name, w in state.items() if name not in ("mean", "std")}
        state[kernel] = weights.inflate(state[kernel], len(unet_args["sources"]) + 1)
        weights.load_matching(net.tail, state, tail, NOT_IN_TAIL)
    return net


@torch.no_grad()
def measure_scale(net, clips, dev, most=64):
    """Sets the input scale of a transformer from crops of training clips."""
    numbers = clips.order(0)[:most]
    net.eval()
    parts = []
    for start in range(0, len(numbers), batch_size):
        wave, _ = clips.batch(0, numbers[start:start + batch_size])
        parts.append(net.features(model.magnitudes(wave.to(dev)))[0])       # (B, S + 1, T, M)
    net.tail.measure(torch.cat(parts))


def phases():
    """[(optimiser, learning rate, epochs)]; epochs None: until the loss stops improving."""
    if recipe == "modern":
        return [("AdamW", learning_rate, None)]
    sgd = [("SGD", rate, None) for rate in SGD_RATES[recipe]]
    if recipe == "paper":
        return [("Adam", learning_rate, None), *sgd]
    halved = [("Adam", learning_rate / 2 ** k, 2) for k in range(1, HALVINGS + 1)]
    return [("Adam", learning_rate, 5), *halved, *sgd]


def make_optimizer(net, phase):
    groups = [{"params": [p for p in part.parameters() if p.requires_grad],
               "lr_scale": unet_lr if name == "unet" else 1.0}
              for name, part in net.train_parts().items()]
    kind, fused = phases()[phase][0], next(net.parameters()).is_cuda
    if kind == "AdamW":
        return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=fused)
    if kind == "SGD":
        return torch.optim.SGD(groups, fused=fused)
    return torch.optim.Adam(groups, eps=1e-7, fused=fused)      # Keras' epsilon


def lr_at(step, steps, phase):
    """modern: linear warm-up, then cosine decay to zero. Other recipes: one rate per phase."""
    if recipe != "modern":
        return phases()[phase][1]
    warmup = max(1, int(WARMUP * steps))
    if step < warmup:
        return learning_rate * (step + 1) / warmup
    fraction = (step - warmup) / max(1, steps - warmup)
    return learning_rate * 0.5 * (1 + math.cos(math.pi * fraction))


def clips_per_epoch(n):
    """The largest multiple of `chunk` below n, as in the authors' code; n itself if n <= chunk."""
    if 0 < chunk < n:
        return (n - 1) // chunk * chunk
    if chunk:
        print(f"{n} training clips are at most one chunk of {chunk}: an epoch is all of them")
    return n


def main():
    config, names = settings.configure(globals())
    dev, rank, world = devices.setup_device(device)
    on_gpu = dev.startswith("cuda")
    torch.backends.cudnn.benchmark = True       # shapes are fixed: pick the fastest kernels
    print("\n".join(f"{k} = {v!r}" for k, v in config.items()))
    check_settings(config, world)
    run = runs.Run(out or f"ckpt/{'_'.join(names) or 'mtat'}.pt", resume, overwrite, rank)

    prepared = Prepared(data, "clips", fold)
    devices.keep_on_gpu(prepared, dev)
    # BatchNorm statistics depend on the batch of a rank, so resuming needs as many ranks
    config |= {"processes": world, "trained_on": prepared.trained_on(),
               "started_from": {key: runs.fingerprint(config[key]) for key in ("init", "tail")}}
    train_clips = Clips(prepared, "train", task, seed, label_fraction)
    valid_clips = Clips(prepared, "valid", task)
    used = clips_per_epoch(len(train_clips))
    per_epoch = used // batch_size
    if per_epoch == 0:
        die(f"{len(train_clips)} training clips do not fill one batch of {batch_size}: use a "
            "smaller --batch_size")
    steps, micro, commit = epochs * per_epoch, batch_size // world, runs.git_commit()

    # `net` is saved and validated; `forward`, which may wrap it, is for training only
    net = build(train_clips).to(dev)
    train_clips.crop = valid_clips.crop = net.crop
    net.amp_dtype = devices.AMP_DTYPES[dtype]
    peak = devices.peak_seconds(net, net.crop, dev) / world
    devices.accelerate(net, dev)
    parts = net.train_parts()
    if freeze:
        parts[freeze].requires_grad_(False)
    scaler = torch.amp.GradScaler(dev.split(":")[0], enabled=dtype == "float16")
    first, progress = 0, {
        "best": math.inf, "best_step": 0, "phase": 0, "phase_epoch": 0, "stale_epochs": 0}
    if run.saved:
        run.check_same(config)
        first, progress = run.saved["step"], run.saved["progress"]
    optimizer = make_optimizer(net, progress["phase"])
    if run.saved:
        runs.load_state(run.saved, net, optimizer, scaler)
    elif variant.startswith("ast"):
        measure_scale(net, train_clips, dev)
    forward = devices.distribute(net, dev, sync_batchnorm)
    if compile and dev != "cpu":
        devices.compile_parts(parts.values(), dev)
    run.begin(config)
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    print(f"{trainable:,} trainable parameters, {len(train_clips)} training clips ({per_epoch} "
          f"steps an epoch), {len(valid_clips)} validation clips, {len(train_clips.classes)} "
          f"classes, {dev} x {world}, {dtype}")

    def micro_batch(step):      # this rank's part of the batch
        epoch, at = divmod(step, per_epoch)
        order = train_clips.order(epoch)[:used][at * batch_size:(at + 1) * batch_size]
        return train_clips.batch(epoch, order[rank * micro:(rank + 1) * micro])

    # from waves to gradients; what follows, such as clipping, stays out of the CUDA graph
    def forward_backward(wave, target):
        loss = model.crop_losses(forward(wave), target, train_clips.multilabel).mean()
        scaler.scale(loss).backward()
        return loss.detach()

    if on_gpu and world == 1:
        forward_backward = devices.CudaGraph(forward_backward, net.parameters())

    batches = prefetch(micro_batch, range(first, steps), workers, pin=on_gpu)
    meter = runs.Meter(run.saved and run.saved["meter"], peak)
    began = time.time()
    net.train()
    for step in range(first, steps + 1):
        epoch, at = divmod(step, per_epoch)

        # save first, so that nothing is lost if validation fails
        validating, stopping = at == 0, run.should_stop(step, dev)
        if validating or stopping:
            devices.sync_and_check(net, dev)
            checkpoint = {
                "kind": "classifier", "args": net.args, "classes": train_clips.classes,
                "task": task, "config": config, "commit": commit, "step": step,
                "model": runs.finite_weights(net)}
            run.save_last(checkpoint, progress, meter, optimizer, scaler)
        if stopping:
            run.exit_stopped(step)
        if validating:
            val_loss = validate(net, valid_clips, dev, rank, world)
            better = run.save_if_best(checkpoint, val_loss, progress)
            progress["stale_epochs"] = 0 if better else progress["stale_epochs"] + 1
            left = (time.time() - began) / max(1, step - first) * (steps - step)
            eta = f" | ETA {settings.clock(left)}" if step > first else ""
            run.log(f"epoch {epoch:3d}/{epochs} | validation loss {val_loss:.5f} "
                    f"(best {progress['best']:.5f}){eta}", epoch=epoch, step=step,
                    val_loss=val_loss, best=progress["best"], phase=progress["phase"])

            # the next phase starts from the best weights
            length, stale = phases()[progress["phase"]][2], progress["stale_epochs"]
            over = epoch - progress["phase_epoch"] >= length if length else stale > PATIENCE
            if recipe != "modern" and over and epoch < epochs:
                if progress["phase"] == len(phases()) - 1:
                    print(f"no better validation loss for {stale} epochs in the last phase: done")
                    break
                progress |= {"phase": progress["phase"] + 1, "phase_epoch": epoch,
                             "stale_epochs": 0}
                if world > 1:
                    dist.barrier()      # rank 0 has written the best weights
                net.load_state_dict(weights.read_checkpoint(run.out)["model"])
                optimizer = make_optimizer(net, progress["phase"])
                kind, rate, _ = phases()[progress["phase"]]
                print(f"phase {progress['phase']}: {kind} at {rate} from the best weights")
            net.train()
            meter.reset()
        if step == steps:
            break

        if freeze:
            parts[freeze].eval()        # in training mode BatchNorm would update its statistics
        # dropout is a function of seed and step, so that resuming changes nothing
        torch.manual_seed((seed << 32) + step * world + rank)
        lr = lr_at(step, steps, progress["phase"])
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        wave, target = meter.next_batch(batches, dev)               # (B, N), (B, classes)
        meter.add(forward_backward(wave, target))
        if grad_clip > 0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # reading the loss waits for the GPU, so only once per log line
        done = step + 1
        if done % log_every == 0 or done % per_epoch == 0:
            means = meter.read(done, batch_size)
            run.log(f"epoch {epoch:3d} step {done:6d} | loss {means['loss']:.5f} | lr {lr:.2e} | "
                    f"{means['clips_per_s']:.1f} clips/s | mfu {means['mfu']:.0%} | "
                    f"data wait {means['data_wait']:.0%}",
                    epoch=epoch, step=done, lr=lr, **means)

    epoch = progress["best_step"] // per_epoch
    note = "" if epoch else " (the initial weights)"
    print(f"best validation loss {progress['best']:.5f} after epoch {epoch}{note}; "
          f"{settings.clock(time.time() - began)}: {run.out}")
    print(f"next: python eval.py {run.out}")


if __name__ == "__main__":
    settings.script(main)
