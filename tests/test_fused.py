"""BatchNorm and LeakyReLU in one, beside PyTorch's own and beside float64; and compiling."""
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import NARROW, ROOT, TORCHRUN

import fused
import kernels

needs_compiler = pytest.mark.skipif(kernels.kernel() is None, reason="there is no C++ compiler")


def module_and_input(shape, slope=0.01, dtype=torch.float32, mean=3.0):
    torch.manual_seed(1)
    norm = fused.NormLeaky(shape[1], slope, 0.1)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    torch.nn.init.normal_(norm.bias)
    x = (mean + torch.randn(shape)).to(dtype)
    return norm, x.to(memory_format=torch.channels_last)


def all_of(norm, x, gradient):
    """What a step of training gives: output, gradients and statistics."""
    norm.train()
    x = x.detach().requires_grad_()
    norm.zero_grad()
    y = norm(x)
    y.backward(gradient)
    return {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad,
            "mean": norm.running_mean.clone(), "var": norm.running_var.clone(),
            "count": norm.num_batches_tracked.clone()}


def in_float64(shape, slope, x, gradient):
    """The same by PyTorch, with float64 throughout."""
    norm, _ = module_and_input(shape, slope)
    norm = norm.double()            # not for the kernel
    return all_of(norm, x.double(), gradient.double())


@needs_compiler
@pytest.mark.parametrize("slope", [0.01, 0.0])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(2, 1, 64, 32), (3, 3, 7, 5), (2, 8, 48, 32), (1, 17, 33, 9),
                                   (2, 64, 12, 8), (4, 200, 3, 1), (2, 5, 1, 1),
                                   (3, 17, 257, 161)])      # the last is written past the caches
def test_kernel_equals_float64(shape, dtype, most, slope):
    norm, x = module_and_input(shape, slope, dtype)
    gradient = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
    found, wanted = all_of(norm, x, gradient), in_float64(shape, slope, x, gradient)
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        scale = value.double().abs().max() + 1e-3
        error = (found[name].double() - value).abs() / scale
        # next to zero, rounding decides on which side of the LeakyReLU a value is
        if name == "x":
            error = error[wanted["y"].abs() > 1e-4]
        assert error.max() < most * (20 if x.numel() < 20 * shape[1] else 1), name


@needs_compiler
def test_the_number_of_threads_changes_no_bit():
    norm, x = module_and_input((2, 17, 96, 64))
    gradient, threads, found = torch.randn(x.shape), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            norm.reset_running_stats()
            found.append(all_of(norm, x, gradient))
    finally:
        torch.set_num_threads(threads)
    for name in found[0]:
        assert all(torch.equal(one[name], found[0][name]) for one in found), name


@needs_compiler
@pytest.mark.parametrize("channels", [1, 5, 8, 17, 64])
@pytest.mark.parametrize("size", [(2, 2), (3, 2), (5, 2)])      # the last one does not divide
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_pooled_at_once_is_as_one_after_the_other(channels, size, dtype, most, slope):
    norm, x = module_and_input((2, channels, 12, 8), slope, dtype)
    with torch.no_grad():
        norm.weight[::2] *= -1      # the largest result is of the smallest value then
    found = []
    for run in (lambda x: norm(x, size), lambda x: fused.pool(norm(x), size)):
        norm.reset_running_stats()
        norm.zero_grad()
        leaf = x.detach().requires_grad_()
        y = run(leaf)
        y.backward(torch.linspace(-1, 2, y.numel()).view(y.shape).to(dtype))
        found.append([y.detach(), leaf.grad, norm.weight.grad.clone(), norm.bias.grad.clone(),
                      norm.running_mean.clone(), norm.running_var.clone()])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert ((one - other).abs().max() / (other.abs().max() + 1e-3)).item() < most
    norm.eval()
    with torch.no_grad():
        torch.testing.assert_close(norm(x, size), fused.pool(norm(x), size), atol=most, rtol=0)


@needs_compiler
def test_far_from_zero_and_without_spread():
    norm, x = module_and_input((2, 8, 32, 32), mean=1e4)
    with torch.no_grad():
        y, mean, var = fused.NormLeakyFunction.apply(x, norm.weight, norm.bias, 1e-3, 0.01, None)
    exact = x.double()
    assert torch.allclose(mean.double(), exact.mean((0, 2, 3)), rtol=1e-7)
    assert torch.allclose(var.double(), exact.var((0, 2, 3), correction=0), rtol=1e-4)

    x = torch.full((2, 8, 32, 32), 5.0).to(memory_format=torch.channels_last)
    y = norm.train()(x)
    wanted = F.leaky_relu(norm.bias, 0.01)[:, None, None].expand(8, 32, 32)
    assert torch.allclose(y, wanted, atol=1e-4)
    x[0, 3, 5, 5] = float("nan")
    y = norm(x)
    assert y[:, 3].isnan().all() and y[:, [0, 7]].isfinite().all()
    assert norm(x.bfloat16())[:, 3].isnan().all()


