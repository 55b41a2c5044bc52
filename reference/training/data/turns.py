"""The ways in which people write conversations down, made into one.

    {"messages": [{"role": "user", "content": TEXT or BLOCKS}, ...], "images": [...], "videos": [...]}   TRL
    {"prompt": TEXT or MESSAGES, "completion": TEXT or MESSAGES, "images": [...]}                        TRL
    {"conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, ...], "image": PATH}        LLaVA
    {"text": TEXT}                                                                    a document, no turns

Where an image or video goes is said by a content block {"type": "image"} or by <image> in the text; if it is
said nowhere, it goes before the first question. A block may also hold its own, as chat templates and OpenAI
have them: {"type": "image", "image" or "path" or "url" or "base64": ...},
{"type": "image_url", "image_url": {"url": ...}}. The keys `images` and `videos` list several, `image` and
`video` name one.
"""

from __future__ import annotations

import re
from typing import Any

from ...prompts.chat_collator import content_blocks

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
MARKS = re.compile(r"(<image>|<video>)\n?")
KINDS = ("image", "video")
TYPES = {kind: kind for kind in ("text", *KINDS)} | {
    "image_url": "image",
    "video_url": "video",
    "input_text": "text",  # OpenAI's Responses
    "input_image": "image",
}
SOURCES = ("url", "path", "base64")  # a block's own image or video, beside the key of its type
BOUNDS = ("max_pixels", "min_pixels", "max_frames")  # of a block; `Media.bounded` keeps them
# What qwen_vl_utils would do to a block's pixels, and nothing here does.
UNSUPPORTED = (
    "min_frames", "nframes", "resized_height", "resized_width", "sample_fps", "total_pixels", "video_end",
    "video_start",
)  # fmt: skip
OF_CONVERSATIONS = ("messages", "conversations", "prompt", "completion")  # keys of rows with turns
OF_MEDIA = ("image", "images", "video", "videos")
UNREAD = ("tool_calls", "reasoning_content")  # of a turn: templates would show it, so it must not get lost

Messages = list[dict[str, Any]]


def read_turns(row: dict[str, Any]) -> Messages:
    """The turns of a row, contents as lists of content blocks, every image and video in its block.

    Returns:
        [{"role", "content", and "weight": 0 for an answer that is context alone}, ...].
    Raises:
        ValueError: for roles, contents or numbers of images that do not fit.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a sample must be an object with messages, got {type(row).__name__}")
    messages = [read_turn(turn) for turn in turns_of(row)]
    check_roles([message["role"] for message in messages])
    beside = {kind: media_beside_messages(row, kind) for kind in KINDS}
    if any(beside.values()) and not any(placeholders(messages, kind) for kind in KINDS):
        split_marks(messages)
    if beside["video"] and not beside["image"] and not placeholders(messages, "video"):
        for place in placeholders(messages, "image"):  # LLaVA-Video writes <image> for a video
            place["type"] = "video"
    for kind in KINDS:
        fill_placeholders(messages, kind, beside[kind])
    return messages


def document_of(row: dict[str, Any]) -> str | None:
    """The text of a row that is a document; None for a conversation.

    Raises:
        ValueError: for a text that is none, or empty, or has pictures beside it.
    """
    if not isinstance(row, dict) or "text" not in row:
        return None
    if any(row.get(key) is not None for key in OF_CONVERSATIONS):
        return None
    if media := [key for key in OF_MEDIA if row.get(key)]:
        raise ValueError(f"a document must be text alone, got {media}; pictures belong into messages")
    text = row["text"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a document's text must be a text that is not empty, got {text!r:.40}")
    return text


def turns_of(row: dict[str, Any]) -> list[Any]:
    """The turns of a row as they are written, a system prompt beside them included."""
    given = next((row[key] for key in ("messages", "conversations") if row.get(key) is not None), None)
    if given is None and row.get("prompt") is not None and row.get("completion") is not None:
        prompt, completion = listed_turns(row["prompt"], "user"), listed_turns(row["completion"], "assistant")
        # As in TRL, the loss is the completion's: answers in the prompt are context.
        given = [turn | {"weight": 0} if isinstance(turn, dict) else turn for turn in prompt] + completion
    if not isinstance(given, list) or not given:
        must = "a sample must have a list of messages or conversations, a prompt and a completion, or a text"
        raise ValueError(f"{must}, got keys {sorted(row)}")
    if row.get("tools"):
        raise ValueError(
            "a sample must hold its tools in its system turn, got tools beside, which are not read"
        )
    system = row.get("system")
    has_system = isinstance(given[0], dict) and "system" in (given[0].get("role"), given[0].get("from"))
    return [{"role": "system", "content": system}, *given] if system and not has_system else given


def listed_turns(given: Any, role: str) -> list[Any]:
    """TRL's prompt or completion as turns: a text is one turn."""
    return given if isinstance(given, list) else [{"role": role, "content": given}]


def kind_of(row: dict[str, Any]) -> str:
    """The name that a sample's results are listed by: `kind`, or "all"."""
    kind = row.get("kind")
    if kind in (None, ""):
        return "all"
    if not isinstance(kind, str | int) or isinstance(kind, bool) or not str(kind).isprintable():
        raise ValueError(f"kind must be a name, got {kind!r:.40}")
    return str(kind)


