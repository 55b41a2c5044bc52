"""The Triton engine of the scan, backward: norm, states both ways, readers, writers, at last the scalars.

Equations as in `torch_engine.backward`. Chunks, scalars and states are recomputed as in the forward pass.
"""

from __future__ import annotations

from ...engine.launch import rows_of
from ..kernels.scalars import scan_scalars
from ..kernels.states import sweep_states
from ..kernels.tiles import gradient_chunk_size, token_dtype
from ..operator import ScanGrads, ScanInputs, ScanOutputs
from ..torch_engine.norm import in_scan_order, y_grad_of
from .norm import norm_backward
from .readers import read_gradients
from .scalars import scalar_gradients
from .writers import write_gradients


def backward(inputs: ScanInputs, outputs: ScanOutputs, grads: ScanOutputs) -> ScanGrads:
    """The gradients of the operator on Triton kernels."""
    y_grad, weight_grad = y_grad_of(inputs, grads), None
    if inputs.norm_weight is None:
        y_grad = in_scan_order(y_grad, inputs.order)
    else:
        y_grad, weight_grad = norm_backward(inputs, outputs.y_before_norm, y_grad)
    dtype = token_dtype(inputs.x.dtype)
    x, B, C, y_grad = (rows_of(tensor.to(dtype)) for tensor in (inputs.x, inputs.B, inputs.C, y_grad))
    scalars = scan_scalars(inputs, gradient_chunk_size(dtype))
    decay, valid = scalars.chunk_decay, scalars.valid
    states, _, _ = sweep_states(B, x, scalars.write_weight, decay, valid, inputs.initial_state)
    state_grads, initial_grad, products = sweep_states(
        C, y_grad, scalars.gated_read, decay, valid, grads.final_state, reverse=True, partner=states
    )
    read = read_gradients(x, B, C, y_grad, scalars, states)
    written = write_gradients(x, B, C, y_grad, scalars, inputs.D, state_grads)
    dt_grad, rate_grad, gate_grad = scalar_gradients(inputs.A, scalars, read, written, products, x.shape[1])
    return ScanGrads(
        x=written["X_GRAD"],
        dt=dt_grad,
        A=rate_grad,
        B=written["B_GRAD"],
        C=read["C_GRAD"],
        gate=gate_grad,
        D=None if inputs.D is None else read["SKIP_GRAD"].sum((0, 1, 3)),
        initial_state=None if inputs.initial_state is None else initial_grad[0],
        norm_weight=weight_grad,
    )
