"""What a chat template puts around texts and videos, so that a conversation can be written piece by piece.

Templates render whole conversations. The pieces are found by rendering a few that differ in one thing, with
marked texts in them: what stands between the marks is the template's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import ProcessorMixin

from ..checks import require

MARKS = ("linmu-mark-one", "linmu-mark-two", "linmu-mark-three")
VIDEO = {"type": "video"}


@dataclass(frozen=True)
class ChatPieces:
    """The texts that a template adds.

    Attributes:
        first: what opens a conversation's first turn, by role; a default system prompt included.
        openings: what opens a later turn, by role.
        closings: what closes a turn, by role.
        answer: what opens the turn in which the model is to answer.
        video: what stands for a video, its placeholder token included.
    """

    first: Mapping[str, str]
    openings: Mapping[str, str]
    closings: Mapping[str, str]
    answer: str
    video: str


def chat_pieces(processor: ProcessorMixin) -> ChatPieces:
    """Find the pieces of a processor's chat template.

    Raises:
        ValueError: without a template, and for one that numbers turns or videos, or changes texts.
    """
    where, hint = "chat_pieces", "watching needs the chat template of Qwen2-VL, Qwen2.5-VL or Qwen3-VL"
    has_template = getattr(processor, "chat_template", None) is not None
    require(has_template, where, "the processor must have a chat template", None, hint)
    one, two, three = ({"type": "text", "text": mark} for mark in MARKS)

    def between_marks(*turns: tuple, answer: bool = False) -> list[str]:
        """Render turns (role, *blocks); return what stands before, between and after the marked texts."""
        messages = [{"role": role, "content": list(blocks)} for role, *blocks in turns]
        rest = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
        pieces = []
        for block in (block for turn in turns for block in turn[1:] if block is not VIDEO):
            require(rest.count(block["text"]) == 1, where, "texts must be rendered once", repr(rest), hint)
            piece, _, rest = rest.partition(block["text"])
            pieces.append(piece)
        return [*pieces, rest]

    def without(text: str, *, start: str = "", end: str = "") -> str:
        """Take `start` and `end` off, which must be there."""
        alike = text.startswith(start) and text.endswith(end) and len(text) >= len(start) + len(end)
        must = "the template must open and close turns alike wherever they stand"
        require(alike, where, must, f"{text!r} without {(start or end)!r}", hint)
        return text[len(start) : len(text) - len(end)]

    first_user, user_end = between_marks(("user", one))
    *_, assistant_end = between_marks(("user", one), ("assistant", two))
    _, to_assistant, to_user, _ = between_marks(("user", one), ("assistant", two), ("user", three))
    user = without(to_user, start=assistant_end)
    first_system, from_system, _ = between_marks(("system", one), ("user", two))
    *_, to_answer = between_marks(("user", one), answer=True)
    _, video, _ = between_marks(("user", one, VIDEO, two))
    *_, second_video, _ = between_marks(("user", one, VIDEO, two, VIDEO, three))
    placeholder = getattr(processor, "video_token", None)
    is_plain = video == second_video and bool(placeholder) and video.count(placeholder) == 1
    require(is_plain, where, "every video must be rendered alike, by one placeholder", repr(video), hint)
    answer = without(to_answer, start=user_end)
    *_, between, end = between_marks(("user", one), ("user", two, VIDEO), answer=True)
    found = between == user_end + user and end == video + user_end + answer
    must = "the template must render a second user turn as it does the first"
    require(found, where, must, f"{between!r} and {end!r}", hint)
    return ChatPieces(
        first={"user": first_user, "system": first_system},
        openings={"user": user, "assistant": without(to_assistant, start=user_end)},
        closings={"user": user_end, "assistant": assistant_end, "system": without(from_system, end=user)},
        answer=answer,
        video=video,
    )
