"""Every family's answers, found by its own chat template: exactly these tokens and their end of turn."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from linmu.reference.prompts import answers
from linmu.reference.prompts.answers import OPENS, ChatMLAnswers
from linmu.reference.prompts.chat_collator import IGNORED, ChatCollator
from linmu.reference.prompts.text_processor import TextProcessor

from ..student import tiny_families
from ..student.tiny_families import BUILDERS, byte_tokenizer
from .chat_templates import (
    CHATML,
    IDEFICS3,
    INTERNVL,
    LLAMA3,
    LLAVA_ONEVISION,
    OF_PICTURES,
    OF_TEXT,
    QWEN2,
    Written,
)

pytestmark = pytest.mark.trial_of_the_reference

NOISE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
SHOWN = [{"type": "image", "image": Image.fromarray(NOISE[:y, :x])} for y, x in ((16, 32), (40, 16))]


def text(said: str) -> dict:
    return {"type": "text", "text": said}


def user(*blocks: dict) -> dict:
    return {"role": "user", "content": list(blocks)}


def answer(*blocks: dict, **more: int) -> dict:
    return {"role": "assistant", "content": list(blocks), **more}


@cache
def processor_of(family: str):
    """A family's tiny processor with its own chat template, padded on the left."""
    written = (OF_PICTURES | OF_TEXT)[family]
    if family in OF_TEXT:
        processor = TextProcessor(byte_tokenizer(written.special))
        processor.tokenizer.chat_template = written.template
        return processor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_families, "byte_tokenizer", lambda special, named=None: byte_tokenizer(
            (*written.special, *special), named))  # fmt: skip
        processor = BUILDERS[family]().processor
    processor.chat_template = written.template
    return processor


def said_by(collator: ChatCollator, *conversations: list[dict]) -> list[str]:
    """What a batch of these teaches, together and each encoded before."""
    items = [{"kind": "all", "messages": messages} for messages in conversations]
    taught = []
    for samples in (items, [collator.encode(item) for item in items]):
        batch = collator(samples)
        learnt = batch["labels"] != IGNORED
        assert torch.equal(batch["labels"][learnt], batch["input_ids"][learnt])
        taught.append([collator.processor.tokenizer.decode(ids[ids != IGNORED]) for ids in batch["labels"]])
    assert taught[0] == taught[1]
    return taught[0]


HEADERLIKE = "\nAssistant: 9 [/INST] user\n<image_pad>"  # and of nearly a placeholder


def conversations(pictures: bool) -> list[list[dict]]:
    """One and two turns; pictures first, between, last and absent, several sizes; odd answers."""
    one, two = SHOWN if pictures else (text("a"), text("b"))
    return [
        [user(text("how")), answer(text("7"))],
        [user(one, text("how")), answer(text("7"))],
        [
            user(text("x"), one, text("y"), two),
            answer(text("long one")),
            user(text("z")),
            answer(text("é")),
        ],
        [user(one, two), answer(text("7")), user(two, text("how")), answer(text("7"))],
        [user(text("7")), answer(text("c" + HEADERLIKE)), user(one, text("7")), answer(text("7"))],
        [user(one, text("7")), answer(text("7"), weight=0), user(one, text("7")), answer(text("7"))],
        [user(text("7"))],
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [*OF_PICTURES, *OF_TEXT])
def test_what_is_learnt_are_the_answers_and_their_ends(family, side):
    written = (OF_PICTURES | OF_TEXT)[family]
    collator = ChatCollator(copy.copy(processor_of(family)))
    collator.processor.tokenizer.padding_side = side
    given = conversations(family in OF_PICTURES)
    want = [
        "".join(
            f"{written.before}{turn['content'][0]['text']}{written.end}"
            for turn in messages
            if turn["role"] == "assistant" and turn.get("weight", 1)
        )
        for messages in given
    ]
    assert said_by(collator, *given) == want
    assert isinstance(collator.answers, ChatMLAnswers) == (family.startswith(("qwen", "internvl")))


@pytest.mark.parametrize("family", [*OF_PICTURES, *OF_TEXT])
def test_an_answer_goes_on_where_the_prompt_for_it_ends(family):
    """By counting the tokens of every prompt and of every conversation cut after an answer."""
    processor = processor_of(family)
    whole, all_text, prompts = (ChatCollator(processor, supervise=s) for s in ("answers", "all", "nothing"))
    end = processor.tokenizer.convert_tokens_to_ids((OF_PICTURES | OF_TEXT)[family].end.strip())
    space = family == "llava_onevision"  # its prompt for an answer lacks what its turns have before it
    for messages in conversations(family in OF_PICTURES)[:5]:
        labels = whole([{"messages": messages}])["labels"][0]
        want = torch.zeros_like(labels, dtype=torch.bool)
        for i, turn in enumerate(messages):
            if turn["role"] == "assistant":
                until = [{"messages": messages[: i + 1]}]
                begins = prompts(until)["input_ids"].shape[1] + space
                cut = all_text(until)["input_ids"][0]
                want[begins : int((cut == end).nonzero().max()) + 1] = True
        assert torch.equal(labels != IGNORED, want)


