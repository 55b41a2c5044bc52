"""How published models write conversations: the chat templates of their repositories, tools left out."""

from __future__ import annotations

from typing import NamedTuple


class Written(NamedTuple):
    """A template, the special tokens it writes, and what it puts around an answer that the model is to write.

    Attributes:
        before: what the model writes before an answer's text.
        end: its end of turn.
    """

    template: str
    special: tuple[str, ...]
    before: str = ""
    end: str = "<|im_end|>"


def blocks(image: str, video: str = "") -> str:
    """The loop over a turn's content blocks."""
    shown = f"{{% elif line['type'] == 'video' %}}{{{{ '{video}' }}}}" if video else ""
    return (
        "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
        f"{{% elif line['type'] == 'image' %}}{{{{ '{image}' }}}}{shown}{{% endif %}}{{% endfor %}}"
    )


CHATML = ("<|im_start|>", "<|im_end|>")
OPENED = "{% if add_generation_prompt %}{{ 'PROMPT' }}{% endif %}"
QWEN_BLOCKS = blocks(
    "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
)
QWEN2_VL = Written(
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    + QWEN_BLOCKS
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    CHATML,
)
QWEN3_VL = Written(
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    + QWEN_BLOCKS
    + "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
    CHATML,
)
LLAVA_ONEVISION = Written(
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}"
    "{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}"
    "{% endfor %}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] }}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{'<|im_end|>'}}{% endfor %}" + OPENED.replace("PROMPT", "<|im_start|>assistant\\n"),
    CHATML,
)
INTERNVL = Written(
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}"
    + blocks("<IMG_CONTEXT>\\n", "<video>\\n")
    + "{{'<|im_end|>\\n'}}{% endfor %}"
    + OPENED.replace("PROMPT", "<|im_start|>assistant\\n"),
    CHATML,
)
ROLES = (
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    + blocks("<image>", "<video>")
    + "<end_of_utterance>\n{% endfor %}"
    + OPENED.replace("PROMPT", "Assistant:")
)
IDEFICS3 = Written(
    "<|begin_of_text|>{% for message in messages %}{{message['role'].capitalize()}}" + ROLES,
    ("<|begin_of_text|>", "<end_of_utterance>"),
    " ",
    "<end_of_utterance>",
)
SMOLVLM = Written(
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}" + ROLES,
    (*CHATML, "<end_of_utterance>"),
    " ",
    "<end_of_utterance>",
)
HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA3 = Written(
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = '<|begin_of_text|>' + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    + OPENED.replace("PROMPT", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    HEADERS,
    end="<|eot_id|>",
)
LLAMA2 = Written(
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<s>' + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + '</s>' }}"
    "{% endif %}{% endfor %}",
    ("<s>", "</s>"),
    " ",
    " </s>",
)
GEMMA = Written(
    "{{ '<bos>' }}{% for message in messages %}{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    end="<end_of_turn>",
)
QWEN2 = Written(
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    + OPENED.replace("PROMPT", "<|im_start|>assistant\n"),
    CHATML,
)
OF_PICTURES = {
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_VL,
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl_moe": QWEN3_VL,
    "llava_onevision": LLAVA_ONEVISION,
    "internvl": INTERNVL,
    "idefics3": IDEFICS3,
    "smolvlm": SMOLVLM,
}
OF_TEXT = {"qwen2": QWEN2, "llama3": LLAMA3, "llama2": LLAMA2, "gemma": GEMMA}