def read_turn(turn: dict[str, Any]) -> dict[str, Any]:
    """One turn as {"role", "content": blocks}."""
    if not isinstance(turn, dict):
        raise ValueError(f"a turn must be an object with role and content, got {type(turn).__name__}")
    role, content = (
        next((turn[key] for key in keys if turn.get(key) is not None), None)
        for keys in (("role", "from"), ("content", "value"))
    )
    if unread := [key for key in UNREAD if turn.get(key)]:
        raise ValueError(f"a turn must hold role and content alone, got {unread}, which are not read")
    if isinstance(content, str):
        blocks = [read_piece(piece) for piece in MARKS.split(content) if piece]
    elif isinstance(content, list):
        blocks = [read_block(block) for block in content]
    else:
        raise ValueError(f"content must be a text or a list of blocks, got {type(content).__name__}")
    message = {"role": ROLES.get(role, role) if isinstance(role, str) else role, "content": blocks}
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(f"a turn's weight must be 0 (context) or 1 (learnt), got {weight!r}")
    return message | {"weight": 0} if weight == 0 and message["role"] == "assistant" else message


def read_piece(text: str) -> dict[str, Any]:
    """A block from a piece of text: a place for an image or video, or the text itself."""
    return {"type": text[1:-1]} if MARKS.fullmatch(text) else {"type": "text", "text": text}


def read_block(block: dict[str, Any]) -> dict[str, Any]:
    """A content block as {"type": "text", "text"} or {"type": kind, kind: its source if it holds one}, and
    an image's or video's `fps` and bounds: without other keys, each of which a processor might take for
    another picture.
    """
    if not isinstance(block, dict):
        raise ValueError(f"a block must be an object with a type, got {block!r:.80}")
    block = {key: value for key, value in block.items() if value is not None}  # tables fill in empty fields
    named = [kind for kind in ("text", *KINDS) if kind in block]
    given = block.get("type", named[0] if len(named) == 1 else None)
    kind = TYPES.get(given) if isinstance(given, str) else None
    if kind is None:
        raise ValueError(f"a block's type must be text, image or video, got {block!r:.80}")
    if kind == "text":
        if not isinstance(block.get("text"), str):
            raise ValueError(f"a text block must hold a text, got {type(block.get('text')).__name__}")
        return {"type": "text", "text": block["text"]}
    if asked := [key for key in UNSUPPORTED if key in block]:
        raise ValueError(
            f"a block must not ask for {', '.join(asked)}, which is not done here; prepare the {kind} so"
        )
    keys = [key for key in (kind, f"{kind}_url", *SOURCES) if key in block]
    if len(keys) > 1:
        raise ValueError(f"a block must hold one {kind}, got {keys}")
    kept = {key: block[key] for key in ("fps", *BOUNDS) if key in block}
    return {"type": kind} | ({kind: read_source(keys[0], block[keys[0]])} if keys else {}) | kept


def read_source(key: str, source: Any) -> Any:
    """An image or video by the key of a block that it stands under."""
    if key.endswith("_url") and isinstance(source, dict):
        return source.get("url")
    return f"data:;base64,{source}" if key == "base64" else source


def check_roles(roles: list[str]) -> None:
    """An optional system turn, then user and assistant in turns, the assistant last."""
    spoken = roles[1:] if roles[0] == "system" else roles
    wanted = ["user", "assistant"] * ((len(spoken) + 1) // 2)
    if not spoken or spoken != wanted:
        must = "roles must be user and assistant in turns, the last message the assistant's"
        raise ValueError(f"{must}, got {roles}")


def media_beside_messages(row: dict[str, Any], kind: str) -> list[Any]:
    """The images or videos that stand beside the messages."""
    several, one = row.get(f"{kind}s"), row.get(kind)
    several = several if isinstance(several, list) else [] if several is None else [several]
    if one is None:
        return several
    # LLaVA-NeXT lists files under `image`; a list of numbers is the pixels of one, a `video` its frames
    lists_files = kind == "image" and isinstance(one, list)
    lists_files = lists_files and not any(isinstance(part, list | int | float) for part in one)
    ones = one if lists_files else [one]
    if several and several != ones:
        raise ValueError(f"a sample must hold {kind} or {kind}s, got both")
    return ones


def placeholders(messages: Messages, kind: str) -> list[dict[str, Any]]:
    """The blocks that wait for an image (or video) from beside the messages."""
    return [block for block in content_blocks(messages, kind) if kind not in block]


def split_marks(messages: Messages) -> None:
    """Take <image> and <video> inside text blocks for places, as nothing else says where the media go."""
    for message in messages:
        pieces = [
            [block]
            if block["type"] != "text"
            else [read_piece(piece) for piece in MARKS.split(block["text"]) if piece]
            for block in message["content"]
        ]
        message["content"] = [block for blocks in pieces for block in blocks]


def fill_placeholders(messages: Messages, kind: str, sources: list[Any]) -> None:
    """Give every place for an image (or video) its own from beside the messages, in order."""
    places = placeholders(messages, kind)
    if sources and not any(True for _ in content_blocks(messages, kind)):
        asked = next(message for message in messages if message["role"] == "user")
        places = [{"type": kind} for _ in sources]
        asked["content"][:0] = places
    if len(places) != len(sources):
        raise ValueError(f"{kind}s must be as many as their places, got {len(sources)} for {len(places)}")
    for place, source in zip(places, sources, strict=True):
        place[kind] = source
