"""Local-Swin of a split prompt: windows that a cut goes through, and the text window."""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference.sliding_window_attention import WindowState
from ...reference.student.context_parallel import ContextParallel
from ...reference.student.context_parallel.halos import pass_tails
from ...reference.student.context_parallel.ranks import wait
from ...reference.student.context_parallel.routes import Route
from ...reference.student.context_parallel.windows import find_holders
from ..layout.operator import WindowPlanInputs, window_plan
from ..projections import checked_angles, rotated
from ..sliding_window_attention import attend_spans, find_spans
from ..window_attention import planned_attention
from .swap import rows_of


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
        ids, destination, cut = find_holders(parallel, window_id)
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
        return self.parallel.start_all_to_all(leaving, self.route.receive_sizes, self.route.send_sizes)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, arriving: Tensor | None, engine: str | None) -> Tensor:
        """The heads (B, n, H, P) of all that this rank computes of its own; the rest is on its way back."""
        output = planned_attention(q, k, v, self.whole, self.whole_plan, engine=engine)
        if not self.moves:
            return output
        came = wait(arriving).split([rows_of(each).shape[1] for each in (q, k, v)], 1)
        joined = [
            torch.cat([rows_of(each)[self.held], new]).view(1, -1, *each.shape[2:])
            for each, new in zip((q, k, v), came, strict=True)
        ]
        computed = joined[0]
        if self.joined_plan is not None:
            computed = planned_attention(*joined, self.joined, self.joined_plan, engine=engine)
        kept, back = rows_of(computed).tensor_split([len(self.held)])
        rows_of(output).index_copy_(0, self.held, kept)
        self.back = self.parallel.start_all_to_all(back, self.route.send_sizes, self.route.receive_sizes)
        return output

    def arrive_back(self, output: Tensor) -> None:
        """Write what others computed of this rank's tokens."""
        if self.moves:
            rows_of(output).index_copy_(0, self.route.send, wait(self.back))
            self.back = None
