"""`--model tiny`: a small randomly initialized Llama that needs no download and is the same everywhere.

Its weights depend on its name alone, neither on the global random state nor on the order in which a library version makes
tensors, so that a policy and its reference, a resumed run and a worker all get the same model. `tiny:hidden=128,layers=4`
changes its size. Parsing the name needs no torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch
from rlhf_core.models.loading.byte_tokenizer import EOS, PAD, TOKENS
from rlhf_core.models.loading.deferral import defer_all, is_deferring
from rlhf_core.util.suggestions import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["Tiny", "parse"]

STD = 0.02
"""Standard deviation of all matrices, Llama's own."""


@dataclass(frozen=True)
class Tiny:
    """The size of a tiny model."""

    layers: int = 2
    hidden: int = 64
    heads: int = 2
    """number of attention heads, of 32 numbers each: the least that vLLM computes on the CPU"""
    kv_heads: int = 1
    intermediate: int = 192
    vocab: int = TOKENS
    """tokens of the model; those beyond the tokenizer's 259 are written `<|300|>` and never read from text"""
    context: int = 4096
    """most positions"""
    seed: int = 0
    """seed of the weights"""

    def config(self, **more: Any) -> PretrainedConfig:
        """Return the model's configuration."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
            **more,
        )

    def model(self, cls: type[Any], attention: str, dtype: torch.dtype, **config: Any) -> PreTrainedModel:
        """The model as an instance of `cls`, one of transformers' Llama classes."""
        llama = self.config(**config)
        llama._attn_implementation = attention
        if is_deferring():
            return self._defer(cls, llama, dtype)
        with torch.random.fork_rng(devices=[]):  # the constructor draws numbers that are overwritten below
            model: Any = cls(llama).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                self._draw(name, parameter)
        converted: PreTrainedModel = model.to(dtype)
        return converted

    def _draw(self, name: str, weight: Tensor) -> Tensor:
        """Give a matrix its numbers; the vectors of a Llama keep theirs, which are 1."""
        if weight.dim() > 1:
            digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator(weight.device).manual_seed(int.from_bytes(digest, "big") >> 1)
            weight.normal_(0.0, STD, generator=generator)
        return weight

    def _defer(self, cls: type[Any], llama: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """The model whose weights are drawn when they are needed."""
        with torch.device("meta"):
            model: Any = cls(llama).eval()
        rotary = model.model.rotary_emb
        model.model.rotary_emb = type(rotary)(config=llama)  # its buffers are computed, not drawn
        model.to(dtype)

        def read(name: str, shape: torch.Size) -> Tensor:
            return self._draw(name, torch.ones(shape)).to(dtype)

        defer_all(model, read)
        deferred: PreTrainedModel = model
        return deferred


def parse(name: str) -> Tiny:
    """`tiny` or `tiny:layers=4,hidden=256`.

    Raises:
        UsageError: an unknown or malformed setting, or sizes that do not fit.
    """
    known = [field.name for field in fields(Tiny)]
    settings: dict[str, int] = {}
    for part in filter(None, name.removeprefix("tiny").removeprefix(":").split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            raise UsageError(
                f"model {name!r}: no setting {key!r}{did_you_mean(key, known)}; the settings are {', '.join(known)}"
            )
        if not value.isdecimal() or (int(value) == 0 and key != "seed"):
            raise UsageError(f"model {name!r}: {key} must be a positive whole number, such as tiny:{key}=4")
        settings[key] = int(value)
    tiny = Tiny(**settings)
    if tiny.hidden % tiny.heads or tiny.hidden // tiny.heads % 2:
        raise UsageError(f"model {name!r}: hidden ({tiny.hidden}) must be an even multiple of heads ({tiny.heads})")
    if tiny.heads % tiny.kv_heads:
        raise UsageError(f"model {name!r}: heads ({tiny.heads}) must be a multiple of kv_heads ({tiny.kv_heads})")
    if tiny.vocab < TOKENS:
        raise UsageError(
            f"model {name!r}: vocab must be at least {TOKENS}, 256 bytes and {TOKENS - 256} special tokens"
        )
    return tiny
