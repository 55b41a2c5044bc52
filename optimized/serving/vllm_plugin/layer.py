"""An M-MATE block on vLLM's rows of states.

Letters: K taps, H heads, G groups, N = P head dim, W text window. A row of the pool holds of one layer

    conv (K-1, channels), scan (H, N, P), present (W-1,)    float32
    keys (W-1, G, N), values (W-1, G, P)                    the model's dtype

`present` says which keys there are, 1 or 0; float32, because vLLM lays a row's tensors end to end and views
each in its dtype. What is empty, K = 0 or W <= 1, is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from ....reference.checks import require
from ....reference.config import LinMUConfig
from ....reference.m_mate import DonatedMMATEState, MMATEState
from ....reference.sliding_window_attention import DonatedWindowState
from ....reference.student.model import with_float32_parameters
from ... import MMATE, VisionLayout
from ...m_mate import PooledMMATEState
from .positions import check_whole


def state_shapes(config: LinMUConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a row's tensors by name, in order; what is empty is left out."""
    keys = (config.text_window - 1, config.groups, config.head_dim)
    shapes = {
        "conv": (config.conv_kernel - 1, config.conv_channels),
        "scan": (config.heads, config.head_dim, config.head_dim),
        "present": keys[:1],
        "keys": keys,
        "values": keys,
    }
    return {name: shape for name, shape in shapes.items() if shape[0] > 0}


def state_dtypes(config: LinMUConfig, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Return their dtypes, in the order of `state_shapes`; `dtype` is the model's."""
    return tuple(dtype if name in ("keys", "values") else torch.float32 for name in state_shapes(config))


class Step:
    """What the layers of one forward share.

    Args:
        angles: cosines and sines of RoPE, (1, n, N) each.
        coords: (n, 4) int64, as in `VisionLayout`; None = all text.
        sizes: (n,) int64, of how many tokens each one's segment is.
    """

    def __init__(self, angles: tuple[Tensor, Tensor], coords: Tensor | None, sizes: Tensor | None) -> None:
        self.angles, self.coords, self.sizes = angles, coords, sizes
        self.layouts: dict[tuple[int, int], VisionLayout | None] = {}

    def layout(self, start: int, end: int) -> VisionLayout | None:
        """Return the layout of the tokens from `start` to `end`, all of one request; None = text.

        Raises:
            ValueError: if they are a part of an image or a video.
        """
        if self.coords is None:
            return None
        if (start, end) not in self.layouts:
            coords = self.coords[start:end]
            check_whole(coords, self.sizes[start:end])
            self.layouts[start, end] = VisionLayout(coords[None]) if bool((coords >= 0).any()) else None
        return self.layouts[start, end]


class StateLayer(MambaBase, nn.Module):
    """The block in the place of a decoder layer's `self_attn`.

    Args:
        config: the sizes and options of this rank's part.
        index: of the decoder layer.
        vllm_config: where vLLM finds the layer by its name.
        name: that name.
    """

    def __init__(self, config: LinMUConfig, index: int, vllm_config: VllmConfig, name: str) -> None:
        super().__init__()
        self.block = with_float32_parameters(MMATE(config, index)).requires_grad_(False)
        self.config, self.name, self.dtype = config, name, vllm_config.model_config.dtype
        self.names = list(state_shapes(config))
        self.step: Step | None = None
        self.kv_cache: tuple[Tensor, ...] = ()
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """As `state_shapes`."""
        return tuple(state_shapes(self.config).values())

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """In the order of `get_state_shape`."""
        return state_dtypes(self.config, self.dtype)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Whose metadata it gets: `StateBackend`'s."""
        return MambaAttentionBackendEnum.CUSTOM

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Mix the tokens of each request of a batch, (n, D) -> (n, D), and update their rows.

        Raises:
            ValueError: if a request has a part of an image or a video.
        """
        metadata = get_forward_context().attn_metadata
        cos, sin = self.step.angles
        if metadata is None:  # vLLM measures memory
            y, _ = self.block(hidden_states[None], position_embeddings=(cos, sin))
            return tensor_model_parallel_all_reduce(y[0])
        metadata = metadata[self.name]
        output = torch.zeros_like(hidden_states)
        decodes = metadata.num_decode_tokens
        if decodes:
            rows = metadata.state_indices_tensor_d[:, 0].long()
            angles = cos[0, :decodes, None], sin[0, :decodes, None]
            tokens = hidden_states[:decodes, None]
            before = self.read(rows, pooled=True)
            y, state = self.block(tokens, position_embeddings=angles, state=before)
            output[:decodes] = y[:, 0]
            self.write(rows, state, pooled=True)
        for i in range(metadata.num_prefills):
            start, end = metadata.starts[i : i + 2]
            row = metadata.state_indices_tensor_p[i : i + 1].long()
            y, state = self.block(
                hidden_states[None, start:end],
                self.step.layout(start, end),
                position_embeddings=(cos[:, start:end], sin[:, start:end]),
                state=self.read(row) if metadata.has_state[i] else None,
            )
            output[start:end] = y[0]
            self.write(row, state)
        return tensor_model_parallel_all_reduce(output)

    def read(self, rows: Tensor, pooled: bool = False) -> DonatedMMATEState | PooledMMATEState:
        """Return copies of the states in these rows, which the block may overwrite.

        With `pooled` the scan's, nine tenths of a row, stay where they are, and one token of each request
        overwrites them there.
        """
        pools = dict(zip(self.names, self.kv_cache, strict=True))
        found = {name: pool[rows] for name, pool in pools.items() if name != "scan"}
        scan = pools["scan"]
        conv = found.get("conv", scan.new_zeros(len(rows), 0, self.config.conv_channels))
        window = None
        if self.config.text_window:
            none = scan.new_zeros(len(rows), 0, self.config.groups, self.config.head_dim).to(self.dtype)
            present = found.get("present", scan.new_zeros(len(rows), 0)) > 0
            window = DonatedWindowState(found.get("keys", none), found.get("values", none), present)
        if pooled:
            return PooledMMATEState(conv, scan, rows, window)
        return DonatedMMATEState(conv, scan[rows], window)

    def write(self, rows: Tensor, state: MMATEState, pooled: bool = False) -> None:
        """Put states into these rows of the pool, but for the scan's that is there."""
        window = state.window
        tensors = {"conv": state.conv, "scan": state.scan}
        if window is not None:
            tensors |= {"keys": window.k, "values": window.v, "present": window.present}
        for name, pool in zip(self.names, self.kv_cache, strict=True):
            if not (pooled and name == "scan"):
                pool[rows] = tensors[name].to(pool.dtype)


def check_decodes_are_text(step: Step, decodes: int) -> None:
    """Refuse a picture of one token alone in its chunk: vLLM takes it for a token that was sampled."""
    if step.coords is not None and decodes:
        is_text = not bool((step.coords[:decodes] >= 0).any())
        require(is_text, "linmu in vLLM", "a picture of one token must not come alone", "one")