@needs_compiler
def test_a_channel_that_is_nearly_constant():
    norm, _ = module_and_input((2, 1, 8, 8))
    x = torch.zeros(8, 1, 384, 256).to(memory_format=torch.channels_last)
    x.view(-1)[x.numel() // 2] = 1.7
    with torch.no_grad():
        _, mean, var = fused.NormLeakyFunction.apply(x, norm.weight, norm.bias, 1e-3, 0.01, None)
    assert mean.item() == pytest.approx(x.double().mean().item(), rel=1e-5)
    assert var.item() == pytest.approx(x.double().var().item(), rel=1e-4)


SYNCED = """
import os, torch, torch.distributed as dist, model, fused
dist.init_process_group("gloo")
rank, gradients = dist.get_rank(), []
torch.manual_seed(0)
wave = torch.randn(4, model.CROP)
for kind in ("whole", "synced", "compiled"):
    torch.manual_seed(1)
    net = model.Separator(["vocals"], [4, 4])
    part = wave
    if kind != "whole":
        fused.synchronise(net)
        part = wave[2 * rank:2 * rank + 2]
    if kind == "compiled":
        net.unet.compile(dynamic=False, backend="eager")
    net(part).abs().mean().backward()
    flat = torch.cat([p.grad.flatten() for p in net.parameters()])
    dist.all_reduce(flat)
    gradients.append(flat / 2)
for found in gradients[1:]:
    assert (found - gradients[0]).norm() < 1e-3 * gradients[0].norm(), (found - gradients[0]).norm()
"""


def test_synced_gradients_are_those_of_the_whole_batch_compiled_too(tmp_path):
    (tmp_path / "synced.py").write_text(SYNCED)
    done = subprocess.run(
        [sys.executable, *TORCHRUN, str(tmp_path / "synced.py")], cwd=ROOT, text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


@needs_compiler
def test_evaluating_equals_pytorch():
    norm, x = module_and_input((2, 17, 24, 16))
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.eval()
    plain = F.leaky_relu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight,
                                      norm.bias, False, eps=1e-3), 0.01)
    with torch.no_grad():
        assert torch.allclose(norm(x), plain, atol=1e-5)
        assert torch.allclose(norm(x.contiguous()), plain, atol=1e-5)   # channels first
    x.requires_grad_()              # of a part that is frozen, gradients pass through
    norm(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_without_a_compiler_pytorch_does_it(tmp_path):
    code = ("import torch, model\n"
            f"net = model.Separator(['vocals'], {NARROW})\n"
            "net(torch.randn(1, model.CROP)).sum().backward()\n"
            "print(sum(p.grad.abs().sum() for p in net.parameters()) > 0)\n")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={"XDG_CACHE_HOME": str(tmp_path), "CXX": "no-such-compiler", "OMP_NUM_THREADS": "1"})
    assert done.stdout.strip() == "tensor(True)", done.stderr
    assert done.stderr.count("cannot be compiled here") == 1 and done.stderr.count("\n") == 1


# -----------------------------------------------------------------------------
# compiling

PROGRAM = """
import torch, model, runtime
losses = {}
for compiled in (False, True):
    torch.manual_seed(1)
    net, wave = model.Separator(["vocals"], [4, 4]), torch.randn(2, model.CROP)
    names = list(net.state_dict())
    if compiled:
        runtime.compile_parts([net.unet], "cpu")
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    for step in range(3):
        loss = net(wave).abs().mean()
        loss.backward()
        optimizer.step()
        losses.setdefault(compiled, []).append(loss.item())
    assert list(net.state_dict()) == names              # no "_orig_mod."
print(losses)
assert losses[False][0] > losses[False][2] * 1.001      # it learns
assert all(abs(a / b - 1) < 1e-3 for a, b in zip(*losses.values())), losses
"""


def compile_and_compare(tmp_path, **env):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True,
                          text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(not shutil.which("c++"), reason="there is no C++ compiler")
def test_compiled_and_eager_training_agree(tmp_path):
    assert "does not work here" not in compile_and_compare(tmp_path)


def test_training_goes_on_where_compiling_does_not_work(tmp_path):
    said = compile_and_compare(tmp_path, CXX="no-such-compiler",
                               TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "c"))
    assert said.count("torch.compile does not work here") == 1


def test_no_script_loads_the_compiler_before_it_is_needed():
    # it takes as long as all the rest of a start
    scripts = "audio, eval, export, fused, hubconf, listen, model, page, report, table"
    asked = f"import sys, {scripts}; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked], cwd=ROOT).returncode == 0


# -----------------------------------------------------------------------------
# channels for GPUs, and resynthesis

@pytest.mark.parametrize("c_in, c_out", [(1, 16), (17, 32), (32, 1), (5, 3), (8, 8)])
def test_channels_of_zeros_change_nothing(c_in, c_out):
    torch.manual_seed(1)
    conv = fused.Conv3x3(c_in, c_out).double()
    results = []
    for way in (conv.in_eights, conv):
        torch.manual_seed(2)
        x = torch.randn(2, c_in, 6, 10, dtype=torch.float64, requires_grad=True)
        y = way(x)
        y.backward(torch.randn(2, c_out, 6, 10, dtype=torch.float64))
        results.append([y, x.grad, conv.weight.grad, conv.bias.grad])
        conv.zero_grad()
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("length, hop", [(512, 160), (12, 4), (5, 5), (3, 7)])
def test_frames_are_added_up_as_by_a_plain_loop(length, hop):
    torch.manual_seed(1)
    frames = torch.randn(2, 3, 6, length, dtype=torch.float64, requires_grad=True)
    wanted = torch.zeros(2, 3, 5 * hop + length, dtype=torch.float64)
    for t in range(6):
        wanted[..., t * hop:t * hop + length] += frames[:, :, t].detach()
    torch.testing.assert_close(fused.OverlapAdd.apply(frames, hop), wanted)
    if length < 512:
        assert torch.autograd.gradcheck(lambda x: fused.OverlapAdd.apply(x, hop), frames)
