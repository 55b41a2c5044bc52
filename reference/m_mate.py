"""M-MATE, a Mamba2 branch and a windowed-attention branch: the block in the place of `self_attn`.

Letters: B batch, L tokens, D width. Input u (B, L, D): the layer's normed hidden states.

    m = sigmoid(W_m u + b_m)                                     (B, L, 1), ½ at first                    (1)
    y = m · FlexMA(u) + (1 - m) · LocalSwin(u)                                                             (2)

LinMU, arXiv 2601.01322: two branches, interpolated per token. The name is LinGen's MATE (arXiv 2412.09856), a
MAmba and a TEmporal-attention branch, made Multimodal.
Choice: (2) on text too, where Local-Swin has its text window; without one text takes Flex-MA alone, as
m · FlexMA(u) + (1 - m) · 0 would only scale it down.
Cost: linear in L. Decoding: an `MMATEState` per layer, the same size at every length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import LinMUConfig
from .flex_ma import DonatedState, FlexMA, FlexMAState
from .layout import VisionLayout
from .local_swin import LocalSwin
from .numerics import full_precision_linear
from .projections import InitialValues
from .sliding_window_attention import WindowState


class MMATEState(NamedTuple):
    """What decoding keeps of one block, constant in size.

    Args:
        conv, scan: Flex-MA's, as in `FlexMAState`.
        window: the last W - 1 keys, after RoPE, and values of Local-Swin's text window; None = it has none.
    """

    conv: Tensor
    scan: Tensor
    window: WindowState | None = None

    @property
    def flex_ma(self) -> FlexMAState:
        """Flex-MA's part."""
        return FlexMAState(self.conv, self.scan)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in one row."""
        return (self.conv, self.scan, *(self.window or ()))


class DonatedMMATEState(MMATEState):
    """A state the callee may overwrite in place; the caller must use the returned state."""

    __slots__ = ()

    @property
    def flex_ma(self) -> DonatedState:
        """Flex-MA's part."""
        return DonatedState(self.conv, self.scan)


class MMATE(InitialValues):
    """The block: Flex-MA and Local-Swin, mixed per token; eqs. (1) and (2) (LinMU, arXiv 2601.01322).

    Args:
        config: sizes and options.
        layer_index: index of the decoder layer, >= 0: scan order, window shift and cache slot follow from it.
    Raises:
        ValueError: for a negative index.
    """

    flex_ma_class: type[FlexMA] = FlexMA
    local_swin_class: type[LocalSwin] = LocalSwin

    def __init__(self, config: LinMUConfig, layer_index: int) -> None:
        super().__init__()
        self.config, self.layer_index = config, layer_index
        self.flex_ma = self.flex_ma_class(config, layer_index)
        if config.has_local_swin:
            self.local_swin = self.local_swin_class(config, layer_index)
            self.mix_proj = nn.Linear(config.width, 1)
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """As `InitialValues`. Choice: m = ½, the mean of both branches, rather than one of them alone."""
        own = {"mix_proj.weight": torch.zeros(1, self.config.width), "mix_proj.bias": torch.zeros(1)}
        own = own if self.config.has_local_swin else {}
        return own | {f"flex_ma.{name}": value for name, value in self.flex_ma.initial_values().items()}

    def copy_attention(self, attention: nn.Module) -> None:
        """Start both branches from an attention layer's weights and biases (LinMU, arXiv 2601.01322).

        Args:
            attention: as for `HeadProjections.copy_attention`.
        Raises:
            ValueError: if a tensor is missing on either side, or has another shape.
        """
        self.flex_ma.copy_attention(attention)
        if self.config.has_local_swin:
            self.local_swin.copy_attention(attention)

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
        """Mix the sequence; eq. (2).

        Args:
            hidden_states: u, (B, L, D), any float dtype.
            layout: where the vision tokens of these L positions are; None = all text.
            valid: (B, L) bool, True = not padding; None = all valid.
            position_embeddings: the teacher's (cos, sin), each (B or 1, L, N); needed where there is vision
                or a text window.
            state: the state after the tokens before; None = there were none.
            sequence: (B, L) int64, which sample of a packed row of text a token belongs to, as operators take
                it; of a row with a layout, the layout says it. None = one a row, or as the layout says.
        Returns:
            (B, L, D) in the dtype of `hidden_states`, and the state after the last token.
        Raises:
            ValueError: for shapes or dtypes that do not fit.
        """
        given = {"valid": valid, "position_embeddings": position_embeddings, "sequence": sequence}
        before, window = (None, None) if state is None else (state.flex_ma, state.window)
        y, after = self.flex_ma(hidden_states, layout, state=before, **given)
        if layout is not None or self.config.text_window:
            local, window = self.local_swin(hidden_states, layout, state=window, **given)
            mix = torch.sigmoid(full_precision_linear(hidden_states, self.mix_proj))  # eq. (1)
            mixed = (mix * y + (1 - mix) * local).to(y.dtype)  # eq. (2)
            mixes = valid if self.config.text_window else layout.is_vision  # None = all
            y = mixed if mixes is None else torch.where(mixes[..., None], mixed, y)
        return y, MMATEState(*after, window)
