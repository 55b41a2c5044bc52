"""Which engine runs an operator: Triton kernels, or torch in chunks and batches; said once, never silent.

Unless one is forced, tensors on CUDA go to the Triton kernels, and so do tensors on a CPU under
TRITON_INTERPRET=1; everything else goes to torch. `LINMU_ENGINE=triton|torch` or `set_engine` forces one of
the two, and forcing one that cannot run here is an error that says why.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache

import torch
from torch import Tensor

from ...reference.checks import require
from .launch import properties
from .torch_state import is_observed

ENGINES = ("triton", "torch")
MAX_HEAD_DIM = 128  # larger tiles do not fit a multiprocessor's registers
MAX_HEAD_DIMS = {"sliding_window_attention": 256}  # where they do
OLDEST_CAPABILITY = (8, 0)  # the first with bfloat16 tensor cores

_forced: str | None = None
_announced: set[str] = set()
_interpreter_computes_bfloat16 = False


def set_engine(name: str | None) -> None:
    """Force an engine for all operators of this process; None goes back to choosing by device.

    Raises:
        ValueError: if `name` is neither "triton", "torch" nor None.
    """
    global _forced
    _forced = None if name is None else checked("set_engine", name)


def get_engine(device: torch.device | str | None = None) -> str:
    """The engine that float32 tensors on `device` go to; None = CUDA if there is one, else the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return wanted_engine() or ("torch" if obstacle(torch.device(device)) else "triton")


def wanted_engine() -> str | None:
    """What `set_engine` or else `LINMU_ENGINE` asks for; None = choose."""
    asked = os.environ.get("LINMU_ENGINE")
    return _forced or (checked("LINMU_ENGINE", asked) if asked else None)


def checked(where: str, name: str) -> str:
    """`name`, if it is an engine."""
    require(name in ENGINES, where, f"the engine must be one of {', '.join(ENGINES)}", repr(name))
    return name


def choose_engine(operator: str, tensor: Tensor, *head_dims: int) -> str:
    """The engine for one call.

    Args:
        operator: name of the operator.
        tensor: its main input: device and dtype count.
        head_dims: sizes that a kernel must hold in one tile.
    Returns:
        "triton" or "torch".
    Raises:
        RuntimeError: if Triton is forced and cannot run this call.
    """
    wanted = wanted_engine()
    if wanted == "torch":
        return announced("torch", operator, "forced")
    most = MAX_HEAD_DIMS.get(operator, MAX_HEAD_DIM)
    reason = obstacle(tensor.device, tensor.dtype, *head_dims, most=most)
    if reason is None:
        return announced("triton", operator, "tensors on", tensor.device)
    if wanted == "triton":
        raise RuntimeError(f"{operator}: the triton engine is forced and must be able to run, got: {reason}")
    return announced("torch", operator, reason)


def engine_of_block(where: str, tensor: Tensor, head_dim: int) -> str | None:
    """The engine of all operators of a module's call, asked for once.

    Args:
        where: the module.
        tensor: its input.
        head_dim: the largest size that a kernel must hold in one tile.
    Returns:
        "triton" or "torch"; None = every operator chooses its own, as where a compiler or a mode observes the
        call and tensors may have no memory.
    Raises:
        RuntimeError: if Triton is forced and cannot run this call.
    """
    if tensor.is_meta or is_observed():
        return None
    if not tensor.is_cuda and torch.is_autocast_enabled(tensor.device.type) and tensor.dtype != torch.float64:
        tensor = tensor.new_empty(0, dtype=torch.get_autocast_dtype(tensor.device.type))
    return choose_engine(where, tensor, head_dim)


def obstacle(
    device: torch.device, dtype: torch.dtype = torch.float32, *head_dims: int, most: int = MAX_HEAD_DIM
) -> str | None:
    """Why the Triton kernels cannot take such a tensor, or None if they can."""
    if not has_triton():
        return "triton is not installed"
    if dtype == torch.float64:
        return "the kernels accumulate in float32, and float64 asks for more"
    if head_dims and max(head_dims) > most:
        return f"the kernels hold head dims up to {most}, not {max(head_dims)}"
    if device.type == "cuda":
        gpu = properties(device)
        capability = (gpu.major, gpu.minor)
        too_old = capability < OLDEST_CAPABILITY
        return f"the kernels need compute capability 8.0, not {capability}" if too_old else None
    if device.type != "cpu":
        return f"there are no kernels for {device.type}"
    return interpreter_obstacle(dtype)


@cache
def has_triton() -> bool:
    """Whether it is installed; looked for once, as every call of an operator asks."""
    return importlib.util.find_spec("triton") is not None


def interpreter_obstacle(dtype: torch.dtype) -> str | None:
    """Why Triton's interpreter cannot take the place of a GPU, or None if it can."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on the CPU and TRITON_INTERPRET is not 1"
    if dtype == torch.bfloat16 and not _interpreter_computes_bfloat16:
        return "Triton's interpreter multiplies the bits of bfloat16, not its values"
    return None


def allow_interpreter_bfloat16() -> None:
    """Send bfloat16 to Triton's interpreter in this process: for those who have mended its arithmetic."""
    global _interpreter_computes_bfloat16
    _interpreter_computes_bfloat16 = True


def announced(engine: str, operator: str, *reason: object) -> str:
    """`engine`, said on stderr the first time it is used."""
    if engine not in _announced:
        say_once(engine, f"{engine} engine from {operator} on ({' '.join(map(str, reason))})")
    return engine


def say_once(topic: str, line: str) -> None:
    """Print a line on stderr, the first time that its topic comes up."""
    if topic not in _announced:
        _announced.add(topic)
        print(f"linmu.optimized: {line}", file=sys.stderr)
