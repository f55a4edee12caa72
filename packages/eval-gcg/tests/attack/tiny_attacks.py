"""Tokenizers of model families, trained here in moments, and tiny models for them: the recipe of core's tests, smaller."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

TEXTS = [
    "The capital of France is Paris. Say hello to me, please! Sure, hello friend. x x x ! ? y z w Yes. No. 12, 7 and 365!",
    "user system assistant model You are kind. [INST] [/INST] Write a poem about the sea. Sure, here it is: blue waves.",
] * 4
SIZE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}" + CHATML
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[INST] {{ m.content.strip() }} "
    "{% elif m.role == 'user' %}[INST] {{ m.content.strip() }} [/INST]{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content.strip() }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}\n{{ m.content.strip() }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PHI_3 = ZEPHYR.replace("m.content + eos_token", "m.content + '<|end|>'")

FAMILIES: dict[str, tuple[str, str | None, str, str | None, tuple[str, ...]]] = {
    # kind of tokenizer, BOS, EOS, template, further special tokens
    "qwen": ("bytes", None, "<|endoftext|>", QWEN, ("<|im_start|>", "<|im_end|>")),
    "llama-3": ("bytes", "<|begin|>", "<|end|>", LLAMA_3, ("<|start|>", "<|stop|>", "<|eot|>")),
    "llama-2": ("blank before", "<s>", "</s>", LLAMA_2, ()),
    "zephyr": ("blank before", "<s>", "</s>", ZEPHYR, ()),
    "phi-3": ("blank before", "<s>", "<|endoftext|>", PHI_3, ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>")),
    "mistral": ("blank before first", "<s>", "</s>", LLAMA_2, ()),
    "gemma": ("no blank before", "<bos>", "<eos>", GEMMA, ("<turn>", "<end>")),
    "gpt-2": ("bytes", None, "<|endoftext|>", None, ()),
}
CHATS = tuple(name for name, row in FAMILIES.items() if row[3])
"""Families with a chat template."""


@cache
def family(name: str) -> Any:
    """Return the tokenizer of a family. Every caller gets the same one."""
    kind, bos, eos, template, special = FAMILIES[name]
    in_bytes = kind == "bytes"
    bpe = Tokenizer(models.BPE(byte_fallback=not in_bytes, unk_token=None))
    own = _pieces(bpe, kind)
    letters = [f"<0x{byte:02X}>" for byte in range(256)] if not in_bytes else []
    named = [token for token in (bos, eos, *special) if token]
    trainer = trainers.BpeTrainer(
        vocab_size=520, special_tokens=["<pad>", *named, *letters], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if in_bytes else ["▁"],
    )  # fmt: skip
    bpe.train_from_iterator(TEXTS, trainer)
    if own is not None:
        bpe.pre_tokenizer = own
    content = json.loads(bpe.to_str())  # bytes are ordinary tokens, as in sentencepiece models
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in letters]
    bpe = Tokenizer.from_str(json.dumps(content))
    if bos:
        bpe.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, bpe.token_to_id(bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token="<pad>",
        additional_special_tokens=list(special), chat_template=template, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _pieces(bpe: Tokenizer, kind: str) -> Any:
    """Set how texts are cut before merging; return the pre-tokenizer to use after training, if it is another one."""
    if kind == "bytes":
        split = pre_tokenizers.Split(Regex(r"\s?\p{L}+|\s?\p{N}+|\s?[^\s\p{L}\p{N}]+|\s+"), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([split, level]), decoders.ByteLevel()
        return None
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    own: Any = None
    if kind == "no blank before":
        bpe.normalizer = normalizers.Replace(" ", "▁")
        bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        if kind == "blank before":  # after every special token too: Llama 2 with `legacy`
            bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            own = pre_tokenizers.Split("\u0000", "isolated")
        else:
            own = pre_tokenizers.Metaspace("▁", "first", split=False)
        steps.append(decoders.Strip(" ", 1, 0))
        blanks = pre_tokenizers.Split("▁", "merged_with_next")  # while training, merges stay within words
        bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace("▁", "first", split=False), blanks])
    bpe.decoder = decoders.Sequence(steps)
    return own


def tiny(vocab: int, seed: int = 0, **changes: Any) -> Any:
    """Return a Llama of two layers with random weights, large enough that tokens differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocab, max_position_embeddings=512, **(SIZE | {"initializer_range": 0.4} | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def plain_loss(model: Any, prompt_ids: Any, target_ids: Any) -> float:
    """Return the mean cross-entropy that plain transformers gives the target after the prompt."""
    row = torch.tensor([[*prompt_ids, *target_ids]])
    labels = row.clone()
    labels[0, : len(prompt_ids)] = -100
    with torch.no_grad():
        return float(model(input_ids=row, labels=labels).loss)
