"""Loading the tokenizer of a model by name, and its chat template as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core.errors import UsageError
from rlhf_core.models.loading import tiny
from rlhf_core.models.loading.adapters import read_base_model
from rlhf_core.models.loading.hub import resolve_name
from rlhf_core.models.loading.transformers_calls import loadable_path, silence, translate_errors
from rlhf_core.util.limits import OverLimit, rendering_limits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.contract.batch import Message
    from rlhf_core.contract.options import ModelOptions

__all__ = ["load_tokenizer", "render_chat"]


def load_tokenizer(name: str, options: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer of the model called `name`. One without a padding token pads with its EOS.

    Raises:
        UsageError, MissingPackage: as `load_model`.
    """
    from transformers import AutoTokenizer

    from rlhf_core.models.loading.byte_tokenizer import byte_tokenizer

    source = resolve_name(name)
    if source.kind == "tiny":
        size = tiny.parse(name)
        return _add_tokens(byte_tokenizer(size.vocab, size.context), options)
    if source.kind == "adapter" and not (Path(source.location) / "tokenizer_config.json").is_file():
        return load_tokenizer(read_base_model(Path(source.location)), options)
    with translate_errors(name), silence(source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            loadable_path(source), trust_remote_code=options.trust_remote_code
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(
                f"the tokenizer of {name} has no end token, so completions could not end, and no padding token; "
                'add "eos_token" to its tokenizer_config.json'
            )
        tokenizer.pad_token = tokenizer.eos_token
    return _add_tokens(tokenizer, options)


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation: bool = True) -> str:
    """The chat as text, ending with what opens the assistant's turn if `generation`.

    Raises:
        UsageError: the tokenizer has no chat template, or one that takes too much time or memory.
    """
    if not tokenizer.chat_template:
        raise UsageError("the model's tokenizer has no chat template: use an instruction-tuned model")
    try:
        with rendering_limits():
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=generation, tokenize=False
            )
    except OverLimit as error:
        raise UsageError(f"the chat template of {tokenizer.name_or_path} cannot be used: {error}") from None
    return str(text)


def _add_tokens(tokenizer: PreTrainedTokenizerBase, options: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer with the tokens that the run adds."""
    if options.add_tokens:
        from rlhf_core.models.loading.grow import add_tokens

        add_tokens(tokenizer, options.add_tokens)
    return tokenizer