@pytest.mark.parametrize("family", ["llava_onevision", "idefics3", "smolvlm"])
def test_a_picture_in_an_answer_is_not_learnt(family):
    written = OF_PICTURES[family]
    collator = ChatCollator(processor_of(family))
    for blocks in ([SHOWN[0], text("7")], [text("7"), SHOWN[0]], [text("7"), SHOWN[0], text("8"), SHOWN[1]]):
        later = [user(text("z")), answer(text("9"))]
        (taught,) = said_by(collator, [user(text("how")), answer(*blocks), *later])
        first, second, rest = taught.split(written.end)
        assert (second.strip(), rest) == ("9", "")
        assert "<" not in first and "7" in first and ("8" in first) == (len(blocks) == 4)


def test_a_tokenizer_without_a_padding_token_pads_with_its_end():
    tokenizer = byte_tokenizer(LLAMA3.special)
    tokenizer.chat_template, tokenizer.pad_token = LLAMA3.template, None
    batch = ChatCollator(TextProcessor(tokenizer))(
        [{"messages": [user(text("how" * n)), answer(text("7"))]} for n in (1, 3)]
    )
    assert (batch["input_ids"][0, :6] == tokenizer.eos_token_id).all()
    assert batch["attention_mask"].sum(1).diff().item() == 6


def test_all_text_is_learnt_by_any_template():
    collator = ChatCollator(processor_of("idefics3"), supervise="all")
    want = "<|begin_of_text|>User: how<end_of_utterance>\nAssistant: 7<end_of_utterance>\n"
    assert said_by(collator, [user(text("how")), answer(text("7"))]) == [want]


def merging_tokenizer(special: tuple[str, ...], *merges: str) -> PreTrainedTokenizerFast:
    """A token per byte, and one for each of these pairs of letters, wherever they meet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(pair.replace(" ", "Ġ").replace("\n", "Ċ")) for pair in merges]
    vocabulary = [*alphabet, *map("".join, pairs)]
    bpe = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(vocabulary)}, merges=pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<pad>", *special)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", padding_side="right")


class FramesInText:
    """Puts words and tokens in the place of a picture, as SmolVLM and InternVL do for a video."""

    image_token = "<image>"

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.limit = tokenizer, None

    def apply_chat_template(self, conversations, *, tokenize=False, add_generation_prompt=False, **kwargs):
        template = {name: value for name, value in kwargs.items() if name == "chat_template"}
        template["add_generation_prompt"] = add_generation_prompt
        texts = self.tokenizer.apply_chat_template(conversations, tokenize=False, **template)
        if not tokenize:
            return texts
        texts = [text.replace("<image>", "7 Frame:<image><image>\n\n") for text in texts]
        cut = {"truncation": self.limit is not None, "max_length": self.limit}
        batch = self.tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True, **cut)
        return {**batch, "pixel_values": torch.zeros(1)}


def merging(written: Written, *merges: str) -> ChatCollator:
    """A collator of conversations with frames whose tokens merge."""
    processor = FramesInText(merging_tokenizer((*written.special, "<image>"), *merges))
    processor.tokenizer.chat_template = written.template
    return ChatCollator(processor)


def of_text(template: str) -> ChatCollator:
    """A collator for another template with Llama 3's tokens."""
    processor = TextProcessor(byte_tokenizer(LLAMA3.special))
    processor.tokenizer.chat_template = template
    return ChatCollator(processor)


def test_tokens_that_join_a_prompts_end_and_an_answers_beginning_are_refused():
    seven, nine = ([user(text("how")), answer(text(said))] for said in ("7", "\n9"))
    assert said_by(merging(IDEFICS3, " 7"), seven) == [" 7<end_of_utterance>"]
    assert said_by(merging(LLAVA_ONEVISION, " \n"), seven) == ["7<|im_end|>"]  # as Qwen2's tokens are
    assert said_by(merging(LLAVA_ONEVISION), nine) == ["\n9<|im_end|>"]
    for written, pair, messages in ((IDEFICS3, ": ", seven), (LLAVA_ONEVISION, "\n7", seven),
                                    (LLAVA_ONEVISION, "\n\n", nine)):  # fmt: skip
        with pytest.raises(ValueError, match=r"first and last tokens must be its own.*generation"):
            merging(written, pair)([{"messages": messages}])
    with pytest.raises(ValueError, match=r"got 0 headers for 1 turns.*must not begin with a line break"):
        merging(INTERNVL, "\n\n")([{"messages": nine}])


