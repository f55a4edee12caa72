"""Tests that capabilities are declared by base classes, documented, and read by name."""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from pathlib import Path

import pytest

from rlhf_core.config.docstrings import docs_of
from rlhf_core.contract import providers
from rlhf_core.contract.capability import OPTIONAL, Capability
from rlhf_core.contract.providers import Provider
from rlhf_core.contract.selection import Filter, Sampler
from rlhf_core.plugins.provider_checks import capabilities

BASES: dict[str, type[Provider]] = {**providers.BASES, "filter": Filter, "sampler": Sampler}
ROOT = Path(__file__).resolve().parents[4]

FOREIGN = {
    "core/cli/resumable": {"strerror": "an error of Python"},
    "core/config/docstrings": {"__file__": "a module of Python"},
    "core/config/value_types": {"__name__": "a type of Python"},
    "core/data/images": {"save": "an image of Pillow, or something that looks like one", "size": "the same"},
    "core/data/draws": {"__getitem__": "any iterable of Python"},
    "core/data/hf": {"load_state_dict": "a table of datasets"},
    "core/forecast/passes": {"head_dim": "a config of transformers"},
    "core/models/build": {"new_tokens": "set by `grow` on a model of transformers"},
    "core/models/export/dry_save": {"score": "the head of a classifier of transformers"},
    "core/models/export/folder": {"score": "the head of a classifier of transformers"},
    "core/models/freezing": {"quant_state": "a parameter of bitsandbytes", "ds_numel": "a parameter of DeepSpeed"},
    "core/models/heads/modules": {
        "logits_scaling": "a config of transformers",
        "final_logit_softcapping": "a config of transformers",
    },
    "core/models/heads/router": {
        "num_local_experts": "a config of transformers",
        "_can_record_outputs": "a model of transformers",
        "load_balancing_loss_func": "a module of transformers",
    },
    "core/models/inputs/processor": {
        "image_processor": "a processor of transformers",
        "chat_template": "a processor of transformers",
        "boi_token": "a processor of transformers",
        "image_token": "a processor of transformers",
    },
    "core/models/inputs/packing": {"layer_types": "a config of transformers"},
    "core/models/inputs/packed_attention": ("head_dim", "is_causal", "num_attention_heads"),
    "core/models/inputs/vision": {
        "vision_config": "a config of transformers",
        "image_token_id": "a config of transformers",
        "is_encoder_decoder": "a config of transformers",
        "get_rope_index": "a model of transformers",
    },
    "core/models/loading/adapters": {"score": "the head of a classifier of transformers"},
    "core/models/loading/architecture": {"attn_logit_softcapping": "a config of transformers"},
    "core/models/loading/convert": {"quantization_config": "a config of transformers"},
    "core/models/loading/deferred_adapters": {
        "base_layer": "a layer of PEFT",
        "modules_to_save": "a wrapper of PEFT",
        "original_module": "a wrapper of PEFT",
        "parameter_name": "a layer of PEFT around a parameter",
    },
    "core/models/loading/grow": {"strerror": "an error of Python", "bias": "a module of torch"},
    "core/models/loading/load": {
        "auto_map": "a config of transformers",
        "support_avx512bf16_for_cpu": "a module of bitsandbytes",
    },
    "core/config/given_model": {"peft_config": "a model of PEFT", "save_pretrained": "a tokenizer of transformers"},
    "core/config/python_values": {
        "__name__": "a function of Python",
        "__qualname__": "a function of Python",
        "__iter__": "rows of any library",
        "__next__": "an iterator of Python",
        "column_names": "a table of datasets",
        "columns": "a table of pandas",
        "to_dict": "a table of pandas",
    },
    "core/data/memory_rows": {
        "__len__": "rows of any library",
        "__next__": "an iterator of Python",
        "features": "a table of datasets",
        "format": "a table of datasets, which tells whether a function of the user's transforms it",
    },
    "core/models/lora": {
        "lora_A": "a layer of PEFT",
        "score": "the head of a classifier of transformers",
        "quant_state": "a parameter of bitsandbytes",
    },
    "core/models/module": {"score": "the head of a classifier of transformers"},
    "core/observer/live": {"kernel": "a shell of IPython"},
    "core/plugins/attribution": {"__notes__": "an error of Python"},
    "core/plugins/provider_checks": {"__get__": "a descriptor of Python"},
    "core/plugins/hook_checks": {"__code__": "a function of Python"},
    "core/plugins/registry": {"all_ranks": "a plugin is any module or object"},
    "core/reward/calls": {
        "tolist": "an array of any library",
        "item": "a number of any library",
        "shape": "an array of any library",
    },
    "core/run/rollout_metrics": {"item": "a number of any library"},
    "core/models/loading/limits": {
        "max_position_embeddings": "a config of transformers",
        "num_key_value_heads": "a config of transformers",
        "num_attention_heads": "a config of transformers",
    },
    "core/strategy/parameter_states": {"get_shape": "a slice of safetensors"},
    "distributed-ray/crew": {"cause": "an error of Ray"},
    "strategy-deepspeed/engine": {
        "ds_id": "a parameter of DeepSpeed",
        "parameter_offload": "an optimizer of DeepSpeed",
    },
    "strategy-deepspeed/pieces": {"optimizer": "an optimizer of DeepSpeed"},
    "strategy-deepspeed/parking": {
        "__dict__": "any object that DeepSpeed made",
        "optimizer": "an optimizer of DeepSpeed",
        "state": "an optimizer of DeepSpeed or torch, where there is one",
    },
    "strategy-deepspeed/ring": {
        "is_causal": "an attention layer of transformers",
        "layer_types": "a configuration of transformers",
        "sliding_window": "a configuration of transformers",
    },
    "strategy-deepspeed/tensor": {
        "head_dim": "an attention layer of transformers",
        "num_key_value_heads": "a configuration of transformers",
    },
    "strategy-deepspeed/sequence": {
        "head_dim": "a config of transformers",
        "num_key_value_groups": "an attention layer of transformers",
    },
    "strategy-deepspeed/trainable": {"overflow": "an optimizer of DeepSpeed"},
}
"""Attributes that are looked for by name, by module, each with whose it is."""


