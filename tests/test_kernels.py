"""The gradient of upsampling, pooling, and the network of our kernels as a whole."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import NARROW

import fused
import kernels
import model
import training

pytestmark = pytest.mark.skipif(kernels.kernel() is None, reason="there is no C++ compiler")


def all_of(module, x, gradient):
    """Output, and gradients of the input and the weights."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(gradient.to(y.dtype))
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


def errors(found, wanted):
    """The largest errors, each as a share of the largest value."""
    assert [one.shape for one in found] == [one.shape for one in wanted]
    return [((a.double() - b).abs().max() / (b.abs().max() + 1e-9)).item()
            for a, b in zip(found, wanted, strict=True)]


def in_float64(kind, module, *args, **settings):
    """PyTorch's own module with the same weights, which our kernels do not take."""
    other = kind(module.in_channels, module.out_channels, *args, **settings).double()
    other.load_state_dict(module.state_dict())
    return other


@pytest.mark.parametrize("dtype, most", [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("c_in, c_out, size", [(6, 4, (12, 8)), (33, 16, (5, 3)), (1, 1, (1, 1))])
def test_upsampling_equals_float64(c_in, c_out, size, dtype, most):
    torch.manual_seed(1)
    module = fused.Up(c_in, c_out)
    x = torch.randn(3, c_in, *size).to(dtype)
    gradient = torch.randn(3, c_out, 2 * size[0], 2 * size[1]).to(dtype)
    wanted = all_of(in_float64(nn.ConvTranspose2d, module, 2, stride=2), x.double(),
                    gradient.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert max(errors(all_of(module, x, gradient), wanted)) < most


@pytest.mark.parametrize("channels", [1, 8, 16, 17, 64])
@pytest.mark.parametrize("size", [(2, 2), (3, 2), (1, 2)])
@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_equals_pytorch_to_the_bit(channels, size, kind, dtype):
    torch.manual_seed(1)
    # whole numbers: many are equal, and sums are exact
    x = torch.randint(-2, 3, (2, channels, 12, 8)).to(dtype)
    x[0, 0, 0, 0], x[1, -1, 5, 3] = float("inf"), -float("inf")
    gradient = torch.randn(2, channels, 12 // size[0], 8 // size[1]).to(dtype)
    found, wanted = [], []
    for seen, run in ((found, fused.pool), (wanted, plain_pool)):
        leaf = x.clone().to(memory_format=torch.channels_last).requires_grad_()
        y = run(leaf, size, kind)
        y.backward(gradient)
        seen += [y.detach(), leaf.grad]
    assert torch.equal(found[0], wanted[0])
    # a sixth is rounded in one place or the other
    exact = kind == "max" or size != (3, 2)
    assert torch.allclose(found[1], wanted[1], rtol=0 if exact else 1e-2, atol=0)


def plain_pool(x, size, kind):
    return {"max": F.max_pool2d, "avg": F.avg_pool2d}[kind](x, size)


def test_pooling_of_what_is_not_a_number_and_of_odd_sizes():
    x = torch.zeros(1, 8, 4, 4)
    for place in range(4):
        x[0, place, place // 2, place % 2] = float("nan")
    y = fused.pool(x, (2, 2))
    assert y[0, :4, 0, 0].isnan().all() and (y[0, 4:] == 0).all() and (y[0, :, 1] == 0).all()
    odd = torch.randn(2, 3, 7, 5)
    assert torch.equal(fused.pool(odd, (2, 2)), F.max_pool2d(odd, 2))


def gradients(unet, x):
    unet = copy.deepcopy(unet)
    y, _ = unet(x)
    y.pow(2).mean().backward()
    return torch.cat([p.grad.double().flatten() for p in unet.parameters()])


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_the_whole_network_is_nearer_to_float64_than_with_pytorchs_functions(pool):
    torch.manual_seed(1)
    unet, x = model.Separator(["vocals"], NARROW, pool).unet.train(), torch.randn(4, 1, 64, 256)
    exact = gradients(unet.double(), x.double())
    unet = unet.float()
    ours = (gradients(unet, x) - exact).norm() / exact.norm()
    with kernels.plain():
        plain = (gradients(unet, x) - exact).norm() / exact.norm()
    assert ours < min(plain, 0.01)


def test_the_number_of_threads_changes_no_bit():
    torch.manual_seed(1)
    modules = fused.Conv3x3(1, 20), fused.Conv3x3(20, 1)
    threads, found = torch.get_num_threads(), []
    one, many = torch.randn(3, 1, 70, 64), torch.randn(3, 20, 70, 64)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([*all_of(modules[0], one, many), *all_of(modules[1], many, one)])
            leaf, norm = many.clone().requires_grad_(), fused.NormLeaky(20, 0.1, 0.1)
            norm(leaf, (2, 2)).pow(2).sum().backward()
            found[-1] += [leaf.grad, norm.weight.grad, norm.bias.grad]
    finally:
        torch.set_num_threads(threads)
    for some in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(some, found[0], strict=True))


def test_half_precision_of_the_other_kind_is_left_to_pytorch():
    module, x = fused.Conv3x3(1, 8), torch.randn(2, 1, 12, 8)
    with torch.autocast("cpu", torch.float16):
        y = module(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), module(x), atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError):
        kernels.half(x.half())


def test_a_traced_network_knows_other_inputs():
    unet = model.Separator(["vocals"], NARROW).unet.eval()
    one, other = torch.randn(2, 1, 1, 64, 256)
    with torch.no_grad():
        traced = torch.jit.trace(unet, one, check_trace=False, strict=False)
        torch.testing.assert_close(traced(other)[0], unet(other)[0], atol=1e-5, rtol=0)


def test_arithmetic_is_counted_in_full():
    net = model.Separator(["vocals"], NARROW)
    counted = training.flops_per_crop(net, model.CROP, "cpu")
    first, last = 2 * 9 * NARROW[0] * 384 * 256, 2 * 9 * 2 * NARROW[0] * 384 * 256
    assert counted > 3 * 4 * (first + last) and not kernels.switched_off
