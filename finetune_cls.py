"""
Attaches a convolutional tail to a U-Net and trains the whole to tag music or name its genre (the paper, stage 2).

    python finetune_cls.py --init=ckpt/vocals.pt                       # MagnaTagATune, from a separator of pretrain_sep.py
    python finetune_cls.py config/fma.py --init=separators/vocals/checkpoint-1   # FMA, from a released TensorFlow checkpoint
    python finetune_cls.py config/mtat.py config/scratch.py            # the same network, from random weights
    python finetune_cls.py config/mtat.py config/tail.py               # the tail alone
    python finetune_cls.py config/mtat.py --variant=v3 --init=ckpt/vocals.pt --tail=ckpt/mtat_tail.pt   # join two trained halves
    python finetune_cls.py config/mtat.py --resume=True                # go on after a stop, as if there had been none

Writes ckpt/<configs>.pt (best validation loss), ckpt/<configs>.resume (to go on from) and ckpt/<configs>.jsonl (the log).
"""
import math
import time

import torch
import torch.nn.functional as F

import model
import runtime
from data import Clips, Prepared, prefetch
from runtime import clock, die

# -----------------------------------------------------------------------------
# settings: the paper's recipe for MagnaTagATune; override them in config/*.py or with --key=value
# files
data = "data/mtat"              # prepared clips
task = "tags"                   # which of their label sets: tags (several per clip) or genre (one per clip)
out = ""                        # best checkpoint; empty: ckpt/<configs>.pt
init = ""                       # a separator: .pt of pretrain_sep.py or a TensorFlow prefix; empty: random weights
tail = ""                       # with variant v3: a trained tail-only checkpoint to join to the U-Net
resume = False                  # go on from the .resume file beside `out`
overwrite = False               # replace a run that is there
# network
variant = "v1"                  # tail, v1 (concatenated skips), v3 (added through adapters), v3_concat
skips = 5                       # decoder outputs that reach the tail, 0 to 5
tail_widths = [0]               # channels of the seven tail blocks; 0: those of the variant
dropout = 0.5                   # before the last layer
mel_of_log = False              # the authors' v1 front end: mel of the logarithm instead of logarithm of the mel
bn_momentum = 0.01              # of the BatchNorm statistics; 0.01 here is 0.99 in Keras
freeze = ""                     # unet or tail: keep its weights and BatchNorm statistics as they are
# the U-Net if there is no init (with one, these come from its checkpoint)
sources = ["vocals"]            # masks: only their number matters here
widths = [16, 32, 64, 128, 192, 192]  # channels of the six encoder blocks
pool = ""                       # max or avg; empty: as in init, else max (the authors switch multisource from avg to max)
# optimisation
recipe = "paper"                # paper: Adam, then SGD from the best weights; modern: AdamW, warm-up, cosine
batch_size = 16                 # clips, one random crop of each
chunk = 1024                    # an epoch is whole chunks of so many clips, what is left over is left out (fewer clips: all of them); 0: all whole batches
epochs = 200                    # at most
learning_rate = 1e-4            # Adam or AdamW
unet_lr = 1.0                   # the U-Net learns at this share of every learning rate
patience = 10                   # paper: epochs without a better validation loss before the next phase
sgd_rates = [1e-3, 1e-4, 1e-5]  # paper: learning rates of the SGD phases
warmup = 0.1                    # modern: share of the steps to warm up in
weight_decay = 0.01             # modern
grad_clip = 0.0                 # largest gradient norm; 0: no clipping, as in the paper
seed = 1                        # of new weights, crops and dropout
# validation and log
val_crops = 7                   # crops per validation clip, end to end
log_every = 50                  # steps between log lines
# system
device = ""                     # cpu, cuda, cuda:1, mps; empty: cuda if there is one
dtype = "float32"               # float32, bfloat16, float16 of the convolutions; STFT, mel and loss stay float32
compile = True                  # torch.compile U-Net and tail
workers = 2                     # threads that cut crops ahead; 0: none
# -----------------------------------------------------------------------------


