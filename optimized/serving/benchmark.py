"""`python -m linmu.optimized.serving.benchmark student|teacher`: vLLM's speed and room for one of the two.

Both are a Qwen2 decoder of the sizes of Qwen2.5-VL-7B with random weights, in one process each, under vLLM's
own settings but for these: a student's decoding steps run from CUDA graphs, both capture graphs of few sizes,
and there is no prefix caching.

- *decoding*: milliseconds between the outputs of steps in which so many requests decode at once, the median.
  A student's step does not depend on what was read, so its prompts fill its window. The teacher's keys and
  values are constants that vLLM's DecodeBenchConnector writes; computing them for a full pool would take
  minutes and change no shape.
- *prompt*: time to first token and time between tokens of requests whose prompts are computed.
- *served*: so many requests at once from their prompts to their last token, all of it timed.
- *pool*: how many tokens (teacher) or requests (student) fit in the memory that vLLM has left for them.
- *profile*: what the GPU was busy with in some steps, or in the prompts of one token of answer.

It appends a JSON line for each to `--out` as soon as it is measured, and ends within `--budget`; `report`
makes tables and a plot of such files. A cell that would not end in the time that is left is not begun; one
that takes longer than thought is cut short, and its full steps count.
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from .report import COMMAND, SHORT, report

SIZES = {
    "7b": {  # the decoder of Qwen/Qwen2.5-VL-7B-Instruct
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "tiny": {  # to try the command on a CPU
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 512,
    },
}
LENGTHS = (32768, 2048, 131072, 8192)  # the most telling first
COUNTS = (256, 1, 64, 16)
TEACHERS_MOST = 1024  # requests at once: vLLM's own choice for this GPU
LARGE = (512, 960, 1024, 1536)  # requests in a graph beyond COUNTS, as many as memory may hold
SPARE = 8 * 2**30  # bytes of a GPU that hold neither weights nor states; an H200 took 6 to 7 GiB
KINDS = ("decoding", "prompt", "served", "profile")
STEPS = 64  # tokens that a request adds where decoding is timed
ANSWER = 17  # tokens after a prompt
SERVED = 128  # tokens after a prompt where all of it is timed
HELD = 128  # tokens that a request may add
RATES = {  # tokens of a prompt a second on an H200, to foresee a cell: by the longest prompt
    "student": {2**20: 20_000},
    "teacher": {2048: 20_000, 8192: 20_000, 32768: 15_000, 2**20: 7_000},
}
FEW = 2**16  # tokens of prompts that come before those that are timed from end to end
FILLED = 8e-3  # seconds that a request's keys and values take to be written
STEP = 0.05  # seconds, of one


def main() -> None:
    """Measure, or report."""
    arguments = parse()
    if arguments.who == "report":
        report(arguments.out, Path(arguments.folder))
        return
    begun, out = time.perf_counter(), Path(arguments.out[0])
    common = {"who": arguments.who, "quantization": arguments.quantization, "size": arguments.size}
    options = ("sync", "eager", "computed", "mamba_ssm_cache_dtype")
    common |= {name: getattr(arguments, name) or None for name in options}
    common["options"] = ", ".join(arguments.options) or None
    signal.signal(signal.SIGALRM, out_of_time)
    signal.signal(signal.SIGTERM, out_of_time)
    signal.alarm(arguments.budget)
    llm = None
    try:
        llm = engine(arguments)
        write(out, common | {"cell": "start", "seconds": round(time.perf_counter() - begun, 1)} | versions())
        room = pool(llm, arguments)
        write(out, common | {"cell": "pool"} | room)
        for cell in cells(arguments, room):
            left = arguments.budget - (time.perf_counter() - begun)
            try:
                found = measure(llm, arguments, cell, left)
            except TimeoutError:
                raise
            except Exception as error:  # costs this cell alone, unless the engine is dead
                found = {"skipped": f"{type(error).__name__}: {error}"}
            write(out, common | cell | found)
            if "EngineDead" in found.get("skipped", ""):
                raise SystemExit(1)
    except TimeoutError as error:
        write(out, common | {"cell": "end", "skipped": str(error)})
    finally:
        signal.alarm(0)
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()  # it holds the GPU in a process of its own


def out_of_time(number: int, frame) -> None:
    """End what runs: a signal's handler."""
    raise TimeoutError("the budget was spent" if number == signal.SIGALRM else "ended from outside")


