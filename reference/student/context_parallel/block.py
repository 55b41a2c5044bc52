"""An M-MATE block over a split prompt: `MMATE.forward`, with the operators of this folder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import require
from ...flex_ma import FlexMA, FlexMAState
from ...layout import VisionLayout, samples_of
from ...m_mate import MMATE, MMATEState
from ...sliding_window_attention import WindowState
from .halos import causal_conv, sliding_window_attention
from .ranks import ContextParallel
from .routes import route_to_scan
from .scan import bidirectional_scan
from .windows import window_attention


def m_mate(
    parallel: ContextParallel,
    block: MMATE,
    u: Tensor,
    layout: VisionLayout | None = None,
    *,
    valid: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    state: MMATEState | None = None,
    sequence: Tensor | None = None,
) -> tuple[Tensor, MMATEState]:
    """`MMATE.forward` of this rank's tokens.

    Args:
        block: the reference's or the optimized one; its parameters are used, by the operators of `parallel`.
        u: (B, n, D), this rank's.
        layout, valid: of the whole prompt, L tokens.
        position_embeddings: (cos, sin), each (B or 1, n, N), this rank's.
        state: the state before the prompt, the same on every rank; of packed rows None.
        sequence: (B, L) int64, the samples of packed rows, where no layout says them; None = one a row.
    Returns:
        This rank's (B, n, D), and the state after the whole prompt, the same on every rank.
    """
    config = block.config
    sequence = samples_of("context_parallel.m_mate", layout, sequence)
    must = "packed rows must have no state before them"
    require(sequence is None or state is None, "context_parallel.m_mate", must, "a state")
    if parallel.operators.m_mate is not None and sequence is None and not torch.is_grad_enabled():
        return parallel.operators.m_mate(parallel, block, u, layout, valid, position_embeddings, state)
    given = {"sequence": sequence}
    y, after = flex_ma(parallel, block.flex_ma, u, layout, valid, position_embeddings, state, **given)
    window = None if state is None else state.window
    if layout is not None or config.text_window:
        rest = (layout, valid, position_embeddings, window)
        local, window = local_swin(parallel, block.local_swin, u, *rest, **given)
        mixes = valid if config.text_window else layout.is_vision
        mixes = None if mixes is None else parallel.local(mixes)
        (logit,) = parallel.operators.narrow_products(u, [block.mix_proj])
        y = parallel.operators.mix_branches(y, local, logit, mixes)
    conv, scan = (tensor.clone() for tensor in after)  # no views of what all ranks sent
    window = None if window is None else WindowState(*(tensor.clone() for tensor in window))
    return y, MMATEState(conv, scan, window)


def flex_ma(
    parallel: ContextParallel, flex, u, layout, valid, position_embeddings, state, sequence=None
) -> tuple[Tensor, FlexMAState]:
    """`FlexMA.forward` of this rank's tokens; arguments as for `m_mate`."""
    xBC, dt, gate = project(parallel, flex, u, position_embeddings)
    route = None
    if layout is not None:
        layer = flex.order_layer
        route = parallel.once(("order", layer % 4), lambda: route_to_scan(parallel, layout.order(layer)))
    if route is not None:
        (xBC,), (rates,) = route.there(xBC), route.there(torch.cat([dt, gate], -1))
        xBC, rates = (each.unflatten(0, (len(u), -1)) for each in (xBC, rates))
        dt, gate = rates.chunk(2, -1)
    conv_start, scan_start = (None, None) if state is None else (state.conv, state.scan)
    conv_state = xBC.new_zeros(len(u), 0, xBC.shape[2])
    if flex.config.conv_kernel:
        weights = (flex.conv_weight, flex.conv_bias)
        given = {"mask": valid, "initial_state": conv_start, "sequence": sequence}
        xBC, conv_state = causal_conv(parallel, xBC, *weights, **given)
    x, B, C = FlexMA.split(flex, xBC)
    A = -torch.exp(flex.A_log.to(dt.dtype))
    has_reverse = layout is not None and flex.config.reverse_scan
    segment = layout.segment if has_reverse else None
    y, scan_state = bidirectional_scan(
        parallel,
        x,
        dt,
        A,
        B,
        C,
        gate=gate,
        segment=segment,
        valid=valid,
        D=flex.D,
        initial_state=scan_start,
        sequence=sequence,
    )
    if route is not None:
        y = route.back(y.flatten(0, 1))
    return FlexMA.project_out(flex, y, u), FlexMAState(conv_state, scan_state)


def project(parallel: ContextParallel, flex, u: Tensor, position_embeddings) -> tuple[Tensor, Tensor, Tensor]:
    """`FlexMA.project` by the operators of `parallel`."""
    C, B, x = flex.project_heads(u)
    if flex.config.scan_rope:
        C, B = (parallel.operators.apply_rope(each, position_embeddings) for each in (C, B))
    C = C * flex.config.head_dim**-0.5
    xBC = torch.cat([tensor.flatten(2) for tensor in (x, B, C)], dim=-1)
    linears = [flex.dt_proj] if flex.config.text_only else [flex.dt_proj, flex.scan_gate_proj]
    rates = parallel.operators.narrow_products(u, linears)
    dt = F.softplus(rates[0])
    return xBC, dt, torch.full_like(dt, 0.5) if flex.config.text_only else torch.sigmoid(rates[1])


def local_swin(parallel: ContextParallel, swin, u, layout, valid, position_embeddings, state, sequence=None):
    """`LocalSwin.forward` of this rank's tokens; arguments as for `m_mate`."""
    q, k, v = swin.project_heads(u)
    q, k = (parallel.operators.apply_rope(each, position_embeddings) for each in (q, k))
    mixed, takes_part = 0, None
    if layout is not None:
        sizes, layer = swin.config.window_thw, swin.layer_index
        windows, key = layout.windows(sizes, layer), ("windows", sizes, layer % 2)
        mixed, takes_part = window_attention(parallel, q, k, v, windows, key=key), layout.is_vision
    if swin.config.text_window:
        asks = None if layout is None else ~layout.is_vision
        given = {"asks": asks, "valid": valid, "initial_state": state, "sequence": sequence}
        near, state = sliding_window_attention(parallel, q, k, v, swin.config.text_window, **given)
        mixed, takes_part = mixed + near, valid
    output = swin.o_proj(mixed.flatten(2))
    if takes_part is not None:
        output = output * parallel.local(takes_part)[..., None]
    return output, state