def crop_losses(logits, targets, multilabel):
    """(B, classes), (B, classes) 0/1 -> (B,): binary cross-entropy averaged over tags, or cross-entropy."""
    if logits.shape != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} differ in shape")
    if multilabel:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    return F.cross_entropy(logits, targets, reduction="none")


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def validate(net, clips):
    """Mean loss over clips, of the mean over their crops."""
    net.eval()
    total = 0.0
    for at in range(0, len(clips), batch_size):
        numbers = range(at, min(at + batch_size, len(clips)))
        crops = [clips.crops(n, val_crops) for n in numbers]                                        # B x (K, 61792)
        targets = torch.cat([clips.targets[n].expand(len(c), -1) for n, c in zip(numbers, crops)])  # (B * K, classes)
        losses = crop_losses(net(torch.cat(crops).to(device)), targets.to(device), clips.multilabel)
        total += sum(part.mean().item() for part in losses.split([len(c) for c in crops]))
    return total / len(clips)


def copy_by_name(part, weights, source, fresh=()):
    """Copies weights {name: tensor} into a module; all names must be there on both sides, but for new ones with a word of `fresh` in them."""
    own = part.state_dict()
    missing = [name for name in own if name not in weights and not any(f in name for f in fresh)]
    unexpected = [name for name in weights if name not in own]
    unlike = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    for what, names in (("missing", missing), ("left over", unexpected), ("of another shape", unlike)):
        if names:
            die(f"{source} does not fit this network: {len(names)} tensors {what} ({', '.join(names[:3])}, ...)")
    part.load_state_dict({**own, **weights})
    print(f"{len(weights)} of {len(own)} tensors from {source}" + (f", {len(own) - len(weights)} new" if len(own) > len(weights) else ""))


def build(clips):
    """The classifier, with what `init` and `tail` hold already in it."""
    runtime.choose("variant", variant, model.VARIANTS)
    runtime.choose("pool", pool, ["", "max", "avg"])
    if variant == "tail" and (init or tail):
        die("variant=tail has no U-Net: it takes neither init nor tail")
    if tail and variant != "v3":
        die(f"tail= needs variant=v3, whose tail has the same shapes with and without a U-Net (variant is {variant})")
    unet_args, separator = dict(sources=sources, widths=widths, pool=pool or "max"), None
    if init:
        separator, meta = model.load(init)
        if meta["kind"] != "separator":
            die(f"init={init} is a {meta['kind']}, fine-tuning starts from a separator: train one with pretrain_sep.py")
        unet_args = {key: meta["args"][key] for key in ("sources", "widths", "pool")}
        unet_args["pool"] = pool or unet_args["pool"]
        print("U-Net as in init: " + ", ".join(f"{k} {v}" for k, v in unet_args.items()))
        if meta["step"] == 0:
            print(f"note: {init} is from before its first step of training: it has learnt nothing")
    args = dict(unet_args, n_classes=len(clips.classes), multilabel=clips.multilabel, variant=variant, skips=skips, dropout=dropout,
                tail_widths=tail_widths if tail_widths != [0] else None, mel_of_log=mel_of_log, bn_momentum=bn_momentum)
    torch.manual_seed(seed)
    net = model.Classifier(**args)
    if separator:
        copy_by_name(net.unet, separator.unet.state_dict(), init)
    if tail:
        trained, meta = model.load(tail)
        if meta["kind"] != "classifier" or meta["args"]["variant"] != "tail":
            die(f"tail={tail} is not a tail-only classifier: train one with config/tail.py")
        weights = trained.tail.state_dict()
        # the first kernel saw one spectrogram and now sees S + 1 of them: dividing keeps the size of what comes out
        kernel, inputs = "blocks.0.convs.0.weight", len(unet_args["sources"]) + 1
        weights[kernel] = weights[kernel].expand(-1, inputs, -1, -1) / inputs                       # (C, 1, 3, 3) -> (C, S + 1, 3, 3)
        copy_by_name(net.tail, weights, tail, fresh=["adapter"])
    return net


