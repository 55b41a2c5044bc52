"""M-MATE of a prompt that is split over processes, without gradients, in as few passes as in one process.

Letters: B batch, n tokens of this rank, D width, H heads. Numbers are those of the reference's `m_mate`; what
differs is how often tokens are read. Those that the scan order takes to another rank are exchanged in place,
and the convolution and the scan read and write by the order of what is there. States enter between the scan's
two steps, so its norm stays part of it. Windows that no cut goes through are computed where they are. An
exchange is under way while what does not need it is computed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.flex_ma import FlexMAState
from ..reference.m_mate import MMATEState
from ..reference.numerics import accumulation_dtype, zero_where_masked
from ..reference.sliding_window_attention import WindowState
from ..reference.student.context_parallel import ContextParallel
from ..reference.student.context_parallel.halos import find_tail, pass_on, pass_tails
from ..reference.student.context_parallel.ranks import waited
from ..reference.student.context_parallel.routes import Route, in_order
from ..reference.student.context_parallel.scan import cuts, hand_on, send_states
from ..reference.student.context_parallel.windows import holders
from .elementwise.operator import MixInputs, mix_branches
from .engine import engine_of_block
from .layout import VisionLayout, fast, permute_tokens, rows_where
from .layout.operator import WindowPlanInputs, window_plan
from .layout.segments import openings, vision_mask
from .projections import checked_angles, narrow_columns, rotated
from .scan import ScanInputs
from .scan.two_steps import Begun, begin, finish
from .sliding_window_attention import attend_spans, find_spans
from .window_attention import planned_attention

Angles = tuple[Tensor, Tensor] | None


def m_mate(
    parallel: ContextParallel,
    block,
    u: Tensor,
    layout: VisionLayout | None,
    valid: Tensor | None,
    angles: Angles,
    state: MMATEState | None,
) -> tuple[Tensor, MMATEState]:
    """`context_parallel.m_mate`, of rows that are one sample each."""
    layout, engine = fast(layout), engine_of_block("MMATE", u, block.config.head_dim)
    flex = FlexMAPart(parallel, block, u, layout, valid, angles, engine)
    has_local = layout is not None or block.config.text_window > 0
    local = LocalPart(parallel, block.local_swin, u, layout, valid, angles, engine) if has_local else None
    before = (None, None, None) if state is None else (state.conv, state.scan, state.window)
    flex.scan(before[0])
    if local is not None:
        local.attend(before[2])
    y, after = flex.finish(before[1])
    if local is None:
        return flex.project_out(y, u), MMATEState(*after, before[2])
    near, window = local.project_out()
    y = flex.project_out(y, u)
    mixes = valid if block.config.text_window else layout.is_vision
    row = parallel.once("mixed rows", lambda: rows_where(parallel.local_or_none(mixes), u))
    return mix_branches(MixInputs(y, near, flex.mix, row, engine)), MMATEState(*after, window)


class Swap:
    """Tokens exchanged in place: those that come take the room of those that leave, row by row.

    Args:
        route: to an order of which every rank holds as many tokens of each row as it does now.
        batch: B.

    Attributes:
        order: (B, n) int64, where in its row the token of each place of this rank's part of the order stands.
    """

    def __init__(self, route: Route, batch: int) -> None:
        self.route, self.parallel = route, route.parallel
        length = len(route.to_home) // batch
        self.room = torch.empty_like(route.send)  # of each token that comes, as they arrive
        self.room[route.receive.argsort()] = route.send.sort().values
        place = route.from_home.index_copy(0, route.receive, self.room).view(batch, length)
        self.order = place - torch.arange(batch, device=place.device)[:, None] * length

    def sent(self, tensors: list[Tensor]) -> Tensor:
        """The exchange of (B, n, ...) each, of one dtype, under way."""
        route = self.route
        leaving = torch.cat([rows_of(tensor)[route.send] for tensor in tensors], 1)
        return self.parallel.sent(leaving, route.receive_sizes, route.send_sizes)

    def arrive(self, tensors: list[Tensor], arriving: Tensor) -> None:
        """Write into the tensors what `sent` of them brings."""
        widths = [rows_of(tensor).shape[1] for tensor in tensors]
        for tensor, new in zip(tensors, waited(arriving).split(widths, 1), strict=True):
            rows_of(tensor).index_copy_(0, self.room, new)

    def sent_back(self, tensor: Tensor) -> Tensor:
        """The exchange the other way."""
        leaving = rows_of(tensor)[self.room]
        return self.parallel.sent(leaving, self.route.send_sizes, self.route.receive_sizes)

    def arrive_back(self, tensor: Tensor, arriving: Tensor) -> None:
        """Write into the tensor what `sent_back` of it brings."""
        rows_of(tensor).index_copy_(0, self.route.send, waited(arriving))


def rows_of(tensor: Tensor) -> Tensor:
    """(B, n, ...) -> (B·n, ·), the same memory."""
    return tensor.view(tensor.shape[0] * tensor.shape[1], math.prod(tensor.shape[2:]))


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
        route = in_order(parallel, order)
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
        states = pass_on(self.parallel, [tail], self.valid, [before], before is not None)
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
        forward, reverse = hand_on(parallel, begun.added, begun.decay, scan_start, self.states)
        first, last = parallel.rank == 0, parallel.rank + 1 == parallel.ranks
        entering = [None if first and scan_start is None else forward[parallel.rank]]
        if reverse is not None:
            segment = self.layout.segment
            is_cut = parallel.once("cuts", lambda: cuts(parallel, segment))[1]
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


class LocalPart:
    """`LocalSwin.attend` of this rank's tokens."""

    def __init__(self, parallel: ContextParallel, swin, u, layout, valid, angles, engine) -> None:
        self.parallel, self.swin, self.layout, self.valid, self.engine = parallel, swin, layout, valid, engine
        q, k, v = swin.project_heads(u)
        q, k = (rotated(each, checked_angles(each, angles), engine=engine) for each in (q, k))
        self.qkv, self.cut = [q, k, v], None
        if layout is not None:
            sizes, layer = swin.config.window_thw, swin.layer_index
            key = ("cut windows", sizes, layer % 2)
            self.cut = parallel.once(key, lambda: CutWindows(parallel, layout.windows(sizes, layer)))
            self.arriving = self.cut.sent(self.qkv)

    def attend(self, state: WindowState | None) -> None:
        """The heads of the windows and of the text."""
        (q, k, v), parallel, window = self.qkv, self.parallel, self.swin.config.text_window
        self.window, output = state, None
        if self.cut is not None:
            output = self.cut.attend(q, k, v, self.arriving, self.engine)
        if window:
            asks = None if self.layout is None else ~parallel.local(self.layout.is_vision)
            before = None
            if window > 1:
                states = (None, None) if state is None else (state.k, state.v)
                present = False if state is None else state.present
                passed = pass_tails(parallel, [k, v], self.valid, window - 1, states, present)
                before, self.window = (WindowState(*kept, there) for kept, there in passed)
            spans = parallel.once(
                ("spans", window),
                lambda: find_spans(
                    window,
                    q.shape[1],
                    asks,
                    parallel.local_or_none(self.valid),
                    None,
                    None if before is None else before.present,
                ),
            )
            given = {"initial_state": before, "engine": self.engine}
            near, end = attend_spans(q, k, v, window, spans, **given)
            self.window = end if window == 1 else self.window
            output = near if output is None else output.add_(near)  # each is 0 where the other is not
        self.qkv, self.output = None, output

    def project_out(self) -> tuple[Tensor, WindowState | None]:
        """(B, n, D), and the state after the prompt."""
        if self.cut is not None:
            self.cut.arrive_back(self.output)
        window = self.window
        window = None if window is None else WindowState(*(tensor.clone() for tensor in window))
        return self.swin.o_proj(self.output.flatten(2)), window


