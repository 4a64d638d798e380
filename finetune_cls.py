"""
Attaches a tail to a U-Net and trains the whole to tag music or name its genre (stage 2).

    python finetune_cls.py --init=ckpt/vocals.pt            # MagnaTagATune, from a separator
    python finetune_cls.py config/fma.py --init=separators/vocals/checkpoint-20
                                                            # FMA, from a TensorFlow checkpoint
    python finetune_cls.py config/mtat.py config/scratch.py     # the same from random weights
    python finetune_cls.py config/mtat.py config/tail.py        # the tail alone
    python finetune_cls.py config/mtat.py --variant=v3 --init=ckpt/vocals.pt \\
        --tail=ckpt/mtat_tail.pt                            # join two trained halves
    python finetune_cls.py config/mtat.py config/ast.py --init=released:vocals \\
        --vit=ViT-B_16.npz                                  # a transformer in place of the tail
    python finetune_cls.py config/own_tags.py --data=data/mine --init=ckpt/vocals.pt
                                                            # your own clips
    python finetune_cls.py config/mtat.py --resume=True     # go on after a stop, to the same bits
    torchrun --standalone --nproc_per_node=4 finetune_cls.py config/mtat.py
                                                            # four GPUs divide the same batch

Writes ckpt/<configs>.pt (best validation loss), ckpt/<configs>.resume (to go on from) and
ckpt/<configs>.jsonl (the log). Ctrl-C and SIGTERM save after the current step, then stop.
"""
import math
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import model
import runtime
import training
from data import Clips, Prepared, prefetch
from fused import synchronise
from runtime import die
from tail import load_vit

# -----------------------------------------------------------------------------
# settings: the paper's recipe for MagnaTagATune; override them in config/*.py or with --key=value
# files
data = "data/mtat"              # prepared clips
task = "tags"                   # label set: tags (several per clip) or genre (one per clip)
fold = -1                       # cross-validation: test on this fold, validate on the next
label_fraction = 1.0            # share of the training clips to learn from, stratified by class
out = ""                        # best checkpoint; empty: ckpt/<configs>.pt
init = ""                       # start from it: .pt, released:NAME or TensorFlow prefix of a
                                # separator, or of a classifier of the same variant
tail = ""                       # with variant v3 or ast: a trained checkpoint of it alone to join
vit = ""                        # with variant ast or ast_tail: .npz weights of a ViT to begin with
resume = False                  # go on from the .resume file of that run
overwrite = False               # replace a run that is there
# network
variant = "v1"                  # tail, v1 (concatenated skips), v3 (added by adapters), v3_concat,
                                # ast (transformer), ast_tail (transformer alone)
skips = 5                       # decoder outputs that reach the tail, 0 to 5
tail_widths = []                # channels of the seven tail blocks; empty: those of the variant
dropout = 0.5                   # before the last layer
mel_of_log = False              # the authors' v1 front end: mel of the log, not log of the mel
bn_momentum = 0.01              # of the BatchNorm statistics; 0.01 here is 0.99 in Keras
sync_batchnorm = False          # statistics of all processes together, not of each one's part
transformer = [768, 12, 12]     # ast: width, layers, heads
frames = 0                      # ast: of a crop; 0: 768
batch_scale = False             # ast: scale the input by the batch, as the authors do
freeze = ""                     # unet or tail: keep its weights and BatchNorm statistics
# the U-Net if there is no init (with one, these come from its checkpoint)
sources = ["vocals"]            # masks: only their number matters here
widths = [16, 32, 64, 128, 192, 192]  # channels of the six encoder blocks
pool = ""                       # max or avg; empty: as in init, else max (the authors: always max)
# optimisation
recipe = "paper"                # paper: Adam, SGD from the best weights; modern: AdamW, cosine;
                                # ast: Adam at rates that are halved, then SGD
