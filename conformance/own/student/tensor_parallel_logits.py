"""Two processes open students with a tensor-parallel plan; logits, and what was split, go to a folder.

CUDA_VISIBLE_DEVICES= python tensor_parallel_logits.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from linmu import optimized

from ..ranks import run_ranks
from .tiny_families import BUILDERS, Tiny

FAMILIES = ("llama", "qwen2_5_vl")


def prompt(tiny: Tiny) -> dict[str, torch.Tensor]:
    return tiny.inputs("see {wide} now" if tiny.image else "see you", "and text")


def rows(tensor: torch.Tensor) -> int:
    """Of this process's own part."""
    return len(tensor.to_local() if isinstance(tensor, DTensor) else tensor)


@torch.no_grad()
def write_logits(folder: Path) -> None:
    """What each process does."""
    dist.init_process_group("gloo")
    for family in FAMILIES:
        student = optimized.load(folder / family, tp_plan="auto")
        logits = student(**prompt(BUILDERS[family]()), use_cache=False).logits
        logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
        layer = student.get_decoder().layers[0]
        split = torch.tensor([rows(layer.mlp.up_proj.weight), rows(layer.self_attn.flex_ma.q_proj.weight)])
        save_file(
            {"logits": logits.contiguous(), "rows": split}, folder / f"{family}-{dist.get_rank()}.safetensors"
        )
    dist.barrier()


if __name__ == "__main__":
    run_ranks(2, Path(sys.argv[1]), write_logits, Path(sys.argv[1]))
