"""Loading the processor of a vision-language model by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core.models.inputs.vision import is_vision, placeholder
from rlhf_core.models.loading.adapters import read_base_model
from rlhf_core.models.loading.hub import resolve_name
from rlhf_core.models.loading.tokenizer import load_tokenizer
from rlhf_core.models.loading.transformers_calls import loadable_path, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.contract.options import ModelOptions
    from rlhf_core.models.inputs.processor import ImageReader

__all__ = ["load_reader"]


def load_reader(
    name: str, options: ModelOptions, tokenizer: PreTrainedTokenizerBase | None = None
) -> ImageReader | None:
    """Load the reader of prompts with images for the model `name`, by default with its own tokenizer; None if it reads
    text alone.

    Raises:
        UsageError, MissingPackage: as `load_model`.
    """
    source = resolve_name(name)
    if source.kind == "adapter":
        return load_reader(read_base_model(Path(source.location)), options, tokenizer)
    if source.kind == "tiny" or not is_vision(config := read_config(name, source, options)):
        return None
    from rlhf_core.models.inputs.processor import ImageReader

    token = placeholder(config)
    assert token is not None
    return ImageReader(loadable_path(source), options, tokenizer or load_tokenizer(name, options), token)
