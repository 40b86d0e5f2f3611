from __future__ import annotations

import subprocess
import sys

import torch

from rlexit import machine


def test_a_machine_is_told_apart_by_its_processor():
    line = machine.describe()
    assert "cores" in line
    assert line.isprintable()
    assert len(line.split(", ")) >= 3


def test_settling_takes_the_threads_asked_for_and_flushes_denormals():
    code = (
        "import torch; from rlexit.machine import settle; settle(1); "
        "print(torch.get_num_threads(), float(torch.tensor([1e-39]) * 0.5))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["1", "0.0"]
    assert machine.cores() >= 1
    assert float(torch.tensor([1e-39]) * 0.5) > 0
