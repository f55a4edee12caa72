"""Tokenizers of the families that models have, trained here in moments, with chat templates in the manner of real ones."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["FAMILIES", "TEMPLATES", "family", "user"]

TEXTS = [
    "The capital of France is Paris. What is the capital of France? Yes. No. Answer: 12, 7 and 365!",
    "<think> Let me see. </think> It is so. system user assistant model You are a helpful assistant. [INST] [/INST]",
    "Human: Hello there, how are you?\n\nAssistant: Fine, thank you.\n\nQuestion: a b c\n",
] * 4

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + CHATML
)
"""Adds a system prompt of its own."""
THINKING = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}").replace(
    "{{ m.content }}", "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}"
)
"""Opens a thought for the turn to come and leaves out those of earlier ones, like DeepSeek R1's."""
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content.strip() }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content.strip() }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content.strip() }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Its role tags are ordinary text."""
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GPT_OSS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{% if m.role == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)
ANSWERS = CHATML.replace("<|im_end|>", "</answer><|im_end|>", 1)
"""Closes a block with a special token before it ends the turn."""
GLM = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Ends a turn with what opens the next one."""
TEMPLATES = {
    "chatml": CHATML,
    "qwen": QWEN,
    "thinking": THINKING,
    "llama-2": LLAMA_2,
    "llama-3": LLAMA_3,
    "gemma": GEMMA,
    "zephyr": ZEPHYR,
    "phi-3": PHI_3,
    "gpt-oss": GPT_OSS,
    "answers": ANSWERS,
    "glm": GLM,
}

TAGS = ("<|im_start|>", "<|im_end|>")
FAMILIES: dict[str, tuple[str, str | None, str, str | None, tuple[str, ...]]] = {
    # kind of tokenizer, BOS, EOS, template, further special tokens
    "gpt-2": ("bytes", None, "<|endoftext|>", None, ()),
    "qwen": ("bytes", None, "<|endoftext|>", "qwen", TAGS),
    "qwen thinking": ("bytes", None, "<|endoftext|>", "thinking", (*TAGS, "<think>", "</think>")),
    "llama-3": (
        "bytes",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "llama-3",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "llama-2": ("blank before", "<s>", "</s>", "llama-2", ()),
    "llama base": ("blank before", "<s>", "</s>", None, ()),
    "zephyr": ("blank before", "<s>", "</s>", "zephyr", ()),
    "mistral": ("blank before first", "<s>", "</s>", "llama-2", ()),
    "phi-3": ("blank before", "<s>", "<|endoftext|>", "phi-3", ("<|user|>", "<|assistant|>", "<|end|>")),
    "gemma": ("no blank before", "<bos>", "<eos>", "gemma", ("<start_of_turn>", "<end_of_turn>")),
    "gpt-oss": ("bytes", None, "<|endoftext|>", "gpt-oss", ("<|start|>", "<|message|>", "<|end|>", "<|return|>")),
    "answers": ("bytes", None, "<|endoftext|>", "answers", (*TAGS, "</answer>")),
    "glm": ("bytes", None, "<|endoftext|>", "glm", ("<|user|>", "<|assistant|>")),
}
"""What the tokenizers are like, by a name of the family."""


@cache
def family(name: str) -> Any:
    """The tokenizer of a family. Every caller gets the same one."""
    kind, bos, eos, template, special = FAMILIES[name]
    named = [token for token in (bos, eos, *special) if token]
    bpe = Tokenizer(models.BPE(byte_fallback=kind != "bytes", unk_token=None))
    alphabet: list[str] = []
    if kind == "bytes":
        split = pre_tokenizers.Split(Regex(r"\s?\p{L}+|\s?\p{N}+|\s?[^\s\p{L}\p{N}]+|\s+"), "isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if kind == "no blank before":
            bpe.normalizer = normalizers.Replace(" ", "▁")
            bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        elif kind == "blank before":  # after every special token too: Llama 2 with `legacy`
            bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            steps.append(decoders.Strip(" ", 1, 0))
        else:
            bpe.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
            steps.append(decoders.Strip(" ", 1, 0))
        bpe.decoder = decoders.Sequence(steps)
        alphabet = ["▁"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if kind != "bytes" else []
    own, blanks = bpe.pre_tokenizer, pre_tokenizers.Split("▁", "merged_with_next")
    if kind.startswith("blank"):  # merges stay within words
        bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace("▁", "first", split=False), blanks])
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<pad>", *named, *bytes_], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    if kind.startswith("blank"):
        bpe.pre_tokenizer = own
    bpe = _without_special(bpe, bytes_)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token=eos,
        pad_token="<pad>",
        additional_special_tokens=list(special),
        chat_template=TEMPLATES[template] if template else None,
        clean_up_tokenization_spaces=False,
    )


def user(text: str) -> tuple[dict[str, str], ...]:
    """A chat with one message."""
    return ({"role": "user", "content": text},)


def _without_special(bpe: Tokenizer, names: list[str]) -> Tokenizer:
    """The tokenizer whose bytes are ordinary tokens, as in sentencepiece models: trained ones are special."""
    import json

    content = json.loads(bpe.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in names]
    plain = Tokenizer.from_str(json.dumps(content))
    assert all(isinstance(token, AddedToken) for token in plain.get_added_tokens_decoder().values())
    return plain
