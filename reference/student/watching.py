"""Watching a video that does not end, in memory that does not grow.

    session = watch(student, processor, fps=2)
    session.see(frames)              # a block of frames; again and again
    session.ask("What happened?")    # answered from a copy of the state
    watch.see_together(sessions, clips)    # a block of each of several streams

Letters: L tokens of a block, F frames, height and width in pixels, R sessions; one stream a session, B = 1.

**What is kept.** Per layer a state of constant size (`cache.py`). Beside it four numbers: the frames seen,
their height and width, and the next token's position; and the text that has not been read yet, which ends
where the next token could still depend on what follows, mostly a line break. No ids, positions or masks of
the past: lengths in the cache are set back to 0 after every block, so nothing is ever built of their size.

**What it equals.** One prompt with the same blocks, in logits: consecutive `see` are the content blocks of
one user turn, `say` is a turn of its own, `ask` is the end of the user turn. Every call's frames are one
video of the prompt, so one segment: vision sees all of its own call in both directions, and of earlier calls
what the state holds.

**Time stamps** (Qwen3-VL writes them before its frames) go on from call to call, as in one film: the second
hour says `<3600.2 seconds>`. Choice: they count from the session's start, since those that began anew with
every call would not say when something happened. With `clock_seconds` they begin anew after so many seconds,
for those who want to stay within what the teacher was trained on. Qwen2-VL has none; in Qwen2.5-VL time is a
position, measured within the call.

**Positions.** A block of Y × X tokens a frame moves the text's position on by max(Y, X) and by its own text,
however many frames it has. With 16 × 16 tokens a frame and a call a second that is some 65,000 an hour:
beyond what any teacher was trained on, and in the end beyond what float32 angles resolve. So positions are
**restarted**: a block that would pass `max_position` goes to position 0, and what the state holds of
positions is turned back by as much (`turn_back`), so that all distances stay what they were. RoPE knows
distances alone, therefore this changes nothing but rounding for Local-Swin, and nothing at all for Flex-MA
without `scan_rope`. With `scan_rope` and a trained convolution the result is near, not equal: the convolution
comes after RoPE, and its bias and its different taps for the two channels of a pair do not turn. What it
wrote before a restart is then read a little wrongly until the state has forgotten it, some half-lives of
tokens. So restart seldom: `max_position` should be many half-lives, and at most some 2^18, where the fastest
angle is wrong by 0.01 rad in float32.

Compressing time is the caller's choice: fewer frames a call, or an `fps` above the true one, by which the
clocks of Qwen2.5-VL and Qwen3-VL run slower. Nothing is done about distances: how far back a state reaches is
for its decays; before training half of the heads have a half-life below some 700 tokens, none above 8,192.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, ProcessorMixin

from ..checks import require
from ..m_mate import MMATEState
from ..projections import apply_rope
from ..prompts.chat_collator import control_tokens
from ..prompts.chat_pieces import chat_pieces
from ..prompts.qwen_layout import Qwen2PromptLayout
from ..sliding_window_attention import WindowState
from .cache import CACHE_NAME, LinMUCacheLayer, cache_slot
from .generation import rope_index
from .model import LinMUModel, decoder_layers, mixers

VERSION = 1  # of a session's file
HEADER = "linmu_watch"  # its entry in the file
ROWS = {"position_ids": 1}  # the axis of rows; 0 in all other inputs
STATE = ("conv", "scan", "k", "v", "present")  # as `MMATEState.tensors` orders them
OWN_ARGUMENTS = ("input_ids", "position_ids", "num_return_sequences", "return_dict_in_generate", CACHE_NAME)


class watch:  # noqa: N801 (called like a function)
    """A session: a student that watches one stream, and is asked about it.

    Args:
        student: of Qwen2-VL, Qwen2.5-VL or Qwen3-VL, all its decoder layers converted.
        processor: of `load_processor`, with videos and a chat template.
        fps: frames per second of what will be seen.
        max_position: the highest position that tokens of a block get; None = the configuration's
            max_position_embeddings. Answers count on from there.
        clock_seconds: time stamps in the text begin anew after so many seconds; None = never.
    Attributes:
        frames: how many were seen.
        position: of the next token.
    Raises:
        ValueError: for another family, a student that keeps attention layers (whose keys and values would
            grow), a processor without videos or template, or an fps that is no finite number > 0.
    """

    def __init__(
        self,
        student: LinMUModel,
        processor: ProcessorMixin,
        fps: float = 2.0,
        *,
        max_position: int | None = None,
        clock_seconds: float | None = None,
    ) -> None:
        check_student(student)
        video_processor = getattr(processor, "video_processor", None)
        hint = "open it with load_processor; Qwen3-VL's needs torchvision for videos"
        must = "the processor must take videos"
        require(video_processor is not None, "watch", must, type(processor).__name__, hint)
        is_rate = isinstance(fps, int | float) and 0 < fps < math.inf
        require(is_rate, "watch", "fps must be a finite number > 0", fps)
        is_time = clock_seconds is None or clock_seconds * fps >= 1
        require(is_time, "watch", "clock_seconds must be None or at least a frame's time", clock_seconds)
        trained = student.config.get_text_config(decoder=True).max_position_embeddings
        max_position = trained if max_position is None else max_position
        require(max_position > 0, "watch", "max_position must be > 0", max_position)
        self.student, self.processor, self.fps = student, processor, float(fps)
        self.max_position, self.clock_seconds = max_position, clock_seconds
        self.depth = video_processor.temporal_patch_size  # frames that become one moment
        self.pieces = chat_pieces(processor)
        self.control_tokens = re.compile("|".join(map(re.escape, control_tokens(processor))))
        self.cache = DynamicCache()
        self.frames, self.position = 0, 0
        self.size: tuple[int, int] | None = None  # height, width
        self.unread = ""  # text at the end that the next text may still belong to
        self.has_begun, self.in_user_turn, self.is_whole = False, False, True

    @property
    def seconds(self) -> float:
        """How long it has watched."""
        return self.frames / self.fps

    @property
    def state_bytes(self) -> int:
        """The size of all layers' states in bytes; the same from the first block on."""
        return sum(tensor.nbytes for state in states_of(self.cache) for tensor in state.tensors)

    def see(self, frames: Any, text: str = "") -> None:
        """Watch a block of frames: one video, in the open user turn.

        Args:
            frames: F frames, a multiple of the processor's temporal_patch_size: a list of PIL images or of
                uint8 arrays (height, width, 3), one uint8 array (F, height, width, 3), or a clip that
                `training.data.media.Media.video` decoded.
            text: stands in the turn before the frames.
        Raises:
            ValueError: for other frames, sizes that differ from frame to frame or from those before, another
                number of frames, or control tokens in the text.
        """
        block = self._block(frames, text)
        self._read(block)
        self._has_seen(block)

    @classmethod
    def see_together(cls, sessions: Sequence[watch], frames: Sequence[Any]) -> None:
        """`see` of several streams in one forward, a row each: sooner than one after the other.

        Args:
            sessions: of one student, each once.
            frames: of each, what `see` takes; as many tokens in all, which frames of one number and size are,
                but for a session's first block, time stamps of other lengths, and text not read yet.
        Raises:
            ValueError: as `see` does, and for other sessions, or blocks of different lengths.
        """
        where = "watch.see_together"
        must = "there must be frames for each session"
        require(len(sessions) == len(frames) > 0, where, must, (len(sessions), len(frames)))
        must = "sessions must be different ones of one student"
        distinct = len(set(map(id, sessions))) == len(sessions)
        require(distinct and len({id(each.student) for each in sessions}) == 1, where, must, "others")
        blocks = [session._block(clip, "") for session, clip in zip(sessions, frames, strict=True)]
        lengths = {block["input_ids"].shape[1] for block in blocks}
        begun = {bool(states_of(session.cache)) for session in sessions}
        must, hint = "blocks must have as many tokens and all or none be the first", "see them one by one"
        require(len(lengths) == len(begun) == 1, where, must, sorted(lengths), hint)
        for session in sessions:
            session._check_whole(where)
        inputs = [session._with_positions(block) for session, block in zip(sessions, blocks, strict=True)]
        advance(sessions, inputs)
        for session, block in zip(sessions, blocks, strict=True):
            session._has_seen(block)

    def _block(self, frames: Any, text: str) -> dict[str, Any]:
        """Return the processor's inputs for a block of frames, and their `shape`, as `see` takes them."""
        pixels = as_frames(frames)
        count, height, width, _ = pixels.shape
        must = f"frames must come in multiples of {self.depth}, the processor's temporal_patch_size"
        require(count % self.depth == 0, "watch.see", must, count, "keep the last ones for the next call")
        hint = "resize them, or begin another session"
        must = f"frames must be (height, width) = {self.size} as before"
        require(self.size in (None, (height, width)), "watch.see", must, (height, width), hint)
        self._check_text("watch.see", text)
        start = self.frames
        if self.clock_seconds is not None:
            start %= round(self.clock_seconds * self.fps)
        indices = list(range(start, start + count))
        inputs = self.processor(
            text=[self.unread + self._open_user_turn() + text + self.pieces.video],
            videos=[pixels],
            video_metadata=[{"total_num_frames": count, "fps": self.fps, "frames_indices": indices}],
            do_sample_frames=False,
            add_special_tokens=False,
            return_tensors="pt",
        )
        moments = inputs["video_grid_thw"][:, 0].tolist()
        must = "the processor must keep all frames"
        require(moments == [count // self.depth], "watch.see", must, f"grids of {moments} moments")
        return {**inputs, "shape": pixels.shape}

    def _has_seen(self, block: Mapping[str, Any]) -> None:
        """Count a block's frames: it stands in the open user turn."""
        count, height, width, _ = block["shape"]
        self.unread, self.has_begun, self.in_user_turn = "", True, True
        self.frames, self.size = self.frames + count, (height, width)

    def say(self, text: str, role: str = "user") -> None:
        """Add a turn of text, and close the one before.

        To let the session know what it answered, say question and answer after `ask`.

        Args:
            text: what is said.
            role: "user", "assistant", or, as the first turn, "system".
        Raises:
            ValueError: for another role, a system turn that is not the first, an assistant's that is, and for
                control tokens in the text.
        """
        openings = self.pieces.openings if self.has_begun else self.pieces.first
        place = "a later" if self.has_begun else "the first"
        require(role in openings, "watch.say", f"{place} turn's role must be among {[*openings]}", role)
        self._check_text("watch.say", text)
        before = self.unread + (self.pieces.closings["user"] if self.in_user_turn else "")
        whole = before + openings[role] + text + self.pieces.closings[role]
        complete = max((match.end() for match in self.control_tokens.finditer(whole)), default=0)
        if complete:  # no token reaches over a control token's end
            self._read(self._tokens(whole[:complete]))
        self.unread, self.has_begun, self.in_user_turn = whole[complete:], True, False

    def ask(self, question: str = "", **generate_kwargs: Any) -> str:
        """Answer a question about what was seen, and leave the session as it was.

        Costs a copy of the state, the question's tokens and the answer's.

        Args:
            question: the end of the open user turn, or a turn of its own; "" where `say` or `see` asked it.
            **generate_kwargs: for generate(), `max_new_tokens` for instance.
        Raises:
            ValueError: for control tokens in the question, for an empty one without an open turn, and for
                arguments that are the session's own.
        """
        own = [name for name in OWN_ARGUMENTS if name in generate_kwargs]
        require(not own, "watch.ask", "generate_kwargs must leave the prompt to the session", own)
        session, inputs = self._asking("watch.ask", question)
        beams = generate_kwargs.get("generation_config") or self.student.generation_config
        beams = generate_kwargs.get("num_beams", beams.num_beams) or 1
        if beams > 1:
            session.cache.batch_repeat_interleave(beams)
        inputs = session._on_device(inputs)
        ids = inputs["input_ids"]
        tokens = self.student.generate(
            **inputs, attention_mask=torch.ones_like(ids), **{CACHE_NAME: session.cache}, **generate_kwargs
        )
        return self.processor.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)

    def logits(self, question: str = "") -> Tensor:
        """Return the logits of an answer's first token, (vocabulary,): for choices, and for when to speak.

        Args:
            question: as for `ask`.
        Raises:
            ValueError: as `ask` does.
        """
        session, inputs = self._asking("watch.logits", question)
        return session._forward(inputs)[0, -1]

    def fork(self) -> watch:
        """Return a second session that goes on from here; student and processor are shared, nothing else."""
        self._check_whole("watch.fork")
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other

    def save(self, path: str | os.PathLike) -> None:
        """Write the session to one safetensors file, of the state's size.

        Raises:
            ValueError: if it was interrupted.
            OSError: if the disk is full or cannot be written; an older file is left as it was.
        """
        self._check_whole("watch.save")
        tensors = {}
        for index, state in enumerate(states_of(self.cache)):
            tensors |= {
                f"{index}.{name}": tensor.detach().cpu().contiguous()
                for name, tensor in zip(STATE, state.tensors, strict=False)
            }
        names = ("fps", "max_position", "clock_seconds", "frames", "position", "size", "unread")
        header = {name: getattr(self, name) for name in (*names, "has_begun", "in_user_turn")}
        header |= {"version": VERSION, "student": fingerprint(self.student)}
        part = Path(f"{os.fspath(path)}.part")
        try:
            save_file(tensors, part, metadata={HEADER: json.dumps(header)})
            os.replace(part, path)  # never a file cut short
        except SafetensorError as error:
            raise OSError(f"watch.save: {os.fspath(path)} must fit on its disk, got {error}") from error
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def open(cls, path: str | os.PathLike, student: LinMUModel, processor: ProcessorMixin) -> watch:
        """Go on with a saved session.

        Args:
            path: what `save` wrote.
            student: the same as when it was saved, by either backend, on any device.
            processor: likewise.
        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no session, of a newer version, or another student's.
        """
        where = "watch.open"
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(HEADER, "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError:
            header = None
        require(header is not None, where, "the file must be a saved session", os.fspath(path))
        version = header.pop("version")
        require(version == VERSION, where, f"the version must be {VERSION}", version, "upgrade linmu")
        check_student(student)
        is_own = header.pop("student") == fingerprint(student)
        hint = "open it with the student that saved it"
        require(is_own, where, "the student must be the session's own", "other weights", hint)
        settings = {name: header.pop(name) for name in ("fps", "max_position", "clock_seconds")}
        session = cls(student, processor, **settings)
        session.__dict__.update(header)
        session.size = header["size"] and tuple(header["size"])
        layers = decoder_layers(student) if tensors else ()
        for index, layer in enumerate(layers):
            device = next(layer.parameters()).device
            state = [tensors[f"{index}.{name}"].to(device) for name in STATE if f"{index}.{name}" in tensors]
            cache_slot(session.cache, index).store(state_of(state), 0)
        return session

    def _asking(self, where: str, question: str) -> tuple[watch, dict[str, Tensor]]:
        """Return a fork, and the tokens and positions of a question at its end."""
        self._check_text(where, question)
        must = "there must be a question, or an open turn that asks it"
        require(bool(question) or self.has_begun, where, must, repr(question))
        session = self.fork()
        is_asked = not question and not self.in_user_turn  # by `say`
        text = "" if is_asked else self._open_user_turn() + question + self.pieces.closings["user"]
        return session, session._with_positions(self._tokens(self.unread + text + self.pieces.answer))

    def _open_user_turn(self) -> str:
        """Return what opens a user turn here: nothing if one is open."""
        if self.in_user_turn:
            return ""
        return (self.pieces.openings if self.has_begun else self.pieces.first)["user"]

    def _tokens(self, text: str) -> dict[str, Tensor]:
        tokenizer = self.processor.tokenizer
        return {"input_ids": tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]}

    def _read(self, inputs: Mapping[str, Any]) -> None:
        """Take tokens into the state."""
        self._check_whole("watch")
        self._forward(self._with_positions(inputs))

    def _with_positions(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what forward takes of a block, with position ids (3, 1, L).

        Positions are restarted first where the block would pass `max_position`.
        """
        ids = inputs["input_ids"]
        if "video_grid_thw" in inputs:
            types = self.student.placeholder_types(ids)
            given = {**inputs, "mm_token_type_ids": types, "attention_mask": torch.ones_like(ids)}
            positions, _ = rope_index(self.student, given)
        else:
            positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
        if self.position and self.position + int(positions.max()) > self.max_position:
            turn_back(self.student, self.cache, self.position)
            self.position = 0
        names = ("pixel_values_videos", "video_grid_thw")
        taken = {"input_ids": ids, "position_ids": positions + self.position}
        return taken | {name: inputs[name] for name in names if name in inputs}

    def _forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Move the state on by a block, and return its last token's logits, (1, 1, vocabulary)."""
        return advance([self], [inputs])

    def _on_device(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.student.device) for name, tensor in inputs.items()}

    def _check_whole(self, where: str) -> None:
        must, hint = "the session must not have been interrupted inside a block", "open it from its file"
        require(self.is_whole, where, must, "a state between two blocks", hint)

    def _check_text(self, where: str, text: str) -> None:
        found = self.control_tokens.search(text)
        must, hint = "a text must hold no control token of the model", "take it out"
        require(found is None, where, must, found and found[0], hint)


@torch.no_grad()
def advance(sessions: Sequence[watch], inputs: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Move the sessions' states on by a block each, and return their last tokens' logits, (R, 1, vocabulary).

    Args:
        sessions: R of one student.
        inputs: of each, what `_with_positions` returns, of one length.
    """
    # a block ends in text, whose position is one number on all axes; asked while it is on the host
    after = [int(each["position_ids"][0, 0, -1]) + 1 for each in inputs]
    batch, first, rest = inputs[0], sessions[0], sessions[1:]
    if rest:
        batch = {name: torch.cat([each[name] for each in inputs], ROWS.get(name, 0)) for name in batch}
    for session in sessions:
        session.is_whole = False
    cache = joined([session.cache for session in sessions]) if rest else first.cache
    output = first.student(**first._on_device(batch), **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
    if rest:
        split([session.cache for session in sessions], cache)
    for session, position in zip(sessions, after, strict=True):
        for slot in session.cache.layers:
            slot.seen_tokens = 0  # of lengths nothing is kept; positions say where a block stands
        session.position, session.is_whole = position, True
    return output.logits


def joined(caches: Sequence[DynamicCache]) -> DynamicCache:
    """A cache whose rows are those of R caches of one row each."""
    cache = DynamicCache()
    for index, states in enumerate(zip(*map(states_of, caches), strict=True)):
        rows = map(torch.cat, zip(*(state.tensors for state in states), strict=True))
        cache_slot(cache, index).store(state_of(list(rows)), 0)
    return cache


def split(caches: Sequence[DynamicCache], cache: DynamicCache) -> None:
    """The inverse of `joined`: each cache gets a row of memory of its own."""
    for index, slot in enumerate(cache.layers):
        rows = zip(*(tensor.split(1) for tensor in slot.state.tensors), strict=True)
        for own, row in zip(caches, rows, strict=True):
            cache_slot(own, index).store(state_of([tensor.clone() for tensor in row]), 0)


def state_of(tensors: Sequence[Tensor]) -> MMATEState:
    """The inverse of `MMATEState.tensors`."""
    conv, scan, *window = tensors
    return MMATEState(conv, scan, WindowState(*window) if window else None)


def check_student(student: Any) -> None:
    """Raise ValueError unless `student` can watch: a Qwen-VL without attention layers."""
    is_student = isinstance(student, LinMUModel)
    hint = "turn a teacher into one with convert(), or open its folder with load()"
    require(is_student, "watch", "the model must be a student", type(student).__name__, hint)
    is_qwen = isinstance(student.prompt_layout, Qwen2PromptLayout)
    must = "the family must be Qwen2-VL, Qwen2.5-VL or Qwen3-VL"
    require(is_qwen, "watch", must, student.config.model_type)
    kept = sorted(set(range(len(decoder_layers(student)))) - set(student.config.linmu["layers"]))
    hint = "their keys and values would grow with every frame; convert all layers"
    require(not kept, "watch", "no decoder layer may keep attention", f"layers {kept}", hint)


def states_of(cache: DynamicCache) -> list[MMATEState]:
    """The layers' states; none before the first block."""
    return [slot.state for slot in cache.layers if isinstance(slot, LinMUCacheLayer) and slot.state]


def as_frames(frames: Any) -> np.ndarray:
    """Return frames as `watch.see` takes them as uint8 (F, height, width, 3).

    Raises:
        ValueError: for anything else.
    """
    where, must = "watch.see", "frames must be PIL images, uint8 arrays (height, width, 3), or a decoded clip"
    if isinstance(frames, Mapping):
        require("video" in frames, where, must, f"a mapping with {sorted(map(str, frames))}")
        frames = frames["video"]
    if isinstance(frames, Tensor):
        frames = frames.cpu().numpy()
    if isinstance(frames, list | tuple):
        require(len(frames) > 0, where, must, "an empty list")
        arrays = []
        for frame in frames:
            is_picture = isinstance(frame, Image.Image)
            require(is_picture or isinstance(frame, np.ndarray | Tensor), where, must, type(frame).__name__)
            arrays.append(np.asarray(frame.convert("RGB") if is_picture else frame))
        sizes = sorted({array.shape for array in arrays})
        require(len(sizes) == 1, where, "frames of one call must be of one size", sizes[:3])
        frames = np.stack(arrays)
    require(isinstance(frames, np.ndarray), where, must, type(frames).__name__)
    is_video = frames.ndim == 4 and frames.shape[-1] == 3 and frames.size > 0 and frames.dtype == np.uint8
    require(is_video, where, must, f"{frames.dtype} of shape {frames.shape}")
    return frames


@torch.no_grad()
def turn_back(student: LinMUModel, cache: DynamicCache, distance: int) -> None:
    """Make a state what it would be, had all its tokens stood `distance` positions earlier; in place.

    RoPE turns keys by their position, the text window's and, with `scan_rope`, what the scan and its
    convolution hold: k_p = R(p) k. So R(-distance) turns each back. M-RoPE's three axes move by the same
    distance, which leaves one angle a channel.

    Args:
        student: whose angles they are.
        cache: of one session.
        distance: in positions.
    """
    rotary = student.get_decoder().rotary_emb
    device = next(rotary.buffers()).device
    ids = torch.full((3, 1, 1), -distance, device=device)
    cos, sin = (angle / rotary.attention_scaling for angle in rotary(torch.ones(1, device=device), ids))

    def turned(tensor: Tensor) -> Tensor:
        """Turn the last axis, N, of a tensor of any shape."""
        angles = cos.to(tensor.device), sin.to(tensor.device)  # (1, 1, N) each
        return apply_rope(tensor.reshape(1, 1, -1, tensor.shape[-1]), angles).reshape(tensor.shape)

    for index, mixer in mixers(student).items():
        slot = cache_slot(cache, index)
        if slot.state is None:
            continue
        conv, scan, window = slot.state
        if mixer.config.scan_rope:
            x, B, C = mixer.flex_ma.split(conv)
            conv = torch.cat([part.flatten(2) for part in (x, turned(B), turned(C))], dim=-1)
            scan = turned(scan.mT).mT.contiguous()
        if window is not None:
            window = WindowState(turned(window.k), window.v, window.present)
        slot.state = MMATEState(conv, scan, window)


def fingerprint(student: LinMUModel) -> str:
    """A text that differs between students: of their decays and steps, which every training moves."""
    digest = hashlib.sha256(student.config.model_type.encode())
    for mixer in mixers(student).values():
        for values in (mixer.flex_ma.A_log, mixer.flex_ma.dt_proj.bias, mixer.flex_ma.dt_proj.weight):
            digest.update(values.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
