"""What a user waits for, and what of it the GPU works: first tokens and generate(), from CUDA graphs or not.

*Wall* is the time from the call until the GPU is done, nothing queued before; *busy* the sum of the times of
all kernels and copies in a profile of one call. Their distance is what the GPU waits for the host. The models
are as Hugging Face makes them: torch.compile, which the other benchmarks of models use, is left out.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from .. import graphs
from .cases import Case, LeftOutError, values_of
from .decoding import graphed
from .kernels import OURS, Setting
from .models import TEACHER, Pair, attention_of, embedded_prompt, name_of, video_inputs
from .problems import prompt
from .timing import Timing, busy_seconds, percentile, wall_and_busy

EAGER, TEACHER_GRAPH = "LinMU, eager", "teacher, from a graph"
BENCHMARKS = ("short", "generate")
PROMPT_METHODS = (OURS, EAGER, TEACHER, TEACHER_GRAPH)
GENERATE_METHODS = (OURS, EAGER, TEACHER)
ROWS = (1, 8)
PROMPT, FEW, MANY = 1024, 2, 34  # tokens of the prompt, and generated

Priority = Callable[[str, int], int]


def short_prompt_cases(
    pair: Pair, lengths: Sequence[int], setting: Setting, priority: Priority
) -> Iterator[Case]:
    """Time to first token of the decoder, as `models.first_token_cases`, with and without graphs."""
    for method in PROMPT_METHODS:
        for length in lengths:
            measure = partial(measure_prompt, pair, method, length, setting)
            yield Case("short", method, pair.size, "decoder", length, measure, priority(method, length))


def generate_cases(pair: Pair, setting: Setting, priority: Priority) -> Iterator[Case]:
    """A token of generate() after a video's prompt, one row and several."""
    for method in GENERATE_METHODS:
        for rows in ROWS:
            passes = f"{rows} row{'s' if rows > 1 else ''}"
            measure = partial(measure_generate, pair, method, rows, setting)
            yield Case("generate", method, pair.size, passes, PROMPT, measure, priority(method, PROMPT))


@contextmanager
def run_by(method: str, model: nn.Module) -> Iterator[None]:
    """Within, the student runs from graphs if the method says so."""
    if method != OURS:
        yield
        return
    try:
        graphs.accelerate(model)
    except ValueError as error:
        raise LeftOutError(f"left out: {error}") from error
    try:
        yield
    finally:
        graphs.unaccelerate(model)


def measure_prompt(pair: Pair, method: str, length: int, setting: Setting) -> dict[str, Any]:
    """Prefill from embeddings; the values of one line."""
    own = OURS if method in (OURS, EAGER) else TEACHER
    model, how = pair.model(own), ""
    inputs = embedded_prompt(model, own, length, setting)

    def prefill() -> Tensor:
        with torch.no_grad():
            return model(**inputs, use_cache=True, logits_to_keep=1).logits

    with attention_of(pair.attention), run_by(method, model):
        call = prefill
        if method == TEACHER_GRAPH:
            call, how, _ = graphed(prefill, setting)
        timing, busy = wall_and_busy(call, setting.device, seconds=setting.seconds)
    more = {"busy": busy, "replayed": how, "attention": name_of(pair.attention)}
    return values_of(timing, **more) | {"memory": timing.peak, "tokens_per_second": length / timing.seconds}


class Clock(StoppingCriteria):
    """Never stops; notes when each token is launched. generate() waits for each before the next, or for the
    one before it: either way the GPU's time is what lies between most of them.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def measure_generate(pair: Pair, method: str, rows: int, setting: Setting) -> dict[str, Any]:
    """Greedy tokens after a prompt with its pixels; the values of one line, of one token of all rows."""
    model = pair.model(TEACHER if method == TEACHER else OURS)
    inputs = video_inputs(model, prompt(PROMPT), setting)
    inputs = {name: torch.cat([value] * rows) for name, value in inputs.items()}

    def tokens(count: int) -> list[float]:
        """Seconds between the tokens."""
        clock = Clock()
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        options["stopping_criteria"] = StoppingCriteriaList([clock])
        model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, **options)
        return [after - before for before, after in itertools.pairwise(clock.times)]

    busy = None
    with attention_of(pair.attention), run_by(method, model):
        tokens(FEW)  # compiles, and captures
        times = [seconds for _ in range(2) for seconds in tokens(MANY)]
        if setting.device.type == "cuda":
            few, many = (busy_seconds(partial(tokens, count)) for count in (FEW, MANY))
            busy = (many - few) / (MANY - FEW)
    timing = Timing(*(percentile(times, share) for share in (0.5, 0.2, 0.8)), len(times))
    values = values_of(timing, batch=rows, busy=busy, attention=name_of(pair.attention))
    return values | {"tokens_per_second": rows / timing.seconds}
