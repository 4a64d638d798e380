"""
Training on a CUDA GPU; skipped without one.

    python -m pytest -q tests/test_gpu.py
"""
import copy
import itertools

import numpy as np
import pytest
import torch
from conftest import CLS, SEP, TAIL, log_of, run

import data
import model
from common import device as devices
from common.run import Meter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WIDTHS = [8, 16, 16, 16, 16, 16]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Full float32 and deterministic algorithms."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def separator(dtype=None):
    torch.manual_seed(1)
    net = model.Separator(["vocals", "bass"], WIDTHS)
    net.amp_dtype = dtype
    return net


def classifier(dtype=None):
    torch.manual_seed(1)
    net = model.Classifier(5, True, "v1", widths=WIDTHS, tail_widths=TAIL)
    net.amp_dtype = dtype
    return net


def batch(number, kind, device):
    generator = torch.Generator().manual_seed(number)
    wave = torch.randn(4, model.CROP, generator=generator) * 0.1
    target = torch.stack([wave, wave], 1) / 2 if kind == "separator" else torch.ones(4, 5)
    return wave.to(device), target.to(device)


def loss_of(net, wave, target):
    if isinstance(net, model.Separator):
        return model.l1_loss(net(wave), target)
    return model.crop_losses(net(wave), target, True).mean()


def distance(values, expected):
    """Relative error in the L2 norm."""
    difference = values.cpu().double() - expected.cpu().double()
    return float(difference.norm() / expected.double().norm())


# -----------------------------------------------------------------------------
# the same numbers as on a CPU

# Gradients of an untrained network depend strongly on rounding: in float32 two implementations on a
# CPU differ by up to 2 %, and those in bfloat16 have little in common.
@pytest.mark.parametrize("make, kind", [(separator, "separator"), (classifier, "classifier")])
@pytest.mark.parametrize("dtype, loss_within, gradient_within", [
    (None, 1e-4, 2e-2), (torch.bfloat16, 5e-2, None)])
def test_losses_and_gradients_equal_those_on_a_cpu(make, kind, dtype, loss_within, gradient_within):
    on_cpu, on_gpu = make(), make(dtype).cuda()
    devices.accelerate(on_gpu, "cuda")
    losses, gradients = [], []
    for net, device in ((on_gpu, "cuda"), (on_cpu, "cpu")):
        for module in net.modules():
            module.p = 0.0                          # the random numbers of dropout differ
        loss = loss_of(net, *batch(0, kind, device))
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([w.grad.flatten() for w in net.parameters()]))
    print(kind, dtype, "loss", distance(*losses), "gradient", distance(*gradients))
    assert distance(*losses) < loss_within
    assert gradient_within is None or distance(*gradients) < gradient_within


def test_operations_are_counted_as_on_a_cpu():
    net = separator()
    on_cpu = devices.count_flops(net, model.CROP, "cpu")
    assert devices.count_flops(net.cuda(), model.CROP, "cuda") == on_cpu


# -----------------------------------------------------------------------------
# CUDA graphs

def trained(make, kind, graphed, steps=7):
    """(network, losses) after some steps, each with another batch."""
    net = make().cuda().train()
    devices.accelerate(net, "cuda")
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, eps=1e-7, fused=True)

    def forward_backward(wave, target):
        loss = loss_of(net, wave, target)
        loss.backward()
        return loss.detach()

    if graphed:
        forward_backward = devices.CudaGraph(forward_backward, net.parameters())
    losses = []
    for step in range(steps):
        torch.manual_seed(step)                     # of dropout
        losses.append(forward_backward(*batch(step, kind, "cuda")).clone())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return net, torch.stack(losses)


@pytest.mark.parametrize("make, kind", [(separator, "separator"), (classifier, "classifier")])
def test_cuda_graph_trains_like_eager_mode(make, kind):
    (net, losses), (plain, expected) = (trained(make, kind, graphed) for graphed in (True, False))
    print(kind, "losses", distance(losses, expected))
    assert distance(losses, expected) < 1e-4
    for name, value in net.state_dict().items():
        if value.dtype == torch.int64:
            assert value == plain.state_dict()[name] == 7       # num_batches_tracked
        elif "running" in name or name.endswith("out.weight"):
            assert distance(value, plain.state_dict()[name]) < 1e-2, name


