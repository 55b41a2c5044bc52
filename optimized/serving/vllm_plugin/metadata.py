"""Which rows of a batch decode, which prefill, and where their states are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport
from vllm.v1.attention.backends.mamba_attn import (
    BaseMambaAttentionMetadata,
    BaseMambaAttentionMetadataBuilder,
)


@dataclass
class StateMetadata(BaseMambaAttentionMetadata):
    """vLLM's, and of the prefilled rows, on the CPU: where each begins, and whether it has a state.

    Args:
        starts: positions in the batch, one more than rows.
        has_state: one for each row.
    """

    starts: list[int] | None = None
    has_state: list[bool] | None = None


class StateMetadataBuilder(BaseMambaAttentionMetadataBuilder[StateMetadata]):
    """Decoding rows come first. A prompt of one token is a prefill: it has no state before."""

    metadata_cls = StateMetadata
    _cudagraph_support: ClassVar = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    needs_causal_conv1d_metadata = False

    def build(self, common_prefix_len: int, common_attn_metadata, fast_build: bool = False, **kwargs):
        """As vLLM's."""
        metadata = self._compute_common_metadata(common_attn_metadata)
        rows, requests = metadata.num_prefills, metadata.num_reqs
        if rows:
            starts = common_attn_metadata.query_start_loc_cpu[-rows - 1 :]
            lengths = common_attn_metadata.seq_lens_cpu_upper_bound[requests - rows : requests]
            metadata.starts = starts.tolist()
            metadata.has_state = (lengths > starts.diff()).tolist()
        return metadata


class StateBackend(AttentionBackend):
    """What vLLM asks the layer for."""

    @staticmethod
    def get_name() -> str:
        """Name it in logs."""
        return "LINMU"

    @staticmethod
    def get_builder_cls() -> type[StateMetadataBuilder]:
        """Who makes the metadata."""
        return StateMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """It keeps states, not keys and values."""
        return True
