"""Students in vLLM give what generate() gives: skipped where vLLM is not installed.

optimized/serving/README.md says how to install it on a CPU. The model is tiny and untrained, and runs in
float32: there is no margin behind which a wrong state could hide.
"""

from __future__ import annotations

import os

import pytest
import torch

from linmu.optimized import convert, load
from linmu.reference.prompts.qwen_processing import FrameProcessor

from ..student.tiny_checkpoint import shake_mixers
from ..student.tiny_families import BUILDERS
from .requests_at_random import IMAGE, Request, request_at_random

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
vllm = pytest.importorskip(
    "vllm", reason="pip install 'linmu[vllm]' brings vLLM, see optimized/serving/README.md"
)

AT_ONCE = 32
LETTERS = list(range(256))  # no placeholder is ever drawn
LONGEST = 448  # tokens of a prompt and its answer; a step has room for as many
REQUESTS = int(os.environ.get("LINMU_VLLM_REQUESTS", "100"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student with a text window and picture windows shorter than its prompts, and its processor."""
    tiny = BUILDERS["qwen2_5_vl"]()
    tiny.processor.video_processor = FrameProcessor(patch_size=4, min_pixels=64, max_pixels=4096)
    path = tmp_path_factory.mktemp("student")
    student = shake_mixers(convert(tiny.teacher, {"text_window": 6, "window_thw": (2, 2, 2)}))
    student.save_pretrained(path)
    tiny.processor.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def expected(folder):
    """Return a function from a request to its prompt's tokens, its answer's, and their log-probabilities."""
    from transformers import AutoProcessor

    student, processor = load(folder).eval(), AutoProcessor.from_pretrained(folder)
    others = list(range(len(LETTERS), student.config.get_text_config().vocab_size))

    @torch.no_grad()
    def answer(request: Request) -> tuple[list[int], list[int], list[float]]:
        inputs = request.for_generate(processor)
        options = {"max_new_tokens": request.tokens, "do_sample": False, "suppress_tokens": others}
        options |= {"output_logits": True, "return_dict_in_generate": True}
        output = student.generate(**inputs, **options)
        prompt = inputs["input_ids"][0].tolist()
        tokens = output.sequences[0, len(prompt) :].tolist()
        pairs = zip(output.logits, tokens, strict=True)
        return prompt, tokens, [logits[0].log_softmax(-1)[token].item() for logits, token in pairs]

    return answer


@pytest.fixture(scope="module")
def engine(folder):
    """vLLM's engine, in this process, without changes but for its sizes."""
    return vllm.LLM(
        model=folder,
        dtype="float32",
        max_model_len=LONGEST,
        max_num_batched_tokens=LONGEST,
        max_num_seqs=AT_ONCE,
        limit_mm_per_prompt={"image": 2, "video": 1},
        mm_processor_cache_gb=0,
        disable_log_stats=True,
    )


def sampling(request: Request) -> vllm.SamplingParams:
    options = {"temperature": 0, "logprobs": 0, "ignore_eos": True, "allowed_token_ids": LETTERS}
    return vllm.SamplingParams(max_tokens=request.tokens, **options)


def check(output, wanted: tuple[list[int], list[int], list[float]], request: Request) -> None:
    prompt, tokens, logarithms = wanted
    (answer,) = output.outputs
    assert list(output.prompt_token_ids) == prompt, request
    assert list(answer.token_ids) == tokens, request
    found = [by_token[token].logprob for by_token, token in zip(answer.logprobs, tokens, strict=True)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(logarithms), rtol=0, atol=1e-4)


def blocks_in_use(engine) -> int:
    """Say how many rows of states belong to a request."""
    pool = engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is vLLM's own, for nobody


def test_all_requests_get_the_tokens_and_log_probabilities_of_generate(engine, expected):
    requests = [request_at_random(seed) for seed in range(REQUESTS)]
    given = [request.for_vllm() for request in requests]
    outputs = engine.generate(given, [sampling(request) for request in requests], use_tqdm=False)
    for request, output in zip(requests, outputs, strict=True):
        check(output, expected(request), request)
    assert blocks_in_use(engine) == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_request_alone_gets_the_same(engine, expected, seed):
    request = request_at_random(seed + 1000)
    (output,) = engine.generate([request.for_vllm()], sampling(request), use_tqdm=False)
    check(output, expected(request), request)


def test_an_aborted_request_leaves_no_state_and_its_neighbours_as_they_are(engine, expected):
    core = engine.llm_engine
    requests = {f"{seed}": request_at_random(seed) for seed in range(2000, 2010)}
    for name, request in requests.items():
        core.add_request(name, request.for_vllm(), sampling(request))
    aborted, outputs = {"2003", "2004", "2007"}, {}
    for step in range(500):
        outputs |= {output.request_id: output for output in core.step() if output.finished}
        if step == 1:
            core.abort_request(list(aborted))
        if not core.has_unfinished_requests():
            break
    for name, request in requests.items():
        if name not in aborted:
            check(outputs[name], expected(request), request)
    assert blocks_in_use(engine) == 0


def test_a_prompt_too_long_is_refused_and_the_engine_goes_on(engine, expected):
    with pytest.raises(vllm.exceptions.VLLMValidationError, match="maximum context length"):
        engine.generate([{"prompt": "a" * (LONGEST + 1)}], use_tqdm=False)
    assert blocks_in_use(engine) == 0
    request = request_at_random(3000)
    (output,) = engine.generate([request.for_vllm()], sampling(request), use_tqdm=False)
    check(output, expected(request), request)


def test_the_state_of_a_layer_holds_the_text_window(engine):
    model = engine.llm_engine.model_executor.driver_worker.worker.model_runner.model
    layer, shapes = (
        model.states[0],
        dict(zip(model.states[0].names, model.states[0].get_state_shape(), strict=True)),
    )
    groups, dim = layer.config.groups, layer.config.head_dim
    assert shapes["keys"] == shapes["values"] == (5, groups, dim) and shapes["present"] == (5,)
    assert [tensor.shape[1:] for tensor in layer.kv_cache] == list(shapes.values())


def test_a_cut_picture_is_refused_by_the_layer():
    from linmu.optimized.serving.vllm_plugin.layer import Step

    coords = torch.tensor([[-1] * 4, [0, 0, 0, 0], [0, 0, 0, 1], [-1] * 4])
    sizes = torch.tensor([0, 2, 2, 0])
    step = Step((torch.zeros(1), torch.zeros(1)), coords, sizes)
    assert step.layout(0, 4) is not None and step.layout(3, 4) is None
    for start, end in ((0, 2), (2, 4)):
        with pytest.raises(ValueError, match="no image or video may be cut"):
            step.layout(start, end)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"enable_prefix_caching": True}, "prefix caching must be off"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculation must be off"),
        ({"tensor_parallel_size": 2}, "parallel sizes must be 1"),
        ({"max_num_batched_tokens": 64}, "Please increase max_num_batched_tokens"),
    ],
)
def test_settings_that_no_student_can_have_are_refused(folder, options, reason):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal.encoder_budget import MultiModalBudget

    arguments = {"model": folder, "dtype": "float32", "max_model_len": LONGEST, "max_num_seqs": 4}
    with pytest.raises(ValueError, match=reason):
        config = EngineArgs(**arguments | options).create_engine_config()
        MultiModalBudget(config, vllm.multimodal.MULTIMODAL_REGISTRY)


def test_positions_carry_coordinates_and_come_back():
    from linmu.optimized.serving.vllm_plugin.positions import pack, unpack

    positions = torch.arange(15).view(3, 5)
    coords = torch.tensor([[-1] * 4, [1, 5, 0, 4095], [1, 0, 3, 0], [0, 0, 0, 0], [-1] * 4])
    found = unpack(pack(positions, coords))
    assert torch.equal(found[0], positions) and torch.equal(found[1], coords)
    assert found[2].tolist() == [0, 2, 2, 1, 0]


def test_text_after_a_long_video_goes_on_where_transformers_does(engine, expected):
    """Two frames high and wide, six long: vLLM's own positions go on from the sixth frame."""
    long = next(r for r in map(request_at_random, range(4000, 5000)) if is_long(r))
    (output,) = engine.generate([long.for_vllm()], sampling(long), use_tqdm=False)
    check(output, expected(long), long)


def is_long(request: Request) -> bool:
    """Whether it is one video of more moments than rows and columns of tokens, no image before."""
    if request.images or not request.videos or IMAGE in request.prompt:
        return False
    frames, height, width, _ = request.videos[0].shape
    return frames // 2 > max(height, width) // 8 + 1