def test_a_step_does_not_wait_for_the_gpu(demo):
    songs = data.Prepared(f"{demo}/demo_songs", "stems")
    songs.keep_on("cuda")
    mixes = data.Mixes(songs, "train", ["vocals", "bass"], 1)
    net = separator(torch.bfloat16).cuda().train()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, eps=1e-7, fused=True)
    source = data.prefetch(lambda k: mixes.batch(4 * k, 4), itertools.count(), 2, pin=True)
    meter = Meter()

    def forward_backward(mixture, target):
        loss = model.l1_loss(net(mixture), target)
        loss.backward()
        return loss.detach()

    forward_backward = devices.CudaGraph(forward_backward, net.parameters())
    for step in range(12):
        # compiling and capturing may wait
        torch.cuda.set_sync_debug_mode("error" if step > 5 else "default")
        try:
            meter.add(forward_backward(*meter.next_batch(source, "cuda")))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert meter.read(12, 4)["loss"] > 0


# -----------------------------------------------------------------------------
# the scripts

GPU = ["--device=cuda"]


def nothing(*_):
    """In place of device.keep_on_gpu()."""


def without_graph(step, parameters):
    """In place of device.CudaGraph."""
    return step


def test_gpu_and_cpu_resume_each_others_runs(demo, tmp_path):
    own = [f"--data={demo}/demo_songs", *SEP, "--val_every=4", f"--out={tmp_path}/a.pt"]
    run("pretrain_sep.py", *own, "--steps=4")
    run("pretrain_sep.py", *own, *GPU, "--steps=12", "--resume=True")
    run("pretrain_sep.py", *own, "--steps=16", "--resume=True")
    run("pretrain_sep.py", *own, *GPU, "--steps=20", "--resume=True")
    validated = [e["step"] for e in log_of(tmp_path / "a.pt") if "val_loss" in e]
    assert validated == [0, 4, 8, 12, 16, 20]


def test_gpu_options_change_losses_little(demo, tmp_path):
    own = [f"--data={demo}/demo_songs", *SEP, *GPU, "--steps=8", "--batch_size=4"]
    ways = [([], {}), (["--dtype=float16", "--grad_clip=1"], {}), (["--compile=True"], {}),
            (["--accumulate=2"], {}), ([], {"common.device.CudaGraph": without_graph}),
            ([], {"common.device.keep_on_gpu": nothing})]
    losses = []
    for number, (more, constants) in enumerate(ways):
        run("pretrain_sep.py", *own, *more, f"--out={tmp_path}/{number}.pt", constants=constants)
        losses.append([e["loss"] for e in log_of(tmp_path / f"{number}.pt") if "loss" in e])
        print(more, losses[-1])
    for values in losses[1:]:
        assert values == pytest.approx(losses[0], rel=0.02)


def test_fine_tuning_switches_from_adam_to_sgd_on_a_gpu(demo, tmp_path):
    recipe = {"finetune_cls.HALVINGS": 0, "finetune_cls.SGD_RATES": {"ast": [1.0]}}
    ways = {"a": (8, {}), "b": (8, {"common.device.CudaGraph": without_graph}), "adam": (5, {})}
    weights = []
    for name, (epochs, constants) in ways.items():
        run("finetune_cls.py", f"--data={demo}/demo_clips", *CLS, *GPU, "--recipe=ast",
            f"--epochs={epochs}", f"--out={tmp_path}/{name}.pt", constants=recipe | constants)
        saved = torch.load(tmp_path / f"{name}.resume", weights_only=True)
        weights.append(saved["model"]["tail.out.weight"])
    assert distance(weights[2], weights[1]) > 0.1   # the change by SGD
    assert distance(weights[0], weights[1]) < 0.02


@pytest.mark.parametrize("more", [
    ["--variant=v3"], ["--variant=tail", "--recipe=modern", "--dtype=float16"], ["--freeze=unet"],
    ["--variant=ast", "--transformer=16,4,2", "--skips=1", "--tail_widths="]])
def test_classifiers_are_fine_tuned_and_evaluated(demo, tmp_path, more):
    run("finetune_cls.py", f"--data={demo}/demo_clips", *CLS, *GPU, *more,
        f"--out={tmp_path}/a.pt")
    scores = []
    for device in ("cuda", "cpu"):
        run("eval.py", f"{tmp_path}/a.pt", f"--device={device}", f"--out={tmp_path}/{device}",
            "--pictures=False", "--bootstrap=0")
        scores.append(torch.from_numpy(np.load(tmp_path / device / "a.npz")["scores"]))
    assert distance(*scores) < 1e-3


def test_network_trained_in_a_graph_separates_songs_of_any_length():
    net, _ = trained(separator, "separator", True)
    net.eval()
    wave = torch.randn(3 * model.CROP) * 0.1
    on_cpu = copy.deepcopy(net).cpu()
    assert distance(model.separate(net, wave), model.separate(on_cpu, wave)) < 1e-4
