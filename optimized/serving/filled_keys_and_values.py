"""vLLM's DecodeBenchConnector for those requests alone that ask for it; others compute their prompts."""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector


class FilledKeysAndValues(DecodeBenchConnector):
    """`extra_args={"kv_transfer_params": {"filled": True}}` of a request's sampling asks for it."""

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """As vLLM's, or none."""
        if not (request.kv_transfer_params or {}).get("filled"):
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)
