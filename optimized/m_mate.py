"""`reference/m_mate.py` on the fast branches: same constructor, parameters, names and results.

Letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from linmu import reference

from ..reference.m_mate import MMATEState
from ..reference.sliding_window_attention import WindowState
from .elementwise.operator import MixInputs, mix_branches
from .engine import engine_of_block
from .engine.beside import Fork
from .engine.torch_state import has_no_hooks
from .flex_ma import FlexMA, PooledState, prepare_decay_rates
from .layout import VisionLayout, fast, rows_where
from .local_swin import LocalSwin
from .projections import (
    MOST_ROWS,
    are_plain,
    narrow_columns,
    narrow_products,
    prepare_narrow,
    scaled_output,
    takes_token_output,
    token_output,
    token_products,
)
from .sliding_window_attention import PooledWindowState

__all__ = ["MMATE", "MMATEState", "PooledMMATEState"]


class PooledMMATEState(NamedTuple):
    """As `PooledState`, with the text window's, in a pool unless it is empty; None = it has none."""

    conv: Tensor | None
    scan: Tensor
    rows: Tensor
    turn: Tensor
    window: WindowState | PooledWindowState | None

    @property
    def flex_ma(self) -> PooledState:
        """Flex-MA's part."""
        return PooledState(self.conv, self.scan, self.rows, self.turn)