def make_optimizer(net, phase):
    """phase 0 is Adam(W), phases 1.. of the paper's recipe are SGD."""
    groups = [{"params": [p for p in part.parameters() if p.requires_grad], "share": unet_lr if name == "unet" else 1.0}
              for name, part in net.train_parts().items()]
    if recipe == "modern":
        return torch.optim.AdamW(groups, weight_decay=weight_decay)
    return torch.optim.SGD(groups) if phase else torch.optim.Adam(groups, eps=1e-7)  # Keras' epsilon


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]


def modern_lr(step, steps):
    """Linear warm-up, then half a cosine down to zero."""
    rising = max(1, int(warmup * steps))
    if step < rising:
        return learning_rate * (step + 1) / rising
    return learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def main(config, out):
    runtime.at_least(1, batch_size=batch_size, val_crops=val_crops, log_every=log_every)
    runtime.at_least(0, epochs=epochs, workers=workers, chunk=chunk, patience=patience)
    runtime.choose("recipe", recipe, ["paper", "modern"])
    runtime.choose("freeze", freeze, ["", "unet", "tail"])
    prepared = Prepared(data, "clips")
    config = {**config, "trained_on": prepared.trained_on()}
    train_clips, valid_clips = Clips(prepared, "train", task, seed), Clips(prepared, "valid", task)
    whole = chunk == 0 or len(train_clips) <= chunk
    if chunk and whole:
        print(f"{len(train_clips)} training clips are no more than a chunk of {chunk}: an epoch is all of them")
    used = len(train_clips) if whole else (len(train_clips) - 1) // chunk * chunk
    steps_per_epoch = used // batch_size
    if steps_per_epoch == 0:
        die(f"{len(train_clips)} training clips do not fill one batch of {batch_size}: use a smaller --batch_size")

    net = build(train_clips).to(device)
    net.amp_dtype = runtime.amp_dtype(dtype)
    parts = net.train_parts()
    if freeze and (freeze not in parts or len(parts) == 1):
        die(f"freeze={freeze}, but variant={variant} has only {', '.join(parts)}")
    if freeze:
        parts[freeze].requires_grad_(False)
    epoch = phase = since_best = 0
    best, optimizer = math.inf, None
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=dtype == "float16")
    saved = runtime.claim_output(out, resume, overwrite)
    if saved:
        runtime.same_run(saved["config"], config)
        epoch, phase, since_best, best = saved["epoch"], saved["phase"], saved["since_best"], saved["best"]
        net.load_state_dict(saved["model"])
        scaler.load_state_dict(saved["scaler"])
    optimizer = make_optimizer(net, phase)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
    if compile:
        runtime.compile_parts(parts.values(), device)
    log = runtime.Log(out.removesuffix(".pt") + ".jsonl", epoch * steps_per_epoch if saved else None)
    print(f"{sum(p.numel() for p in net.parameters() if p.requires_grad):,} trainable parameters, {len(train_clips)} clips to train on "
          f"({steps_per_epoch} steps an epoch), {len(valid_clips)} to validate on, {len(train_clips.classes)} classes, {device}, {dtype}")

    started, first = time.time(), epoch
    while True:
        # save first, so that nothing is lost if validation fails; then validate, and keep the best
        runtime.check_finite(net)
        about = {"kind": "classifier", "args": net.args, "task": task, "classes": train_clips.classes, "config": config, "epoch": epoch,
                 "step": epoch * steps_per_epoch, "model": runtime.cpu_weights(net)}
        runtime.save_atomically({**about, "phase": phase, "since_best": since_best, "best": best, "optimizer": optimizer.state_dict(),
                                 "scaler": scaler.state_dict()}, out.removesuffix(".pt") + ".resume")
        val_loss = validate(net, valid_clips)
        if not math.isfinite(val_loss):
            die(f"the validation loss is {val_loss} after epoch {epoch}: lower learning_rate, or use --dtype=float32 or bfloat16")
        since_best += 1
        if val_loss < best:
            best, since_best = val_loss, 0
            runtime.save_atomically({**about, "val_loss": val_loss}, out)
        left = (time.time() - started) / max(1, epoch - first) * (epochs - epoch)
        log(f"epoch {epoch:3d}/{epochs} | validation loss {val_loss:.5f} (best {best:.5f})" + (f" | ETA {clock(left)}" if epoch > first else ""),
            epoch=epoch, step=epoch * steps_per_epoch, val_loss=val_loss, best=best, phase=phase)
        if epoch == epochs:
            break
        if recipe == "paper" and since_best > patience:
            if phase == len(sgd_rates):
                print(f"no better validation loss for {since_best} epochs in the last phase: done")
                break
            phase, since_best = phase + 1, 0
            net.load_state_dict(torch.load(out, map_location=device, weights_only=True)["model"])
            optimizer = make_optimizer(net, phase)
            print(f"phase {phase}: SGD at {sgd_rates[phase - 1]} from the best weights")

        net.train()
        if freeze:
            parts[freeze].eval()  # BatchNorm would go on gathering statistics in training mode
        order = train_clips.order(epoch)[:used]
        cuts = [order[i * batch_size:(i + 1) * batch_size] for i in range(steps_per_epoch)]
        batches = prefetch(lambda numbers: train_clips.batch(epoch, numbers), cuts, workers, pin=device.startswith("cuda"))
        train_loss, n_losses, waited, began = 0.0, 0, 0.0, time.time()
        for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
            lr = modern_lr(step, epochs * steps_per_epoch) if recipe == "modern" else sgd_rates[phase - 1] if phase else learning_rate
            set_lr(optimizer, lr)
            torch.manual_seed((seed << 32) + step)  # dropout too is a function of seed and step, so that resuming changes nothing
            asked = time.time()
            wave, target = (t.to(device, non_blocking=True) for t in next(batches))                 # (B, 61792), (B, classes)
            waited += time.time() - asked
            loss = crop_losses(net(wave), target, train_clips.multilabel).mean()
            scaler.scale(loss).backward()
            if grad_clip > 0:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            train_loss, n_losses = train_loss + loss.detach(), n_losses + 1

            # reading the loss waits for the GPU, so it is done once per interval; a loss that was not finite stays so in the sum
            if (step + 1) % log_every == 0 or step + 1 == (epoch + 1) * steps_per_epoch:
                train_loss, spent = float(train_loss) / n_losses, time.time() - began
                if not math.isfinite(train_loss):
                    die(f"the loss is {train_loss} at step {step + 1}: lower learning_rate, set grad_clip, or use --dtype=float32 or bfloat16")
                rate = n_losses * batch_size / spent
                log(f"epoch {epoch:3d} step {step + 1:6d} | loss {train_loss:.5f} | lr {lr:.2e} | {rate:.1f} clips/s | waiting for data "
                    f"{100 * waited / spent:.0f}%", epoch=epoch, step=step + 1, loss=train_loss, lr=lr, clips_per_s=round(rate, 2),
                    data_wait=round(waited / spent, 4))
                train_loss, n_losses, waited, began = 0.0, 0, 0.0, time.time()
        epoch += 1

    kept = model.load(out)[1]["epoch"]
    print(f"best validation loss {best:.5f}, after epoch {kept}" + (", before any training: nothing was learnt" if kept == 0 else "")
          + f"; {clock(time.time() - started)}: {out}\nnext: python eval.py {out}")


if __name__ == "__main__":
    config, names = runtime.configure(globals())
    device, rank, world = runtime.start(device)
    if world > 1:
        die("finetune_cls.py runs in one process: start it with python, not torchrun")
    print("\n".join(f"{k} = {v!r}" for k, v in config.items()))
    try:
        main(config, out or f"ckpt/{'_'.join(names) or 'mtat'}.pt")
    except (ValueError, OSError) as e:
        die(e)
    except KeyboardInterrupt:
        die("stopped; --resume=True goes on from the last epoch")
