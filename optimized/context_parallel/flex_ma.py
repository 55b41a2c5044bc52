"""Flex-MA of a split prompt: what the scan order moves, the states that enter, and the way back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.flex_ma import FlexMAState
from ...reference.numerics import accumulation_dtype, zero_where_masked
from ...reference.student.context_parallel import ContextParallel
from ...reference.student.context_parallel.halos import find_tail, pass_found_tails
from ...reference.student.context_parallel.routes import route_to_scan
from ...reference.student.context_parallel.scan import find_cuts, receive_states, send_states
from ..layout import permute_tokens
from ..layout.segments import openings, vision_mask
from ..projections import narrow_columns
from ..scan import ScanInputs
from ..scan.two_steps import Begun, begin, finish
from .swap import Swap


class FlexMAPart:
    """`FlexMA.heads` of this rank's tokens, and the mix's product."""

    def __init__(self, parallel: ContextParallel, block, u, layout, valid, angles, engine) -> None:
        flex = block.flex_ma
        self.parallel, self.flex, self.layout, self.valid, self.engine = parallel, flex, layout, valid, engine
        C, B, x = flex.project_heads(u)
        C, B = flex.rotate(C, B, angles, engine)
        self.xBC = [each.contiguous() for each in (x, B, C)]
        self.has_gate = layout is not None and flex.config.reverse_scan
        linears = [flex.dt_proj, flex.scan_gate_proj] if self.has_gate else [flex.dt_proj]
        if layout is not None or block.config.text_window:
            rates, self.mix = narrow_columns(u, [*linears, block.mix_proj]).tensor_split([-1], dim=-1)
        else:
            rates = narrow_columns(u, linears)
        self.rates = rates.contiguous()
        self.order = self.swap = self.arriving = None
        if layout is not None:
            layer = flex.order_layer
            self.order, self.swap = parallel.once(("scan order", layer % 4), lambda: self.way_to(layer))
        if self.swap is not None:
            self.arriving = self.swap.sent(self.moved)

    def way_to(self, layer: int) -> tuple[Tensor | None, Swap | None]:
        """The order in which this rank's tokens are read, and what is exchanged before; None = neither."""
        parallel, order = self.parallel, self.layout.order(layer)
        route = route_to_scan(parallel, order)
        if route is None:
            return None, None
        swap = Swap(route, len(order))
        edges = [parallel.owner[order] != parallel.owner]
        return swap.order, swap if bool(torch.stack(edges).any()) else None

    @property
    def moved(self) -> list[Tensor]:
        """What goes to the scan, in one dtype: the rates are float32, and go as numbers of half the width."""
        return [*self.xBC, self.rates.view(self.xBC[0].dtype)]

    def scan(self, conv_start: Tensor | None) -> None:
        """The convolution, and the scan's first step."""
        parallel, flex, valid = self.parallel, self.flex, self.parallel.local_or_none(self.valid)
        if self.swap is not None:
            self.swap.arrive(self.moved, self.arriving)
        start, self.conv_state = self.convolution_states(conv_start)
        before = FlexMAState(start, None)
        (x, B, C), _ = flex.convolve_in_order(*self.xBC, valid, before, self.order, None, self.engine)
        rates = self.rates if self.order is None else permute_tokens(self.rates, self.order)
        rate, gate_rate = rates.tensor_split([flex.config.heads], dim=-1)
        dt, segment = F.softplus(rate), self.layout.segment if self.has_gate else None
        inputs = ScanInputs(
            x,
            dt,
            flex.decay_rate(dt.dtype),
            B,
            C,
            gate=torch.sigmoid(gate_rate) if self.has_gate else None,
            segment=None if segment is None else parallel.local(segment).contiguous(),
            valid=valid,
            D=flex.D,
            order=self.order,
            openings=None if segment is None else parallel.once("openings", self.openings),
            norm_weight=flex.norm_weight if flex.config.head_norm else None,
            eps=flex.config.norm_eps,
            engine=self.engine,
        )
        self.begun: Begun = begin(inputs)
        self.xBC = self.rates = None
        self.states = send_states(parallel, self.begun.added, self.begun.decay)

    def convolution_states(self, before: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """The convolution's states before this rank's tokens, and after the prompt: (B, K-1, channels)."""
        x, taps = self.xBC[0], self.flex.config.conv_kernel
        if taps <= 1:
            shape = (len(x), 0, self.flex.config.conv_channels)
            return (before, before) if before is not None else (None, x.new_zeros(shape))
        place, found = self.parallel.once(
            ("tail", taps - 1), lambda: find_tail(self.parallel, self.valid, taps - 1, len(x))
        )
        token = place if self.order is None else self.order.gather(1, place.clamp(min=0))
        rows, scales = torch.arange(len(x), device=x.device)[:, None], (1, 1, self.flex.config.head_dim**-0.5)
        tails = (each[rows, token].flatten(2) * scale for each, scale in zip(self.xBC, scales, strict=True))
        tail = zero_where_masked(torch.cat([*tails], 2).to(accumulation_dtype(x.dtype)), found[..., None])
        states = pass_found_tails(self.parallel, [tail], self.valid, [before], before is not None)
        return states[0][0][0], states[1][0][0]

    def openings(self) -> Tensor:
        """Where segments open among this rank's tokens, and the one that does behind them."""
        segment, parallel = self.layout.segment, self.parallel
        segment = torch.where(vision_mask(segment, self.valid), segment, -1)
        behind = F.pad(segment[:, parallel.slice.stop :], (0, 1), value=-1)
        after = behind.gather(1, (behind >= 0).int().argmax(1, keepdim=True))[:, 0]
        return openings(parallel.local(segment), after)

    def finish(self, scan_start: Tensor | None) -> tuple[Tensor, FlexMAState]:
        """The heads (B, n, H·P), on their way back, and the state after the prompt."""
        parallel, begun = self.parallel, self.begun
        forward, reverse = receive_states(parallel, begun.added, begun.decay, scan_start, self.states)
        first, last = parallel.rank == 0, parallel.rank + 1 == parallel.ranks
        entering = [None if first and scan_start is None else forward[parallel.rank]]
        if reverse is not None:
            segment = self.layout.segment
            is_cut = parallel.once("cuts", lambda: find_cuts(parallel, segment))[1]
            entering.append(reverse[parallel.rank + 1] if is_cut and not last else None)
        y, self.begun = finish(begun, entering), None
        if self.swap is not None:
            self.arriving = self.swap.sent_back(y)
        return y, FlexMAState(self.conv_state.clone(), forward[-1].clone())

    def project_out(self, y: Tensor, u: Tensor) -> Tensor:
        """The rest of eq. (5): (B, n, D)."""
        if self.swap is not None:
            self.swap.arrive_back(y, self.arriving)
        y = y.flatten(2)
        if self.flex.config.output_gate:
            y = y * F.silu(self.flex.z_proj(u))
        return self.flex.o_proj(y)
