"""The Triton engine of the scan, forward: its scalars, then the states between chunks, then the output.

Equations as in `torch_engine`. `tiles` has what the kernels share.
"""

from __future__ import annotations

from ...engine.launch import rows_of
from ..operator import ScanInputs, ScanOutputs
from .output import scan_output
from .scalars import scan_scalars
from .states import sweep_states
from .tiles import chunk_size, token_dtype


def forward(inputs: ScanInputs) -> ScanOutputs:
    """The operator on Triton kernels."""
    dtype = token_dtype(inputs.x.dtype)
    x, B, C = (rows_of(tensor.to(dtype)) for tensor in (inputs.x, inputs.B, inputs.C))
    scalars = scan_scalars(inputs, chunk_size(dtype))
    decays = (scalars.write_weight, scalars.chunk_decay, scalars.valid)
    states, final_state, _ = sweep_states(B, x, *decays, inputs.initial_state)
    y, y_before_norm = scan_output(inputs, x, B, C, scalars, states)
    return ScanOutputs(y, final_state[0], y_before_norm)
