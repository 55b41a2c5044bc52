"""Where the answers are among a conversation's tokens: each with its end-of-turn token, so that it is taught.

A chat template is read in the first of three ways that fits it:

1. ChatML: an answer stands between the tokens of `ANSWER_HEADER` and `TURN_END`.
2. {% generation %} marks in the template, which say what the model writes, and the end of turn after them.
3. The difference of two renderings: what an answered conversation adds to the prompt for that answer.

Ways 2 and 3 give places in the rendered text. Before it is tokenised, the processor puts longer texts in the
place of pictures' placeholders; the texts between them stay, and are found again in order. Where that leaves
a choice, or a token lies across an answer's border, the conversation is refused; and where the template cuts
an answer, as some leave out what stands before </think>.

Letters: B conversations, L tokens.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase, ProcessorMixin

from ..checks import require

WHERE = "ChatCollator"
TURN_START = "<|im_start|>"
ANSWER_HEADER = f"{TURN_START}assistant\n"
TURN_END = "<|im_end|>"
QUESTION, ANSWER = "linmu-mark-one", "linmu-mark-two"
OPENS, CLOSES = "\ue0a1linmu-answer\ue0a2", "\ue0a3linmu-answer\ue0a4"
MARKED = "put {% generation %} and {% endgeneration %} around the answer in the chat template"

Turn = Mapping[str, Any]
Conversation = Sequence[Turn]


class ChatTemplateError(ValueError):
    """A chat template that is missing, or whose answers cannot be told: no fault of a sample."""


class Found(NamedTuple):
    """(B, L) bool each: the tokens of answers to be learnt, and which of these end a turn."""

    learnt: Tensor
    ends: Tensor


def answers_of(
    processor: Any, control: Sequence[str], placeholders: Sequence[str]
) -> ChatMLAnswers | RenderedAnswers:
    """Choose how the answers of a processor's chat template are found.

    Args:
        processor: of `load_processor`, with a chat template.
        control: its control tokens, of which one ends a turn.
        placeholders: those that stand for pictures.
    Raises:
        ChatTemplateError: for a template that does not say where an answer begins and ends.
    """
    try:
        return way_of(processor, control, placeholders)
    except ValueError as error:
        raise ChatTemplateError(str(error)) from error


def way_of(
    processor: Any, control: Sequence[str], placeholders: Sequence[str]
) -> ChatMLAnswers | RenderedAnswers:
    """`answers_of`, its refusals as `ValueError`."""
    asked, answered = (
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", QUESTION), ("assistant", ANSWER))
    )
    text = render(processor, [asked, answered])
    hint = "contents are texts to a language model's template, and lists of blocks to one that sees"
    is_said = QUESTION in text and ANSWER in text
    require(is_said, WHERE, "the chat template must write what is said", repr(text), hint)
    before, _, after = text.partition(ANSWER)
    is_chatml = before.endswith(ANSWER_HEADER) and after.startswith(TURN_END)
    if is_chatml and TURN_END in processor.tokenizer.get_vocab():
        return ChatMLAnswers(processor.tokenizer)
    ends = "|".join(re.escape(token) for token in control if token not in placeholders)
    end = re.match(rf"\s*({ends})", after) if ends else None
    must = "the chat template must close an answer with a control token"
    require(end is not None, WHERE, must, repr(text), "close it with the token that the model stops at")
    marked = template_with_marks(processor)
    if marked is None:
        prompt = render(processor, [asked], add_generation_prompt=True)
        exact = before.startswith(prompt) and not before[len(prompt) :].strip()
        must = "the chat template must render an answer right after its prompt (add_generation_prompt)"
        require(exact, WHERE, must, f"{prompt!r} and {text!r}", MARKED)
    require(processor.tokenizer.is_fast, WHERE, "the tokenizer must tell where its tokens are", "a slow one")
    found = RenderedAnswers(processor, placeholders, end[1], marked)
    found.opening = opening_of(found, ends, asked, answered)
    return found


def opening_of(found: RenderedAnswers, ends: str, asked: Turn, answered: Turn) -> str:
    """What a template writes before answers and nowhere else, from the end of the turn before; "" if not.

    It holds a control token, which no text of a conversation may, so its places are those of the answers.

    Args:
        found: finds answers without it.
        ends: a pattern of control tokens.
        asked, answered: two turns to try it on.
    """
    before, prompt = (render(found.processor, [asked], add_generation_prompt=g) for g in (False, True))
    turn_end = re.search(rf"({ends})\s*$", before)
    if turn_end is None or not prompt.startswith(before) or not prompt[len(before) :].strip():
        return ""
    found.opening = prompt[turn_end.start() :]
    conversation, turns = [asked, answered] * 2, [1, 3]
    if found.marked is not None:
        return found.opening
    text = render(found.processor, conversation)
    try:
        want = [found.difference(conversation, turn, text) for turn in turns]
    except ValueError:
        return ""
    return found.opening if found.after_openings(conversation, turns, text) == want else ""


class ChatMLAnswers:
    """Way 1: from the ids alone.

    Args:
        tokenizer: of the processor.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.header = np.array(tokenizer(ANSWER_HEADER, add_special_tokens=False)["input_ids"])
        self.end = tokenizer.convert_tokens_to_ids(TURN_END)

    def observed(self, processor: Any) -> Any:
        """The processor to make the batch with."""
        return processor

    def find(self, ids: Tensor, conversations: Sequence[Conversation], processor: Any) -> Found:
        """Find the answers in ids (B, L).

        Raises:
            ValueError: where there are not as many headers as answers, or the template cuts one.
        """
        answers = [[turn for turn in c if turn["role"] == "assistant"] for c in conversations]
        number, found = answer_numbers(ids.numpy(), self.header, self.end)
        for row, (headers, turns) in enumerate(zip(found, answers, strict=True)):
            must = f"every assistant turn must follow {ANSWER_HEADER!r}"
            got = f"{headers} headers for {len(turns)} turns in item {row}"
            hint = "an answer must not begin with a line break"
            require(headers == len(turns), WHERE, must, got, hint)
            self.require_whole(processor, conversations[row])
        most = max(map(len, answers), default=0)
        weights = [[turn.get("weight", 1) for turn in turns] + [0] * (most - len(turns)) for turns in answers]
        by_number = torch.tensor([[0, *row] for row in weights]).bool()  # none outside the answers
        learnt = by_number.gather(1, torch.from_numpy(number))
        return Found(learnt, learnt & (ids == self.end))

    def require_whole(self, processor: Any, conversation: Conversation) -> None:
        """Every answer that is learnt must be between its header and the end of its turn."""
        _, *written = render(processor, conversation).split(ANSWER_HEADER)
        turns = [i for i, turn in enumerate(conversation) if turn["role"] == "assistant"]
        for turn, text in zip(turns, written, strict=True):
            require_whole(conversation, turn, text.partition(TURN_END)[0])