batch_size = 16                 # clips, one random crop of each, over all processes
chunk = 1024                    # an epoch is whole chunks of so many clips; 0: all whole batches
epochs = 200                    # at most
learning_rate = 1e-4            # Adam or AdamW
unet_lr = 1.0                   # the U-Net learns at this share of every learning rate
patience = 10                   # paper: epochs without a better loss before the next phase
sgd_rates = [1e-3, 1e-4, 1e-5]  # paper, ast: learning rates of the SGD phases
halvings = 4                    # ast: of the rate, after 5 epochs and then after every 2
warmup = 0.1                    # modern: share of the steps to warm up in
weight_decay = 0.01             # modern
grad_clip = 0.0                 # largest gradient norm; 0: no clipping, as in the paper
seed = 1                        # of new weights, crops and dropout
# validation and log
val_crops = 7                   # crops per validation clip, end to end
log_every = 50                  # steps between log lines
report = False                  # after each validation, a page with the curves so far
track = ""                      # send the log to tensorboard or wandb too
# system
device = ""                     # cpu, cuda, cuda:1, mps; empty: cuda if there is one
dtype = "float32"               # float32, bfloat16, float16: of the convolutions only
compile = True                  # torch.compile U-Net and tail, on a GPU; a CPU has kernels
cuda_graph = True               # on one GPU: start a pass's kernels at once
workers = 2                     # threads that cut crops ahead; 0: none
data_on_gpu = True              # keep the audio in GPU memory, if that has room for it twice
# -----------------------------------------------------------------------------


# variants that join a tail, and the variant of that tail alone
ALONE = {"v3": "tail", "ast": "ast_tail"}
FIRST_KERNEL = {"v3": "blocks.0.convs.0.weight", "ast": "patches.weight"}


def check_settings(config, world):
    """Ends the script at a setting that cannot work, before anything is trained or saved."""
    if any(type(width) is not int for width in tail_widths):
        die(f"tail_widths must be whole numbers, got {tail_widths}")
    runtime.check_numbers(config, "learning_rate", "sgd_rates", "widths", "tail_widths")
    runtime.choose("recipe", recipe, ["paper", "modern", "ast"])
    runtime.choose("variant", variant, model.VARIANTS)
    runtime.choose("pool", pool, ["", "max", "avg"])
    runtime.choose("dtype", dtype, runtime.AMP_DTYPES)
    runtime.choose("freeze", freeze, ["", "unet", "tail"])
    runtime.at_least(2, batch_size=batch_size)
    runtime.at_least(1, val_crops=val_crops, log_every=log_every)
    runtime.at_least(-1, fold=fold)
    runtime.at_least(0, epochs=epochs, workers=workers, chunk=chunk, patience=patience,
                     unet_lr=unet_lr, weight_decay=weight_decay, grad_clip=grad_clip,
                     halvings=halvings)
    runtime.within(0, 1, dropout=dropout, warmup=warmup, bn_momentum=bn_momentum)
    runtime.within(0, 5, skips=skips)
    runtime.within(1e-9, 1, label_fraction=label_fraction)
    if batch_size % world or batch_size // world < 2:
        die(f"batch_size={batch_size} must be at least 2 clips for each of {world} processes, as "
            "many for each")        # BatchNorm cannot train on one clip
    if not sources:
        die("sources must name at least one mask")
    if variant in ALONE.values() and (init or tail or freeze):
        die(f"variant={variant} has only a tail: it takes no init, no tail and no freeze")
    if tail and variant not in ALONE:
        die("tail= needs variant=v3 or ast, whose tails have the same shapes with and without a "
            f"U-Net (variant is {variant})")
    if vit and not variant.startswith("ast"):
        die(f"vit= needs variant=ast or ast_tail (variant is {variant})")
    if vit and tail:
        die("vit= and tail= both say what the transformer starts from: choose one")
    if len(transformer) != 3:
        die(f"transformer must be width, layers and heads, got {transformer}")