def parse() -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n\n")[0])
    parser.add_argument("who", choices=("student", "teacher", "report"))
    parser.add_argument("--out", nargs="+", default=["serving.jsonl"], help="files of JSON lines")
    parser.add_argument("--folder", default="optimized/results/serving", help="where `report` writes")
    parser.add_argument("--size", choices=tuple(SIZES), default="7b")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the prompts")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="requests at once")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of cells")
    parser.add_argument("--most", type=int, help="requests in a step; vLLM's max_num_seqs")
    parser.add_argument("--quantization", choices=("fp8",), help="of the weights, by vLLM")
    parser.add_argument("--mamba-ssm-cache-dtype", choices=("bfloat16", "float16"), help="vLLM's: of states")
    parser.add_argument(
        "--options", nargs="+", choices=("prompt_graphs",), default=(), help="additional_config's"
    )
    parser.add_argument("--memory", type=float, default=0.9, help="share of the GPU that vLLM may use")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs; a CPU has none")
    parser.add_argument("--computed", action="store_true", help="the teacher's keys and values, not written")
    parser.add_argument("--sync", action="store_true", help="a student's steps planned one after another")
    parser.add_argument("--budget", type=int, default=600, help="seconds after which it ends, start included")
    arguments = parser.parse_args()
    arguments.most = arguments.most or (TEACHERS_MOST if arguments.who == "teacher" else None)
    return arguments


def model_of(who: str, size: str, longest: int):
    """Return a model without weights; vLLM makes dummies of its own."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from .. import convert

    rope = {"rope_type": "default", "rope_theta": 1e6}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    sizes = SIZES[size] | {"max_position_embeddings": 2 * longest, "rope_parameters": rope}
    config = Qwen2Config(**sizes, **special, tie_word_embeddings=False, dtype="bfloat16")
    with torch.device("meta"):
        teacher = Qwen2ForCausalLM(config)
        return convert(teacher) if who == "student" else teacher


def folder_of(model) -> str:
    """Write a model's config.json and return its folder."""
    model.config.architectures = [type(model).__name__]
    folder = tempfile.mkdtemp()
    model.config.save_pretrained(folder)
    return folder


