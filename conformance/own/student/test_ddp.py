"""A finished student trains by plain DDP as its teacher does, whatever the other process has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..ranks import run_ranks
from .ddp_steps import STUDENTS, batches, gradients, student_of, train
from .tiny_families import BUILDERS


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of gradients that two processes wrote."""
    folder = tmp_path_factory.mktemp("gradients")
    run_ranks(2, folder, train, folder)
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