class CutWindows:
    """Window attention where a rank computes the whole windows it holds, and cut ones where they begin."""

    def __init__(self, parallel: ContextParallel, window_id: Tensor) -> None:
        ids, destination, cut = holders(parallel, window_id)
        self.parallel, self.moves = parallel, bool(cut.any())
        self.route = route = Route(
            destination, torch.arange(ids.numel(), device=ids.device).view_as(ids), parallel
        )
        mine, is_cut = parallel.local(ids), parallel.local(cut)
        self.whole = torch.where(is_cut, -1, mine)
        self.whole_plan = window_plan(WindowPlanInputs(self.whole))
        stays = is_cut & (parallel.local(destination) == parallel.rank)
        self.held = stays.flatten().nonzero().squeeze(1)  # this rank's tokens of the windows that begin here
        there = route.of_prompt(ids)[route.receive]
        self.joined = torch.cat([mine.flatten()[self.held], there])[None]
        self.joined_plan = window_plan(WindowPlanInputs(self.joined)) if self.joined.numel() else None

    def sent(self, qkv: list[Tensor]) -> Tensor | None:
        """The exchange of what is in windows that begin on other ranks, under way."""
        if not self.moves:
            return None
        leaving = torch.cat([rows_of(each)[self.route.send] for each in qkv], 1)
        return self.parallel.sent(leaving, self.route.receive_sizes, self.route.send_sizes)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, arriving: Tensor | None, engine: str | None) -> Tensor:
        """The heads (B, n, H, P) of all that this rank computes of its own; the rest is on its way back."""
        output = planned_attention(q, k, v, self.whole, self.whole_plan, engine=engine)
        if not self.moves:
            return output
        came = waited(arriving).split([rows_of(each).shape[1] for each in (q, k, v)], 1)
        joined = [
            torch.cat([rows_of(each)[self.held], new]).view(1, -1, *each.shape[2:])
            for each, new in zip((q, k, v), came, strict=True)
        ]
        computed = joined[0]
        if self.joined_plan is not None:
            computed = planned_attention(*joined, self.joined, self.joined_plan, engine=engine)
        kept, back = rows_of(computed).tensor_split([len(self.held)])
        rows_of(output).index_copy_(0, self.held, kept)
        self.back = self.parallel.sent(back, self.route.send_sizes, self.route.receive_sizes)
        return output

    def arrive_back(self, output: Tensor) -> None:
        """Write what others computed of this rank's tokens."""
        if self.moves:
            rows_of(output).index_copy_(0, self.route.send, waited(self.back))
            self.back = None
