"""Shared by the tests: scripts run as a user runs them, small data and small networks."""
import http.server
import importlib
import json
import multiprocessing
import os
import runpy
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile as sf
import torch

import prepare_data
from common import download, settings
from weights import tensorflow

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
REAL = SHARED / "realdata"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real files")

RATE = 16000
NARROW = [4, 4, 4, 4, 4, 4]
TAIL = [4, 4, 4, 4, 4, 4, 8]

# the smallest settings with which the training scripts still do everything
COMMON = ["--log_every=1", "--compile=False", "--device=cpu"]
SEP = [f"--widths={NARROW}", "--batch_size=2", "--val_mixes=2", "--val_every=2", *COMMON]
CLS = [f"--widths={NARROW}", f"--tail_widths={TAIL}", "--batch_size=4", "--epochs=2", *COMMON]

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


# -----------------------------------------------------------------------------
# running scripts

def run(script, *args, ok=True, env=None, constants=None):
    """Runs "eval.py", ["-m", "tools.bench"] or another command of Python; returns its output.

    With ok=False it must fail with one line that begins with "error: ": then returns stderr.
    constants: {"finetune_cls.PATIENCE": 0}, values to set in modules before a script runs.
    """
    args = [str(arg) for arg in args]
    script = script if isinstance(script, list) else [script]
    is_ours = len(script) == 1 or script[0] == "-m" and len(script) == 2
    if is_ours and not env and sys.platform == "linux":
        status, output, errors = run_forked(script[-1], args, constants or {})
    else:
        assert not constants
        done = subprocess.run(
            [sys.executable, *script, *args], cwd=ROOT, capture_output=True, text=True,
            timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
        status, output, errors = done.returncode, done.stdout, done.stderr
    if ok:
        assert status == 0, output[-2000:] + errors[-4000:]
        return output
    assert status == 1 and "Traceback" not in errors, errors[-4000:]
    assert errors.strip().splitlines()[-1].startswith("error: "), errors
    return errors


def run_forked(script, args, constants):
    """(exit status, stdout, stderr) of a script or module, forked from a server with torch loaded.

    Importing torch, and what its optimizers import, takes six seconds; tests run some 100 scripts.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "torch._dynamo", "matplotlib.figure"])
    with tempfile.TemporaryDirectory() as folder:
        process = server.Process(target=run_here, args=(folder, script, args, constants))
        process.start()
        process.join(280)
        process.kill()
        output, errors = (Path(folder, name).read_text() for name in ("out", "err"))
    return process.exitcode, output, errors


def run_here(folder, script, args, constants):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), number)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = [script, *args]
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        assert hasattr(importlib.import_module(module), constant)
        setattr(sys.modules[module], constant, value)
    if constants:
        settings.script(importlib.import_module(script.removesuffix(".py")).main)
    elif script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def prepare(out, *args):
    """Runs prepare_data.py in this process; returns its exit status or error message."""
    try:
        return prepare_data.main([*map(str, args), f"--out={out}"])
    except (ValueError, OSError) as e:
        return f"error: {e}"
    except SystemExit as e:
        return e.code


# -----------------------------------------------------------------------------
# small data

def tone(hertz, rate, seconds, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


def sound(path, seconds=5.0, rate=RATE, seed=0, **options):
    """Writes a file of noise, in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.1 * np.random.default_rng(seed).standard_normal(int(rate * seconds))
    sf.write(path, wave, rate, format=path.suffix[1:].upper(), **options)


def encode(path, wave, rate, codec, streams=1, bit_rate=128_000):
    """Writes (N,) or (N, channels) with one of FFmpeg's encoders."""
    wave = np.atleast_2d(wave.T).astype(np.float32)                             # (C, N)
    layout = "mono" if len(wave) == 1 else "stereo"
    with av.open(str(path), "w") as out:
        tracks = [out.add_stream(codec, rate=rate, layout=layout) for _ in range(streams)]
        for k, stream in enumerate(tracks):
            stream.bit_rate = bit_rate
            resampler = av.AudioResampler(stream.format, layout, rate)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave / (k + 1)), "fltp", layout)
            frame.sample_rate = rate
            fifo = av.AudioFifo()
            for part in resampler.resample(frame):
                fifo.write(part)
            while piece := fifo.read(stream.frame_size or 4096, True):
                out.mux(stream.encode(piece))
            out.mux(stream.encode(None))


