"""Which rows of a batch decode, which prefill, and where their states are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport
from vllm.v1.attention.backends.mamba_attn import (
    BaseMambaAttentionMetadata,
    BaseMambaAttentionMetadataBuilder,
)


@dataclass
class StateMetadata(BaseMambaAttentionMetadata):
    """vLLM's, and of the prefilled rows, on the CPU: where each begins, and what was read of it before.

    Args:
        starts: positions in the batch, one more than rows.
        past: tokens, one number for each row.
    """

    starts: list[int] | None = None
    past: list[int] | None = None


class StateMetadataBuilder(BaseMambaAttentionMetadataBuilder[StateMetadata]):
    """Decoding rows come first."""

    metadata_cls = StateMetadata
    _cudagraph_support: ClassVar = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    needs_causal_conv1d_metadata = False
    supports_update_block_table = False  # each group of layers has rows of its own to clear

    def build(self, common_prefix_len: int, common_attn_metadata, fast_build: bool = False, **kwargs):
        """As vLLM's."""
        if common_attn_metadata.max_query_len == 1:
            common_attn_metadata = self.all_decoding(common_attn_metadata)
        metadata = self._compute_common_metadata(common_attn_metadata)
        rows, requests = metadata.num_prefills, metadata.num_reqs
        if rows:
            starts = common_attn_metadata.query_start_loc_cpu[-rows - 1 :]
            lengths = common_attn_metadata.seq_lens_cpu_upper_bound[requests - rows : requests]
            metadata.starts = starts.tolist()
            metadata.past = (lengths - starts.diff()).tolist()
        return metadata

    def all_decoding(self, common_attn_metadata):
        """Let a prompt's first token decode too, from a row of zeros, where each request has one token.

        By that shape alone vLLM replays a captured decode, and would leave such a token without its row.
        """
        requests, context = common_attn_metadata.num_reqs, self.compilation_config.static_forward_context
        first = common_attn_metadata.seq_lens_cpu_upper_bound[:requests] == 1
        if bool(first.any()):
            rows = common_attn_metadata.block_table_tensor[:requests, 0]
            rows = rows[first.to(rows.device)].long()
            for name in self.layer_names:
                for pool in context[name].kv_cache:
                    pool[rows] = 0
        still = torch.zeros_like(common_attn_metadata.is_prefilling)
        return common_attn_metadata.replace(is_prefilling=still)


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
