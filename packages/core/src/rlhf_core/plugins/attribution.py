"""A note on an exception that names the provider whose code raised it, with its distribution.

A KeyError from a stranger's reward ends in a traceback through core's files. The note at its end names the provider. It is
found from the traceback alone, so that no call of a provider needs a wrapper, and providers inside providers are named too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.hooks import KINDS
from rlhf_core.errors import RlhfError

if TYPE_CHECKING:
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.plugins.registry import Registry

__all__ = ["note_provider"]


def note_provider(error: BaseException, registry: Registry, config: RunConfig | None = None) -> None:
    """Add a note to `error` that names the provider whose method raised it: `in reward 'brevity' of rlhf-brevity 0.1.0`.

    Nothing is added if no provider's method is in the traceback, or if the error is one that core raises on purpose.

    Args:
        error: the exception, with its traceback.
        registry: the registered providers.
        config: the run; its providers are named even if they are registered nowhere.
    """
    if isinstance(error, RlhfError):
        return
    for cls in _classes_in_traceback(error):
        if name := _describe(cls, registry, config):
            note = f"in {name}"
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            return


def _classes_in_traceback(error: BaseException) -> Iterator[type]:
    """Yield the classes whose methods raised, the innermost first."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):
        code = frame.f_code
        if code.co_argcount and (first := frame.f_locals.get(code.co_varnames[0])) is not None:
            yield type(first)


def _describe(cls: type, registry: Registry, config: RunConfig | None) -> str:
    """Return the kind, name and distribution of a provider class; empty if it is none."""
    path = f"{cls.__module__}:{cls.__qualname__}"
    for kind in KINDS:
        for entry in registry.entries(kind):
            if entry.target in (cls, path):
                return str(entry)
    for kind, provider in ({} if config is None else _providers(config)).items():
        if cls in [type(each) for each in (provider if isinstance(provider, tuple) else (provider,))]:
            return f"{kind} {path}"
    return ""


def _providers(config: RunConfig) -> dict[str, Any]:
    return {"algorithm": config.algorithm, **config.providers}