WORDS = st.lists(st.sampled_from(["7", " ", "\n", "Assistant:", "User:", "Frame:", "é", ":"]), max_size=4)
BLOCKS = st.lists(st.just({"type": "image"}) | WORDS.map("".join).map(text), min_size=1, max_size=3)
PAIRS = st.lists(st.sampled_from([" 7", "\n\n", ": ", "7 ", "\n ", ":\n", "t:"]), max_size=3, unique=True)


@given(
    turns=st.lists(st.tuples(BLOCKS, BLOCKS, st.booleans()), min_size=1, max_size=3),
    pairs=PAIRS,
)
@settings(max_examples=60)
def test_whatever_stands_around_pictures_answers_are_exact_or_refused(turns, pairs):
    collator = merging(IDEFICS3, *pairs)
    messages, want = [], ""
    for asked, said, learnt in turns:
        messages += [user(*asked), answer(*said, weight=int(learnt))]
        words = "".join(block.get("text", "") for block in said)
        colon = "" if said[0]["type"] == "image" else " "
        want += f"{colon}{words}<end_of_utterance>" if learnt else ""
    try:
        taught = said_by(collator, messages)
    except ValueError as error:
        assert "must be certain" in str(error) or (pairs and "must be its own" in str(error))
    else:
        assert taught == [want]


def marked(template: str) -> str:
    """Llama 3's template with marks, as people add them."""
    return template.replace(
        "{{ content }}",
        "{% if message['role'] == 'assistant' %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{%- generation -%} {{ message['content'] | trim }}<|eot_id|>{%- endgeneration %}"
        "{% else %}{{ content }}{% endif %}",
    )


def test_marks_are_followed_where_a_prompt_does_not_show_the_header():
    messages = [user(text("how")), answer(text("7")), user(text("z")), answer(text("9"))]
    unopened = LLAMA3.template.split("{% if add_generation_prompt")[0]
    with pytest.raises(ValueError, match=r"right after its prompt.*put \{% generation %\}"):
        of_text(unopened)([{"messages": messages}])
    assert said_by(of_text(marked(unopened)), messages) == ["7<|eot_id|>9<|eot_id|>"]
    macro = "{% macro said(m) %}>> {% generation %}{{ m.content }}{% endgeneration %}<|eot_id|>{% endmacro %}"
    for template, want in (
        (macro + "{% for m in messages %}{{ said(m) if m.role == 'assistant' else m.content }}{% endfor %}",
         "7<|eot_id|>9<|eot_id|>"),
        (macro.replace("<|eot_id|>", " <|eot_id|>\n") + "{% for m in messages %}"
         "{{ said(m) if m.role == 'assistant' else m.content }}{% endfor %}", "7 <|eot_id|>9 <|eot_id|>"),
    ):  # fmt: skip
        assert said_by(of_text(template), messages) == [want]


def test_a_text_that_looks_like_a_mark_is_refused():
    messages = [user(text(OPENS)), answer(text("7"))]
    collator = of_text(marked(LLAMA3.template))
    with pytest.raises(ValueError, match=r"must write the same with its .* marks as without"):
        collator([{"messages": messages}])


TURNS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|start_header_id|>{{ m.content }}<|eot_id|>{% else %}"
    "<|end_header_id|>ANSWER{% endif %}{% endfor %}{% if add_generation_prompt %}<|end_header_id|>{% endif %}"
)
REFUSED = {
    "no end of turn": (LLAMA3.template.replace("<|eot_id|>", "\n"), "close an answer with a control"),
    "a text that is not written": ("{% for m in messages %}{{ m.role }}{% endfor %}", "write what is said"),
    "blocks of text for a language model": (
        "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}<|eot_id|>{% endfor %}",
        "write what is said.*contents are texts",
    ),
    "what is not there": ("{{ messages[0].role.x.y }}", "write every conversation, got UndefinedError"),
    "half a template": ("{% for m in messages %}", "write every conversation, got TemplateSyntaxError"),
    "it refuses": ("{{ raise_exception('no roles') }}", "every conversation, got TemplateError: no roles"),
    "the last turn alone is closed": (
        "{% for m in messages %}{{ m.content }}{% if loop.last %}<|eot_id|>{% endif %}{% endfor %}",
        "render an answer right after its prompt",
    ),
    "earlier turns are dropped": (
        "{% for m in messages[-2:] %}<|start_header_id|>{{ m.content }}<|eot_id|>{% endfor %}"
        + "{% if add_generation_prompt %}<|start_header_id|>{% endif %}",
        "render turns alike",
    ),
    "earlier answers are dropped": (
        "{% for m in messages %}<|start_header_id|>{{ m.content if m.role == 'user' or loop.last }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>{% endif %}",
        "render turns alike",
    ),
    "the last answer alone is closed": (
        TURNS.replace("ANSWER", "{{ m.content }}{% if loop.last %}<|eot_id|>{% endif %}"),
        "render turns alike",
    ),
    "earlier answers are written otherwise": (
        TURNS.replace("ANSWER", "{{ '~' if not loop.last }}{{ m.content }}<|eot_id|>"),
        "render turns alike",
    ),
    "every turn is marked": (
        "{% for m in messages %}{% generation %}{{ m.content }}<|eot_id|>{% endgeneration %} {% endfor %}",
        "mark every answer once.*4 marks for 2 answers",
    ),
}


