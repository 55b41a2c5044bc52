"""A student opened with a tensor-parallel plan gives the logits of a whole one: its MLPs alone are split."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linmu import optimized

from .tensor_parallel_logits import FAMILIES, prompt
from .tiny_checkpoint import shake_mixers
from .tiny_families import BUILDERS


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Path:
    """The folder of students, and of what two processes wrote of them."""
    folder = tmp_path_factory.mktemp("split")
    for family in FAMILIES:
        shake_mixers(optimized.convert(BUILDERS[family]().teacher)).save_pretrained(folder / family)
    # In a process of its own: without a GPU, which transformers would take for the ranks.
    launch = [sys.executable, "-m", "linmu.conformance.own.student.tensor_parallel_logits", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_split_over_two_processes_it_is_the_same_model(family, split):
    student = optimized.load(split / family)
    layer = student.get_decoder().layers[0]
    wanted = student(**prompt(BUILDERS[family]()), use_cache=False).logits
    for rank in range(2):
        got = load_file(split / f"{family}-{rank}.safetensors")
        torch.testing.assert_close(got["logits"], wanted, rtol=1e-4, atol=1e-4)
        mlp, mixer = got["rows"].tolist()
        assert 2 * mlp == len(layer.mlp.up_proj.weight)
        assert mixer == len(layer.self_attn.flex_ma.q_proj.weight)
