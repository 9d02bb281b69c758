"""Devices by name, a number format by a timed product, and free memory, also inside of containers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minicogview.errors import MiniCogViewError
from minicogview.scale import machine

GB = 2**30
PLAIN = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}  # as if there were no bfloat16


def test_auto_is_a_device_that_computes() -> None:
    device = machine.pick_device()
    assert torch.ones(2, device=device).sum() == 2
    assert (device.type == "cuda") == torch.cuda.is_available()


@pytest.mark.parametrize("name", ["meta", "gpu", "cuda:77", ""])
def test_devices_that_cannot_be_used_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(MiniCogViewError, match=rf"^device '{name}' cannot be used here \(.*\): use auto") as caught:
        machine.pick_device(name)
    assert "\n" not in str(caught.value)


def test_the_faster_format_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for bfloat16, precision in ((300e9, "bf16"), (80e9, "fp32"), (1.2e9, "fp32")):
        monkeypatch.setattr(machine, "cpu_speeds", lambda f=bfloat16: {torch.float32: 100e9, torch.bfloat16: f})
        assert machine.training_precision("auto", "cpu") == precision
    assert machine.training_precision("bf16", "cpu") == "bf16"
    with pytest.raises(MiniCogViewError, match="unknown precision 'fp8': choose auto, fp32 or bf16"):
        machine.training_precision("fp8", "cpu")


def test_a_plain_processor_is_found_out_by_timing() -> None:
    """The variables leave what the processor says about itself as it was; only a timed product can tell."""
    program = "from minicogview.scale.machine import bfloat16_pays; print(bfloat16_pays())"
    ended = subprocess.run([sys.executable, "-c", program], env=os.environ | PLAIN, capture_output=True, text=True)
    assert ended.stdout.strip() == "False", ended.stderr


def test_free_memory_is_found_here() -> None:
    free = machine.free_memory()
    assert free is None or free > 10**7


def make_group(folder: Path, limit: str, used: int, cached: int, version: int) -> None:
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
             2: ("memory.max", "memory.current", "inactive_file")}[version]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


def test_a_container_has_what_its_control_group_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "self"
    own.write_text("0::/user/box\n")
    make_group(tmp_path / "user" / "box", str(6 * GB), 3 * GB, GB, version=2)
    make_group(tmp_path / "user", "max", 9 * GB, 0, version=2)
    assert list(machine.cgroup_rooms(tmp_path, own)) == [4 * GB]
    own.write_text("12:cpu,cpuacct:/x\n9:memory:/box\n")
    make_group(tmp_path / "memory" / "box", str(2 * GB), GB, 0, version=1)
    make_group(tmp_path / "memory", str(2**63 - 4096), GB, 0, version=1)  # version 1 writes "no limit" so
    assert min(machine.cgroup_rooms(tmp_path, own)) == GB
    monkeypatch.setattr(machine, "cgroup_rooms", lambda: [GB])
    monkeypatch.setattr(machine, "system_memory", lambda: 8 * GB)
    assert machine.free_memory() == GB
    monkeypatch.setattr(machine, "cgroup_rooms", lambda: [])
    monkeypatch.setattr(machine, "system_memory", lambda: None)  # Windows
    assert machine.free_memory() is None


def test_a_group_that_cannot_be_read_does_not_count(tmp_path: Path) -> None:
    own = tmp_path / "self"
    own.write_text("0::/gone\n")
    assert list(machine.cgroup_rooms(tmp_path, own)) == []
    assert list(machine.cgroup_rooms(tmp_path, tmp_path / "no such file")) == []


@pytest.mark.parametrize("first", ["torch", "minicogview"])
def test_idle_threads_do_not_wait_in_a_loop(first: str) -> None:
    """With a second thread that spins, drawing and upsampling would take almost twice as much computing as time."""
    program = f"""
import {first}, time, torch
from minicogview import CogView2
from minicogview.scale import threads

model = CogView2.from_pretrained("toy")
inside = []
torch.set_num_threads(2)
model.coglm.transformer.register_forward_hook(lambda *_: inside.append(torch.get_num_threads()))
model.upsampler.direct.register_forward_hook(lambda *_: inside.append(torch.get_num_threads()))
model.generate("a red apple", n=1)
print(threads.SPIN, set(inside[:-1]), inside[-1], torch.get_num_threads())
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    expected = {"torch": "True {1} 1 2", "minicogview": "False {1} 2 2"}[first]
    assert ended.stdout.strip() == expected, ended.stderr
