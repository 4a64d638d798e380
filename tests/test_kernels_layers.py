"""
The CPU kernels against the same network in plain PyTorch and float64, and padded channels.

    python -m pytest -q tests/test_kernels_layers.py
"""
import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import NARROW, TAIL, randomise

import kernels
import model
from kernels import build, layers

pytestmark = pytest.mark.skipif(build.library() is None, reason="there is no C++ compiler")

# one block of channels, several, a partial one; rows of tiles that exceed the cache and that do not
WINOGRAD = [(c_in, c_out, size)
            for c_in, c_out in [(16, 16), (17, 32), (13, 40), (64, 64), (100, 70)]
            for size in [(12, 16), (2, 96), (96, 2), (34, 26), (16, 128)]]
# one channel and many, in groups of all sizes; lines of whole vectors and of partial ones
NARROW_SHAPES = [
    (c_in, c_out, size)
    for c_in, c_out in [(1, 16), (1, 1), (24, 1), (5, 2), (4, 8), (8, 4), (2, 67), (33, 11)]
    for size in [(12, 16), (1, 200), (200, 1), (9, 25), (3, 130)]]
# outputs above STREAM_BYTES, aligned and not
STREAMED = [(1, 4, (300, 301)), *(
    (c_in, c_out, (192, 160)) for c_in, c_out in [(16, 32), (17, 16), (8, 24), (16, 4), (9, 1)])]


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels that run, in order."""
    names, call = [], layers.call
    monkeypatch.setattr(layers, "call", lambda name, *a: (names.append(name), call(name, *a)))
    return names


def make(*modules):
    """(accelerated network, the same in PyTorch and float64), norms with random weights."""
    plain = nn.Sequential(*modules)
    for module in plain:
        if hasattr(module, "running_mean"):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return kernels.accelerate(copy.deepcopy(plain)), plain.double()


def norm_act(channels, slope=0.01, kind=nn.BatchNorm2d):
    return kind(channels, eps=1e-3), nn.LeakyReLU(slope) if slope else nn.ReLU()


def conv3x3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def images(*shape, dtype=torch.float32):
    """Channels last, with another mean for each channel."""
    torch.manual_seed(1)
    x = 3 * torch.randn(shape) + torch.randn(shape[1], 1, 1)
    return x.to(dtype).to(memory_format=torch.channels_last)


def step(net, x, gradient):
    """{name: tensor} of a training step: output, gradients, running statistics."""
    net.zero_grad()
    x = x.detach().requires_grad_()
    y = net(x)
    y.backward(gradient.to(y.dtype))
    actual = {"y": y.detach(), "x": x.grad}
    actual |= {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return actual | {name: value.clone() for name, value in net.named_buffers()}


def error(actual, expected):
    """The largest error, relative to the largest value."""
    assert actual.shape == expected.shape
    largest = expected.double().abs().max() + 1e-9
    return ((actual.double() - expected).abs().max() / largest).item()


def largest_error(actual, expected):
    assert actual.keys() == expected.keys()
    return max(error(actual[name], expected[name]) for name in expected)


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -----------------------------------------------------------------------------
# BatchNorm and LeakyReLU

@pytest.mark.parametrize("slope", [0.01, 0.0, 1.0])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [
    (2, 1, 64, 32), (3, 3, 7, 5), (2, 8, 48, 32), (1, 17, 33, 9), (2, 64, 12, 8), (4, 200, 3, 1),
    (2, 5, 1, 1), (40, 24), (3, 17, 257, 161)])     # the last one is written by streaming stores
def test_norm_equals_float64(shape, dtype, limit, slope, calls):
    torch.manual_seed(1)
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    net, exact = make(*norm_act(shape[1], slope, kind)[:1 if slope == 1 else 2])
    x, gradient = (3 + torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    actual, expected = step(net, x, gradient), step(exact, x.double(), gradient.double())
    assert calls == ["norm_measure", "norm_apply", "norm_backward"] and actual["y"].dtype == dtype
    for name, value in expected.items():
        scale = value.double().abs().max() + 1e-3
        errors = (actual[name].double() - value).abs() / scale
        if name == "x":     # near zero, rounding decides on which side of the LeakyReLU a value is
            errors = errors[expected["y"].abs() > 1e-4]
        assert errors.max() < limit * (40 if x.numel() < 20 * shape[1] else 1), name


@pytest.mark.parametrize("channels", [1, 5, 8, 17, 64])
@pytest.mark.parametrize("size", [(2, 2), (3, 2), (5, 2)])      # the last one does not divide
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_pooled_norm_equals_norm_and_pooling(channels, size, dtype, limit, slope, calls):
    torch.manual_seed(1)
    fused, _ = make(*norm_act(channels, slope), nn.MaxPool2d(size))
    with torch.no_grad():
        fused[0].weight[::2] *= -1          # the maximum is then at the smallest input
    parts = copy.deepcopy(fused)
    # levels that differ within each window: bfloat16 could round others to the same value
    levels = (2 * torch.arange(12)[:, None] + torch.arange(8)) % 7
    x = (levels + 0.3 * torch.rand(2, channels, 12, 8)).to(dtype)
    gradient = torch.linspace(-1, 2, 8 * channels * (12 // size[0])).to(dtype)
    gradient = gradient.view(2, channels, 12 // size[0], 4)
    actual = step(fused, x, gradient)
    assert ("norm_apply" in calls) == (12 % size[0] > 0)
    split = nn.Sequential(parts[:2], nn.Sequential(parts[2]))
    expected = step(split, x, gradient)
    assert actual["y"].dtype == dtype
    for value, other in zip(actual.values(), expected.values(), strict=True):
        assert error(value, other) < limit
    fused.eval(), split.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), split(x), atol=limit, rtol=0)


def test_statistics_of_large_means_constant_channels_and_nan():
    x = 1e4 + images(2, 8, 32, 32)
    mean, var = layers.norm_measure(x)
    assert torch.allclose(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-7)
    assert torch.allclose(var.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-4)

    x = torch.zeros(8, 1, 384, 256).to(memory_format=torch.channels_last)
    x.view(-1)[x.numel() // 2] = 1.7        # nearly constant
    mean, var = layers.norm_measure(x)
    assert mean.item() == pytest.approx(x.double().mean().item(), rel=1e-5)
    assert var.item() == pytest.approx(x.double().var().item(), rel=1e-4)

    net, _ = make(*norm_act(8))
    x = torch.full((2, 8, 32, 32), 5.0).to(memory_format=torch.channels_last)
    expected = F.leaky_relu(net[0].bias, 0.01)[:, None, None].expand(8, 32, 32)
    assert torch.allclose(net(x), expected, atol=1e-4)
    x[0, 3, 5, 5] = float("nan")
    for y in (net(x), net(x.bfloat16())):
        assert y[:, 3].isnan().all() and y[:, [0, 7]].isfinite().all()


def test_momentum_none_is_a_cumulative_average():
    net, exact = make(nn.BatchNorm2d(8, momentum=None))     # as SWA's update_bn sets it
    for k in range(3):
        x = images(2, 8, 6, 4) * (k + 1)
        net(x), exact(x.double())
    assert error(net[0].running_mean, exact[0].running_mean) < 1e-6
    assert error(net[0].running_var, exact[0].running_var) < 1e-6
    assert net[0].num_batches_tracked == 3


# -----------------------------------------------------------------------------
# convolutions

@pytest.mark.parametrize("c_in, c_out, size", WINOGRAD + NARROW_SHAPES + STREAMED)
def test_convolution_equals_float64(c_in, c_out, size, calls):
    x, gradient = images(3, c_in, *size), 0.3 + torch.randn(3, c_out, *size)
    net, exact = make(conv3x3(c_in, c_out))
    plain = copy.deepcopy(exact).float()
    expected = step(exact, x.double(), gradient.double())
    actual = largest_error(step(net, x, gradient), expected)
    assert calls[0] == ("narrow" if min(c_in, c_out) < 12 else "winograd") + "_forward"
    # no worse than PyTorch's, apart from chance in such small errors
    assert actual < 2e-6 and actual < 4 * largest_error(step(plain, x, gradient), expected)


@pytest.mark.parametrize("c_in, c_out, size", WINOGRAD + NARROW_SHAPES + STREAMED)
@pytest.mark.parametrize("slope", [0.01, 0.0])
def test_norm_and_convolution_equal_float64(c_in, c_out, size, slope, calls):
    x, gradient = images(3, c_in, *size), 0.3 + torch.randn(3, c_out, *size)
    net, exact = make(*norm_act(c_in, slope), conv3x3(c_in, c_out))
    nn.init.normal_(net[0].weight)          # negative ones too
    exact.load_state_dict(net.state_dict())
    expected = step(exact, x.double(), gradient.double())
    assert largest_error(step(net, x, gradient), expected) < 1e-5
    assert "norm_apply" not in calls and net[0].num_batches_tracked == 1
    net.eval(), exact.eval()                # running statistics
    with torch.no_grad():
        assert error(net(x), exact(x.double())) < 2e-6


def test_shapes_that_no_kernel_supports_use_pytorch(calls):
    net, exact = make(*norm_act(16), conv3x3(16, 16))
    x = images(3, 16, 34, 26)
    net(x)
    assert calls == ["norm_measure", "winograd_forward"]
    for part in (x[:, :, :33], x[..., :25], x[:, :, :12, :8]):      # odd, odd, small
        calls.clear()
        assert error(net(part).detach(), exact(part.double()).detach()) < 2e-6
        assert calls == ["norm_measure", "norm_apply"]


@pytest.mark.parametrize("module, shape", [
    (nn.BatchNorm1d(3), (4, 3, 50)), (conv3x3(16, 16), (16, 32, 32)), (nn.MaxPool2d(2), (4, 8, 8)),
    (nn.ConvTranspose2d(3, 3, 2, stride=2), (3, 8, 8)), (conv3x3(16, 16), (0, 16, 32, 32)),
    (nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"), (2, 16, 32, 32)),
    (nn.ConvTranspose2d(3, 3, 2, stride=2, dilation=2), (2, 3, 8, 8)),
    (nn.AvgPool2d(2, divisor_override=3), (2, 4, 8, 8)), (nn.MaxPool2d(3, 1), (2, 4, 8, 8)),
    (nn.MaxPool2d(2, ceil_mode=True), (2, 4, 7, 7)), (conv3x3(16, 16).half(), (2, 16, 32, 32))])
def test_other_options_and_dimensions_use_pytorch(module, shape):
    fast, x = kernels.accelerate(nn.Sequential(copy.deepcopy(module))), torch.randn(shape)
    x = x.to(next(module.parameters(), x).dtype)
    torch.testing.assert_close(fast(x), module(x))


def test_a_tail_block_is_fused(calls):
    net, exact = make(conv3x3(16, 24), *norm_act(24, 0), conv3x3(24, 24), *norm_act(24, 0),
                      nn.MaxPool2d(2))
    x = images(3, 16, 12, 16)
    y = net(x)
    assert calls == ["winograd_forward", "norm_measure", "winograd_forward", "norm_measure",
                     "pool_forward"]
    assert error(y.detach(), exact(x.double()).detach()) < 2e-6
    assert error(y.detach(), F.max_pool2d(net[:6](x), 2).detach()) < 1e-6


def test_gradients_through_given_statistics():
    net, exact = make(*norm_act(16), conv3x3(16, 24))
    x, gradient = images(3, 16, 12, 16), torch.randn(3, 24, 12, 16)
    net(x), exact(x.double())
    actual, expected = (step(n.eval(), v, gradient) for n, v in ((net, x), (exact, x.double())))
    assert largest_error(actual, expected) < 1e-5
    with torch.no_grad():       # NCHW too
        assert error(net[:2](x.contiguous()), exact[:2](x.double())) < 1e-5


@pytest.mark.parametrize("frozen", [[], ["0.weight"], ["0.bias"], ["0.weight", "0.bias"]])
def test_gradients_without_the_input_and_with_frozen_norms(frozen):
    net, _ = make(*norm_act(16), conv3x3(16, 24))
    x, gradient = images(3, 16, 12, 16), torch.randn(3, 24, 12, 16)
    expected = step(net, x, gradient)
    net.zero_grad()
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    net(x).backward(gradient)
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, expected[name]) if p.requires_grad else p.grad is None
    expected = step(net[2], x, gradient)
    net.zero_grad()
    net[2](x).backward(gradient)
    assert torch.equal(net[2].weight.grad, expected["weight"])


def test_convolutions_of_other_layouts_slices_nan_and_single_images():
    conv = kernels.accelerate(nn.Sequential(conv3x3(16, 16)))
    x = images(5, 16, 34, 26)
    y = conv(x)
    assert torch.equal(conv(x.contiguous()), y)
    assert torch.equal(conv(torch.cat([x, x], 1)[:, 16:]), y)
    assert torch.equal(conv(x[3:4]), y[3:4])
    x[1, 3, 6, 4] = float("nan")
    y = conv(x)
    assert y[1, :, 5:8, 3:6].isnan().all()
    assert y[[0, 2]].isfinite().all() and y[1, :, :4].isfinite().all()


@pytest.mark.parametrize("make_net, shape", [
    (lambda: [*norm_act(17)], (2, 17, 96, 64)),
    (lambda: [*norm_act(20, 0.1), nn.MaxPool2d(2)], (3, 20, 70, 64)),
    (lambda: [conv3x3(1, 20)], (3, 1, 70, 64)), (lambda: [conv3x3(20, 1)], (3, 20, 70, 64)),
    (lambda: [*norm_act(40), conv3x3(40, 24)], (4, 40, 34, 26))])
def test_results_do_not_depend_on_the_number_of_threads(make_net, shape):
    net, _ = make(*make_net())
    x, threads, actual = images(*shape), torch.get_num_threads(), []
    gradient = torch.randn(net(x).shape)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for norm in net:
                getattr(norm, "reset_running_stats", lambda: None)()
            actual.append(step(net, x, gradient))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(actual[0], actual[1]) and same_bits(actual[0], actual[2])


# -----------------------------------------------------------------------------
# transposed convolution and pooling

@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("c_in, c_out, size", [(6, 4, (12, 8)), (33, 16, (5, 3)), (1, 1, (1, 1))])
def test_transposed_convolution_equals_float64(c_in, c_out, size, dtype, limit):
    torch.manual_seed(1)
    net, exact = make(nn.ConvTranspose2d(c_in, c_out, 2, stride=2))
    assert type(net[0]) is layers.Up
    x = torch.randn(3, c_in, *size).to(dtype)
    gradient = torch.randn(3, c_out, 2 * size[0], 2 * size[1]).to(dtype)
    expected = step(exact, x.double(), gradient.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert largest_error(step(net, x, gradient), expected) < limit


@pytest.mark.parametrize("channels", [1, 8, 16, 17, 64])
@pytest.mark.parametrize("size", [(2, 2), (3, 2), (1, 2), 2])
@pytest.mark.parametrize("kind", [nn.MaxPool2d, nn.AvgPool2d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_equals_pytorch_to_the_bit(channels, size, kind, dtype, calls):
    torch.manual_seed(1)
    # integers: many are equal, and their sums are exact
    x = torch.randint(-2, 3, (2, channels, 12, 8)).to(dtype)
    x[0, 0, 0, 0], x[1, -1, 5, 3] = float("inf"), -float("inf")
    x = x.to(memory_format=torch.channels_last)
    plain = nn.Sequential(kind(size))
    gradient = torch.randn(plain(x).shape).to(dtype)
    expected = step(plain, x, gradient)
    actual = step(kernels.accelerate(plain), x, gradient)
    assert calls == ["pool_forward", "pool_backward"] and torch.equal(actual["y"], expected["y"])
    # a sixth is rounded at different places
    exact = kind is nn.MaxPool2d or size != (3, 2)
    assert torch.allclose(actual["x"], expected["x"], rtol=0 if exact else 1e-2, atol=0)


def test_pooling_of_nan_and_of_odd_sizes():
    pool = kernels.accelerate(nn.Sequential(nn.MaxPool2d(2)))
    x = torch.zeros(1, 8, 4, 4)
    for k in range(4):
        x[0, k, k // 2, k % 2] = float("nan")
    y = pool(x)
    assert y[0, :4, 0, 0].isnan().all() and (y[0, 4:] == 0).all() and (y[0, :, 1] == 0).all()
    odd = torch.randn(2, 3, 7, 5)
    assert torch.equal(pool(odd), F.max_pool2d(odd, 2))


# -----------------------------------------------------------------------------
# whole networks

def unet_gradient(unet, x):
    unet.zero_grad()
    unet(x)[0].pow(2).mean().backward()
    return torch.cat([p.grad.double().flatten() for p in unet.parameters()])


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_gradients_of_a_unet_are_closer_to_float64_than_pytorchs(pool):
    torch.manual_seed(2)
    unet, x = model.Separator(["vocals"], NARROW, pool).unet, torch.randn(4, 1, 64, 256)
    exact = unet_gradient(copy.deepcopy(unet).double(), x.double())
    plain = (unet_gradient(copy.deepcopy(unet), x) - exact).norm() / exact.norm()
    fast = (unet_gradient(kernels.accelerate(unet), x) - exact).norm() / exact.norm()
    assert fast < min(plain, 0.01)


@pytest.fixture
def classifiers():
    """(plain, accelerated): U-Net, tail and all kinds of layers."""
    net = model.Classifier(3, True, "v3", widths=NARROW, tail_widths=TAIL)
    return randomise(net), kernels.accelerate(copy.deepcopy(net)).eval()


def test_names_copies_and_pickles(classifiers):
    plain, fast = classifiers
    assert list(fast.state_dict()) == list(plain.state_dict())
    kinds = {type(module) for module in fast.modules()}
    assert set(kernels.SWAP.values()) - kinds == {layers.AvgPool}
    wave = 0.1 * torch.randn(2, model.CROP)
    with torch.no_grad():
        expected = fast(wave)
        torch.testing.assert_close(expected, plain(wave), atol=1e-4, rtol=1e-4)
        for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert torch.equal(twin(wave), expected)


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_autocast_around_a_network(classifiers, dtype, limit):
    plain, fast = classifiers
    x = torch.randn(2, 1, 64, 256)
    for training in (False, True):
        fast.train(training), plain.train(training)
        with torch.autocast("cpu", dtype):
            y = fast.unet(x)[0]
        assert y.dtype == dtype
        assert (y.float() - plain.unet(x)[0]).abs().mean() < limit
        y.float().mean().backward()
    with pytest.raises(ValueError):         # the kernels would write out of bounds
        layers.argument(torch.float16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracing_compiling_and_exporting(classifiers):
    plain, fast = classifiers
    one, other = torch.randn(2, 2, 1, 64, 256)
    with torch.no_grad():
        traced = torch.jit.trace(fast.unet, one, check_trace=False, strict=False)
        exported = torch.export.export(fast.unet, (one,)).module()
        for net in (traced, exported, torch.compile(fast.unet, backend="eager")):
            torch.testing.assert_close(net(other)[0], plain.unet(other)[0], atol=1e-5, rtol=0)


def test_default_dtype_and_device_do_not_matter(classifiers):
    _, fast = classifiers
    x, unet = torch.randn(2, 1, 64, 256), fast.unet.train()
    expected = unet_gradient(copy.deepcopy(unet), x)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        actual = unet_gradient(unet, x)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("c_in, c_out", [(1, 16), (17, 32), (32, 1), (5, 3), (8, 8)])
def test_padded_channels_change_nothing(c_in, c_out):
    torch.manual_seed(1)
    plain = nn.Sequential(conv3x3(c_in, c_out)).double()
    padded = kernels.pad_channels(copy.deepcopy(plain))
    assert (type(padded[0]) is layers.PaddedConv) == ((c_in, c_out) != (8, 8))
    x, gradient = torch.randn(2, c_in, 6, 10).double(), torch.randn(2, c_out, 6, 10).double()
    assert largest_error(step(padded, x, gradient), step(plain, x, gradient)) < 1e-12