def answer_numbers(ids: np.ndarray, header: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the answers in ids (B, L).

    Returns:
        (B, L) int64, n in the n-th answer of a row, from after its header up to and including the end token,
        else 0; and (B,) headers found.
    """
    batch, length = ids.shape
    follows = np.zeros((batch, length + 1), dtype=bool)
    if length >= len(header):
        windows = np.lib.stride_tricks.sliding_window_view(ids, len(header), axis=1)
        follows[:, len(header) :] = (windows == header).all(-1)
    after_end = np.zeros((batch, length + 1), dtype=bool)
    after_end[:, 1:] = ids == end
    place = np.arange(1, length + 2)
    opened = np.maximum.accumulate(np.where(follows, place, 0), axis=1)
    closed = np.maximum.accumulate(np.where(after_end, place, 0), axis=1)
    numbers = np.where(opened > closed, follows.cumsum(1), 0)
    return numbers[:, :length], follows.sum(1)


class RenderedAnswers:
    """Ways 2 and 3: from the rendered text.

    Args:
        processor: of `load_processor`.
        placeholders: the tokens that stand for pictures.
        end: the token that ends a turn.
        marked: the chat template with `OPENS` and `CLOSES` in place of its marks; None = it has none.
    Attributes:
        opening: what stands before every answer and nowhere else, as of `opening_of`; "" = not known.
    """

    opening = ""

    def __init__(self, processor: Any, placeholders: Sequence[str], end: str, marked: str | None) -> None:
        nothing = "(?!)"
        self.placeholders = re.compile("|".join(map(re.escape, placeholders)) or nothing)
        self.processor, self.end, self.marked = processor, end, marked
        self.end_id = processor.tokenizer.convert_tokens_to_ids(end)

    def observed(self, processor: Any) -> Any:
        """A copy of the processor whose `tokenizer` notes what it is given, to make one batch with."""
        observed = copy.copy(processor)
        observed.tokenizer = ObservedTokenizer(processor.tokenizer)
        return observed

    def find(self, ids: Tensor, conversations: Sequence[Conversation], processor: Any) -> Found:
        """Find the answers in ids (B, L), which `processor`, an `observed` one, made.

        Raises:
            ValueError: where a place is not exact, a token lies across a border, or an answer is cut.
        """
        seen: ObservedTokenizer = processor.tokenizer
        learnt, ends = np.zeros(ids.shape, bool), np.zeros(ids.shape, bool)
        for row, conversation in enumerate(conversations):
            turns = [i for i, t in enumerate(conversation) if t["role"] == "assistant" and t.get("weight", 1)]
            if not turns:
                continue
            text = render(self.processor, conversation)
            parts = literal_parts(text, self.placeholders)
            moved = places_of([text[start:stop] for start, stop in parts], seen.texts[row])
            tokens = TokenSpans(ids[row].numpy(), seen.offsets[row])
            places = self.places(conversation, turns, text)
            for turn, (start, stop) in zip(turns, places, strict=True):
                require_whole(conversation, turn, text[start:stop])
                for (opens, closes), place in zip(parts, moved, strict=True):
                    first, last = max(start, opens), min(stop, closes)
                    if first >= last:
                        continue
                    must = "an answer's place among the pictures must be certain"
                    require(place is not None, WHERE, must, repr(text[first:last]), MARKED)
                    shift, end_id = place - opens, self.end_id if last == stop else None
                    chosen = tokens.between(first + shift, last + shift, end_id)
                    learnt[row, chosen] = True
                    ends[row, chosen[-1]] |= last == stop
        return Found(torch.from_numpy(learnt), torch.from_numpy(ends))

    def places(self, conversation: Conversation, turns: Sequence[int], text: str) -> list[tuple[int, int]]:
        """The answers of these turns in the rendered text, each (first character, after its end of turn)."""
        require(turns[0] > 0, WHERE, "a conversation must begin with a question", "an answer")
        if self.marked is None:
            places = self.after_openings(conversation, turns, text)
            return places or [self.difference(conversation, turn, text) for turn in turns]
        marks = marks_of(render(self.processor, conversation, chat_template=self.marked), text)
        answers = [i for i, turn in enumerate(conversation) if turn["role"] == "assistant"]
        must = "the chat template must mark every answer once with {% generation %}"
        require(len(marks) == len(answers), WHERE, must, f"{len(marks)} marks for {len(answers)} answers")
        prompt = self.prompt_for(conversation, turns[-1])
        alike = self.opening and prompt.endswith(self.opening)
        prompts = [prompt if alike else self.prompt_for(conversation, turn) for turn in turns]
        own = [marks[answers.index(turn)] for turn in turns]
        return [self.within(prompt, text, *mark) for prompt, mark in zip(prompts, own, strict=True)]

    def after_openings(
        self, conversation: Conversation, turns: Sequence[int], text: str
    ) -> list[tuple[int, int]] | None:
        """What follows the openings, up to its end of turn; None if they are not one for each answer.

        The prompt for the last of these turns is rendered: it must be the text up to there.
        """
        answers = [i for i, turn in enumerate(conversation) if turn["role"] == "assistant"]
        before, *after = text.split(self.opening) if self.opening else [""]
        if len(after) != len(answers) or not all(self.end in part for part in after):
            return None
        spans, start = [], len(before)
        for part in after:
            start += len(self.opening)
            spans.append((start, text.index(self.end, start) + len(self.end)))
            start += len(part)
        places = [spans[answers.index(turn)] for turn in turns]
        is_prompt = text[: places[-1][0]] == self.prompt_for(conversation, turns[-1])
        return places if is_prompt else None

    def difference(self, conversation: Conversation, turn: int, text: str) -> tuple[int, int]:
        """What this turn adds to the prompt for it, up to its end of turn."""
        prompt = self.prompt_for(conversation, turn)
        last = turn + 1 == len(conversation)
        answered = text if last else render(self.processor, conversation[: turn + 1])
        stop = answered.find(self.end, len(prompt)) + len(self.end)
        exact = answered.startswith(prompt) and stop > len(prompt) and text.startswith(answered[:stop])
        must = "the chat template must render turns alike whatever follows them, answers right after a prompt"
        require(exact, WHERE, must, f"{prompt[-80:]!r} for turn {turn} of {text!r}", MARKED)
        return len(prompt), stop

    def within(self, prompt: str, text: str, start: int, stop: int) -> tuple[int, int]:
        """What is marked, without the white space that the prompt for it ends with, up to its end of turn."""
        marked = text[start:stop]
        space = marked[: len(marked) - len(marked.lstrip())]
        while not prompt.endswith(space):
            space = space[:-1]
        end = re.compile(r"\s*" + re.escape(self.end))
        after = end.search(text, start, stop) or end.match(text, stop)
        must = f"the chat template must close a marked answer with {self.end!r}"
        require(after is not None, WHERE, must, repr(text[start : stop + 40]))
        return start + len(space), after.end()

    def prompt_for(self, conversation: Conversation, turn: int) -> str:
        """What the model is given to write this turn."""
        return render(self.processor, conversation[:turn], add_generation_prompt=True)


class ObservedTokenizer:
    """A tokenizer that keeps the texts it was given last, and where in them its tokens are.

    Attributes:
        texts: B texts, the placeholders of pictures already replaced.
        offsets: (B, L, 2) the characters of each token, from and to; equal for padding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.observed = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.observed, name)

    def __call__(self, text: str | Sequence[str], **kwargs: Any) -> BatchEncoding:
        encoding = self.observed(text, **(kwargs | {"return_offsets_mapping": True}))
        self.texts, self.offsets = list(text), np.asarray(encoding.pop("offset_mapping"))
        return encoding


