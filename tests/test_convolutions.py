"""Our convolutions, alone and with the norm before them: beside float64."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fused
import kernels

pytestmark = pytest.mark.skipif(kernels.kernel() is None, reason="there is no C++ compiler")

# one block of channels, several, a part of one; rows of tiles that fill a cache, or do not
WINOGRAD = [(c_in, c_out, size)
            for c_in, c_out in [(16, 16), (17, 32), (13, 40), (64, 64), (100, 70)]
            for size in [(12, 16), (2, 96), (96, 2), (34, 26), (16, 128)]]
# one channel and many, in groups of all sizes; lines of whole vectors, and of a part of one
NARROW = [(c_in, c_out, size)
          for c_in, c_out in [(1, 16), (1, 1), (24, 1), (5, 2), (4, 8), (8, 4), (2, 67), (33, 11)]
          for size in [(12, 16), (1, 200), (200, 1), (9, 25), (3, 130)]]


def everything(run, leaves, gradient):
    """What run() gives, and the gradients of the leaves."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = run(*leaves)
    y.backward(gradient.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def errors(found, wanted):
    """The largest errors, each as a share of the largest value."""
    assert [one.shape for one in found] == [one.shape for one in wanted]
    return [((a.double() - b).abs().max() / b.abs().max()).item()
            for a, b in zip(found, wanted, strict=True)]


def made(c_in, c_out, size, images=3):
    """A convolution, an input with an offset of its own per channel, a gradient."""
    torch.manual_seed(1)
    conv = fused.Conv3x3(c_in, c_out)
    x = torch.randn(images, c_in, *size) * 3 + torch.randn(c_in, 1, 1)
    x = x.to(memory_format=torch.channels_last)
    return conv, x, torch.randn(images, c_out, *size)


@pytest.mark.parametrize("c_in, c_out, size", WINOGRAD + NARROW)
def test_a_convolution_equals_float64(c_in, c_out, size):
    conv, x, gradient = made(c_in, c_out, size)
    kind = conv.kernel_for(x)
    assert kind == ("narrow" if min(c_in, c_out) < 12 else "winograd")

    def ours(x, weight, bias):
        return fused.ConvFunction.apply(kind, x, weight, bias, None, None, 0.0, 0.0)[0]

    def plain(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=1)

    leaves = x, conv.weight, conv.bias
    exact = everything(plain, [leaf.double() for leaf in leaves], gradient)
    found = errors(everything(ours, leaves, gradient), exact)
    theirs = errors(everything(plain, leaves, gradient), exact)
    # no worse than the plain sums, but for the chance in such small errors
    assert max(found) < 2e-6
    assert max(found) < 4 * max(theirs)


@pytest.mark.parametrize("c_in, c_out, size", WINOGRAD + NARROW)
@pytest.mark.parametrize("slope", [0.01, 0.0])
def test_with_a_norm_it_equals_float64(c_in, c_out, size, slope):
    conv, x, gradient = made(c_in, c_out, size)
    norm = fused.NormLeaky(c_in, slope, 0.1)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    both = fused.NormsAndConvs(norm, conv)

    wanted = nn.Sequential(nn.BatchNorm2d(c_in, 1e-3, 0.1), nn.LeakyReLU(slope),
                           nn.Conv2d(c_in, c_out, 3, padding=1)).double()
    state = {key.replace("1.", "2."): value for key, value in both.state_dict().items()}
    wanted.load_state_dict(state)
    found, exact = [], []
    for net, seen, dtype in ((both, found, torch.float32), (wanted, exact, torch.float64)):
        leaf = x.detach().to(dtype).requires_grad_()
        y = net(leaf)
        y.backward(gradient.to(dtype))
        seen += [y.detach(), leaf.grad, *(p.grad for p in net.parameters())]
        seen += [net[0].running_mean, net[0].running_var]
    assert max(errors(found, exact)) < 1e-5
    assert int(norm.num_batches_tracked) == 1

    # in use: statistics that were learnt, not those of this batch
    both.eval(), wanted.eval()
    with torch.no_grad():
        assert max(errors([both(x)], [wanted(x.double())])) < 2e-6


@pytest.mark.parametrize("c_in, c_out", [(16, 32), (17, 16), (8, 24), (16, 4), (9, 1)])
def test_large_results_which_are_written_past_the_caches(c_in, c_out):
    test_a_convolution_equals_float64(c_in, c_out, (192, 160))
    test_with_a_norm_it_equals_float64(c_in, c_out, (192, 160), 0.01)


def test_the_norm_is_not_run_on_its_own_where_both_are_one():
    conv, x, _ = made(16, 16, (34, 26))
    both, ran = fused.NormsAndConvs(fused.NormLeaky(16, 0.01, 0.1), conv), []
    both[0].register_forward_hook(lambda *_: ran.append(1))
    both(x)
    assert not ran
    for odd in (x[:, :, :33], x[..., :25], x[:, :, :12, :8]):       # and small ones
        ran.clear()
        both(odd)               # by PyTorch
        assert ran


def test_pooled_behind_a_norm_and_behind_a_convolution():
    conv, x, _ = made(16, 24, (12, 16))
    for parts in ([conv, fused.NormLeaky(24, 0.0, 0.1)], [fused.NormLeaky(16, 0.0, 0.1), conv]):
        both = fused.NormsAndConvs(*parts)
        assert torch.equal(both(x, (2, 2)), F.max_pool2d(both(x), 2))


def test_gradients_through_statistics_that_are_given():
    conv, x, gradient = made(16, 24, (12, 16))
    both, found = fused.NormsAndConvs(fused.NormLeaky(16, 0.01, 0.1), conv), []
    both(x)
    both.eval()
    for net, given in ((copy.deepcopy(both).double(), x.double()), (both, x)):
        leaf = given.detach().requires_grad_()
        net.zero_grad()
        net(leaf).backward(gradient.to(leaf.dtype))
        found.append([leaf.grad, *(p.grad.clone() for p in net.parameters())])
    assert max(errors(found[1], found[0])) < 1e-5


def test_without_gradients_of_the_input():
    conv, x, gradient = made(16, 24, (12, 16))
    conv(x).backward(gradient)
    weight = conv.weight.grad.clone()
    conv.zero_grad()
    conv(x.requires_grad_()).backward(gradient)
    assert torch.equal(conv.weight.grad, weight) and x.grad is not None


@pytest.mark.parametrize("frozen", [["weight"], ["bias"], ["weight", "bias"]])
def test_with_a_norm_that_is_not_trained(frozen):
    conv, x, gradient = made(16, 24, (12, 16))
    both = fused.NormsAndConvs(fused.NormLeaky(16, 0.01, 0.1), conv)
    both(x).backward(gradient)
    wanted = {name: p.grad.clone() for name, p in both.named_parameters()}
    both.zero_grad()
    for name in frozen:
        getattr(both[0], name).requires_grad_(False)
    both(x).backward(gradient)
    for name, p in both.named_parameters():
        assert torch.equal(p.grad, wanted[name]) if p.requires_grad else p.grad is None


def test_an_input_in_another_layout_and_a_sliced_one():
    conv, x, _ = made(16, 24, (12, 16))
    wanted = conv(x)
    assert torch.equal(conv(x.contiguous()), wanted)
    wide = torch.cat([x, x], 1)
    assert torch.equal(conv(wide[:, 16:]), wanted)


def test_what_is_not_a_number_stays_near_its_place():
    conv, x, _ = made(16, 16, (12, 16))
    x[1, 3, 6, 4] = float("nan")
    y = conv(x)
    assert y[1, :, 5:8, 3:6].isnan().all()
    assert y[[0, 2]].isfinite().all() and y[1, :, :4].isfinite().all()


def test_one_image_does_not_depend_on_the_others():
    conv, x, _ = made(32, 32, (34, 26), images=5)
    assert torch.equal(conv(x)[3:4], conv(x[3:4]))


def test_the_number_of_threads_changes_no_bit():
    conv, x, gradient = made(40, 24, (34, 26), images=4)
    both = fused.NormsAndConvs(fused.NormLeaky(40, 0.01, 0.1), conv)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            both.zero_grad()
            leaf = x.detach().requires_grad_()
            y = both(leaf)
            y.backward(gradient)
            found.append([y.detach(), leaf.grad, *(p.grad.clone() for p in both.parameters())])
    finally:
        torch.set_num_threads(threads)
    for some in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(some, found[0], strict=True))
