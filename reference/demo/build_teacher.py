"""The untrained teacher: a small but genuine Qwen2.5-VL folder, made without any download.

Sizes are chosen so that one 8x8-pixel cell is one token: patches of 4x4 pixels, merged 2x2. The vision
tower's window holds any picture of the demo whole, so its window attention sees all of a moment.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

from .digits import CELL
from .questions import DigitsQuestions

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Qwen2's rule: contractions, words with their leading space, single numerals, punctuation, white space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATCH, MERGE, TEMPORAL_PATCH = 4, 2, 2
WINDOW = 8 * CELL  # pixels; pictures have at most 6 cells a side
LARGEST = 32  # cells a side of the largest picture that is not made smaller
VOCABULARY = 448
TEMPLATE = Path(__file__).parent / "chat_template.jinja"


def build_tokenizer() -> Qwen2Tokenizer:
    """Train a byte-level BPE on the questions, in which every word of theirs is one token."""
    corpus = [text for pair in DigitsQuestions("train").texts(range(2000)) for text in pair]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([*corpus, "user", "assistant", "system"] * 4, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=1024,
        padding_side="left",
    )
    tokenizer.chat_template = TEMPLATE.read_text()
    return tokenizer


def build_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """Return the sizes of the teacher: four decoder layers of width 128, under a million parameters."""
    token = tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=8 * -(-len(tokenizer) // 8),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        # Choice: with a base below 1 every pair of channels turns by 1 to 75 radians a cell, and on each axis
        # the cosines of a few cells' distance are as good as independent. The usual bases leave the x axis,
        # which gets the slowest pairs, blind on grids of six columns.
        rope_parameters={"rope_type": "default", "rope_theta": 0.01, "mrope_section": [4, 6, 6]},
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
        initializer_range=0.08,
        tie_word_embeddings=True,
    )
    vision = dict(
        depth=3,
        hidden_size=64,
        intermediate_size=128,
        num_heads=2,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        temporal_patch_size=TEMPORAL_PATCH,
        window_size=WINDOW,
        fullatt_block_indexes=[2],
        out_hidden_size=text["hidden_size"],
        tokens_per_second=1,
        initializer_range=0.08,
    )
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Return the teacher with fresh float32 weights; seed torch before."""
    model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer)).float()
    token = tokenizer.convert_tokens_to_ids
    model.generation_config.update(
        bos_token_id=token("<|endoftext|>"),
        pad_token_id=token("<|endoftext|>"),
        eos_token_id=[token("<|im_end|>"), token("<|endoftext|>")],
        max_new_tokens=8,
        do_sample=False,
    )
    return model


def write_preprocessing(folder: Path, tokenizer: PreTrainedTokenizerBase, largest: int = LARGEST) -> None:
    """Write tokenizer, chat template, and image and video processor settings, as hub repositories do."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    pixels = {
        "patch_size": PATCH,
        "temporal_patch_size": TEMPORAL_PATCH,
        "merge_size": MERGE,
        "min_pixels": CELL * CELL,
        "max_pixels": (largest * CELL) ** 2,
        "image_mean": [0.3, 0.3, 0.3],
        "image_std": [0.375, 0.375, 0.375],
        "processor_class": "Qwen2_5_VLProcessor",
    }
    image = pixels | {"image_processor_type": "Qwen2VLImageProcessor"}
    video = pixels | {"video_processor_type": "Qwen2VLVideoProcessor", "do_sample_frames": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n")