def most_rows(student, memory: float, scan: str) -> int:
    """Return of how many requests the states surely fit: vLLM starts with no more at once than that."""
    from math import prod

    import torch
    from vllm.platforms import current_platform

    from ...reference.student.model import mixers
    from .vllm_plugin.layer import state_dtypes, state_shapes

    row, kind = 0, getattr(torch, scan)
    for mixer in mixers(student).values():
        pairs = zip(
            state_shapes(mixer.config).values(), state_dtypes(mixer.config, torch.bfloat16, kind), strict=True
        )
        row += sum(prod(shape) * dtype.itemsize for shape, dtype in pairs)
    weights = sum(2 * parameter.numel() for parameter in student.parameters())
    total = current_platform.get_device_total_memory()
    return max(int(memory * total - weights - SPARE) // row // 64 * 64, 64)


def engine(arguments: argparse.Namespace):
    """Start vLLM."""
    import vllm

    is_student, longest = arguments.who == "student", max(arguments.lengths) + HELD
    model = model_of(arguments.who, arguments.size, longest)
    arguments.most = arguments.most or most_rows(
        model, arguments.memory, arguments.mamba_ssm_cache_dtype or "float32"
    )
    options: dict[str, Any] = {"enforce_eager": True} if arguments.eager else {}
    if not arguments.eager:
        graphs: dict[str, Any] = {"cudagraph_capture_sizes": graph_sizes(arguments)}
        if is_student:
            graphs["cudagraph_mode"] = "FULL_DECODE_ONLY"
        options["compilation_config"] = graphs
    if is_student:
        options["async_scheduling"] = not arguments.sync
        options["mamba_ssm_cache_dtype"] = arguments.mamba_ssm_cache_dtype or "auto"
        options["additional_config"] = {"linmu": list(arguments.options)}
    else:
        options["enable_prefix_caching"] = False
        if not arguments.computed:
            options["kv_transfer_config"] = connector()
    return vllm.LLM(
        model=folder_of(model),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        quantization=arguments.quantization,
        max_model_len=longest,
        max_num_seqs=arguments.most,
        gpu_memory_utilization=arguments.memory,
        worker_extension_cls=f"{__package__}.watched_worker.WatchedWorker",
        **options,
    )


def graph_sizes(arguments: argparse.Namespace) -> list[int]:
    """Return of how many requests steps are captured."""
    few = () if arguments.who == "student" else (32, 128)
    sizes = {1, 2, 4, 8, *few, *arguments.counts, *LARGE, *([] if few else [arguments.most])}
    return sorted(n for n in sizes if n <= arguments.most)


def connector():
    """Return vLLM's connector that fills keys and values, for the requests that ask for it."""
    from vllm.config import KVTransferConfig

    module = f"{__package__}.filled_keys_and_values"
    name = "FilledKeysAndValues"
    return KVTransferConfig(kv_connector=name, kv_connector_module_path=module, kv_role="kv_both")


def versions() -> dict[str, Any]:
    """Say what ran, and on what."""
    import torch
    import transformers
    import vllm

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found = {"device": device, "torch": torch.__version__, "vllm": vllm.__version__}
    return found | {"transformers": transformers.__version__}


def pool(llm, arguments: argparse.Namespace) -> dict[str, Any]:
    """Say what the memory holds: requests of a student, tokens of the teacher."""
    cache = llm.llm_engine.vllm_config.cache_config
    blocks = cache.num_gpu_blocks - 1  # one is vLLM's own, for nobody
    if arguments.who == "student":
        return {"blocks": blocks, "held": {str(length): blocks for length in arguments.lengths}}
    tokens = blocks * cache.block_size
    held = {str(length): tokens // (length + HELD) for length in arguments.lengths}
    return {"blocks": blocks, "tokens": tokens, "held": held}


def cells(arguments: argparse.Namespace, room: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what to measure, the most telling first."""
    counts, few = arguments.counts, sorted(arguments.lengths)
    fits = {length: room["held"][str(length)] for length in arguments.lengths}

    def cell(kind: str, length: int | None, requests: int) -> dict[str, Any]:
        return {"cell": kind, "length": length, "requests": requests}

    def decoding_cells() -> tuple[list, list]:
        if arguments.who == "student":
            ours = dict.fromkeys((counts[0], arguments.most, *counts[1:], 1024))
            return [cell("decoding", None, n) for n in ours if n <= arguments.most], []
        fulls = {length: min(most, arguments.most) for length, most in fits.items()}
        first = [cell("decoding", length, most) for length, most in fulls.items() if most]
        rest = [
            cell("decoding", length, count)
            for count in counts
            for length, most in fulls.items()
            if count < most
        ]
        return first, rest

    first, rest = decoding_cells()
    long = few[min(2, len(few) - 1)]
    ours, at_once = arguments.who == "student", min(room["blocks"], arguments.most)
    alone = [cell("prompt", length, 1) for length in few]
    order = [
        *first,
        *alone[:2],
        *(cell("profile", None, n) for n in (256, 1, 64, 16) if ours and n <= at_once),
        *([cell("profile", few[0], 1)] if ours else []),
        *alone[2:],
        cell("served", few[0], 64),
        cell("served", long, 8),
        cell("prompt", few[0], 16),
        *rest,
        *([cell("profile", few[0], 16)] if ours else []),
        cell("prompt", few[min(1, len(few) - 1)], 16),
        cell("served", few[0], 256),
    ]
    yield from (each for each in order if each["cell"] in arguments.kinds)


def foreseen(who: str, cell: dict[str, Any], is_computed: bool = False) -> float:
    """Return about how many seconds a cell takes on an H200."""
    kind, length, requests = cell["cell"], cell["length"] or SHORT, cell["requests"]
    rate = next(rate for most, rate in RATES[who].items() if length <= most)
    computed = length * requests / rate
    if kind == "decoding":
        written = FILLED * requests if who == "teacher" else 1.0
        return (computed if is_computed else written) + STEPS * STEP * (1 + requests / 512)
    if kind == "prompt":
        return (2 if is_warmed(cell) else 1) * computed + ANSWER * STEP
    if kind == "served":
        return computed + FEW / rate + SERVED * STEP
    return computed + 10.0


def is_warmed(cell: dict[str, Any]) -> bool:
    """Whether a prompt is computed before it is timed."""
    return cell["length"] * cell["requests"] <= 2**15


@dataclass
class Trace:
    """When vLLM's outputs came.

    Args:
        begun: before the first request was added, seconds.
        steps: of each step the time, and how many requests had a token in it.
        firsts: of each request the time of its first token.
        lasts: and of its last.
        cut: whether it was ended before all had their tokens.
    """

    begun: float
    steps: list[tuple[float, int]] = field(default_factory=list)
    firsts: dict[str, float] = field(default_factory=dict)
    lasts: dict[str, float] = field(default_factory=dict)
    cut: bool = False

    def full_steps(self, requests: int) -> list[float]:
        """Return the seconds between two steps in which all had a token."""
        pairs = zip(self.steps, self.steps[1:], strict=False)
        return [after - before for (before, m), (after, n) in pairs if m == n == requests]


def drive(
    llm,
    arguments: argparse.Namespace,
    cell: dict[str, Any],
    tokens: int,
    until: float,
    at_step: Callable[[Trace], bool] = lambda trace: False,
) -> Trace:
    """Answer a cell's prompts of random tokens with so many tokens each, or until a time, or `at_step`."""
    import numpy as np
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    length, requests, engine = cell["length"] or SHORT, cell["requests"], llm.llm_engine
    draw = np.random.default_rng(length + requests)
    prompts = draw.integers(0, SIZES[arguments.size]["vocab_size"], (requests, length)).tolist()
    filled = cell["cell"] == "decoding" and arguments.who == "teacher" and not arguments.computed
    extra = {"kv_transfer_params": {"filled": True}} if filled else None
    options = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra
    )
    options.output_kind = RequestOutputKind.DELTA
    trace = Trace(time.perf_counter())
    names = [f"{trace.begun}-{i}" for i in range(requests)]
    for name, ids in zip(names, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": ids}, options.clone())
    while engine.has_unfinished_requests():
        outputs, now = engine.step(), time.perf_counter()
        found = [output.request_id for output in outputs if output.outputs[0].token_ids]
        if found:
            trace.steps.append((now, len(found)))
        for name in found:
            trace.firsts.setdefault(name, now)
            trace.lasts[name] = now
        if at_step(trace) or now > until:
            trace.cut = now > until
            engine.abort_request(names)
    return trace


def measure(llm, arguments: argparse.Namespace, cell: dict[str, Any], left: float) -> dict[str, Any]:
    """Measure a cell, if it should end in the seconds that are left."""
    guess = foreseen(arguments.who, cell, arguments.computed)
    if guess > left:
        return {"skipped": f"some {guess:.0f} s, {left:.0f} s were left"}
    kinds = {"decoding": decoding, "prompt": prompt, "served": served, "profile": profile}
    begun = time.perf_counter()
    found = kinds[cell["cell"]](llm, arguments, cell, begun + min(left, 3 * guess + 5))
    return found | {"seconds_of_cell": round(time.perf_counter() - begun, 1)}


def decoding(llm, arguments: argparse.Namespace, cell: dict[str, Any], until: float) -> dict[str, Any]:
    """Time the steps in which all requests decode."""
    requests = cell["requests"]
    trace = drive(llm, arguments, cell, STEPS, until)
    steps = trace.full_steps(requests)
    if not steps:
        most = max((count for _, count in trace.steps), default=0)
        return {"skipped": f"{most} of {requests} decoded at once"}
    step = median(steps)
    found = {"ms_a_step": round(1e3 * step, 3), "tokens_per_second": round(requests / step, 1)}
    return found | {"steps": len(steps), "slowest_ms": round(1e3 * max(steps), 3), "cut": trace.cut or None}


def prompt(llm, arguments: argparse.Namespace, cell: dict[str, Any], until: float) -> dict[str, Any]:
    """Time prompts that are computed, and the tokens after them; of short ones the second of two runs."""
    if is_warmed(cell):
        drive(llm, arguments, cell, 2, until)
    return times_of(drive(llm, arguments, cell, ANSWER, until), ANSWER)


def served(llm, arguments: argparse.Namespace, cell: dict[str, Any], until: float) -> dict[str, Any]:
    """Time requests from the first prompt to the last token, after some that make the same kinds of steps."""
    few = cell | {"requests": min(cell["requests"], -(-FEW // cell["length"]))}
    drive(llm, arguments, few, 4, until)
    trace = drive(llm, arguments, cell, SERVED, until)
    found = times_of(trace, SERVED)
    if "skipped" not in found:
        found["tokens_per_second"] = round(cell["requests"] * SERVED / found["seconds"], 1)
    return found


def times_of(trace: Trace, tokens: int) -> dict[str, Any]:
    """Return what requests waited for, in milliseconds, and all of it in seconds."""
    if trace.cut:
        return {"skipped": "it took longer than was left"}
    waited = [first - trace.begun for first in trace.firsts.values()]
    between = [(trace.lasts[name] - first) / (tokens - 1) for name, first in trace.firsts.items()]
    return {
        "seconds": round(trace.steps[-1][0] - trace.begun, 3),
        "ms_to_first_token": round(1e3 * mean(waited), 1),
        "ms_to_last_first_token": round(1e3 * max(waited), 1),
        "ms_between_tokens": round(1e3 * median(between), 3),
    }


def profile(llm, arguments: argparse.Namespace, cell: dict[str, Any], until: float) -> dict[str, Any]:
    """Watch the GPU for some steps of decoding, or while prompts are computed."""
    found: dict[str, Any] = {}

    def watch(trace: Trace) -> bool:
        steps = len(trace.full_steps(cell["requests"]))
        if steps >= 8 and "from" not in found:
            llm.collective_rpc("begin_watching")
            found["from"] = steps
        if "from" in found and steps >= found["from"] + 16:
            (found["watched"],) = llm.collective_rpc("end_watching")
            return True
        return False

    if cell["length"]:
        llm.collective_rpc("begin_watching")
        drive(llm, arguments, cell, 1, until)
        (watched,) = llm.collective_rpc("end_watching")
    else:
        drive(llm, arguments, cell, min(1000, max(arguments.lengths)), until, watch)
        watched = found.get("watched", {"skipped": "no step was watched"})
    if "steps" in watched:
        watched["steps"] //= SIZES[arguments.size]["num_hidden_layers"]
    return watched


def write(path: Path, line: dict[str, Any]) -> None:
    """Append a line, and print it."""
    line = {name: value for name, value in line.items() if value is not None}
    print(json.dumps(line), flush=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
