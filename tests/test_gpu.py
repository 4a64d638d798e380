"""
What only a GPU can show; without one, all of this is skipped.

    python -m pytest -q tests/test_gpu.py
"""
import copy
import itertools

import numpy as np
import pytest
import torch
from conftest import CLS, SEP, TAIL, log_of, run

import data
import finetune_cls
import model
import pretrain_sep
import training
from data import prefetch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
WIDTHS = [8, 16, 16, 16, 16, 16]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Whole float32 and the same algorithm each time, or nothing could be compared."""
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
        return pretrain_sep.l1_loss(net(wave), target)
    return finetune_cls.crop_losses(net(wave), target, True).mean()


def distance(found, wanted):
    """The size of the difference, as a share of the size of what is wanted."""
    return float((found.cpu().double() - wanted.cpu().double()).norm() / wanted.double().norm())


# -----------------------------------------------------------------------------
# the same numbers as on a CPU

# Gradients of a network that has learnt nothing depend much on rounding: in float32, PyTorch's
# functions and our kernels differ by up to 2 % on a CPU, and bfloat16 has not much in common.
@pytest.mark.parametrize("make, kind", [(separator, "separator"), (classifier, "classifier")])
@pytest.mark.parametrize("dtype, loss_within, gradient_within", [
    (None, 1e-4, 2e-2), (torch.bfloat16, 5e-2, None)])
def test_losses_and_gradients_are_those_of_a_cpu(make, kind, dtype, loss_within, gradient_within):
    on_cpu, on_gpu = make(), make(dtype).cuda()
    losses, gradients = [], []
    for net, device in ((on_gpu, "cuda"), (on_cpu, "cpu")):
        for module in net.modules():
            module.p = 0.0                          # dropout would draw other numbers
        loss = loss_of(net, *batch(0, kind, device))
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([w.grad.flatten() for w in net.parameters()]))
    print(kind, dtype, "loss", distance(*losses), "gradient", distance(*gradients))
    assert distance(*losses) < loss_within
    assert gradient_within is None or distance(*gradients) < gradient_within


def test_arithmetic_is_counted_as_on_a_cpu():
    net = separator()
    wanted = training.flops_per_crop(net, model.CROP, "cpu")
    assert training.flops_per_crop(net.cuda(), model.CROP, "cuda") == wanted


# -----------------------------------------------------------------------------
# a step as a CUDA graph

def trained(make, kind, graphed, steps=7):
    """(network, losses) after some steps, each with another batch."""
    net = make().cuda().train()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, eps=1e-7, fused=True)

    def learn(wave, target):
        loss = loss_of(net, wave, target)
        loss.backward()
        return loss.detach()

    learn = training.Graphed(learn, net.parameters()) if graphed else learn
    losses = []
    for step in range(steps):
        torch.manual_seed(step)                     # of dropout
        losses.append(learn(*batch(step, kind, "cuda")).clone())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return net, torch.stack(losses)


@pytest.mark.parametrize("make, kind", [(separator, "separator"), (classifier, "classifier")])
def test_a_graph_learns_what_single_kernels_learn(make, kind):
    (net, losses), (other, wanted) = (trained(make, kind, graphed) for graphed in (True, False))
    print(kind, "losses", distance(losses, wanted))
    assert distance(losses, wanted) < 1e-4
    for (name, found), expected in zip(net.state_dict().items(), other.state_dict().values(),
                                       strict=True):
        if found.dtype == torch.int64:
            assert found == expected == 7           # the batches that BatchNorm has seen
        elif "running" in name or name.endswith("out.weight"):
            assert distance(found, expected) < 1e-2, name


def test_a_step_does_not_wait_for_the_gpu(demo):
    songs = data.Prepared(f"{demo}/demo_songs", "stems")
    songs.keep_on("cuda")
    mixes = data.Mixes(songs, "train", ["vocals", "bass"], 1)
    net = separator(torch.bfloat16).cuda().train()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, eps=1e-7, fused=True)
    source = prefetch(lambda k: mixes.batch(4 * k, 4), itertools.count(), 2, pin=True)
    meter = training.Meter()

    def learn(mixture, target):
        loss = pretrain_sep.l1_loss(net(mixture), target)
        loss.backward()
        return loss.detach()

    learn = training.Graphed(learn, net.parameters())
    for step in range(12):
        # what compiles and records may wait
        torch.cuda.set_sync_debug_mode("error" if step > 5 else "default")
        try:
            meter.add(learn(*meter.next_batch(source, "cuda")))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert meter.read(12, 4)["loss"] > 0


# -----------------------------------------------------------------------------
# the scripts

GPU = ["--device=cuda", "--data_on_gpu=True"]


def test_pre_training_on_a_gpu_and_on_a_cpu_go_on_from_each_other(demo, tmp_path):
    own = [f"--data={demo}/demo_songs", *SEP, "--val_every=4", f"--out={tmp_path}/a.pt"]
    run("pretrain_sep.py", *own, "--steps=4")
    run("pretrain_sep.py", *own, *GPU, "--steps=12", "--resume=True")
    run("pretrain_sep.py", *own, "--steps=16", "--resume=True")
    run("pretrain_sep.py", *own, *GPU, "--steps=20", "--resume=True")
    validated = [e["step"] for e in log_of(tmp_path / "a.pt") if "val_loss" in e]
    assert validated == [0, 4, 8, 12, 16, 20]


def test_a_run_in_float16_of_an_older_version_goes_on(demo, tmp_path):
    own = [f"--data={demo}/demo_songs", *SEP, *GPU, "--dtype=float16", f"--out={tmp_path}/a.pt"]
    run("pretrain_sep.py", *own, "--steps=4")
    saved = torch.load(tmp_path / "a.resume", weights_only=True)
    for group in saved["optimizer"]["param_groups"]:
        group["fused"] = None                       # before Adam was fused
    torch.save(saved, tmp_path / "a.resume")
    run("pretrain_sep.py", *own, "--steps=8", "--resume=True")


def test_what_changes_how_a_gpu_is_used_changes_little(demo, tmp_path):
    own = [f"--data={demo}/demo_songs", *SEP, *GPU, "--steps=8", "--batch_size=4"]
    ways = [[], ["--dtype=float16", "--grad_clip=1"], ["--compile=True"], ["--accumulate=2"],
            ["--cuda_graph=False"], ["--data_on_gpu=False"]]
    losses = []
    for number, more in enumerate(ways):
        run("pretrain_sep.py", *own, *more, f"--out={tmp_path}/{number}.pt")
        losses.append([e["loss"] for e in log_of(tmp_path / f"{number}.pt") if "loss" in e])
        print(more, losses[-1])
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], rel=0.02)


def test_fine_tuning_changes_its_optimiser_on_a_gpu(demo, tmp_path):
    weights = []
    ways = {"a": ["--epochs=8"], "b": ["--epochs=8", "--cuda_graph=False"], "adam": ["--epochs=5"]}
    for name, more in ways.items():
        run("finetune_cls.py", f"--data={demo}/demo_clips", *CLS, *GPU, "--recipe=ast", *more,
            "--halvings=0", "--sgd_rates=1", f"--out={tmp_path}/{name}.pt")
        saved = torch.load(tmp_path / f"{name}.resume", weights_only=True)
        weights.append(saved["model"]["tail.out.weight"])
    assert distance(weights[2], weights[1]) > 0.1   # what SGD has done
    assert distance(weights[0], weights[1]) < 0.02


@pytest.mark.parametrize("more", [
    ["--variant=v3"], ["--variant=tail", "--recipe=modern", "--dtype=float16"], ["--freeze=unet"],
    ["--variant=ast", "--transformer=16,4,2", "--frames=128", "--skips=1", "--tail_widths="]])
def test_all_kinds_of_classifiers_are_fine_tuned_and_tested(demo, tmp_path, more):
    run("finetune_cls.py", f"--data={demo}/demo_clips", *CLS, *GPU, *more,
        f"--out={tmp_path}/a.pt")
    scores = []
    for device in ("cuda", "cpu"):
        run("eval.py", f"{tmp_path}/a.pt", f"--device={device}", f"--out={tmp_path}/{device}",
            "--pictures=False", "--bootstrap=0")
        scores.append(torch.from_numpy(np.load(tmp_path / device / "a.npz")["scores"]))
    assert distance(*scores) < 1e-3


def test_a_network_that_a_graph_has_trained_takes_songs_of_any_length():
    net, _ = trained(separator, "separator", True)
    net.eval()
    wave = torch.randn(3 * model.CROP) * 0.1
    alone = copy.deepcopy(net).cpu()
    assert distance(model.separate(net, wave), model.separate(alone, wave)) < 1e-4