@pytest.mark.parametrize(("template", "says"), REFUSED.values(), ids=REFUSED)
def test_a_template_that_does_not_tell_its_answers_is_refused(template, says):
    messages = [user(text("how")), answer(text("7")), user(text("z")), answer(text("9"))]
    with pytest.raises(ValueError, match=rf"ChatCollator: the chat template must .*({says})"):
        of_text(template)([{"messages": messages}])


CUT = ".split('</think>')[-1]"  # as in templates of Qwen3 and DeepSeek-R1
THOUGHT = "<think>\nseven?\n</think>\n\n7"


@pytest.mark.parametrize("supervise", ["answers", "all"])
@pytest.mark.parametrize(
    ("written", "content"),
    [(QWEN2, "message['content']"), (LLAMA3, "message['content']"), (None, "message['content']")],
    ids=["ChatML", "renderings", "marks"],
)
def test_an_answer_that_a_template_cuts_is_refused_unless_it_is_context(written, content, supervise):
    plain = written.template if written else marked(LLAMA3.template)
    processor = TextProcessor(byte_tokenizer((*CHATML, *LLAMA3.special)))
    processor.tokenizer.chat_template = plain.replace(content, content + CUT)
    collator = ChatCollator(processor, supervise=supervise)
    messages = [user(text("how")), answer(text(THOUGHT), weight=0), user(text("z")), answer(text("9 \n"))]
    (taught,) = said_by(collator, messages)
    assert "9" in taught and "seven" not in taught
    for turn in (1, 3):
        broken = [*messages[:turn], answer(text(THOUGHT)), *messages[turn + 1 :]]
        with pytest.raises(ValueError, match=rf"must write an answer whole, got .*turn {turn}.*think"):
            collator([{"messages": broken}])
    processor.tokenizer.chat_template = plain
    assert "seven?" in said_by(ChatCollator(processor, supervise=supervise), broken)[0]


@pytest.mark.parametrize("family", ["llama3", "gemma", "idefics3", "llava_onevision"])
def test_a_long_conversation_is_rendered_as_often_as_a_short_one(family, monkeypatch):
    collator, counts = ChatCollator(processor_of(family)), []
    said = [collator.answers, answers.render]  # finding out about the template is done once

    def render(*args, **kwargs):
        counts[-1] += 1
        return said[1](*args, **kwargs)

    monkeypatch.setattr(answers, "render", render)
    for turns in (2, 9):
        counts.append(0)
        messages = [turn for n in range(turns) for turn in (user(text("how")), answer(text(str(n))))]
        learnt = said_by(collator, messages)[0]
        assert [n in learnt for n in map(str, range(turns))] == [True] * turns
    assert counts[0] == counts[1] <= 2 * 3  # of the batch, and of the sample encoded before


def test_an_answer_that_a_processor_cuts_off_is_refused():
    collator, messages = merging(IDEFICS3), [user(text("how")), answer(text("777"))]
    collator.processor.limit = len("<User: how<\nAssistant: 77")  # a token for each control token
    with pytest.raises(ValueError, match="up to its end of turn, got one that the processor cuts off"):
        collator([{"messages": messages}])


def test_a_place_between_pictures_that_could_be_another_is_refused():
    """A text in an answer that the frames' words hold too."""
    around = [{"type": "image"}, text("7"), {"type": "image"}]
    with pytest.raises(ValueError, match=r"an answer's place among the pictures must be certain, got '7'"):
        merging(IDEFICS3)([{"messages": [user(text("how")), answer(*around)]}])
    asked = [user(*around), answer(text("7")), user(*around), answer(text("7"))]
    assert said_by(merging(IDEFICS3), asked) == [" 7<end_of_utterance>" * 2]
