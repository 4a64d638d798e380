"""
The files of a training run: checkpoints, log, and the state that resuming needs.
"""
import glob
import hashlib
import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import torch
import torch.distributed as dist

from common.device import mean_over_ranks, sum_over_ranks
from common.files import naming, save_atomically, write_atomically
from common.settings import choose, die

# settings that may change on resume. Data may move: its splits and labels are compared by hash
FREE_KEYS = ("data", "out", "resume", "overwrite", "device", "compile", "workers", "log_every",
             "track")


class Stop:
    """`asked` becomes True at the first Ctrl-C or SIGTERM. A second one quits at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.asked = True
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, signal.SIG_DFL)
        # not print(), which is not reentrant
        os.write(2, b"\nstopping after this step; press Ctrl-C again to quit now\n")


def check_finite(name, loss, step):
    if not math.isfinite(loss):
        die(f"the {name} is {loss} at step {step}: lower learning_rate, set grad_clip, or use "
            "--dtype=float32 or bfloat16")


class Meter:
    """Mean loss, speed and data wait since the last log line.

    saved: state() of a stopped run, to continue from. peak: see device.peak_seconds().
    """

    def __init__(self, saved=None, peak=0.0):
        self.peak = peak
        self.reset(**(saved or {}))

    def reset(self, loss=0.0, count=0, waited=0.0, spent=0.0):
        self.loss, self.count, self.waited, self.began = loss, count, waited, time.time() - spent

    def next_batch(self, batches, device):
        """The next tensors of an iterator, on the device. Adds the time to the data wait."""
        began = time.time()
        tensors = [t.to(device, non_blocking=True) for t in next(batches)]
        self.waited += time.time() - began
        return tensors

    def add(self, loss):
        self.loss = self.loss + loss.detach()       # not float(), which waits for a GPU
        self.count += 1

    def read(self, step, batch_size):
        """{loss, clips_per_s, mfu, data_wait}; resets them. Exits if the loss is not finite.

        mfu: model FLOPs utilisation, relative to the measured rate of a large matrix product.
        """
        loss = mean_over_ranks(float(self.loss) / self.count, self.loss.device)
        check_finite("loss", loss, step)
        spent = time.time() - self.began
        clips_per_s = self.count * batch_size / spent
        values = {"loss": loss, "clips_per_s": round(clips_per_s, 2),
                  "mfu": round(clips_per_s * self.peak, 4),
                  "data_wait": round(self.waited / spent, 4)}
        self.reset()
        return values

    def state(self):
        return {"loss": torch.as_tensor(self.loss).cpu(), "count": self.count,
                "waited": self.waited, "spent": time.time() - self.began}


class Run:
    """NAME.pt (best checkpoint, the path `out`), NAME.resume (last state) and NAME.jsonl (log).

    `saved` is the content of NAME.resume if the run is resumed, else None. Exits instead of
    overwriting an existing run. Only rank 0 writes.
    """

    def __init__(self, out, resume, overwrite, rank=0):
        if not out.endswith(".pt"):
            die(f"out={out} must end in .pt")
        self.name = out.removesuffix(".pt")
        self.files = [self.name + ending for ending in (".pt", ".resume", ".jsonl")]
        self.out, self.last, self.log_path = self.files
        self.saved, self.started, self.writes = None, time.time(), rank == 0
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        existing = [path for path in self.files if os.path.lexists(path)]
        for path in existing:
            if not os.path.exists(path):        # such as a link to a disk that is not mounted
                die(f"{path} is a broken link: restore its target, or remove the link")
        if resume:
            self._read_last()
        elif existing and not overwrite:
            die(f"{existing[0]} exists: --resume=True continues that run, --overwrite=True "
                "replaces it, --out=ckpt/NAME.pt writes elsewhere")

    def _read_last(self):
        try:
            self.saved = torch.load(self.last, map_location="cpu", weights_only=True)
            best = self.saved["progress"]["best"]
        except Exception as e:      # torch.load has no exception class of its own
            die(f"resume=True, but {self.last} is not the state of a run ({type(e).__name__}): "
                "restore it, or start again with --overwrite=True")
        if math.isfinite(best) and not os.path.isfile(self.out):
            die(f"{self.out}, the best checkpoint of this run (validation loss {best:.5f}), is "
                "missing: restore it, or start again with --overwrite=True")

    def check_same(self, config):
        """Exits if settings, data or weights differ from those that the run was started with."""
        old = self.saved["config"]
        # initial weights may move: they are compared by hash
        moved = [key for key, digest in config.get("started_from", {}).items() if digest]
        reasons = {"trained_on": f"the splits or labels in {config['data']} have changed",
                   "started_from": "init or tail is another file"}
        changed = [reasons.get(key, f"{key}: {old.get(key)!r} -> {value!r}")
                   for key, value in config.items()
                   if old.get(key) != value and key not in (*FREE_KEYS, "steps", *moved)]
        if changed:
            die(f"{self.last} was started differently ({'; '.join(changed)}): resume it with the "
                "same settings, or start another run with --out or --overwrite=True")

    def begin(self, config):
        """Removes leftover temporary files, opens the log and installs the signal handlers."""
        if dist.is_initialized():
            dist.barrier()      # all ranks check for existing files before rank 0 writes any
        self.log_every = config["log_every"]
        if self.writes:
            self._open_log(config)
        self.stop = Stop()      # last: Ctrl-C interrupts a tracker that hangs

    def _open_log(self, config):
        first = self.saved["step"] if self.saved else 0
        self.send = tracker(config["track"], self.name, config, first)
        for path in self.files:
            for leftover in glob.glob(glob.escape(path) + ".*.tmp"):
                os.remove(leftover)     # of a run that was killed while saving
        entries = []
        if self.saved and os.path.exists(self.log_path):
            entries, damaged = read_log(self.log_path)
            if damaged:
                print(f"note: {self.log_path}: {damaged} damaged lines are dropped")
        elif self.saved:
            print(f"note: {self.log_path} is missing: the log starts here")
        # saving comes before validating: the validation of the saved step is repeated
        kept = [e for e in entries if (e["step"], "val_loss" in e) < (first, True)]
        write_atomically("".join(json.dumps(e) + "\n" for e in kept), self.log_path)

    def should_stop(self, step, device):
        """Whether any rank has received a signal."""
        # an all-reduce waits for the GPU: only at log lines
        if dist.is_initialized() and device != "cpu" and step % self.log_every:
            return False
        return sum_over_ranks([float(self.stop.asked)], device)[0] > 0

    def save_last(self, checkpoint, progress, meter, optimizer, scaler):
        """Writes NAME.resume: a checkpoint and the state of the training loop."""
        if self.writes:
            save_atomically({
                **checkpoint, "progress": progress, "meter": meter.state(),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}, self.last)

    def save_if_best(self, checkpoint, val_loss, progress):
        """Writes NAME.pt if the loss is the lowest so far; returns whether. Exits if it is NaN."""
        check_finite("validation loss", val_loss, checkpoint["step"])
        if val_loss >= progress["best"]:
            return False
        progress |= {"best": val_loss, "best_step": checkpoint["step"]}
        if self.writes:
            save_atomically({**checkpoint, "val_loss": val_loss}, self.out)
        return True

    def exit_stopped(self, step):
        if dist.is_initialized():
            dist.barrier()      # torchrun kills all ranks once one exits: wait for the file
        die(f"stopped at step {step}; --resume=True continues from there")

    def log(self, line, **entry):
        """Prints the line, and appends the entry to the log as a line of JSON."""
        if not self.writes:
            return
        print(line, flush=True)
        entry["seconds"] = round(time.time() - self.started, 2)
        with naming(self.log_path), open(self.log_path, "a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")
        self.send(entry)


def load_state(saved, net, optimizer, scaler):
    net.load_state_dict(saved["model"])
    scaler.load_state_dict(saved["scaler"])
    for group in saved["optimizer"]["param_groups"]:
        group["fused"] = optimizer.defaults["fused"]    # depends on the device
    optimizer.load_state_dict(saved["optimizer"])


def tracker(name, folder, config, step):
    """A function that sends log entries, from a step on, to tensorboard or wandb."""
    choose("track", name, ["", "tensorboard", "wandb"])
    if name == "":
        return lambda entry: None
    if name == "wandb":
        import wandb
        try:
            board = wandb.init(project="music-sep-pretrain", name=folder, config=config)
        except Exception as e:      # no login, no network: each has an exception of its own
            die(f"track=wandb does not work here ({type(e).__name__}: {e})")
        return lambda entry: board.log(entry, step=entry["step"])
    from torch.utils.tensorboard import SummaryWriter
    board = SummaryWriter(folder, purge_step=step)      # drops entries after the stop

    def send(entry):
        for key, value in entry.items():
            board.add_scalar(key, value, entry["step"])
        board.flush()
    return send


def read_log(path):
    """([{"step": number, ...}], number of damaged lines, as crashes leave them) of a log."""
    entries, damaged = [], 0
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                entry = json.loads(line)
                entry["step"] + 0           # TypeError unless it is a number
                entries.append(entry)
            except (ValueError, TypeError, KeyError):
                damaged += 1
    return entries, damaged


def fingerprint(path):
    """A hash of the file at `path`; "" if there is none, as for weights given by name."""
    if not os.path.isfile(path):
        return ""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def git_commit():
    """The commit of this code, with + if files differ from it; None without git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=os.path.dirname(os.path.abspath(__file__)),
                              capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def finite_weights(net):
    """The state dict on the CPU. Exits if a value is not finite: such weights are never saved."""
    state = {name: value.cpu() for name, value in net.state_dict().items()}
    bad = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if bad:
        die(f"{len(bad)} tensors are not finite ({bad[0]}, ...), nothing was saved: lower "
            "learning_rate, or use --dtype=bfloat16 or float32")
    return state
