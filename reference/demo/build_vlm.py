"""A vision-language model around the decoder of a Llama: Qwen2.5-VL's class, a new tower and connector.

Qwen2.5-VL's decoder is Llama's with biases on q, k and v, and positions on three axes. With biases of 0 it
computes on text what the Llama computed, to the last bit of rounding. Tower and connector are small and start
from nothing; a cell of 8 x 8 pixels is one token, as in `build_teacher.py`.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from ..checks import require
from .build_teacher import MERGE, PATCH, TEMPLATE, TEMPORAL_PATCH, build_tokenizer
from .digits import CELL

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TURN_END, PADDING = "<|im_end|>", "<|endoftext|>"
WINDOW = 18 * CELL  # pixels: a moment of a film is one window of the tower's attention
TOWER = {"depth": 4, "hidden_size": 192, "intermediate_size": 512, "num_heads": 3}
TINY_TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 1}
COPIED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range",
)  # fmt: skip


def random_decoder() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Two layers of random weights, and the tokenizer of the bundled teacher: to try this file with."""
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **sizes, num_key_value_heads=2, vocab_size=len(tokenizer), tie_word_embeddings=True, pad_token_id=0
    )
    return LlamaForCausalLM(config), tokenizer


def with_vision_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A ChatML tokenizer with the tokens that stand for pictures, and the demo's chat template; in place."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(VISION_TOKENS)})
    tokenizer.pad_token, tokenizer.eos_token = PADDING, TURN_END
    tokenizer.padding_side, tokenizer.chat_template = "right", TEMPLATE.read_text()
    return tokenizer


def axes_of_pairs(pairs: int) -> list[int]:
    """Qwen's `mrope_section`: how many pairs of channels, fastest first, turn by time, row, column, time ...

    Choice: one each in turn, beginning with the rows. Sections as long as Qwen's leave the slowest pairs to
    the columns, which with a Llama's base (100,000) do not tell a cell from the next.
    """
    sections = [0, 1, 1] + [1] * (pairs - 2)
    return sections + [0] * (-len(sections) % 3)


def build_config(
    decoder: LlamaConfig, tokenizer: PreTrainedTokenizerBase, tower: dict[str, int]
) -> Qwen2_5_VLConfig:
    """The sizes of the model.

    Raises:
        ValueError: for a Llama whose decoder is not Qwen's.
    """
    head_dim, rope = decoder.hidden_size // decoder.num_attention_heads, decoder.rope_parameters
    same = not (decoder.attention_bias or decoder.mlp_bias) and decoder.head_dim == head_dim
    must = "the decoder must be a Llama without biases, with heads as wide as the model together, plain RoPE"
    require(same and rope["rope_type"] == "default", "build_vlm", must, decoder.to_diff_dict())
    token = tokenizer.convert_tokens_to_ids
    text = {name: getattr(decoder, name) for name in COPIED} | {
        "vocab_size": 64 * -(-len(tokenizer) // 64),
        "rope_parameters": rope | {"mrope_section": axes_of_pairs(head_dim // 2)},
        "bos_token_id": decoder.bos_token_id,
        "eos_token_id": token(TURN_END),
        "pad_token_id": token(PADDING),
    }
    vision = tower | {
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL_PATCH,
        "window_size": WINDOW,
        "fullatt_block_indexes": [],
        "out_hidden_size": decoder.hidden_size,
        "tokens_per_second": 1,
        "initializer_range": 0.05,
    }
    start, end, image, video = map(token, VISION_TOKENS)
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=decoder.tie_word_embeddings,
    )


def build_vlm(
    decoder: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tower: dict[str, int] = TOWER
) -> Qwen2_5_VLForConditionalGeneration:
    """The model in float32: decoder copied, tower and connector fresh; seed torch before.

    Args:
        decoder: a Llama.
        tokenizer: of `with_vision_tokens`.
        tower: its sizes.
    Raises:
        ValueError: as `build_config` does.
    """
    model = Qwen2_5_VLForConditionalGeneration(build_config(decoder.config, tokenizer, tower)).float()
    weights = {name: tensor.float() for name, tensor in decoder.model.state_dict().items()}
    language = model.model.language_model
    weights["embed_tokens.weight"] = widened(weights["embed_tokens.weight"], language.embed_tokens)
    absent = language.load_state_dict(weights, strict=False)
    biases = {name for name, _ in language.named_parameters() if name.endswith("proj.bias")}
    require(
        set(absent.missing_keys) == biases and not absent.unexpected_keys,
        "build_vlm",
        "the decoder must have the weights of a Llama",
        absent,
    )
    for name in biases:
        nn.init.zeros_(language.get_parameter(name))
    nn.init.zeros_(model.model.visual.merger.mlp[-1].weight)  # else its outputs are ten times an embedding
    if not decoder.config.tie_word_embeddings:
        model.lm_head.weight.data = widened(decoder.lm_head.weight.data.float(), model.lm_head)
    token = tokenizer.convert_tokens_to_ids
    model.generation_config.update(
        bos_token_id=decoder.config.bos_token_id,
        pad_token_id=token(PADDING),
        eos_token_id=[token(TURN_END), token(PADDING)],
        max_new_tokens=8,
        do_sample=False,
    )
    return model


def widened(rows: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Rows (V, D) with as many more as the module has: their mean. Choice: as vocabularies are extended."""
    more = module.weight.shape[0] - len(rows)
    return torch.cat([rows, rows.mean(0, keepdim=True).expand(max(more, 0), -1)])[: module.weight.shape[0]]
