"""Values that only Python can give: functions as rewards, lists and tables as data.

`make_config` turns each into the provider that holds it. OUTPUT/config.toml names such a value and cannot repeat it; a
user who reads that file is asked to give it from Python again.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sized
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.provider import Provider
from rlhf_core.errors import UsageError

if TYPE_CHECKING:
    from rlhf_core.plugins.registry import Registry

__all__ = ["COMBINING", "describe", "from_python", "function_name", "import_path", "python_text", "text_of_value"]

COMBINING = {"reward": "sum"}
"""Kinds of which a run has one provider, and the provider that combines several of them, its `parts`."""
MARK = "<from Python: "
"""Beginning of the text of such a value in a file."""
SAMPLED = 1000
"""Rows of a table that its fingerprint reads."""
HELDOUT = ("heldout", "test", "validation")
"""Names of the held-out part in a dictionary of tables, first hit first."""


def from_python(kind: str, value: Any, registry: Registry) -> Any:
    """Return a provider, a name or a table of options for what a Python user passed as `kind`.

    A function is the reward `func`, a list of rewards is `sum`, and rows are the data `memory`; all else is returned as it is.

    Raises:
        UsageError: the value cannot be a provider of this kind; the message states what to pass.
    """
    if isinstance(value, type):
        raise UsageError(f"{kind} is the class {value.__name__}; pass an instance, {kind}={value.__name__}(…)")
    read = {"reward": _reward, "data": _data}.get(kind)
    return value if read is None else read(value, registry)


def _reward(value: Any, registry: Registry) -> Any:
    """A function as `func`, several rewards as `sum`."""
    if isinstance(value, (str, Provider)):
        return value
    if isinstance(value, Mapping):
        return {key: _parts(each) if key == "parts" else each for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return registry.resolve("reward", COMBINING["reward"])(parts=_parts(value))
    if _is_module(value):
        raise UsageError(
            f"reward is a {type(value).__name__}; save the model and its tokenizer in a folder, and pass "
            "reward={'use': 'model', 'model': FOLDER}"
        )
    if callable(value) and (inspect.isroutine(value) or "rollouts" not in inspect.signature(value).parameters):
        return registry.resolve("reward", "func")(path=import_path(value) or value)
    if callable(value):
        return value  # called like a provider, and checked like one
    raise UsageError(
        f"reward is {describe(value)}; pass a name, a function such as f(completions, **columns), a list of them, or a Reward"
    )


def _parts(value: Any) -> Any:
    """The parts of a sum: functions of modules by their paths, others as they are."""
    if not isinstance(value, (list, tuple)):
        return value
    for number, part in enumerate(value):
        if isinstance(part, type) or not (isinstance(part, str) or callable(part)):
            raise UsageError(f"reward[{number}] is {describe(part)}; pass a function, a name with options, or a Reward")
    return tuple(value)


def _data(value: Any, _: Registry) -> Any:
    """Rows as the data `memory`: a list of dictionaries, a table of `datasets`, or a dictionary of splits."""
    if isinstance(value, (str, Provider)):
        return value
    if isinstance(value, Mapping):
        if value.get("rows") is not None:
            return {"use": "memory", **value}
        if "train" in value and not isinstance(value["train"], str):
            heldout = next((value[name] for name in HELDOUT if name in value), None)
            parts = {"rows": value["train"], **({} if heldout is None else {"heldout_rows": heldout})}
            return {"use": "memory", **parts}
        if "use" not in value and any(hasattr(each, "column_names") for each in value.values()):
            raise UsageError(f"data has the splits {', '.join(value)}, but none is called train; pass one of them")
        return value
    if hasattr(value, "to_dict") and hasattr(value, "columns"):  # pandas, polars
        raise UsageError(
            f"data is a {type(value).__name__}; pass datasets.Dataset.from_pandas(data), or its rows as a list of dictionaries"
        )
    if not hasattr(value, "__iter__") or hasattr(value, "__next__"):
        raise UsageError(
            f"data is {describe(value)}; pass a name, a list of dictionaries, a datasets.Dataset, or a Data provider"
        )
    return {"use": "memory", "rows": value}


def _is_module(value: Any) -> bool:
    """Return True for a torch module, without importing torch: its owner has imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def function_name(value: Any) -> str:
    """Return the name of a function, or of the class of another object."""
    return str(getattr(value, "__name__", type(value).__name__))


def import_path(function: Callable[..., Any]) -> str:
    """Return the `module:name` that gives this very function in any process; empty if nothing does."""
    module, name = function.__module__, getattr(function, "__qualname__", "")
    if module in (None, "__main__") or not name.isidentifier():
        return ""
    return f"{module}:{name}" if getattr(sys.modules.get(module), name, None) is function else ""


# ----------------------------------------------------------------------------------------------------------------------
# in files and messages
# ----------------------------------------------------------------------------------------------------------------------


def describe(value: Any) -> str:
    """Return a few words for a value, for a message: `'x'`, or `a LlamaForCausalLM`."""
    if value is None or isinstance(value, (str, int, float)):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}…"
    if isinstance(value, (list, tuple, dict, set)) and len(repr(value)) <= 80:
        return repr(value)
    return f"a {type(value).__name__}"


def python_text(value: Any) -> str:
    """Return the text in a file in place of a value that only Python can give; equal values have equal texts."""
    return f"{MARK}{_identity(value)}>"


def text_of_value(value: Any) -> str:
    """Return the words inside `python_text`; empty if a value of a file is no such text."""
    texts = value if isinstance(value, list) else [value]
    found = [each for each in texts if isinstance(each, str) and each.startswith(MARK)]
    return ", ".join(each.removeprefix(MARK).removesuffix(">") for each in found)


def _identity(value: Any) -> str:
    """Name a function, list the options of a provider, count and fingerprint rows."""
    if is_dataclass(value) and not isinstance(value, type):
        options = (f"{each.name}={_identity(getattr(value, each.name))}" for each in fields(value))
        return f"{type(value).__qualname__}({', '.join(options)})"
    if value is None or isinstance(value, (str, int, float)):
        return repr(value)
    if isinstance(value, Sized) and not isinstance(value, Mapping):
        return f"{len(value)} rows, fingerprint {_fingerprint(value)}"
    return getattr(value, "__qualname__", type(value).__qualname__)


def _fingerprint(rows: Any) -> str:
    """Hash the number of rows and some of them, evenly spaced."""
    import xxhash

    digest = xxhash.xxh3_64(str(len(rows)).encode())
    for number in islice(range(0, len(rows), max(1, len(rows) // SAMPLED)), SAMPLED):
        digest.update(json.dumps(rows[number], sort_keys=True, default=lambda each: type(each).__qualname__).encode())
    return digest.hexdigest()
