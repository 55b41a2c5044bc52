"""What both branches take from attention: the q, k, v and output projections, q/k norms and RoPE.

Letters: B batch, L tokens, D width, H heads, G groups, N = P head dim. Parameter names are Hugging Face's, so
an attention layer's tensors fit by name.

    rope(q) = q · cos + rotate_half(q) · sin                                      (1)   RoPE, arXiv 2104.09864
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import require, require_int64, require_mask, require_shape
from .config import LinMUConfig
from .numerics import accumulation_dtype

COPIED_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


class InitialValues(nn.Module):
    """A module some of whose parameters the teacher does not have, and which says how those start."""

    def initial_values(self) -> dict[str, Tensor]:
        """The first value of every parameter that the teacher does not have: float32, on the CPU, by name."""
        return {}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set those parameters to their initial values, in their own dtype and on their device."""
        for name, value in self.initial_values().items():
            self.get_parameter(name).copy_(value)


class HeadProjections(InitialValues):
    """q, k, v and output projections of grouped-query attention, with its optional biases and q/k norms.

    Args:
        config: sizes and options.
        layer_index: index of the decoder layer, >= 0.
    Raises:
        ValueError: for a negative index.
    """

    def __init__(self, config: LinMUConfig, layer_index: int) -> None:
        super().__init__()
        require(layer_index >= 0, type(self).__name__, "layer_index must be >= 0", layer_index)
        self.config, self.layer_index = config, layer_index
        inner, grouped = config.heads * config.head_dim, config.groups * config.head_dim
        self.q_proj = nn.Linear(config.width, inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, grouped, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, grouped, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner, config.width, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)

    def check_tokens(
        self, where: str, hidden_states: Tensor, valid: Tensor | None, sequence: Tensor | None
    ) -> tuple[int, int]:
        """Check what both branches are given of B·L tokens, under their callers' names. Returns (B, L)."""
        require_shape(where, "hidden_states", hidden_states, (None, None, self.config.width), "B, L, D")
        shape = hidden_states.shape[0], hidden_states.shape[1]
        require_mask(where, "valid", valid, shape, "B, L")
        require_int64(where, "sequence", sequence, shape, "B, L")
        return shape

    @torch.no_grad()
    def copy_attention(self, attention: nn.Module) -> None:
        """Copy an attention layer's weights and biases, as both branches start (LinMU, arXiv 2601.01322).

        Args:
            attention: a module with q_proj, k_proj, v_proj, o_proj and, where configured, q_norm, k_norm.
        Raises:
            ValueError: if a tensor is missing on either side, or has another shape.
        """
        where = f"{type(self).__name__}.copy_attention"
        for name in COPIED_MODULES:
            own, given = (dict(module_tensors(module, name)) for module in (self, attention))
            require(own.keys() == given.keys(), where, f"{name} must hold {sorted(own)}", sorted(given))
            for key, tensor in given.items():
                require_shape(where, f"{name}.{key}", tensor, tuple(own[key].shape), "out, in")
                own[key].copy_(tensor)

    def project_heads(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u (B, L, D) -> q (B, L, H, N), k (B, L, G, N), v (B, L, G, P), q/k norms applied."""
        q = split_heads(self.q_proj(u), self.config.heads)
        k = split_heads(self.k_proj(u), self.config.groups)
        v = split_heads(self.v_proj(u), self.config.groups)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


def module_tensors(parent: nn.Module, name: str):
    """(key, parameter) pairs of a child module; none if the child does not exist."""
    child = getattr(parent, name, None)
    return () if child is None else child.named_parameters()


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """(B, L, heads·dim) -> (B, L, heads, dim)."""
    return tensor.unflatten(-1, (heads, -1))


def apply_rope(tensor: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotate heads by the teacher's angles; eq. (1) (RoPE, arXiv 2104.09864).

    M-RoPE needs no code here: its angles, one section an axis, arrive put together.

    Args:
        tensor: (B, L, heads, N), any float dtype.
        position_embeddings: (cos, sin), each (B or 1, L, N).
    Returns:
        (B, L, heads, N) in the dtype of `tensor`.
    Raises:
        ValueError: if the angles are missing or have another length or width.
    """
    wide = tensor.to(accumulation_dtype(tensor.dtype))
    cos, sin = (angle.to(wide.dtype) for angle in checked_angles(tensor, position_embeddings))
    first, second = wide.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (wide * cos[:, :, None] + rotated * sin[:, :, None]).to(tensor.dtype)  # eq. (1)


def checked_angles(
    tensor: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Check that cos and sin are there and fit `tensor` (B, L, heads, N); return them."""
    require(position_embeddings is not None, "apply_rope", "position_embeddings must be (cos, sin)", None)
    for name, angle in zip(("cos", "sin"), position_embeddings, strict=True):
        require_shape("apply_rope", name, angle, (None, tensor.shape[1], tensor.shape[3]), "B or 1, L, N")
    return position_embeddings
