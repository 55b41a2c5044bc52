"""The ways in which people write conversations down, made into one.

    {"messages": [{"role": "user", "content": TEXT or BLOCKS}, ...], "images": [...], "videos": [...]}   TRL
    {"conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, ...], "image": PATH}        LLaVA

Where an image or video goes is said by a block {"type": "image"} or by <image> in the text; if it is said
nowhere, it goes before the first question. A block may also hold its own: {"type": "image", "image": ...}.
"""

from __future__ import annotations

import re
from typing import Any

from ...prompts.chat_collator import content_blocks

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
PLACES = re.compile(r"(<image>|<video>)\n?")
KINDS = ("image", "video")

Messages = list[dict[str, Any]]


def read_turns(row: dict[str, Any]) -> Messages:
    """The turns of a row, contents as lists of blocks, every image and video in its block.

    Raises:
        ValueError: for roles, contents or numbers of images that do not fit.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a sample must be an object with messages, got {type(row).__name__}")
    given = next((row[key] for key in ("messages", "conversations") if row.get(key) is not None), None)
    if not isinstance(given, list) or not given:
        raise ValueError(f"a sample must have a list of messages or conversations, got keys {sorted(row)}")
    messages = [read_turn(turn) for turn in given]
    check_roles([message["role"] for message in messages])
    for kind in KINDS:
        fill_placeholders(messages, kind, media_beside_messages(row, kind))
    return messages


def read_turn(turn: dict[str, Any]) -> dict[str, Any]:
    """One turn as {"role", "content": blocks}."""
    if not isinstance(turn, dict):
        raise ValueError(f"a turn must be an object with role and content, got {type(turn).__name__}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if isinstance(content, str):
        content = [read_piece(piece) for piece in PLACES.split(content) if piece]
    elif not isinstance(content, list):
        raise ValueError(f"content must be a text or a list of blocks, got {type(content).__name__}")
    return {"role": ROLES.get(role, role), "content": [read_block(block) for block in content]}


def read_piece(text: str) -> dict[str, Any]:
    """A block from a piece of text: a place for an image or video, or the text itself."""
    return {"type": text[1:-1]} if PLACES.fullmatch(text) else {"type": "text", "text": text}


def read_block(block: dict[str, Any]) -> dict[str, Any]:
    """A block without the empty fields that tables fill in."""
    if not isinstance(block, dict) or block.get("type") not in ("text", *KINDS):
        raise ValueError(f"a block's type must be text, image or video, got {block!r:.80}")
    block = {key: value for key, value in block.items() if value is not None}
    if block["type"] == "text" and not isinstance(block.get("text"), str):
        raise ValueError("a text block must hold a text, got none")
    return block


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
    if several is None:
        several = [] if one is None else one
    return several if isinstance(several, list) else [several]


def fill_placeholders(messages: Messages, kind: str, sources: list[Any]) -> None:
    """Give every place for an image (or video) its own from beside the messages, in order."""
    places = [block for block in content_blocks(messages, kind) if kind not in block]
    if sources and not any(True for _ in content_blocks(messages, kind)):
        asked = next(message for message in messages if message["role"] == "user")
        places = [{"type": kind} for _ in sources]
        asked["content"][:0] = places
    if len(places) != len(sources):
        raise ValueError(f"{kind}s must be as many as their places, got {len(sources)} for {len(places)}")
    for place, source in zip(places, sources, strict=True):
        place[kind] = source