class TokenSpans:
    """One conversation's tokens, by the characters they stand for.

    Args:
        ids: (L,) the tokens.
        offsets: (L, 2) the characters of each, from and to; equal for those that stand for none.
    """

    def __init__(self, ids: np.ndarray, offsets: np.ndarray) -> None:
        self.index = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
        self.ids, (self.starts, self.stops) = ids[self.index], offsets[self.index].T

    def between(self, start: int, stop: int, end_id: int | None) -> np.ndarray:
        """The places among L of the tokens of these characters, of which `end_id`, if given, is the last.

        Raises:
            ValueError: for a token that lies across a border, or an end that is not there.
        """
        first = int(np.searchsorted(self.stops, start, side="right"))
        last = int(np.searchsorted(self.starts, stop, side="left")) - 1
        is_closed = end_id is None or (last >= first and self.ids[last] == end_id)
        must = "an answer must be among the tokens up to its end of turn"
        require(is_closed, WHERE, must, "one that the processor cuts off")
        begins = first <= last and (self.stops[first - 1] if first else 0) == start <= self.starts[first]
        closes = end_id is not None or self.stops[last] <= stop
        must = "an answer's first and last tokens must be its own"
        got = "a token that is partly the chat template's or a picture's"
        hint = "an answer must not begin with white space; or " + MARKED
        require(bool(begins and closes), WHERE, must, got, hint)
        return self.index[first : last + 1]


