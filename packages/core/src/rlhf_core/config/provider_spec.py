"""A provider inside another one, described in one word of a flag: "NAME option=value …", as "length target=40"."""

from __future__ import annotations

import shlex
from typing import Any

from rlhf_core.config.option_fields import annotation_of, option_fields
from rlhf_core.config.value_types import from_words
from rlhf_core.errors import OptionError, options_under
from rlhf_core.util.suggestions import did_you_mean

__all__ = ["make_from_spec"]


def make_from_spec(kind: str, text: str, field: str) -> Any:
    """The provider that `text` describes.

    Args:
        kind: of the provider.
        text: its name and options.
        field: the option that holds `text`, relative to the provider that calls.

    Raises:
        UsageError: there is no such provider or option, or the value does not fit.
    """
    from rlhf_core.plugins.registry import default_registry

    name, *words = shlex.split(text)
    cls: Any = default_registry().resolve(kind, name)
    known = [field.name for field in option_fields(cls)]
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.replace("-", "_")
        if not equals or key not in known:
            raise OptionError(
                field, f"{text!r}: {name} has no option {key!r}{did_you_mean(key, known)}; write option=value"
            )
        try:
            options[key] = from_words(annotation_of(cls, key), value.split(","))
        except ValueError:
            raise OptionError(field, f"{text!r}: {value!r} is not a valid value for {key}") from None
    try:
        with options_under(field):
            return cls(**options)
    except TypeError as error:
        raise OptionError(field, f"{text!r}: {error}") from None
