"""A tokenizer whose tokens are bytes, for models that were never trained: any text becomes tokens and comes back unchanged.

Token b is the byte b, for all 256; three special tokens follow, and a chat template in the ChatML manner. It is an ordinary
fast tokenizer: a folder saved with it loads with `AutoTokenizer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EOS", "PAD", "TOKENS", "byte_tokenizer"]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD, _, EOS = range(256, 259)
"""Ids of `<|endoftext|>`, which pads, and `<|im_end|>`, which ends a turn."""

TOKENS = 256 + len(SPECIAL)
"""Size of the vocabulary."""

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(vocab: int = TOKENS, context: int = 4096) -> PreTrainedTokenizerBase:
    """The tokenizer. Tokens from 259 up to `vocab` can be decoded, as `<|number|>`, but no text becomes them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*_letters(), *SPECIAL, *(f"<|{number}|>" for number in range(TOKENS, vocab))]
    bare = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=bare,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        additional_special_tokens=[SPECIAL[1]],
        chat_template=TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def _letters() -> list[str]:
    """Return the letter of each byte in byte-level BPE: itself if printable, else a letter from 256 on (GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
