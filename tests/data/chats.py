"""Chat templates that behave as those of published models do, in words of our own."""

from __future__ import annotations

# A system turn of its own where none is said; a line break after each turn's end (Qwen2.5).
QWEN2_5 = """
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helper.<|im_end|>\\n' }}{% endif %}
{%- if tools %}{{ raise_exception('no tools here') }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' and m.tool_calls %}{{ raise_exception('no calls here') }}{% endif %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# A thought, if only an empty one, before the answer to the last question alone; earlier ones lose theirs.
QWEN3 = """
{%- set seen = namespace(question=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set seen.question = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role != 'assistant' %}
        {{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
        {%- continue %}
    {%- endif %}
    {%- set said = namespace(thought='', words=m.content) %}
    {%- if '</think>' in m.content %}
        {%- set said.words = m.content.split('</think>')[-1].lstrip('\\n') %}
        {%- set said.thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.last and loop.index0 > seen.question %}
        {{- '<think>\\n' ~ said.thought ~ '\\n</think>\\n\\n' ~ said.words.lstrip('\\n') }}
    {%- else %}
        {{- said.words }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
# It always asks for a thought (Qwen3 Thinking).
_NO_THOUGHT = "{%- if enable_thinking is defined and enable_thinking is false %}"
_NO_THOUGHT += "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
THINKING = QWEN3.replace(_NO_THOUGHT, "{{- '<think>\\n' }}")
assert THINKING != QWEN3
# BOS in its text, turns trimmed, the day said (Llama 3.1).
LLAMA3 = """
{{- bos_token }}
{%- set day = strftime_now('%d %b %Y') if strftime_now is defined else 'never' %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' ~ day ~ '\\n\\n<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' ~ m.content | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
# It asks by the question's end alone, and refuses what it has no place for (Mistral 0.1).
MISTRAL = """
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}
    {%- elif m.role == 'assistant' %}{{ ' ' ~ m.content ~ eos_token }}
    {%- else %}{{ raise_exception('only user and assistant speak') }}{% endif %}
{%- endfor %}"""
# The system turn moves into the last question (Mistral 0.3).
MISTRAL3 = """
{{- bos_token }}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set asked = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set asked.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' ~ (system ~ '\\n\\n' if system and loop.index0 == asked.last else '') ~ m.content ~ ' [/INST]' }}
    {%- elif m.role == 'assistant' %}{{ ' ' ~ m.content | trim ~ eos_token }}{% endif %}
{%- endfor %}"""
# The whole is closed with eos where nothing is asked (Phi-3, Phi-4-mini).
PHI3 = """
{%- for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' ~ m.content ~ '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
PHI4 = """
{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '<|im_sep|>' ~ m.content ~ '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""
# What is the assistant's is marked.
MARKED = """
{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' }}
    {%- if m.role == 'assistant' %}{% generation %}{{ m.content ~ '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{ m.content ~ '<|im_end|>' }}{% endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# An answer is ended by the next turn, the last one by nothing (GLM-4).
ENDLESS = """
{%- for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' ~ m.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

IM_END = "<|im_end|>"
# template, tokenizer, and what is learnt after an answer and after the last one
CHATS = {
    "qwen2.5": (QWEN2_5, "qwen1_5", IM_END, IM_END),
    "qwen3": (QWEN3, "qwen1_5", IM_END, IM_END),
    "llama3": (LLAMA3, "llama_nolegacy", "<|eot_id|>", "<|eot_id|>"),
    "mistral": (MISTRAL, "llama_nolegacy", "</s>", "</s>"),
    "mistral3": (MISTRAL3, "llama_nolegacy", "</s>", "</s>"),
    "phi3": (PHI3, "qwen1_5", "<|end|>", "<|end|>\n<|endoftext|>"),
    "phi4": (PHI4, "qwen1_5", IM_END, IM_END),
    "marked": (MARKED, "qwen1_5", IM_END, IM_END),
}
SPECIAL = ["<|im_start|>", IM_END, "<|im_sep|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
SPECIAL += ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
