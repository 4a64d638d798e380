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

import torch
import torch.distributed as dist

from common.device import any_rank, mean_over_ranks
from common.files import naming, save_atomically, write_atomically
from common.settings import choose, die

# settings that may change on resume. Data may move: a hash of its splits and labels is compared
FREE_KEYS = ("data", "out", "resume", "overwrite", "device", "compile", "workers", "log_every",
             "track")


class Stop:
    """`asked` turns True at the first Ctrl-C or SIGTERM. A second one quits at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.asked = True
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, signal.SIG_DFL)
        # not print(): the signal may have interrupted one
        os.write(2, b"\nstopping after this step; press Ctrl-C again to quit now\n")


class Meter:
    """Mean loss, speed and data wait since the last log line.

    saved: the state() at a stop, to go on from. peak: see device.peak_seconds().
    """

    def __init__(self, saved=None, peak=0.0):
        self.peak = peak
        self.reset(**(saved or {}))

    def reset(self, loss=0.0, count=0, waited=0.0, spent=0.0):
        self.loss, self.count, self.waited, self.began = loss, count, waited, time.time() - spent

    def next_batch(self, batches, device):
        """The next tensors of an iterator, on the device; measures the wait for them."""
        began = time.time()
        tensors = [t.to(device, non_blocking=True) for t in next(batches)]
        self.waited += time.time() - began
        return tensors

    def add(self, loss):
        self.loss = self.loss + loss.detach()       # stays on the device: reading waits for a GPU
        self.count += 1

    def read(self, step, batch_size):
        """{loss, clips_per_s, mfu, data_wait}, and starts again. Exits if the loss is not finite.

        mfu: model FLOPs utilisation, relative to the measured rate of a large matrix product.
        """
        loss = mean_over_ranks(float(self.loss) / self.count, self.loss.device)
        if not math.isfinite(loss):
            die(f"the loss is {loss} at step {step}: lower learning_rate, set grad_clip, or use "
                "--dtype=float32 or bfloat16")
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

    `saved` is the content of NAME.resume if the run is resumed, else None. Exits rather than
    overwrite an existing run. Only rank 0 writes.
    """

    def __init__(self, out, resume, overwrite, rank=0):
        if not out.endswith(".pt"):
            die(f"out={out} must end in .pt")
        name = out.removesuffix(".pt")
        self.files = self.out, self.last, self.log_path = out, name + ".resume", name + ".jsonl"
        self.saved, self.started, self.writes = None, time.time(), rank == 0
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        existing = [path for path in self.files if os.path.lexists(path)]   # broken links too
        if resume:
            self._read_last()
        elif existing and not overwrite:
            die(f"{existing[0]} exists: --resume=True continues that run, --overwrite=True "
                "replaces it, --out=ckpt/NAME.pt writes elsewhere")

    def _read_last(self):
        try:
            self.saved = torch.load(self.last, map_location="cpu", weights_only=True)
            best = self.saved["progress"]["best"]
        except Exception as e:      # missing, torn, another file: torch.load has no error type
            die(f"resume=True, but {self.last} is not the state of a run ({type(e).__name__})")
        if math.isfinite(best) and not os.path.isfile(self.out):
            die(f"{self.out}, the best checkpoint of this run (validation loss {best:.5f}), is "
                "missing: restore it, or start again with --overwrite=True")

    def check_same(self, config):
        """Exits if a resumed run was started with settings or data that change its course."""
        old = self.saved["config"]
        # weights to start from may move, since their hash is compared
        moved = [key for key, digest in config.get("started_from", {}).items() if digest]
        free = {*FREE_KEYS, "steps", *moved}
        words = {"trained_on": f"the splits or labels in {config['data']} have changed",
                 "started_from": "init or tail is another file"}
        changed = [words.get(key, f"{key}: {old.get(key)!r} -> {value!r}")
                   for key, value in config.items() if old.get(key) != value and key not in free]
        if changed:
            die(f"{self.last} was started differently ({'; '.join(changed)}): resume it with the "
                "same settings, or start another run with --out or --overwrite=True")

    def begin(self, config):
        """Removes leftover temporary files and opens the log; signals stop the run from now on."""
        if dist.is_initialized():
            dist.barrier()              # all ranks have seen which files exist
        self.stop, self.log_every = Stop(), config["log_every"]
        if not self.writes:
            return
        first = self.saved["step"] if self.saved else 0
        self.send = tracker(config["track"], self.out, config, first)
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
        """Whether any rank received a signal. On GPUs, where asking the others waits for the GPU,
        they only ask at log lines."""
        if not dist.is_initialized():
            return self.stop.asked
        asking = step % self.log_every == 0 or device == "cpu"
        return asking and any_rank(self.stop.asked, device)

    def save_last(self, checkpoint, progress, meter, optimizer, scaler):
        """Writes NAME.resume: a checkpoint and the state of the training loop."""
        self._save({**checkpoint, "progress": progress, "meter": meter.state(),
                    "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}, self.last)

    def save_if_best(self, checkpoint, val_loss, progress):
        """Writes NAME.pt if the loss is the lowest so far: then returns True, and notes it in
        `progress`. Exits if the loss is not finite."""
        step = checkpoint["step"]
        if not math.isfinite(val_loss):
            die(f"the validation loss is {val_loss} at step {step}: lower learning_rate, or use "
                "--dtype=float32 or bfloat16")
        if val_loss >= progress["best"]:
            return False
        progress |= {"best": val_loss, "best_step": step}
        self._save({**checkpoint, "val_loss": val_loss}, self.out)
        return True

    def exit_stopped(self, step):
        if dist.is_initialized():
            dist.barrier()      # torchrun kills all ranks once one exits: wait for the file
        die(f"stopped at step {step}; --resume=True continues from there")

    def _save(self, state, path):
        if self.writes:
            save_atomically(state, path)

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


def tracker(name, out, config, step):
    """A function that sends log entries, from a step on, to tensorboard or wandb."""
    choose("track", name, ["", "tensorboard", "wandb"])
    folder = out.removesuffix(".pt")
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(folder, purge_step=step)      # drops entries after the stop
        if name == "wandb":
            import wandb
            board = wandb.init(project="music-sep-pretrain", name=folder, config=config)
    except Exception as e:      # not installed, no login, no network: each with its own exception
        die(f"track={name} does not work here (pip install {name}? {type(e).__name__}: {e})")

    def send(entry):
        if name == "wandb":
            board.log(entry, step=entry["step"])
        if name == "tensorboard":
            for key, value in entry.items():
                board.add_scalar(key, value, entry["step"])
            board.flush()
    return send


def read_log(path):
    """(entries, number of damaged lines) of a .jsonl log; a crash may leave torn lines.

    An entry is a dictionary with a number `step`. FileNotFoundError if there is no log.
    """
    entries, damaged = [], 0
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                entry = json.loads(line)
                entry["step"] + 0           # a number
                entries.append(entry)
            except (ValueError, TypeError, KeyError):
                damaged += 1
    return entries, damaged


def fingerprint(path):
    """A hash of the file at `path`; empty if there is none, as for weights known by name."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()[:16]


def git_commit():
    """The commit of this code, with + if files differ from it; None without git."""
    folder = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", folder, "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def finite_weights(net):
    """The state dict on the CPU. Exits if a value is not finite, so that none is ever saved."""
    state = {name: value.cpu() for name, value in net.state_dict().items()}
    bad = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if bad:
        die(f"{len(bad)} tensors are not finite ({bad[0]}, ...), nothing was saved: lower "
            "learning_rate, or use --dtype=bfloat16 or float32")
    return state
