"""
Device setup, ranks and the measured peak.
"""
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

from common import device


def test_world_size_of_a_scheduler_is_ignored():
    code = "from common import device; print(device.setup_device('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, env={"WORLD_SIZE": "4", "PATH": ""})
    assert done.returncode == 0 and "WORLD_SIZE=4" in done.stdout and "RANK" in done.stdout
    assert "('cpu', 0, 1)" in done.stdout


def test_a_package_named_kernels_is_not_ours():
    code = ("import sys, types; sys.modules['kernels'] = types.ModuleType('kernels')\n"
            "from common import device; print(device.kernels)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.stdout == "None\n"


def test_devices_other_than_cuda_and_cpu_have_one_process(monkeypatch):
    keys = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "x"}
    for key, value in (keys | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit, match="mps.*2 processes.*--device=cuda"):
        device.setup_device("mps")


def test_sync_batchnorm_needs_gpus(monkeypatch):
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    assert device.distribute(net, "cpu", True) is net       # one process: the batch is whole
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(SystemExit, match="sync_batchnorm"):
        device.distribute(net, "cpu", True)


def test_sync_batchnorm_keeps_parameters_and_their_names(monkeypatch):
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(2, eps=1e-3), torch.nn.Linear(2, 2))
    names, weight = list(net.state_dict()), net[0].weight
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(device, "DistributedDataParallel", lambda net, devices: (net, devices))
    assert device.distribute(net, "cuda:1", True) == (net, ["cuda:1"])
    assert type(net[0]) is torch.nn.SyncBatchNorm and net[0].eps == 1e-3
    assert net[0].weight is weight and list(net.state_dict()) == names


def test_operations_of_training_are_counted():
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 5))
    assert device.count_flops(net, 7, "cpu") == 3 * 2 * 7 * 5
    assert net.training and not net[0].num_batches_tracked


def test_a_failing_compiler_is_noted(monkeypatch, capsys):
    def compile(module, **options):
        raise RuntimeError("no Triton")
    net = torch.nn.Linear(2, 2)
    monkeypatch.setattr(torch, "compile", compile)
    device.compile_parts([net], "cpu")
    assert "no Triton" in capsys.readouterr().out and net._compiled_call_impl is None


@pytest.mark.parametrize("free, kept", [(400, True), (399, False)])
def test_audio_is_kept_on_a_gpu_with_room_for_it_twice(monkeypatch, capsys, free, kept):
    class Prepared:
        path, audio, device = "data/x", torch.zeros(100, dtype=torch.int16), None

        def keep_on(self, device):
            self.device = device

    prepared = Prepared()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 1000))
    device.keep_on_gpu(prepared, "cpu")
    assert prepared.device is None
    device.keep_on_gpu(prepared, "cuda")
    assert prepared.device == ("cuda" if kept else None)
    assert ("data/x" in capsys.readouterr().out) != kept