def render(processor: Any, conversation: Conversation, **settings: Any) -> str:
    """A conversation as its chat template writes it, a placeholder for each picture.

    Raises:
        ValueError: for a template that is broken, or that refuses the conversation.
    """
    try:
        return processor.apply_chat_template([list(conversation)], tokenize=False, **settings)[0]
    except (TemplateError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"{WHERE}: the chat template must write every conversation, got {got}") from error


def require_whole(conversation: Conversation, turn: int, rendered: str) -> None:
    """An answer that is learnt must be in what is rendered for it, white space aside, which templates trim.

    Raises:
        ValueError: if it is not.
    """
    said, place = conversation[turn], 0
    if not said.get("weight", 1):
        return
    content = said["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    written = "".join(rendered.split())
    for text in (block["text"] for block in blocks if block["type"] == "text"):
        wanted = "".join(text.split())
        place = written.find(wanted, place)
        must = "the chat template must write an answer whole"
        got = f"{rendered[-200:]!r} for turn {turn}, {text[:200]!r}"
        require(place >= 0, WHERE, must, got, "leave out what it cuts, or change the template")
        place += len(wanted)


def chat_template_of(processor: ProcessorMixin | Any) -> str:
    """The template that conversations are rendered with; "" if there is none."""
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template or ""
    return template.get("default", "") if isinstance(template, dict) else template


def template_with_marks(processor: ProcessorMixin | Any) -> str | None:
    """A chat template with `OPENS` and `CLOSES` for its {% generation %} marks; None if it has none."""
    template = chat_template_of(processor)
    tag = re.compile(r"\{%([-+]?)\s*(generation|endgeneration)\s*([-+]?)%\}")

    def mark(found: re.Match) -> str:
        """A block in a block's place, so that white space around it is treated alike."""
        written = OPENS if found[2] == "generation" else CLOSES
        return f"{{%{found[1]} if true %}}{written}{{% endif {found[3]}%}}"

    return tag.sub(mark, template) if tag.search(template) else None


def marks_of(marked: str, text: str) -> list[tuple[int, int]]:
    """Where marked stretches of a rendered text are; those that touch are one.

    Raises:
        ValueError: if without its marks it is not that text.
    """
    marks, plain, opened = [], "", None
    for piece in re.split(f"({OPENS}|{CLOSES})", marked):
        if piece == OPENS:
            opened = len(plain)
        elif piece == CLOSES:
            start = marks.pop()[0] if marks and marks[-1][1] == opened else opened
            marks.append((start, len(plain)))
        else:
            plain += piece
    must = "the chat template must write the same with its {% generation %} marks as without"
    require(plain == text, WHERE, must, repr(plain[:200]))
    return marks


def literal_parts(text: str, placeholders: re.Pattern) -> list[tuple[int, int]]:
    """What stands before, between and after the placeholders of a text."""
    found = [match.span() for match in placeholders.finditer(text)]
    return [*zip([0, *(stop for _, stop in found)], [*(start for start, _ in found), len(text)], strict=True)]


def places_of(parts: Sequence[str], text: str) -> list[int | None]:
    """Where parts begin in a text of which they are what is left, in order; None where there is a choice.

    The first part opens the text, the last closes it. Every way to place the others lies between the two that
    place each as early, and as late, as the others allow.

    Raises:
        ValueError: if the text does not hold them in order.
    """
    *inner, last = parts
    early, late, stop = [], [len(text) - len(last)], 0
    for part in inner:
        early.append(text.find(part, stop))
        stop = max(early[-1], 0) + len(part)
    for part in reversed(inner):
        late.insert(0, text.rfind(part, 0, max(late[0], 0)))
    early.append(late[-1])
    fits = text.startswith(parts[0]) and text.endswith(last) and min(*early, *late) >= 0 and stop <= early[-1]
    must = "the processor must keep the text between pictures as the chat template writes it"
    require(fits and (bool(inner) or text == last), WHERE, must, repr(text[:200]))
    return [one if one == other else None for one, other in zip(early, late, strict=True)]
