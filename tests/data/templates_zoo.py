"""Chat templates of the habits that model families have, and tokenizers that know their control tokens.

Each family writes its turns as the models do; the wording around them is our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from transformers import PreTrainedTokenizerBase

from tests.data.tokenizers_zoo import CHATML, tiny

__all__ = ["FAMILIES", "Family", "family_tokenizer"]

_EOS = "</s>"


@final
@dataclass(frozen=True)
class Family:
    """A chat template and what is known of it.

    Args:
        template: Jinja text.
        control: tokens beside those of `tiny`.
        stop: what ends a trained turn.
        lead: what a model of the family writes before the content of its last turn.
        earlier: the same in turns that others follow.
        splits: earlier turns change once others follow, so each trained turn is an example.
        system: a system message is rendered.
        tools: tools, calls and results are rendered.
        reasoning: what stands around the reasoning of the last turn; `None` where the template has none.
        refuses: why no turn can be trained; `None` where it can.
    """

    template: str
    control: tuple[str, ...] = ()
    stop: str = _EOS
    lead: str = ""
    earlier: str = ""
    splits: bool = False
    system: bool = True
    tools: bool = False
    reasoning: tuple[str, str] | None = None
    refuses: str | None = None


_ALTERNATE = (
    "{% for m in messages if m['role'] != 'system' %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('expected user and assistant in turn') }}{% endif %}{% endfor %}"
)
_LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Prints a preamble for any `tools` that are not none, an empty list too; a call stands in place of content.
_LLAMA_3_TOOLS = (
    "{{ bos_token }}{% if tools is not none %}{{ '<|start_header_id|>system<|end_header_id|>\n\n"
    "You may call: ' + (tools | tojson) + '<|eot_id|>' }}{% endif %}{% for m in messages %}"
    "{{ '<|start_header_id|>' + ('ipython' if m['role'] == 'tool' else m['role']) + "
    "'<|end_header_id|>\n\n' }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m['content'] | trim }}"
    "{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# BOS before every exchange.
_LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
# The system text stands before the last question, wherever that is.
_MISTRAL = (
    _ALTERNATE + "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if (loop.last or loop.index0 == messages | length - 2) and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\n\n' }}{% endif %}{{ m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system role here') }}{% endif %}" + _ALTERNATE + "{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# The last turn opens with its thoughts, or with none; they are taken out of turns before the last question.
_QWEN_3 = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m['content'] + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and "
    "(loop.last or m.reasoning_content) %}{{ '<think>\n' + (m.reasoning_content or '') | trim }}"
    "{{ '\n</think>\n\n' }}"
    "{% endif %}{{ m['content'] }}{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] + '<｜Assistant｜>' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Asked to answer it is made to think; what it said is rendered without.
_DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
# Role names are ordinary text; only EOS is a control token.
_ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_VICUNA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% else %}{{ 'Someone asks, a program answers.' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ ' USER: ' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ASSISTANT: ' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
# No token ends a turn.
_ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
_COMMAND = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|><|' + "
    "{'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'}[m['role']] + '_TOKEN|>' "
    "+ m['content'] | trim + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
# Answers name their channel, and the last turn ends in another token than earlier ones.
_HARMONY = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|start|>assistant' }}"
    "{% if m.thinking and loop.last %}{{ '<|channel|>analysis<|message|>' + m.thinking + "
    "'<|end|><|start|>assistant' }}{% endif %}{{ '<|channel|>final<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MARKS_NO_STOP = _MARKED.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
    "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
)
_MARKS_THE_HEADER = _MARKED.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' }}",
).replace("{% else %}", "{% else %}{{ '<|im_start|>' + m['role'] + '\n' }}")

_GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] "
    "+ '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
# Brings a system text where the messages have none.
_QWEN_2 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help people.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)

_LLAMA_CONTROL = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_THINKS = ("<think>\n", "\n</think>\n\n")

FAMILIES: dict[str, Family] = {
    "alpaca": Family(_ALPACA, stop="\n\n</s>", splits=True),
    "chatml": Family(CHATML, stop="<|im_end|>"),
    "command": Family(
        _COMMAND,
        (
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            *(f"<|{r}_TOKEN|>" for r in ("USER", "CHATBOT", "SYSTEM")),
        ),
        stop="<|END_OF_TURN_TOKEN|>",
    ),
    "deepseek": Family(_DEEPSEEK, ("<｜User｜>", "<｜Assistant｜>")),
    "deepseek_r1": Family(
        _DEEPSEEK_R1,
        ("<｜User｜>", "<｜Assistant｜>"),
        refuses="the rendered turn does not start with its generation prompt",
    ),
    "gemma": Family(_GEMMA, ("<start_of_turn>", "<end_of_turn>"), stop="<end_of_turn>", system=False),
    "granite": Family(
        _GRANITE,
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        stop="<|end_of_text|>",
    ),
    "harmony": Family(
        _HARMONY,
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        stop="<|return|>",
        lead="<|channel|>final<|message|>",
        splits=True,
        reasoning=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ),
    "llama_2": Family(_LLAMA_2, lead=" ", earlier=" ", stop=" </s>"),
    "llama_3": Family(_LLAMA_3, _LLAMA_CONTROL, stop="<|eot_id|>"),
    "llama_3_tools": Family(_LLAMA_3_TOOLS, _LLAMA_CONTROL, stop="<|eot_id|>", tools=True),
    "marked": Family(_MARKED, stop="<|im_end|>"),
    "marks_no_stop": Family(_MARKS_NO_STOP, stop="<|im_end|>"),
    "marks_the_header": Family(_MARKS_THE_HEADER, stop="<|im_end|>"),
    "mistral": Family(_MISTRAL, lead=" ", earlier=" "),
    "phi": Family(_PHI, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), stop="<|end|>"),
    "qwen_2": Family(_QWEN_2, stop="<|im_end|>"),
    "qwen_3": Family(
        _QWEN_3,
        stop="<|im_end|>",
        lead="".join(_THINKS),
        splits=True,
        tools=True,
        reasoning=_THINKS,
    ),
    "vicuna": Family(_VICUNA, lead=" ", earlier=" "),
    "zephyr": Family(_ZEPHYR),
}


def family_tokenizer(name: str, kind: str = "byte_level", *, bos: bool = True) -> PreTrainedTokenizerBase:
    """A tokenizer of `kind` with the control tokens and the template of a family.

    Args:
        name: of the family.
        kind: of `tiny`.
        bos: it adds BOS to plain text.
    """
    family = FAMILIES[name]
    tokenizer = tiny(kind, template=None, bos=bos)
    if family.control:
        tokenizer.add_tokens(list(family.control), special_tokens=True)
    tokenizer.chat_template = family.template
    return tokenizer