def crop_losses(logits, targets, multilabel):
    """(B, classes), (B, classes) 0/1 -> (B,): binary cross-entropy per tag, or cross-entropy."""
    if logits.shape != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} differ "
                         "in shape")
    if multilabel:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    return F.cross_entropy(logits, targets, reduction="none")


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def validate(net, clips, device, rank, world):
    """Mean loss over clips, of the mean over their crops; the processes divide the clips."""
    def read(at):
        numbers = range(at, min(at + batch_size, len(clips)))
        return numbers, [clips.crops(n, val_crops) for n in numbers]        # B x (K, 61792)

    net.eval()
    total = 0.0
    starts = range(rank * batch_size, len(clips), world * batch_size)
    for numbers, crops in prefetch(read, starts, workers):
        counts = [len(c) for c in crops]
        targets = [clips.targets[n].expand(k, -1) for n, k in zip(numbers, counts, strict=True)]
        targets = torch.cat(targets).to(device)                     # (B * K, classes)
        parts = torch.cat(crops).split(batch_size)                  # as much memory as training
        logits = torch.cat([net(part.to(device)) for part in parts])        # (B * K, classes)
        losses = crop_losses(logits, targets, clips.multilabel)     # (B * K,)
        means = [part.mean() for part in losses.split(counts)]
        total += sum(torch.stack(means).tolist())                   # a GPU is waited for once
    return training.sum_over_ranks([total], device)[0] / len(clips)


def copy_by_name(part, weights, source, fresh=()):
    """Copies weights {name: tensor} into a module. Ends the script unless all names agree.

    Names with a word of `fresh` in them may be missing in weights: they stay as they are.
    """
    own = part.state_dict()
    expected = [name for name in own if not any(word in name for word in fresh)]
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in own]
    shared = [name for name in own if name in weights]
    unlike = [name for name in shared if own[name].shape != weights[name].shape]
    faults = {"missing": missing, "left over": unexpected, "of another shape": unlike}
    for what, names in faults.items():
        if names:
            die(f"{source} does not fit this network: {len(names)} tensors {what} "
                f"({', '.join(names[:3])}, ...)")
    part.load_state_dict({**own, **weights})
    more = len(own) - len(weights)
    print(f"{len(weights)} of {len(own)} tensors from {source}" + (f", {more} new" if more else ""))


def read_init():
    """(network, meta) of what `init` names."""
    net, meta = model.load(init)
    if meta["kind"] == "classifier" and net.args["variant"] != variant:
        die(f"init={init} is a classifier of variant {net.args['variant']}, not {variant}: start "
            "from a separator, or from a classifier of the same variant")
    if meta["kind"] == "classifier" and vit:
        die(f"vit={vit} and init={init}, a classifier, both say what the transformer starts from: "
            "choose one")
    if meta["step"] == 0:
        print(f"note: {init} is from before its first step of training: it has learnt nothing")
    if meta.get("as_published"):
        print(f"{init}: published weights, trained with {meta['as_published']}")
    return net, meta


def read_tail(clips):
    """(network, weights of its tail) of what `tail` names."""
    net, meta = model.load(tail)
    if meta["kind"] != "classifier" or net.args["variant"] != ALONE[variant]:
        die(f"tail={tail} is not a classifier of variant {ALONE[variant]}: train one with "
            f"--variant={ALONE[variant]}")
    if net.args["batch_scale"] != batch_scale:
        die(f"tail={tail} was trained with batch_scale={net.args['batch_scale']}: say the same "
            "here")
    weights = known_part(net.tail, meta, clips)
    return net, {name: w for name, w in weights.items() if name not in ("mean", "std")}


def known_part(tail, meta, clips):
    """The weights of a trained tail, without the last layer if that knows other classes.

    Weights of TensorFlow do not say which classes they know: then their number decides.
    """
    weights, same = tail.state_dict(), meta["classes"] == clips.classes
    if meta["classes"] is None:
        same = tail.out.out_features == len(clips.classes)
    if not same:
        weights = {name: w for name, w in weights.items() if not name.startswith("out.")}
    return weights


