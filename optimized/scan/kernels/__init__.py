"""The Triton engine of the scan, forward: its scalars, then the states between chunks, then the output.

Equations as in `torch_engine`. `tiles` has what the kernels share.
"""

from __future__ import annotations

from torch import Tensor

from ...engine.launch import rows_of
from ..operator import ScanInputs, ScanOutputs
from ..two_steps import Begun
from .output import scan_output
from .scalars import Scalars, scan_scalars
from .states import enter_states, sweep_states
from .tiles import chunk_size, token_dtype


def forward(inputs: ScanInputs) -> ScanOutputs:
    """The operator on Triton kernels."""
    tokens, scalars, states, final_state = swept(inputs)
    y, y_before_norm = scan_output(inputs, *tokens, scalars, states)
    return ScanOutputs(y, final_state[0], y_before_norm)


def begin(inputs: ScanInputs) -> Begun:
    """`two_steps.begin` on Triton kernels."""
    tokens, scalars, states, final_state = swept(inputs)
    return Begun(inputs, final_state, scalars.chunk_decay.prod(2), (tokens, scalars, states))


def finish(inputs: ScanInputs, begun: Begun, entering: list[Tensor | None]) -> Tensor:
    """`two_steps.finish` on Triton kernels."""
    tokens, scalars, states = begun.kept
    for direction, state in enumerate(entering):
        if state is not None:
            enter_states(states[direction], scalars.chunk_decay[direction], state, reverse=direction == 1)
    return scan_output(inputs, *tokens, scalars, states)[0]


def swept(inputs: ScanInputs) -> tuple[list[Tensor], Scalars, Tensor, Tensor]:
    """x, B and C as kernels take them, their scalars, the states that chunks receive, and the last ones."""
    dtype = token_dtype(inputs.x.dtype)
    x, B, C = (rows_of(tensor.to(dtype)) for tensor in (inputs.x, inputs.B, inputs.C))
    scalars = scan_scalars(inputs, chunk_size(dtype))
    decays = (scalars.write_weight, scalars.chunk_decay, scalars.valid)
    states, final_state, _ = sweep_states(B, x, *decays, inputs.initial_state)
    return [x, B, C], scalars, states, final_state
