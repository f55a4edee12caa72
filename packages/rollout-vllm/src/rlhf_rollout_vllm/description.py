"""The folder or hub name that vLLM reads a role's configuration and tokenizer from."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from rlhf_core.contract.options import ModelOptions

__all__ = ["describe_model"]


def describe_model(options: ModelOptions, folder: str) -> str:
    """Return where vLLM reads configuration and tokenizer: a folder or a hub name. It needs no weights there.

    They are written to `folder` where no place has them as the role does: a model without files, or one with new tokens.
    """
    from transformers import AutoConfig, GenerationConfig, LlamaForCausalLM

    from rlhf_core.models.loading import tiny
    from rlhf_core.models.loading.adapters import read_base_model
    from rlhf_core.models.loading.convert import convert_gguf
    from rlhf_core.models.loading.hub import resolve_name
    from rlhf_core.models.loading.tokenizer import load_tokenizer

    name = options.model
    while (source := resolve_name(name)).kind == "adapter":  # its weights are merged into those of its base
        name = read_base_model(Path(source.location))
    place = str(convert_gguf(Path(source.location))) if source.kind == "gguf" else source.location
    if source.kind == "tiny":
        config = tiny.parse(name).model(LlamaForCausalLM, "sdpa", torch.float32).config
        config.architectures = [LlamaForCausalLM.__name__]
    else:
        config = AutoConfig.from_pretrained(place, trust_remote_code=options.trust_remote_code)
    tokenizer = load_tokenizer(options.model, options)
    text = config.get_text_config(decoder=True)
    tokens = max(tokenizer.get_vocab().values()) + 1
    if source.kind != "tiny" and tokens <= text.vocab_size:
        return place
    text.vocab_size = max(tokens, text.vocab_size)  # as `rlhf_core.models.loading.grow` has it
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if source.kind != "tiny":  # which the hub knows nothing of
        with suppress(OSError):  # its end tokens, where the model has such a file
            GenerationConfig.from_pretrained(place).save_pretrained(folder)
    return folder
