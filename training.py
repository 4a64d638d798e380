"""
What both training loops need: several processes, speed and losses, and the files of a run.

    run = training.Run("ckpt/vocals.pt", resume, overwrite)     # run.saved: what to go on from
    meter = training.Meter(floor=training.floor_per_crop(net, crop, device))
"""
import glob
import hashlib
import json
import math
import os
import subprocess
import time

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import kernels
import runtime
from model import read_checkpoint
from runtime import die

# -----------------------------------------------------------------------------
# several processes

def sum_over_ranks(values, device):
    """The element-wise sum of a list of numbers over all processes."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def mean_over_ranks(value, device):
    processes, total = sum_over_ranks([1.0, value], device)
    return total / processes


def anyone(asked, device):
    """Whether any of the processes says yes."""
    return sum_over_ranks([float(asked)], device)[0] > 0


def agree(net, device):
    """Gives all processes the statistics of the first. Ends the script if weights differ."""
    if not dist.is_initialized():
        return
    for buffer in net.buffers():        # each process may have gathered statistics of its own
        dist.broadcast(buffer, 0)
    own = sum(p.double().sum().item() for p in net.parameters())
    mean = mean_over_ranks(own, device)
    if abs(mean - own) > 1e-6 * max(1.0, abs(own)):
        die("the processes hold different weights: their gradients were not exchanged")


def stop_at(step):
    """Ends the script after all has been saved."""
    if dist.is_initialized():
        dist.barrier()      # the end of one process ends the others: wait for the file
    die(f"stopped at step {step}; --resume=True goes on from there")


# -----------------------------------------------------------------------------
# speed

def keep_on_gpu(prepared, device, wanted):
    """Copies prepared audio to a GPU, where crops are cut faster, if there is room for it."""
    if not wanted or not device.startswith("cuda"):
        return
    size, free = prepared.audio.nbytes, torch.cuda.mem_get_info(device)[0]
    if 2 * size > free:
        print(f"note: {prepared.path} stays on the CPU: its audio takes {size / 2 ** 30:.1f} GiB, "
              f"and the GPU has {free / 2 ** 30:.1f} free, half of it for training")
        return
    prepared.keep_on(device)


@torch.no_grad()
def flops_per_crop(net, crop, device):
    """Arithmetic operations to train on a crop of so many samples.

    A forward pass, and twice as much for the gradients of inputs and weights.
    """
    net.eval()
    with kernels.plain(), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, crop, device=device))
    net.train()
    return 3 * counter.get_total_flops()


@torch.no_grad()
def matmul_rate(device, amp_dtype):
    """Operations a second of a large matrix product, as measured here: the floor of any training.

    The best of five, as others may be at work on the same cores.
    """
    n = 8192 if device.startswith("cuda") else 2048
    x, took = torch.randn(n, n, device=device, dtype=amp_dtype or torch.float32), []
    for _ in range(6):
        began = time.perf_counter()
        (x @ x)[0, 0].item()                # reading a number waits for the GPU
        took.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(took[1:])


def floor_per_crop(net, crop, device):
    """Seconds to train on a crop if all its arithmetic were one large matrix product.

    Says so if threads have to wait for other processes, which the measurement shows.
    """
    rate, threads = matmul_rate(device, net.amp_dtype), torch.get_num_threads()
    if device == "cpu" and threads > 1:
        torch.set_num_threads(1)
        alone = matmul_rate(device, net.amp_dtype)
        torch.set_num_threads(threads)
        if rate < 1.3 * alone:
            print(f"note: {threads} threads are {rate / alone:.1f} times as fast as one, as others "
                  "are at work here: OMP_NUM_THREADS=1 is often faster then")
    return flops_per_crop(net, crop, device) / rate


class Graphed:
    """work(*tensors) -> loss, which leaves gradients in `weights`, recorded as one CUDA graph.

    Its hundreds of kernels then start at once. One by one, in small batches, starting them takes
    longer than what they do. Compilers and libraries choose kernels in the first three calls, so
    these are as ever; the fourth one records. Later ones replay that with new values, so shapes
    must stay. Before each call the gradients must be None. A result lasts until the next call.
    """

    def __init__(self, work, weights):
        self.work, self.weights = work, [w for w in weights if w.requires_grad]
        self.calls, self.graph = 0, None

    def __call__(self, *tensors):
        self.calls += 1
        if self.calls <= 3:
            return self.work(*tensors)
        if self.graph is None:
            self.record(tensors)
        for own, new in zip(self.inputs, tensors, strict=True):
            own.copy_(new)
        self.graph.replay()
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient
        return self.result

    def record(self, tensors):
        self.inputs = [t.clone() for t in tensors]
        self.graph = torch.cuda.CUDAGraph()
        # threads that cut the next crops may go on meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = self.work(*self.inputs)
        self.gradients = [w.grad for w in self.weights]


class Meter:
    """Mean loss, speed and waiting since the last log line; `saved` is the state() at a stop.

    floor: seconds per crop to compare the speed with.
    """

    def __init__(self, saved=None, floor=0.0):
        self.floor = floor
        self.reset()
        if saved:
            self.loss, self.count, self.waited = saved["loss"], saved["count"], saved["waited"]
            self.began -= saved["spent"]

    def reset(self):
        self.loss, self.count, self.waited, self.began = 0.0, 0, 0.0, time.time()

    def next_batch(self, batches, device):
        """The next tensors of an iterator, on the device; the time that this takes is noted."""
        asked = time.time()
        tensors = [t.to(device, non_blocking=True) for t in next(batches)]
        self.waited += time.time() - asked
        return tensors

    def add(self, loss):
        """The sum stays on the device: reading it waits for the GPU."""
        self.loss = self.loss + loss.detach()
        self.count += 1

    def read(self, step, batch_size):
        """{loss, clips_per_s, matmul_share, data_wait}, then begins again. Ends the script at NaN.

        matmul_share: of the speed that one large matrix product has here (nanoGPT's mfu).
        """
        loss = mean_over_ranks(float(self.loss) / self.count, self.loss.device)
        spent = time.time() - self.began
        if not math.isfinite(loss):
            die(f"the loss is {loss} at step {step}: lower learning_rate, set grad_clip, or use "
                "--dtype=float32 or bfloat16")
        clips_per_s = self.count * batch_size / spent
        found = {"loss": loss, "clips_per_s": round(clips_per_s, 2),
                 "matmul_share": round(clips_per_s * self.floor, 4),
                 "data_wait": round(self.waited / spent, 4)}
        self.reset()
        return found

    def state(self):
        return {"loss": torch.as_tensor(self.loss).cpu(), "count": self.count,
                "waited": self.waited, "spent": time.time() - self.began}


# -----------------------------------------------------------------------------
# files

class Run:
    """The files of a training run: the best checkpoint, what resuming needs, and the log.

    NAME.pt is `out`; NAME.resume and NAME.jsonl lie next to it. `saved` is what NAME.resume holds
    if the run is resumed, else None. Ends the script rather than write over a run that is there.
    Of several processes only the first writes.
    """

    def __init__(self, out, resume, overwrite, rank=0):
        if not out.endswith(".pt"):
            die(f"out={out} must end in .pt")
        name = out.removesuffix(".pt")
        self.files = self.out, self.last, self.log_path = out, name + ".resume", name + ".jsonl"
        self.saved, self.started, self.writes = None, time.time(), rank == 0
        for path in self.files:
            if os.path.islink(path) and not os.path.exists(path):
                die(f"{path} is a link to {os.readlink(path)}, which does not exist: remove the "
                    "link, or put the file back")
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        found = [path for path in self.files if os.path.exists(path)]
        if resume:
            self._read_last()
        elif found and not overwrite:
            die(f"{found[0]} exists: --resume=True goes on with that run, --overwrite=True "
                "replaces it, --out=ckpt/NAME.pt writes elsewhere")

    def _read_last(self):
        if not os.path.isfile(self.last):
            die(f"resume=True, but there is no {self.last} to go on from")
        self.saved = read_checkpoint(self.last)
        if not {"config", "step", "best", "optimizer", "scaler"} <= self.saved.keys():
            die(f"{self.last} holds a network, but not what resuming needs")
        if math.isfinite(self.saved["best"]) and not os.path.isfile(self.out):
            die(f"{self.out} is missing, the best checkpoint of this run so far (validation loss "
                f"{self.saved['best']:.5f}): put it back, or start again with --overwrite=True")

    def check_same(self, config, script):
        """Ends the script if a resumed run was started with settings that change its course."""
        # what older versions of the script had no key for, they did as is the default
        old = {"processes": 1} | runtime.defaults(script) | self.saved["config"]
        free = ["resume", "overwrite", "out", "steps", "device", "compile", "log_every", "workers",
                "data_on_gpu", "cuda_graph", "report", "track"]
        # what training sees of the data counts, wherever it lies; older runs did not note it
        free.append("data" if "trained_on" in old else "trained_on")
        # what the run started from counts, wherever it lies; older runs did not note that either
        from_files = config.get("started_from", {})
        free += [key for key, what in from_files.items() if what and "started_from" in old]
        if "started_from" not in old:
            free.append("started_from")
        changed = [key for key in config if old.get(key) != config[key] and key not in free]
        if changed == ["trained_on"]:
            die(f"the splits or labels in {config['data']} are not those that this run was started "
                "with: give it another --out, or --overwrite=True")
        if changed == ["started_from"]:
            die("init or tail is another file than when this run was started: give it another "
                "--out, or --overwrite=True")
        if changed:
            told = "; ".join(f"{key}: {old.get(key)!r} -> {config[key]!r}" for key in changed)
            die(f"this run was started with other settings ({told}): resume it with the same")

    def begin(self, config):
        """Removes leftovers and opens the log, once all processes have looked."""
        if dist.is_initialized():
            dist.barrier()
        if not self.writes:
            return
        first = self.saved["step"] if self.saved else 0
        self.send, self.report = tracker(config["track"], self.out, config, first), config["report"]
        for path in self.files:
            for leftover in glob.glob(glob.escape(path) + ".*.tmp"):
                os.remove(leftover)  # of a run that was killed while it saved
        kept = log_until(self.log_path, self.saved["step"]) if self.saved else ""
        runtime.write_atomically(kept, self.log_path)

    def save(self, state, path):
        if self.writes:
            runtime.save_atomically(state, path)

    def log(self, line, **entry):
        """One entry to the screen, and to the file as a line of JSON."""
        if not self.writes:
            return
        print(line, flush=True)
        entry["seconds"] = round(time.time() - self.started, 2)
        with runtime.naming(self.log_path), open(self.log_path, "a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")
        self.send(entry)
        if self.report and "val_loss" in entry:
            self.write_page()

    def write_page(self):
        import page  # here: nobody else needs matplotlib while training
        try:
            page.run_page(self.log_path)
        except Exception as e:          # drawing has many ways to fail; none is worth a run
            print(f"note: no page for {self.log_path}: {type(e).__name__}: {e}")


def resume_optimizer(optimizer, saved):
    """Gives an optimiser its saved state; fused or not is a matter of the device it runs on."""
    for group in saved["param_groups"]:
        group["fused"] = optimizer.defaults["fused"]
    optimizer.load_state_dict(saved)


def tracker(name, out, config, step):
    """A function that sends entries of the log, from a step on, to tensorboard or wandb."""
    runtime.choose("track", name, ["", "tensorboard", "wandb"])
    folder = out.removesuffix(".pt")
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(folder, purge_step=step)      # what comes later is of no use
        if name == "wandb":
            import wandb
            board = wandb.init(project="music-sep-pretrain", name=folder, config=config)
    except ImportError as e:
        die(f"track={name} needs a package that is not installed: pip install {name} ({e})")
    except Exception as e:              # no login, no network: these have errors of their own
        die(f"track={name} does not work here ({type(e).__name__}: {e})")

    def send(entry):
        if name == "wandb":
            board.log(entry, step=entry["step"])
        if name == "tensorboard":
            for key, value in entry.items():
                board.add_scalar(key, value, entry["step"])
            board.flush()
    return send


def log_until(path, step):
    """The text of a log up to a step. Damaged lines, as crashes leave them, are told, not kept."""
    if not os.path.exists(path):
        print(f"note: {path} is missing: the log begins here")
        return ""
    kept, damaged = "", 0
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                entry = json.loads(line)
                place = entry["step"], "val_loss" in entry
            except (ValueError, TypeError, KeyError):
                damaged += 1
                continue
            # saving comes before validating, so the validation of this step comes again
            if place < (step, True):
                kept += line.rstrip("\n") + "\n"
    if damaged:
        print(f"note: {path}: {damaged} damaged lines are left out")
    return kept


def fingerprint(path):
    """A hash of a file; empty if there is no such file, as for weights that have a name only."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()[:16]


def git_commit():
    """The commit of this code, with + if files differ from it; None if there is no git here."""
    folder = os.path.dirname(os.path.abspath(__file__))
    asked = ["git", "-C", folder, "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