def looked_for(source: str) -> Counter[str]:
    """Literal names that `getattr` and `hasattr` are called with."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and len(node.args) > 1]
    return Counter(
        call.args[1].value
        for call in calls
        if isinstance(call.func, ast.Name)
        and call.func.id in ("getattr", "hasattr")
        and isinstance(call.args[1], ast.Constant)
    )


def test_the_search_finds_both_functions_and_no_computed_name() -> None:
    assert looked_for('getattr(a, "x", 0) or hasattr(b, "y") and getattr(c, name)') == Counter({"x": 1, "y": 1})


def test_no_attribute_of_our_own_contract_is_looked_for_by_name() -> None:
    """`getattr(provider, "needs", ())` keeps a default to itself, and a misspelt declaration is never seen."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "packages").glob("*/src/*/**/*.py"):
        package, _, _, *inside = path.relative_to(ROOT / "packages").with_suffix("").parts
        if names := looked_for(path.read_text(encoding="utf-8")):
            found["/".join((package, *inside))] = set(names)
    assert found == {module: set(names) for module, names in FOREIGN.items()}


# ----------------------------------------------------------------------------------------------------------------------
# the page
# ----------------------------------------------------------------------------------------------------------------------


def documented(base: type[Provider], kind: str) -> list[str]:
    """The rows that the page has about a base class."""
    own = capabilities(base) if base is Provider else {n: v for n, v in capabilities(base).items() if n not in COMMON}
    return [_row(base, kind, name, value) for name, value in own.items()]


COMMON = capabilities(Provider)


def _row(base: type[Provider], kind: str, name: str, value: object) -> str:
    if isinstance(value, Capability):
        text, default = inspect.getdoc(value) or "", repr(value.default(None))
        type_ = inspect.signature(value.default).return_annotation
    elif inspect.isfunction(value):
        parameters = [str(each).partition(":")[0] for each in list(inspect.signature(value).parameters.values())[1:]]
        name, text, default = f"{name}({', '.join(parameters)})", inspect.getdoc(value) or "", ""
        type_ = inspect.signature(value).return_annotation
    else:
        text, default = docs_of(base).fields[name], repr(value)
        type_ = re.sub(r"ClassVar\[(.*)\]", r"\1", inspect.get_annotations(base)[name])
    text = " ".join(text.partition("\n\n")[0].split()).rstrip(".").replace("|", "\\|")
    option = "; may be an option" if name in OPTIONAL.get(kind, ()) else ""
    default = f"`{default}`" if default else ""
    return f"| `{name}` | `{type_}` | {default} | {text}{option} |".replace(" | None`", " \\| None`").replace(
        "|  |", "| |"
    )


def on_the_page(heading: str) -> list[str]:
    """The rows of the table under a heading of docs/hooks.md."""
    page = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    assert f"\n#### {heading}\n" in page, f"docs/hooks.md has no '#### {heading}'"
    section = re.split(r"\n#+ ", page.partition(f"\n#### {heading}\n")[2])[0]
    return [line for line in section.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("kind", ["provider", *BASES])
def test_the_page_lists_every_capability_with_its_type_and_default(kind: str) -> None:
    base = BASES.get(kind, Provider)
    expected = documented(base, kind)
    assert on_the_page(f"`{kind}`" if kind in BASES else "All providers") == expected, "\n".join(expected)


@pytest.mark.parametrize("base", [Provider, *BASES.values()])
def test_a_base_has_no_fields_and_every_capability_is_explained(base: type[Provider]) -> None:
    assert "__dataclass_fields__" not in vars(base)
    for name, value in capabilities(base).items():
        documented = inspect.getdoc(value) if isinstance(value, Capability) or callable(value) else ""
        assert documented or docs_of(base).fields.get(name), f"{base.__name__}.{name} has no docstring"