def build(clips):
    """The classifier, with what `init`, `tail` and `vit` hold already in it."""
    unet_args = dict(sources=sources, widths=widths, pool=pool or "max")
    old_mel = mel_of_log
    if init:
        source, meta = read_init()
        unet_args = {key: source.args[key] for key in unet_args}
        unet_args["pool"] = pool or unet_args["pool"]
        old_mel = mel_of_log or source.args.get("mel_of_log", False)
        print("U-Net as in init: " + ", ".join(f"{k} {v}" for k, v in unet_args.items()))
    if tail:
        alone, tail_weights = read_tail(clips)
        old_mel = old_mel or alone.args["mel_of_log"]
    torch.manual_seed(seed)
    net = model.Classifier(
        len(clips.classes), clips.multilabel, variant, skips, **unet_args,
        tail_widths=tail_widths or None, dropout=dropout, mel_of_log=old_mel,
        bn_momentum=bn_momentum, transformer=transformer, frames=frames, batch_scale=batch_scale)
    if vit:
        load_vit(net.tail, vit)
    if init:
        copy_by_name(net.unet, source.unet.state_dict(), init)
    if init and meta["kind"] == "classifier":
        copy_by_name(net.tail, known_part(source.tail, meta, clips), init, fresh=["out."])
    if tail:
        # its first kernel saw one spectrogram: dividing keeps the size of what comes out
        kernel, n_inputs = FIRST_KERNEL[variant], len(unet_args["sources"]) + 1
        one = tail_weights[kernel]                                  # (C, 1, 3, 3)
        tail_weights[kernel] = one.expand(-1, n_inputs, -1, -1) / n_inputs      # (C, S + 1, 3, 3)
        copy_by_name(net.tail, tail_weights, tail, fresh=["adapter", "out.", "mean", "std"])
    return net


@torch.no_grad()
def measure_scale(net, clips, device, most=64):
    """Takes the scale of a transformer's input from crops of the training clips."""
    numbers = clips.order(0)[:most]
    net.eval()
    parts = []
    for at in range(0, len(numbers), batch_size):
        wave, _ = clips.batch(0, numbers[at:at + batch_size])
        parts.append(net.features(model.magnitudes(wave.to(device)))[0])    # (B, S + 1, T, M)
    net.tail.measure(torch.cat(parts))


def phases():
    """[(optimiser, learning rate, epochs or None)]: without epochs, until nothing gets better."""
    slow = [("SGD", rate, None) for rate in sgd_rates]
    if recipe == "modern":
        return [("AdamW", learning_rate, None)]
    if recipe == "paper":
        return [("Adam", learning_rate, None), *slow]
    halved = [("Adam", learning_rate / 2 ** k, 2) for k in range(1, halvings + 1)]
    return [("Adam", learning_rate, 5), *halved, *slow]


def make_optimizer(net, phase):
    groups = []
    for name, part in net.train_parts().items():
        share = unet_lr if name == "unet" else 1.0
        groups.append({"params": [p for p in part.parameters() if p.requires_grad], "share": share})
    kind, fused = phases()[phase][0], next(net.parameters()).is_cuda
    if kind == "AdamW":
        return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=fused)
    if kind == "SGD":
        return torch.optim.SGD(groups, fused=fused)
    return torch.optim.Adam(groups, eps=1e-7, fused=fused)      # Keras' epsilon


def lr_at(step, steps, phase):
    """modern: linear warm-up, then half a cosine down to zero. Else one rate per phase."""
    if recipe != "modern":
        return phases()[phase][1]
    rising = max(1, int(warmup * steps))
    if step < rising:
        return learning_rate * (step + 1) / rising
    progress = (step - rising) / max(1, steps - rising)
    return learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def clips_per_epoch(n_clips):
    """Whole chunks, one less if all are whole, as the authors count; fewer clips than one: all."""
    if chunk == 0:
        return n_clips
    if n_clips <= chunk:
        print(f"{n_clips} training clips are no more than a chunk of {chunk}: an epoch is all")
        return n_clips
    return (n_clips - 1) // chunk * chunk


