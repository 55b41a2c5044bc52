"""A finished student trains by plain DDP as its teacher does, whatever the other process has."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from .ddp_steps import batches, gradients, student_of
from .tiny_families import BUILDERS


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("family", "package"),
    [
        ("qwen2_5_vl", "optimized"),
        ("qwen2_5_vl", "reference"),
        ("internvl", "optimized"),
        ("llama", "optimized"),
    ],
)
def test_two_processes_get_the_mean_of_both_gradients(family, package, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--master_port", str(free_port()), "-m", "linmu.conformance.own.student.ddp_steps"]
    output = tmp_path / "gradients.safetensors"
    done = subprocess.run(
        [*launch, family, package, str(output)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    got, wanted = load_file(output), {}
    tiny = BUILDERS[family]()
    for inputs in batches(tiny):
        student = student_of(tiny, package)
        student(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        for name, gradient in gradients(student).items():
            wanted[name] = wanted.get(name, 0) + gradient / 2
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5)
