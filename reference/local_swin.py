"""Local-Swin: the local branch, the teacher's own attention inside 3-D shifted windows.

Letters: B batch, L tokens, D width, H heads, G groups, N = P head dim. Input u (B, L, D): the layer's normed
hidden states.

    q, k, v = W_q u, W_k u, W_v u        with the teacher's biases, q/k norms and RoPE or M-RoPE       (1)
    o = W_o window_attention(rope(q), rope(k), v, window_ids)                                          (2)

LinMU, arXiv 2601.01322; windows after Swin (arXiv 2103.14030), shifted in odd layers. Choice: it is 0 on
text, which has no place on a grid; the alternative is a sliding window of text.
"""

from __future__ import annotations

from torch import Tensor

from .checks import require, require_shape
from .layout import VisionLayout
from .projections import HeadProjections, apply_rope
from .window_attention import window_attention


class LocalSwin(HeadProjections):
    """The local branch of M-MATE (LinMU, arXiv 2601.01322), eqs. (1) and (2).

    Args:
        config: sizes and options.
        layer_index: index of the decoder layer; odd layers shift their windows.
    """

    def forward(
        self,
        hidden_states: Tensor,
        layout: VisionLayout,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Mix each vision token with its window; eqs. (1) and (2).

        Args:
            hidden_states: u, (B, L, D), any float dtype.
            layout: where the vision tokens of these L positions are.
            position_embeddings: the teacher's (cos, sin), each (B or 1, L, N).
        Returns:
            (B, L, D) in the dtype of `hidden_states`; 0 on text and padding.
        Raises:
            ValueError: for shapes that do not fit, or if the angles are missing.
        """
        require_shape("LocalSwin", "hidden_states", hidden_states, (None, None, self.config.width), "B, L, D")
        got = f"{tuple(layout.coords.shape[:2])} for {tuple(hidden_states.shape[:2])}"
        same = layout.coords.shape[:2] == hidden_states.shape[:2]
        require(same, "LocalSwin", "layout must describe the same (B, L) as hidden_states", got)
        q, k, v = self.project_heads(hidden_states)  # eq. (1)
        q, k = apply_rope(q, position_embeddings), apply_rope(k, position_embeddings)
        windows = layout.windows(self.config.window_thw, self.layer_index)
        output = self.o_proj(window_attention(q, k, v, windows).flatten(2))  # eq. (2)
        return output * layout.is_vision[..., None]  # an output bias would otherwise reach text
