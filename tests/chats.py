"""A small byte-level tokenizer, chat templates in their published forms, and conversations."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>"]  # fmt: skip
SMOLLM2 = (  # HuggingFaceTB/SmolLM2-135M-Instruct
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (  # meta-llama/Meta-Llama-3-8B-Instruct
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (  # the form of meta-llama/Llama-2-7b-chat-hf
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TAGGED = (  # ChatML with the tag that transformers reads masks from, several lines, and a loop control
    "{%- for message in messages %}\n    {%- if message.role == 'tool' %}{% continue %}{% endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\n' }}\n    {%- if message.role == 'assistant' %}\n"
    "        {%- generation %}\n        {{- message.content + '<|im_end|>' }}\n        {%- endgeneration %}\n"
    "    {%- else %}\n        {{- message.content | trim + '<|im_end|>' }}\n    {%- endif %}\n    {{- '\n' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{%- endif %}"
)
TEMPLATES: dict[str, tuple[str, dict[str, str]]] = {
    "smollm2": (SMOLLM2, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}),
    "llama3": (LLAMA3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "llama2": (LLAMA2, {"bos_token": "<s>", "eos_token": "</s>"}),
    "tagged": (TAGGED, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}),
}
SYSTEM = {"role": "system", "content": "Be brief, café-style."}
ONE = [{"role": "user", "content": "The capital of France?"}, {"role": "assistant", "content": "It is Paris."}]
TWO = [*ONE, {"role": "user", "content": "And\nof Peru? ü"}, {"role": "assistant", "content": "Lima,\n of course."}]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {"one": ONE, "system": [SYSTEM, *ONE], "two": TWO}


def tokenizer() -> Tokenizer:
    """Byte-level BPE as GPT-2 splits, trained here on a few sentences."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    text = "the capital of France is Paris, and that of Peru is Lima, of course; yes, it is. system user assistant"
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    made.train_from_iterator([text, text.title()] * 4, trainer)
    return made
