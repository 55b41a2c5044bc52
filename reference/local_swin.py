"""Local-Swin: the local branch, the teacher's own attention in 3-D windows of vision and a window of text.

Letters: B batch, L tokens, D width, H heads, G groups, N = P head dim, W text window. Input u (B, L, D): the
layer's normed hidden states.

    q, k, v = W_q u, W_k u, W_v u        with the teacher's biases, q/k norms and RoPE or M-RoPE       (1)
    o = W_o window_attention(rope(q), rope(k), v, window_ids)                         on vision         (2)
    o = W_o sliding_window_attention(rope(q), rope(k), v, W)                          on text           (3)

LinMU, arXiv 2601.01322; windows after Swin (arXiv 2103.14030), shifted in odd layers. Choice: (3), a causal
window over the last W tokens, text and vision alike, because text has no place on a grid and a scan alone is
poor at what stands just before; with W = 0 the branch is 0 on text.
"""

from __future__ import annotations

from torch import Tensor

from .checks import require
from .layout import VisionLayout, samples_of
from .projections import HeadProjections, apply_rope
from .sliding_window_attention import WindowState, sliding_window_attention
from .window_attention import window_attention


class LocalSwin(HeadProjections):
    """The local branch of M-MATE (LinMU, arXiv 2601.01322), eqs. (1) to (3).

    Args:
        config: sizes and options.
        layer_index: index of the decoder layer, >= 0; odd layers shift their windows.
    Raises:
        ValueError: for a negative index.
    """

    def forward(
        self,
        hidden_states: Tensor,
        layout: VisionLayout | None = None,
        *,
        valid: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        state: WindowState | None = None,
        sequence: Tensor | None = None,
    ) -> tuple[Tensor, WindowState | None]:
        """Mix each vision token with its window, each text token with the tokens before it; eqs. (1) to (3).

        Args:
            hidden_states: u, (B, L, D), any float dtype.
            layout: where the vision tokens of these L positions are; None = all text.
            valid: (B, L) bool, True = not padding; None = all valid.
            position_embeddings: the teacher's (cos, sin), each (B or 1, L, N).
            state: keys, after RoPE, and values of the text window before; None = there were none.
            sequence: (B, L) int64, which sample of a packed row of text a token belongs to, as operators take
                it; of a row with a layout, the layout says it. None = one a row, or as the layout says.
        Returns:
            (B, L, D) in the dtype of `hidden_states`, 0 on padding, and on text without a text window; and
            the text window after the last token, None without one.
        Raises:
            ValueError: for shapes that do not fit, or if the angles are missing.
        """
        self.check_inputs(hidden_states, layout, valid, sequence)
        sequence = samples_of("LocalSwin", layout, sequence)
        q, k, v = self.project_heads(hidden_states)  # eq. (1)
        q, k = apply_rope(q, position_embeddings), apply_rope(k, position_embeddings)
        mixed, takes_part = 0, None
        if layout is not None:
            windows = layout.windows(self.config.window_thw, self.layer_index)
            mixed, takes_part = window_attention(q, k, v, windows), layout.is_vision  # eq. (2)
        if self.config.text_window:
            asks = None if layout is None else ~layout.is_vision
            given = {"asks": asks, "valid": valid, "sequence": sequence, "initial_state": state}
            near, state = sliding_window_attention(q, k, v, self.config.text_window, **given)
            mixed, takes_part = mixed + near, valid  # eq. (3); each is 0 where the other is not
        output = self.o_proj(mixed.flatten(2))
        if takes_part is not None:  # an output bias would otherwise reach the rest
            output = output * takes_part[..., None]
        return output, state

    def check_inputs(
        self,
        hidden_states: Tensor,
        layout: VisionLayout | None,
        valid: Tensor | None,
        sequence: Tensor | None,
    ) -> None:
        """Check what operators would name by other names."""
        batch, length = self.check_tokens("LocalSwin", hidden_states, valid, sequence)
        if layout is None:
            has_window = self.config.text_window > 0
            require(has_window, "LocalSwin", "layout must be given without a text window", None)
            return
        got = f"{tuple(layout.coords.shape[:2])} for {(batch, length)}"
        same = tuple(layout.coords.shape[:2]) == (batch, length)
        require(same, "LocalSwin", "layout must describe the same (B, L) as hidden_states", got)