class MMATE(reference.MMATE):
    """The M-MATE block: `linmu.reference.MMATE`, the same state dict."""

    flex_ma_class = FlexMA
    local_swin_class = LocalSwin

    def forward(
        self,
        hidden_states: Tensor,
        layout: VisionLayout | None = None,
        *,
        valid: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        state: MMATEState | None = None,
        sequence: Tensor | None = None,
    ) -> tuple[Tensor, MMATEState]:
        """`linmu.reference.MMATE.forward`: arguments, result and errors are the same.

        Both branches' outputs are mixed in one pass. One output product over both branches' heads, scaled
        before it, would read and write as many bytes per token, and could not be adapted by branch; for one
        token of text, which waits for weights alone, it is made where modules are plain.
        """
        flex_ma, local_swin, angles = self.flex_ma, getattr(self, "local_swin", None), position_embeddings
        before, window = (None, None) if state is None else (state.flex_ma, state.window)
        if layout is None or not self.runs_in_parts():
            given = {"valid": valid, "position_embeddings": angles, "sequence": sequence}
            has_local = layout is not None or self.config.text_window > 0
            products = self.token_products(hidden_states, layout, state)
            if self.makes_output_at_once(hidden_states, layout, state):
                return self.step_at_once(hidden_states, valid, angles, state, sequence, products)
            fork = Fork(has_local and self.may_fork())
            if products is None:
                y, after = flex_ma(hidden_states, layout, state=before, **given)
            else:
                of_flex, of_local = products
                engine = engine_of_block("FlexMA", hidden_states, self.config.head_dim)
                y, after = flex_ma.text_step(hidden_states, valid, angles, before, engine, of_flex)
                y = flex_ma.o_proj(y)
            if not has_local:
                return y, MMATEState(*after, window)
            if is_own(local_swin, LocalSwin):
                engine = engine_of_block("LocalSwin", hidden_states, self.config.head_dim)
                vkq = mix = None
                with fork.second():
                    if products is not None:
                        vkq, mix = of_local
                    elif layout is None:
                        vkq, mix = local_swin.project_token(hidden_states, self.mix_proj, window, engine)
                    rest = (layout, valid, angles, window, sequence, engine, vkq)
                    local, row, window = local_swin.attend(hidden_states, *rest)
                    local = local_swin.o_proj(local)
            else:
                local, window = local_swin(hidden_states, layout, state=window, **given)
                engine, row, mix = None, self.mixed_rows(y, layout, valid), None
            if mix is None:
                (mix,) = narrow_products(hidden_states, [self.mix_proj])
            fork.join()
        else:
            engine = engine_of_block("MMATE", hidden_states, self.config.head_dim)
            linears = [flex_ma.dt_proj, flex_ma.scan_gate_proj, self.mix_proj]
            rates, mix = narrow_columns(hidden_states, linears).tensor_split([-1], dim=-1)
            given, fork = (hidden_states, layout, valid, angles), Fork(self.may_fork())
            y, after = flex_ma.heads(*given, before, sequence, engine, rates)
            y = flex_ma.o_proj(y)
            with fork.second():
                local, row, window = local_swin.attend(*given, window, sequence, engine)
                local = local_swin.o_proj(local)
            fork.join()
        return mix_branches(MixInputs(y, local, mix, row, engine)), MMATEState(*after, window)

    def step_at_once(
        self,
        u: Tensor,
        valid: Tensor | None,
        angles: tuple[Tensor, Tensor] | None,
        state: MMATEState,
        sequence: Tensor | None,
        products: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    ) -> tuple[Tensor, MMATEState]:
        """`forward` of one token of text whose output is one product; `products` are `token_products`."""
        flex_ma, local_swin, window = self.flex_ma, self.local_swin, state.window
        flex_ma.check_inputs(u, None, valid, sequence)
        engine = engine_of_block("MMATE", u, self.config.head_dim)
        of_flex, (vkq, mix) = products or (None, (None, None))
        heads, (into_flex, into_local) = None, (None, None)
        if products is not None and len(u) > MOST_ROWS and isinstance(window, PooledWindowState):
            # the kernels scale what they write, and write it side by side
            heads = u.new_empty(len(u), 2, self.config.heads * self.config.head_dim)
            into_flex, into_local = ((mix[:, 0], each) for each in heads.unbind(1))
        fork = Fork(self.may_fork())
        y, after = flex_ma.text_step(u, valid, angles, state.flex_ma, engine, of_flex, into_flex)
        with fork.second():
            if vkq is None:
                vkq, mix = local_swin.project_token(u, self.mix_proj, window, engine)
            rest = (None, valid, angles, window, sequence, engine, vkq, into_local)
            local, row, window = local_swin.attend(u, *rest)
        if mix is None:
            (mix,) = narrow_products(u, [self.mix_proj])
        fork.join()
        if heads is None:
            y = token_output(y, local, mix, row, self.output_linears(), engine)
        else:
            y = scaled_output(heads, self.output_linears())
        return y, MMATEState(*after, window)

    def token_products(
        self, u: Tensor, layout: VisionLayout | None, state: MMATEState | None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """Both branches' products with one token of text after others, without a gradient, where
        `join_weights` has joined their weights: [x, B, C] (B, channels) and dt before its softplus (B, H);
        v, k and q, and the mix before its sigmoid (B, 1, n). None = elsewhere.
        """
        if self.config.qk_norm or not self.is_token_of_text(u, layout, state):
            return None
        engine = engine_of_block("MMATE", u, self.config.head_dim)
        products = token_products(u, *self.joined_linears(), None, engine)
        if products is None:
            return None
        product, rates, _ = products
        (of_flex, of_local), heads = product.chunk(2, dim=1), self.config.heads
        return (of_flex, rates[:, :heads]), (of_local, rates[:, None, heads:])

    def makes_output_at_once(self, u: Tensor, layout: VisionLayout | None, state: MMATEState | None) -> bool:
        """Whether `token_output` makes what both branches' output projections would, and mixes it."""
        if not self.is_token_of_text(u, layout, state):
            return False
        return takes_token_output(u, self.output_linears())

    def is_token_of_text(self, u: Tensor, layout: VisionLayout | None, state: MMATEState | None) -> bool:
        """Whether this is one token of text after others for both branches, whose parts may be called apart,
        without a gradient.
        """
        if layout is not None or state is None or u.shape[1] != 1 or not self.config.text_window:
            return False
        return not torch.is_grad_enabled() and (
            is_own(self.flex_ma, FlexMA) and is_own(self.local_swin, LocalSwin)
        )

    def joined_linears(self) -> tuple[list[nn.Linear], list[nn.Linear]]:
        """What a token of text is multiplied with, for `join_weights`: linears, and narrow ones."""
        branches = [self.flex_ma, *([self.local_swin] if self.config.text_window else [])]
        linears = [getattr(each, name) for each in branches for name in ("v_proj", "k_proj", "q_proj")]
        return linears, [self.flex_ma.dt_proj, *([self.mix_proj] if self.config.text_window else [])]

    def output_linears(self) -> list[nn.Linear]:
        """Both branches' output projections, for `join_columns`; none without a text window."""
        return [self.flex_ma.o_proj, self.local_swin.o_proj] if self.config.text_window else []

    def may_fork(self) -> bool:
        """Whether the branches share nothing that is made on the way: what layers have in common, the first
        two have made, whose windows are plain and shifted.
        """
        return self.layer_index > 1 and is_own(self.local_swin, LocalSwin)

    def mixed_rows(self, y: Tensor, layout: VisionLayout | None, valid: Tensor | None) -> Tensor:
        """(B, L) int64: where each token stands in the flattened batch, -1 where only Flex-MA has a say."""
        if not self.config.text_window:
            return fast(layout).vision_row
        return rows_where(valid, y)

    def runs_in_parts(self) -> bool:
        """Whether the branches may be run in parts, so that their narrow products read the hidden states
        once: no hooks on them, no adapted or offloaded projections, no other forward.
        """
        if self.config.text_only:
            return False
        own = is_own(self.flex_ma, FlexMA) and is_own(self.local_swin, LocalSwin)
        return own and are_plain([self.flex_ma.dt_proj, self.flex_ma.scan_gate_proj, self.mix_proj])


def prepare_layers(blocks: list[MMATE], u: Tensor, is_text: bool) -> None:
    """Within `one_forward`: compute for all of a decoder's blocks at once what follows from weights alone.

    Args:
        blocks: of the same sizes.
        u: (B, L, D), like the hidden states of all.
        is_text: whether the forward has no layout.
    """
    flex = [block.flex_ma for block in blocks]
    prepare_decay_rates(flex, u)
    if is_text:
        prepare_narrow(u, [[each.dt_proj] for each in flex])
        prepare_narrow(u, [[block.mix_proj] for block in blocks if hasattr(block, "mix_proj")])
        prepare_narrow(u, [narrow for block in blocks if len(narrow := block.joined_linears()[1]) > 1])
        return
    pairs = zip(flex, blocks, strict=True)
    prepare_narrow(u, [[each.dt_proj, each.scan_gate_proj, block.mix_proj] for each, block in pairs])


def is_own(branch: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a branch is this class's forward and nothing else."""
    return has_no_hooks(branch) and type(branch).forward is kind.forward
