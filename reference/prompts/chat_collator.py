"""From conversations to tensors.

    conversation  = turns; a turn = {"role", "content": text or a list of content blocks}
    content block = {"type": "text", "text"} | {"type": "image", "image"} | {"type": "video", "video", "fps"}
    document      = a text without turns, as language models are pretrained on

Letters: B conversations, L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import ProcessorMixin

from ..checks import require
from .answers import (
    TURN_END,
    TURN_START,
    ChatMLAnswers,
    ChatTemplateError,
    RenderedAnswers,
    answers_of,
    chat_template_of,
    render,
    require_whole,
)

IGNORED = -100
GROUNDING = (
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
    "<|quad_end|>", "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>",
)  # fmt: skip
SET_TEMPLATE = (
    'give documents, rows {"text": ...}, or set tokenizer.chat_template and save the tokenizer with the model'
)
SUPERVISE = ("answers", "all", "nothing")


class ChatCollator:
    """Collates items {"messages": conversation} or {"text": document} into one batch of tensors.

    `collator(items)` is the one entrance. A data set may `encode` its samples one by one before, in the
    process that reads them, so that one that does not fit can be named and left out; padded together they
    give what the processor gives for them at once.

    Args:
        processor: of `load_processor`.
        supervise: "answers": `labels` are the assistant's answers, each with its end of turn, found by the
            chat template (`answers.py`); "all": all text, so what a user asks, too; "nothing": prompts
            without labels, cut before a final assistant turn, opened for an answer. Vision tokens and
            padding are never supervised: -100. Neither are, with "answers", those of turns with `weight` 0.
            A document is supervised throughout; it has no turns, so it reads as the tokenizer gives it.
        max_length: tokens that a conversation may have; 0 = any number.
    Raises:
        ChatTemplateError: on use, for a conversation, if there is no chat template, or its answers cannot be
            told.
        ValueError: on use, for a conversation that does not fit the chat template, holds control tokens in
            its text, is too long, or whose pictures the processor leaves out or thins.

    A video block may carry `fps`, the frames per second of what it holds; it becomes `second_per_grid_ts`.
    """

    def __init__(self, processor: ProcessorMixin, *, supervise: str = "answers", max_length: int = 0) -> None:
        must = f"supervise must be one of {SUPERVISE}"
        require(supervise in SUPERVISE, "ChatCollator", must, repr(supervise))
        tokenizer = processor.tokenizer
        self.processor, self.supervise, self.max_length = processor, supervise, max_length
        self.padding = {"attention_mask": 0, "mm_token_type_ids": 0, "labels": IGNORED}
        self.padding["input_ids"] = tokenizer.pad_token_id
        self.control_tokens = re.compile("|".join(map(re.escape, control_tokens(processor))))
        self.control_ids = ids_of(tokenizer, control_tokens(processor))
        self.placeholder_ids = ids_of(tokenizer, vision_placeholders(processor))

    def require_chat_template(self) -> None:
        """Refuse a chat template that is missing, or whose answers cannot be told; documents need none.

        Raises:
            ChatTemplateError: for such a template.
        """
        if not chat_template_of(self.processor):
            must = "ChatCollator: the tokenizer must have a chat template to read conversations"
            raise ChatTemplateError(f"{must}, got none; {SET_TEMPLATE}")
        if self.supervise == "answers":
            _ = self.answers

    @cached_property
    def answers(self) -> ChatMLAnswers | RenderedAnswers:
        """How answers are found; documents have none, so for them no chat template is needed."""
        return answers_of(self.processor, control_tokens(self.processor), vision_placeholders(self.processor))

    def encode(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """One sample {"kind", "messages" or "text"} as {"kind", "name", "tensors"}, to be collated later."""
        read = self._document if "text" in item else self._tensors
        return {"kind": item["kind"], "name": item.get("name", "?"), "tensors": read([item])}

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch: input_ids, attention_mask, mm_token_type_ids, labels, all (B, L) int64; pixels, grids."""
        if not any("tensors" in item or "text" in item for item in items):
            return self._tensors(items)
        samples = [(item if "tensors" in item else self.encode(item))["tensors"] for item in items]
        longest = max(sample["input_ids"].shape[1] for sample in samples)
        left = self.processor.tokenizer.padding_side == "left"
        batch = {}
        for name in dict.fromkeys(name for sample in samples for name in sample):
            tensors = [sample[name] for sample in samples if name in sample]
            if name in self.padding:
                ids = [sample["input_ids"] for sample in samples]  # a document has no token types: it is text
                tensors = [
                    sample.get(name, torch.full_like(own, self.padding[name]))
                    for sample, own in zip(samples, ids, strict=True)
                ]
                missing = [longest - tensor.shape[1] for tensor in tensors]
                sides = [(count, 0) if left else (0, count) for count in missing]
                fill = self.padding[name]
                tensors = [pad(*given, value=fill) for given in zip(tensors, sides, strict=True)]
            batch[name] = torch.cat(of_one_size(name, tensors))
        return batch

    def with_names(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch to train on: the tensors, and the `names` of the samples."""
        return self(items) | {"names": [item.get("name", "?") for item in items]}

    def _tensors(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Items not encoded before."""
        conversations = [list(item["messages"]) for item in items]
        for conversation in conversations:
            self._refuse_control_tokens(conversation)
        self.require_chat_template()
        prompts = self.supervise == "nothing"
        if prompts:
            conversations = [c[:-1] if c[-1]["role"] == "assistant" else c for c in conversations]
        processor_kwargs: dict[str, Any] = {"padding": True}
        videos = [block for c in conversations for block in content_blocks(c, "video")]
        if videos:  # their frames are chosen already
            processor_kwargs["do_sample_frames"] = False
        if any("fps" in block for block in videos):
            processor_kwargs["video_metadata"] = list(map(_metadata, videos))
        finds = self.supervise == "answers"
        processor = self.answers.observed(self.processor) if finds else self.processor
        batch = dict(
            processor.apply_chat_template(
                conversations,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=prompts,
                processor_kwargs=processor_kwargs,
            )
        )
        self._refuse_long(batch)
        self._refuse_lost_media(batch, conversations)
        if not prompts:
            learnt = ~torch.isin(batch["input_ids"], self.placeholder_ids)
            if not finds:
                for conversation in conversations:
                    self._refuse_cut_answers(conversation)
            else:
                found = self.answers.find(batch["input_ids"], conversations, processor)
                # an answer may hold a picture
                learnt = found.learnt & (~torch.isin(batch["input_ids"], self.control_ids) | found.ends)
            learnt &= batch["attention_mask"].bool()
            batch["labels"] = batch["input_ids"].where(learnt, torch.tensor(IGNORED))
        return batch

    def _document(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """One document, with the special tokens that the tokenizer puts around a text."""
        (item,) = items
        self._refuse_control_tokens([{"content": item["text"]}])
        batch = dict(self.processor.tokenizer(item["text"], return_tensors="pt"))
        length = batch["input_ids"].shape[1]
        require(length > 1, "ChatCollator", "a document must have a token to predict from the first", length)
        self._refuse_long(batch)
        return batch | ({} if self.supervise == "nothing" else {"labels": batch["input_ids"].clone()})

    def _refuse_cut_answers(self, conversation: Sequence[Mapping[str, Any]]) -> None:
        """The template must write all of every answer that is learnt, wherever it stands."""
        text = render(self.processor, conversation)
        for turn, said in enumerate(conversation):
            if said["role"] == "assistant":
                require_whole(conversation, turn, text)

    def _refuse_long(self, batch: Mapping[str, Tensor]) -> None:
        """A sample must not be longer than asked for."""
        length, must = batch["input_ids"].shape[1], f"a sample must have at most {self.max_length} tokens"
        require(not self.max_length or length <= self.max_length, "ChatCollator", must, length)

    def _refuse_control_tokens(self, conversation: Sequence[Mapping[str, Any]]) -> None:
        """Text must not end a turn, open another, or pass for an image."""
        for block in content_blocks(conversation, "text"):
            must = "a text must be Unicode that can be encoded"
            halves = re.search(r"[\ud800-\udfff]", block["text"])
            require(not halves, "ChatCollator", must, "half of a surrogate pair")
            if found := self.control_tokens.search(block["text"]):
                must = "a text must hold no placeholder or other control token of the model"
                hint = "take it out, or write it in other characters"
                require(False, "ChatCollator", must, found[0], hint)

    def _refuse_lost_media(
        self, batch: Mapping[str, Tensor], conversations: Sequence[Sequence[Mapping[str, Any]]]
    ) -> None:
        """Every picture that was given must be in the batch, and every frame."""
        has_place = torch.isin(batch["input_ids"], self.placeholder_ids).any(1).tolist()
        has_pixels = any(name.startswith("pixel_values") for name in batch)
        hint = f"the processor, {type(self.processor).__name__}, or its chat template leaves some out"
        for kind in ("image", "video"):
            rows = [list(content_blocks(conversation, kind)) for conversation in conversations]
            given = [block for row in rows for block in row]
            without = [
                row for row, blocks in enumerate(rows) if blocks and not (has_place[row] and has_pixels)
            ]
            require(
                not without,
                "ChatCollator",
                f"every {kind} must be in the batch",
                f"none of items {without}",
                hint,
            )
            grids = batch.get(f"{kind}_grid_thw")
            if not given or grids is None:
                continue
            moments = [1] * len(given)
            if kind == "video":
                depth = self.processor.video_processor.temporal_patch_size
                moments = [-(-len(block["video"]) // depth) for block in given]
            must = f"every {kind} must be in the batch with all its frames, {moments} moments"
            require(grids[:, 0].tolist() == moments, "ChatCollator", must, grids[:, 0].tolist(), hint)


def control_tokens(processor: ProcessorMixin) -> list[str]:
    """What a family's tokenizer reads as structure wherever it stands: turns, pictures, ends, padding.

    Choice: markers of places in a picture (`GROUNDING`) are for texts to use, so they are none of these.
    """
    special = {str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(processor.tokenizer.all_special_tokens) | set(vision_placeholders(processor))
    added = {str(token) for token in processor.tokenizer.added_tokens_decoder.values()}
    special |= added & {TURN_START, TURN_END}  # some tokenizers do not call them special
    return sorted(special - set(GROUNDING), key=len, reverse=True)


def vision_placeholders(processor: ProcessorMixin) -> list[str]:
    """The tokens in whose place pictures are put."""
    names = ("image_token", "video_token")
    return [token for name in names if isinstance(token := getattr(processor, name, None), str)]


def ids_of(tokenizer: Any, tokens: Sequence[str]) -> Tensor:
    """(tokens,) int64, the ids of those that the tokenizer has."""
    vocabulary = tokenizer.get_vocab()
    return torch.tensor([vocabulary[token] for token in tokens if token in vocabulary], dtype=torch.int64)


def of_one_size(name: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Samples' pixels, such that they can be joined along their first axis.

    Some processors fill up their second axis with 0, which the models tell from pictures: LLaVA-OneVision's
    (images, tiles, C, Y, X), Idefics3's (rows, tiles, C, Y, X). Frames of a video cannot be filled up so.

    Raises:
        ValueError: for samples whose pixels differ otherwise.
    """
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return tensors
    if (name, tensors[0].ndim) in (("pixel_values", 5), ("pixel_attention_mask", 4)):
        most = max(tensor.shape[1] for tensor in tensors)
        after = (0, 0) * (tensors[0].ndim - 2)
        tensors = [pad(tensor, (*after, 0, most - tensor.shape[1])) for tensor in tensors]
    sizes = sorted({tuple(tensor.shape[1:]) for tensor in tensors})
    must = f"{name} of a batch must be of one size, videos of as many frames"
    require(len(sizes) == 1, "ChatCollator", must, sizes, "batches of 1, or frames thinned to one number")
    return tensors


def _metadata(block: Mapping[str, Any]) -> dict[str, Any]:
    """What processors ask about a video: all its frames are given, at the rate that it states."""
    count = len(block["video"])
    return {"total_num_frames": count, "fps": block.get("fps"), "frames_indices": [*range(count)]}


def content_blocks(messages: Sequence[Mapping[str, Any]], kind: str) -> Iterator[Mapping[str, Any]]:
    """All content blocks of a kind; a content that is a text is one text block."""
    for content in (message["content"] for message in messages):
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        yield from (block for block in blocks if block["type"] == kind)