def main():
    config, names = runtime.configure(globals())
    torch_device, rank, world = runtime.start(device)
    on_gpu = torch_device.startswith("cuda")
    torch.backends.cudnn.benchmark = True       # shapes stay: try which kernel is fastest
    print("\n".join(f"{k} = {v!r}" for k, v in config.items()))
    check_settings(config, world)
    run = training.Run(out or f"ckpt/{'_'.join(names) or 'mtat'}.pt", resume, overwrite, rank)

    prepared = Prepared(data, "clips", fold)
    training.keep_on_gpu(prepared, torch_device, data_on_gpu)
    # BatchNorm sees the batch of one process, so resuming needs as many processes
    config |= {"processes": world, "trained_on": prepared.trained_on(),
               "started_from": {key: training.fingerprint(config[key]) for key in ("init", "tail")}}
    train_clips = Clips(prepared, "train", task, seed, label_fraction)
    valid_clips = Clips(prepared, "valid", task)
    used = clips_per_epoch(len(train_clips))
    per_epoch = used // batch_size
    if per_epoch == 0:
        die(f"{len(train_clips)} training clips do not fill one batch of {batch_size}: use a "
            "smaller --batch_size")
    steps, commit = epochs * per_epoch, training.git_commit()

    # the network, with what it starts from in it
    net = build(train_clips).to(torch_device)
    train_clips.crop = valid_clips.crop = net.crop
    net.amp_dtype = runtime.AMP_DTYPES[dtype]
    parts = net.train_parts()
    if freeze:
        parts[freeze].requires_grad_(False)
    scaler = torch.amp.GradScaler(torch_device.split(":")[0], enabled=dtype == "float16")
    first = phase = phase_began = since_best = best_epoch = 0
    best = math.inf
    if run.saved:
        if run.saved["config"].get("tail_widths") == [0]:
            run.saved["config"]["tail_widths"] = []         # older runs said it so
        run.check_same(config, __file__)
        first, phase, since_best = run.saved["step"], run.saved["phase"], run.saved["since_best"]
        best = run.saved["best"]
        best_epoch = run.saved.get("best_epoch", "?")       # older runs did not note it
        phase_began = run.saved.get("phase_began", 0)
        net.load_state_dict(run.saved["model"])
        scaler.load_state_dict(run.saved["scaler"])
    elif variant.startswith("ast") and not batch_scale:
        measure_scale(net, train_clips, torch_device)
    optimizer = make_optimizer(net, phase)
    if run.saved:
        training.resume_optimizer(optimizer, run.saved["optimizer"])
    floor = training.floor_per_crop(net, net.crop, torch_device) / world
    if compile and torch_device != "cpu":
        runtime.compile_parts(parts.values(), torch_device)
    forward = net
    if sync_batchnorm and world > 1:
        synchronise(net)
    run.begin(config)
    if world > 1:
        forward = DistributedDataParallel(net, [torch_device] if on_gpu else None)
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    print(f"{trainable:,} trainable parameters, {len(train_clips)} clips to train on ({per_epoch} "
          f"steps an epoch), {len(valid_clips)} to validate on, {len(train_clips.classes)} "
          f"classes, {torch_device} x {world}, {dtype}")
    micro = batch_size // world

    def crops(step):  # this process' part of the batch of a step, in the order of its epoch
        epoch, at = divmod(step, per_epoch)
        order = train_clips.order(epoch)[:used][at * batch_size:(at + 1) * batch_size]
        return train_clips.batch(epoch, order[rank * micro:(rank + 1) * micro])

    def learn(wave, target):  # a pass from waves to gradients
        loss = crop_losses(forward(wave), target, train_clips.multilabel).mean()
        scaler.scale(loss).backward()
        return loss.detach()

    if cuda_graph and on_gpu and world == 1:
        learn = training.Graphed(learn, net.parameters())

    batches = prefetch(crops, range(first, steps), workers, pin=on_gpu)
    meter = training.Meter(run.saved.get("meter") if run.saved else None, floor)
    stop = runtime.Stop()
    began = time.time()
    net.train()
    for step in range(first, steps + 1):
        epoch, at = divmod(step, per_epoch)

        # processes must stop at the same step; they ask each other when a log line waits anyway
        stopping, validating = stop.asked, at == 0
        if world > 1:
            together = step % log_every == 0 or validating or not on_gpu
            stopping = together and training.anyone(stopping, torch_device)

        # save first, so that nothing is lost if validation fails
        if validating or stopping:
            training.agree(net, torch_device)
            checkpoint = {
                "kind": "classifier", "args": net.args, "task": task, "config": config,
                "commit": commit, "classes": train_clips.classes, "epoch": epoch, "step": step,
                "model": runtime.finite_weights(net)}
            state = {
                **checkpoint, "phase": phase, "since_best": since_best, "best": best,
                "best_epoch": best_epoch, "meter": meter.state(),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            run.save(state, run.last)
        if stopping:
            training.stop_at(step)

        # then validate, and keep the best
        if validating:
            val_loss = validate(net, valid_clips, torch_device, rank, world)
            if not math.isfinite(val_loss):
                die(f"the validation loss is {val_loss} after epoch {epoch}: lower learning_rate, "
                    "or use --dtype=float32 or bfloat16")
            since_best += 1
            if val_loss < best:
                best, best_epoch, since_best = val_loss, epoch, 0
                run.save({**checkpoint, "val_loss": val_loss}, run.out)
            left = (time.time() - began) / max(1, step - first) * (steps - step)
            eta = f" | ETA {runtime.clock(left)}" if step > first else ""
            run.log(f"epoch {epoch:3d}/{epochs} | validation loss {val_loss:.5f} (best {best:.5f})"
                    f"{eta}", epoch=epoch, step=step, val_loss=val_loss, best=best, phase=phase)

            # a phase ends after its epochs, or if nothing gets better: go on from the best weights
            length = phases()[phase][2]
            over = epoch - phase_began >= length if length else since_best > patience
            if recipe != "modern" and over and epoch < epochs:
                if phase == len(phases()) - 1:
                    print(f"no better validation loss for {since_best} epochs in the last phase: "
                          "done")
                    break
                phase, phase_began, since_best = phase + 1, epoch, 0
                if world > 1:
                    dist.barrier()  # the best weights are written
                net.load_state_dict(model.read_checkpoint(run.out)["model"])
                optimizer = make_optimizer(net, phase)
                kind, rate, _ = phases()[phase]
                print(f"phase {phase}: {kind} at {rate} from the best weights")
            net.train()
            meter.reset()
        if step == steps:
            break

        # BatchNorm would go on gathering statistics in training mode
        if freeze:
            parts[freeze].eval()
        # dropout too is a function of seed and step, so that resuming changes nothing
        torch.manual_seed((seed << 32) + step * world + rank)
        lr = lr_at(step, steps, phase)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["share"]
        wave, target = meter.next_batch(batches, torch_device)      # (B, 61792), (B, classes)
        meter.add(learn(wave, target))
        if grad_clip > 0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # reading the loss waits for the GPU, so it is done once per line
        done = step + 1
        if done % log_every == 0 or done % per_epoch == 0:
            seen = meter.read(done, batch_size)
            run.log(f"epoch {epoch:3d} step {done:6d} | loss {seen['loss']:.5f} | lr {lr:.2e} | "
                    f"{seen['clips_per_s']:.1f} clips/s, {seen['matmul_share']:.0%} of matmul | "
                    f"waiting for data {seen['data_wait']:.0%}",
                    epoch=epoch, step=done, lr=lr, **seen)

    note = ", before any training: nothing was learnt" if best_epoch == 0 else ""
    print(f"best validation loss {best:.5f}, after epoch {best_epoch}{note}; "
          f"{runtime.clock(time.time() - began)}: {run.out}")
    print(f"next: python eval.py {run.out}")


if __name__ == "__main__":
    runtime.script(main)
