"""A finished student trains by plain DDP as its teacher does, whatever the other process has."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .ddp_steps import STUDENTS, batches, gradients, student_of
from .tiny_families import BUILDERS


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of gradients that two processes wrote."""
    folder = tmp_path_factory.mktemp("gradients")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += [
        "--master_port",
        str(free_port()),
        "-m",
        "linmu.conformance.own.student.ddp_steps",
        str(folder),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize(("family", "package"), STUDENTS)
def test_two_processes_get_the_mean_of_both_gradients(family, package, trained):
    got, wanted = load_file(trained / f"{family}-{package}.safetensors"), {}
    tiny = BUILDERS[family]()
    for inputs in batches(tiny):
        student = student_of(tiny, package)
        student(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        for name, gradient in gradients(student).items():
            wanted[name] = wanted.get(name, 0) + gradient / 2
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5)