def wav_header(rate, channels, frames, samples):
    """A 16-bit wav file whose header may contradict its content."""
    size = frames * channels * 2
    form = struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * channels * 2 % 2 ** 32,
                       channels * 2, 16)
    riff = b"RIFF" + struct.pack("<I", (36 + size) % 2 ** 32) + b"WAVEfmt " + form
    return riff + b"data" + struct.pack("<I", size % 2 ** 32) + samples.astype("<i2").tobytes()


def index_of(folder):
    return json.loads((folder / "index.json").read_text())


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder with demo_songs and demo_clips, very small."""
    out = tmp_path_factory.mktemp("data")
    run("prepare_data.py", "demo", f"--out={out}", "--songs=3,2,2", "--song_seconds=15",
        "--clips=10,4,12", "--clip_seconds=6")
    return out


@pytest.fixture(scope="session")
def separator(demo, tmp_path_factory):
    """A separator trained for four steps."""
    out = tmp_path_factory.mktemp("ckpt") / "sep.pt"
    run("pretrain_sep.py", "config/vocals.py", *SEP, f"--data={demo}/demo_songs", f"--out={out}",
        "--steps=4")
    return out


@pytest.fixture(scope="session")
def tail_only(demo, tmp_path_factory):
    """A tagger without U-Net, trained for two epochs."""
    out = tmp_path_factory.mktemp("ckpt") / "tail.pt"
    run("finetune_cls.py", "config/mtat.py", "--variant=tail", *CLS, f"--data={demo}/demo_clips",
        f"--out={out}")
    return out


# -----------------------------------------------------------------------------
# a file server

class Server(http.server.BaseHTTPRequestHandler):
    """files: {name: bytes}; mood: {name: faults of the next answers}; requests: all so far."""
    files, mood, requests = {}, {}, []

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        name = self.path.strip("/")
        moods, start = self.mood.get(name, []), 0
        now = moods.pop(0) if moods and body else ""
        wanted = self.headers.get("Range")
        self.requests.append((self.command, name, wanted))
        if now == "busy":
            return self.send_error(503)
        if name not in self.files:
            return self.send_error(404)
        content = self.files[name] if now != "wrong" else bytes(len(self.files[name]))
        if wanted and now != "no ranges":
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            if start >= len(content):
                return self.send_error(416)
            first = start + 100_000 if now == "other range" else start
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if now != "no length":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if body:
            end = start + 300_000 if now in ("drop", "no length") else len(content)
            self.wfile.write(content[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSES", (0.01, 0.01))
    Server.files, Server.mood, Server.requests = {}, {}, []
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}/"
    running.shutdown()


# -----------------------------------------------------------------------------
# weights and logs

def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomise(net, seed=0):
    """Random weights and BatchNorm statistics, so that swapping any two of them is noticed."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        if not value.is_floating_point():
            continue
        scale = value.dim() == 1 and name.endswith("weight")
        if scale or "running_var" in name:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        else:
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return net.eval()


def weights_of(path):
    return torch.load(path, weights_only=True)["model"]


