"""Parts of a model that are not trained, chosen by patterns.

    embed           the input embeddings (and the head, where it is tied to them)
    vision          of a model that reads images: what turns them into tokens' states, the projection to the text's included
    body            everything but the heads: what remains is the language-model head, or the head of a reward model or critic
    a.b.c           parameters whose names have these parts in a row: `self_attn`, `layers.0`, `mlp.up_proj`
                    a part is a name, which may have * and ?, a number, or a range of numbers: `layers.0-3`, `layers.*.mlp`

Patterns are words of one option or parts between commas. One that matches nothing is a mistake, and so is leaving nothing to
train.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from torch import nn

from rlhf_core.errors import OptionError
from rlhf_core.util.suggestions import did_you_mean

__all__ = ["freeze", "matches_pattern", "parameter_size", "trained_share"]


def freeze(module: Any, patterns: Iterable[str], role: str) -> dict[str, int]:
    """Switch the gradients of matching parameters of a `RoleModule` off; how many numbers each pattern stands for.

    Raises:
        UsageError: a pattern matches nothing, or nothing is left to train.
    """
    words = [word for each in patterns for word in each.split(",") if word]
    named = dict(module.named_parameters())
    counts = {word: _freeze(module, named, word, role) for word in words}
    if words and not any(parameter.requires_grad for parameter in named.values()):
        raise OptionError(f"/{role}.freeze", f"{' '.join(words)} leaves nothing to train")
    return counts


def matches_pattern(pattern: str, name: str) -> bool:
    """Return True if the parts of `pattern` follow one another in the dotted `name`."""
    parts, wanted = name.split("."), pattern.split(".")
    return any(
        all(_part(part, want) for part, want in zip(parts[i:], wanted, strict=False))
        for i in range(len(parts) - len(wanted) + 1)
    )


def parameter_size(parameter: nn.Parameter) -> int:
    """Return the number of elements of a parameter, including those in 4 bits or on other ranks (DeepSpeed)."""
    state = getattr(parameter, "quant_state", None)
    return int(getattr(parameter, "ds_numel", parameter.numel())) if state is None else prod(state.shape)


def trained_share(module: Any) -> str:
    """`1,024 of 60,000 parameters (frozen: embed 16,576)`."""
    every = list(module.parameters())
    trained = sum(parameter_size(parameter) for parameter in every if parameter.requires_grad)
    frozen = ", ".join(f"{pattern} {count:,}" for pattern, count in module.frozen.items())
    return f"{trained:,} of {sum(map(parameter_size, every)):,} parameters" + (f" (frozen: {frozen})" if frozen else "")


def _freeze(module: Any, named: Mapping[str, nn.Parameter], pattern: str, role: str) -> int:
    if pattern == "embed":
        chosen = list(module.model.get_input_embeddings().parameters())
    elif pattern == "body":
        chosen = list(module.model.base_model.parameters())
    elif pattern == "vision" and module.vision is not None:
        text = {id(parameter) for parameter in module.model.get_decoder().parameters()}
        chosen = [parameter for parameter in module.model.base_model.parameters() if id(parameter) not in text]
    else:
        chosen = [
            parameter
            for name, parameter in named.items()
            if matches_pattern(pattern, name.replace(".base_layer.", "."))
        ]
    if not chosen:
        parts = sorted({part for name in named for part in name.split(".") if not part.isdecimal()})
        hint = did_you_mean(pattern.rpartition(".")[2], parts) or f"; parameter names contain {', '.join(parts)}"
        raise OptionError(f"/{role}.freeze", f"{pattern} matches no parameter of the model{hint}")
    for parameter in chosen:
        parameter.requires_grad_(False)
    return sum(map(parameter_size, chosen))


def _part(part: str, want: str) -> bool:
    between = re.fullmatch(r"(\d+)-(\d+)", want)
    if between:
        return part.isdecimal() and int(between[1]) <= int(part) <= int(between[2])
    return fnmatchcase(part, want)
