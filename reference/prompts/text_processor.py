"""A tokenizer in a processor's place: what conversations with a text decoder are read by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..checks import require


class TextProcessor:
    """Renders conversations whose contents are content blocks, as a processor does; text blocks alone.

    Templates of text decoders take a turn's content as one text, so the blocks of a turn are joined.

    Args:
        tokenizer: of the decoder, with a chat template if conversations are to be rendered. Without a padding
            token it is given its end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        if tokenizer.pad_token is None:  # as Llama 3's; padding is masked, so any token will do
            tokenizer.pad_token = tokenizer.eos_token

    def apply_chat_template(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        *,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render, and tokenise if asked, as `ProcessorMixin.apply_chat_template` does with several.

        Raises:
            ValueError: for an image or a video, which a text decoder cannot take.
        """
        turns = [[turn | {"content": text_of(turn)} for turn in turns] for turns in conversations]
        texts = self.tokenizer.apply_chat_template(turns, tokenize=False, **kwargs)
        if not tokenize:
            return texts
        settings = {"add_special_tokens": False, "return_tensors": return_tensors, **(processor_kwargs or {})}
        batch = self.tokenizer(texts, **settings)  # the template writes special tokens
        return batch if return_dict else batch["input_ids"]

    def save_pretrained(self, folder: str) -> None:
        """Write the tokenizer's files: AutoProcessor and AutoTokenizer open them."""
        self.tokenizer.save_pretrained(folder)


def text_of(turn: Mapping[str, Any]) -> str:
    """The text of a turn's content blocks."""
    content = turn["content"]
    if isinstance(content, str):
        return content
    kinds = sorted({block["type"] for block in content} - {"text"})
    hint = "take a teacher that sees"
    require(not kinds, "TextProcessor", "a text decoder must be given text alone", kinds, hint)
    return "".join(block["text"] for block in content)
