"""
Speed of a network: the benchmark, and the operations that it counts.

    python -m pytest -q tests/test_bench.py
"""
import pytest
import torch
import torch.nn as nn
from conftest import NARROW, TAIL, run

import model
from common import device
from tools import bench


def flops_by_hand(net, crop):
    """Multiplications and additions of the convolutions and dense layers, by a plain loop."""
    total = []

    def count(module, args, out):
        if isinstance(module, nn.Linear):
            total.append(2 * module.in_features * out.numel())
        elif isinstance(module, nn.ConvTranspose2d):
            total.append(2 * module.weight[0].numel() * args[0].numel())
        else:
            total.append(2 * module.weight[0].numel() * out.numel())

    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        net.eval()(torch.zeros(1, crop))
    return sum(total)


def test_flops_equal_a_count_by_hand():
    net = model.Classifier(5, True, "v3", widths=NARROW, tail_widths=TAIL)
    by_hand = flops_by_hand(net, model.CROP)
    mel = 2 * 2 * 384 * 256 * 128           # of the mixture and of one source
    assert device.count_flops(net, model.CROP, "cpu") == 3 * (by_hand + mel)


def test_bench_prints_one_row_per_network(demo):
    args = ["--size=demo", "--steps=1", "--song=4", "--batch_size=2"]
    output = run(["-m", "tools.bench"], "--networks=separator,tail", *args)
    heads, _, first, second = (
        row.strip("| ").split(" | ") for row in output.splitlines()[2:6])
    assert [head.strip() for head in heads] == list(bench.HEADS)
    assert (first[0].strip(), second[0].strip()) == ("separator", "tail")
    assert all(float(value.strip(" %")) >= 0 for value in first[1:] + second[1:])
    assert float(first[2]) > 0 and float(first[9]) > 0

    # real data: separators need stems, and refuse clips
    output = run(["-m", "tools.bench"], "--networks=separator4", *args, f"--data={demo}/demo_songs")
    assert "separator4" in output
    assert "stems" in run(["-m", "tools.bench"], "--networks=separator4", *args,
                          f"--data={demo}/demo_clips", ok=False)


def test_wrong_settings_name_the_key():
    assert "networks must be one of" in run(["-m", "tools.bench"], "--networks=unet", ok=False)
    assert "size must be one of" in run(["-m", "tools.bench"], "--size=tiny", ok=False)


@pytest.mark.parametrize("speed, reported", [(lambda n: 1.0, True), (float, False)])
def test_busy_cores_are_reported(speed, reported, monkeypatch, capsys):
    monkeypatch.setattr(device, "matmul_rate", lambda *_: speed(torch.get_num_threads()))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        device.peak_seconds(model.Separator(["vocals"], NARROW), model.CROP, "cpu")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert ("OMP_NUM_THREADS=1" in capsys.readouterr().out) == reported