def same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_of(path):
    """The log entries of the run with this checkpoint."""
    log = Path(str(path).removesuffix(".pt") + ".jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()]


def log_values(path):
    """The log entries without times: equal for equal runs."""
    keys = ("step", "loss", "val_loss", "best", "lr", "epoch", "phase")
    return [{key: entry.get(key) for key in keys} for entry in log_of(path)]


def stopped_by(number, script, lines, out, *args):
    """(output, exit status) of a script that gets a signal once its log has so many lines."""
    process = subprocess.Popen(
        [sys.executable, script, *map(str, args), f"--out={out}"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = Path(str(out).replace(".pt", ".jsonl"))
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= lines):
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=100)
    return output, process.returncode


# -----------------------------------------------------------------------------
# TensorFlow checkpoints in their own format

def crc_of_byte(c):
    """CRC-32C of one byte, bit by bit, from its definition."""
    for _ in range(8):
        c = c >> 1 ^ (0x82F63B78 if c & 1 else 0)
    return c


CRC_TABLE = [crc_of_byte(byte) for byte in range(256)]


def crc32c(raw):
    """Independent of the package that the reader uses."""
    c = 0xFFFFFFFF
    for byte in raw:
        c = c >> 8 ^ CRC_TABLE[(c ^ byte) & 255]
    return c ^ 0xFFFFFFFF


def mask(c):
    return ((c >> 15 | c << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def keras_tensors(net):
    """{(layer number, name): array} of a network, with Keras' names and layouts."""
    tensors = {}
    for n, m in enumerate(tensorflow.weighted_layers(net)):
        w = m.weight.detach().numpy()
        if w.ndim == 1:
            tensors |= {(n, "gamma"): w, (n, "beta"): m.bias, (n, "moving_mean"): m.running_mean,
                        (n, "moving_variance"): m.running_var}
            continue
        if w.ndim == 4:
            w = w.transpose(2, 3, 1, 0)
        elif m is net.tail.dense:  # Keras flattens (time, mel, channel)
            w = w.reshape(len(w), -1, 2, 1).transpose(2, 3, 1, 0).reshape(-1, len(w))
        else:
            w = w.T
        tensors |= {(n, "kernel"): w, (n, "bias"): m.bias}
    return {key: np.ascontiguousarray(torch.as_tensor(value).detach().numpy(), "<f4")
            for key, value in tensors.items()}


def table_block(pairs, at):
    """(bytes, handle) of a block at byte `at` of a LevelDB table."""
    body, last = b"", b""
    for i, (key, value) in enumerate(pairs):
        shared = len(os.path.commonprefix([key, last])) if i % 16 else 0
        body += varint(shared) + varint(len(key) - shared) + varint(len(value))
        body += key[shared:] + value
        last = key
    body += bytes(4) + (1).to_bytes(4, "little") + b"\0"
    return body + mask(crc32c(body)).to_bytes(4, "little"), varint(at) + varint(len(body) - 1)


def as_dtype(value, dtype):
    """(TensorFlow DataType, bytes) of a float32 array."""
    if dtype == "half":
        return 19, value.astype("<f2").tobytes()
    if dtype == "bfloat16":
        return 14, torch.from_numpy(value).bfloat16().view(torch.int16).numpy().tobytes()
    return 1, value.tobytes()


def write_tensorflow(net, prefix, shards=1, dtype="float32"):
    """Writes a TensorFlow checkpoint of a network, with optimizer slots, which readers skip."""
    entries, data = {"": b"\x08" + varint(shards) + b"\x1a\x02\x08\x01"}, [b""] * shards
    for number, ((n, name), value) in enumerate(keras_tensors(net).items()):
        shard = number % shards
        kind, raw = as_dtype(value, dtype)
        dims = [b"\x08" + varint(size) for size in value.shape]
        shape = b"".join(b"\x12" + varint(len(dim)) + dim for dim in dims)
        entry = b"\x08" + varint(kind) + b"\x12" + varint(len(shape)) + shape
        entry += b"\x18" + varint(shard) + b"\x20" + varint(len(data[shard]))
        entry += b"\x28" + varint(len(raw))
        crc = b"\x35" + mask(crc32c(raw)).to_bytes(4, "little")
        variable = f"layer_with_weights-{n}/{name}"
        entries[f"{variable}/.ATTRIBUTES/VARIABLE_VALUE"] = entry + crc
        entries[f"{variable}/.OPTIMIZER_SLOT/optimizer/m/.ATTRIBUTES/VARIABLE_VALUE"] = entry
        data[shard] += raw

    pairs, table, handles = sorted((k.encode(), v) for k, v in entries.items()), b"", []
    for i in range(0, len(pairs), 50):  # several data blocks
        block, handle = table_block(pairs[i:i + 50], len(table))
        handles.append((pairs[i:i + 50][-1][0], handle))
        table += block
    meta, meta_handle = table_block([], len(table))
    table += meta
    index, index_handle = table_block(handles, len(table))
    table += index + (meta_handle + index_handle).ljust(40, b"\0")
    table += bytes.fromhex("57fb808b247547db")
    Path(f"{prefix}.index").write_bytes(table)
    for shard, raw in enumerate(data):
        Path(f"{prefix}.data-{shard:05d}-of-{shards:05d}").write_bytes(raw)
