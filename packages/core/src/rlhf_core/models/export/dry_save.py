"""The dry save: what is written after the last step is written before the first, without weights, and read back.

A model that cannot be saved, or is another one when plain transformers reads it, is reported while nothing is lost yet.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch
from rlhf_core.models.export.folder import with_template, write_folder
from rlhf_core.models.loading.deferral import compute_deferred
from rlhf_core.models.loading.names import Source
from rlhf_core.models.loading.tokenizer import load_tokenizer
from rlhf_core.models.loading.transformers_calls import silence

if TYPE_CHECKING:
    from rlhf_core.contract.options import ModelOptions
    from rlhf_core.models.module import RoleModule

__all__ = ["check_saving"]

PROBE = "Why is the sky blue?\n  Because 1,000 small things scatter light. \u00e9"
"""A text that both tokenizers should read alike."""

WEIGHTLESS = ("dtype", "transformers_version", "_name_or_path")
"""Keys that may differ in a saved configuration: the weights' dtype and the program that wrote it."""


def check_saving(role: str, module: RoleModule, options: ModelOptions, template: str = "") -> None:
    """Write the folder of a module without its weights, read it with plain transformers and compare.

    Args:
        role: its name, for messages.
        module: a role's, not sharded yet.
        options: the role's.
        template: the chat template that is saved in place of its own, if any.

    Raises:
        UsageError: it cannot be written or read, or is read as something else.
    """
    tokenizer = load_tokenizer(options.model, options)
    own = {name: tensor.new_empty(0) for name, tensor in module.own_weights().items()}
    with TemporaryDirectory(prefix="rlhf-dry-") as folder, silence(Source("folder", folder)):
        try:
            write_folder(module, tokenizer, Path(folder), base=options.model, state={}, own=own, template=template)
            reads = module.vision.reader.processor.tokenizer if module.vision else tokenizer
            faults = _compare(module, with_template(reads, template), folder, options)
        except Exception as error:  # of transformers, PEFT and code that comes with models: each would raise at the end
            first = (str(error).strip().splitlines() or [type(error).__name__])[0].replace(folder, "OUTPUT/model")
            raise UsageError(f"the {role} model {options.model} cannot be saved and loaded again: {first}") from error
    if faults:
        raise UsageError(f"the {role} model {options.model} changes when it is saved and loaded again: {faults[0]}")


def _compare(module: RoleModule, tokenizer: Any, folder: str, options: ModelOptions) -> list[str]:
    """Return what differs between a module with its tokenizer and what plain transformers reads in `folder`."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    code = {"trust_remote_code": options.trust_remote_code}
    read: Any = AutoTokenizer.from_pretrained(folder, **code)
    faults = _compare_tokenizers(tokenizer, read)
    model, adapters = module.model, module.adapters
    pairs = []
    if model.can_generate():
        pairs.append(("generation configuration", model.generation_config, GenerationConfig.from_pretrained(folder)))
    if adapters is not None:
        pairs.append(("adapter", adapters.config, type(adapters.config).from_pretrained(folder)))
    else:
        config = AutoConfig.from_pretrained(folder, **code)
        pairs.append(("configuration", model.config, config))
    for what, *both in pairs:
        expected, found = map(_plain, both)
        faults += [f"its {what}'s {key}" for key in expected if expected[key] != found.get(key)]
    if adapters is not None:
        return faults
    faults += _compare_shapes(model, config)
    if hasattr(model, "score"):
        with compute_deferred(model):
            faults += _compare_scores(model, read)
    return faults


def _compare_tokenizers(expected: Any, found: Any) -> list[str]:
    """Return what differs between two tokenizers: ids, the template, or special tokens; but for what pads."""
    faults = []
    if expected(PROBE)["input_ids"] != found(PROBE)["input_ids"]:
        faults.append("its tokenizer returns other ids")
    if len(expected) != len(found):
        faults.append(f"its tokenizer has {len(found)} tokens and not {len(expected)}")
    if expected.chat_template != found.chat_template:
        faults.append("its chat template")
    if (expected.bos_token_id, expected.eos_token_id) != (found.bos_token_id, found.eos_token_id):
        faults.append("its tokenizer's special tokens")
    return faults


def _compare_shapes(model: Any, config: Any) -> list[str]:
    """Return which parameters of the model are others, by name or shape, in one that is made from the configuration."""
    with torch.device("meta"):
        made = type(model)(config)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    found = {name: parameter.shape for name, parameter in made.named_parameters()}
    odd = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    return [f"the shape of {name}" for name in sorted(odd)]


@torch.no_grad()
def _compare_scores(model: Any, tokenizer: Any) -> list[str]:
    """Return one fault if transformers' scores of a padded batch are not those of each row's last token."""
    ids = tokenizer(PROBE)["input_ids"]
    rows = [ids[:8], ids[:3]]
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    together = model(**batch, use_cache=False).logits[:, 0]
    last = [model.base_model(torch.tensor([row]), use_cache=False)[0][:, -1] for row in rows]
    apart = model.score(torch.cat(last))[:, 0]
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if torch.allclose(together.float(), apart.float(), rtol=tolerance, atol=tolerance):
        return []
    return [f"its scores of a padded batch, {together.tolist()}, are not those of its rows, {apart.tolist()}"]


def _plain(config: Any) -> dict[str, Any]:
    """Return a configuration in JSON form, without the keys that may differ."""
    text: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=_jsonable, sort_keys=True))
    return _drop_weightless(text)


def _jsonable(value: Any) -> Any:
    """A set in one order, whatever order its hashes gave it; of anything else the text."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _drop_weightless(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _drop_weightless(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in WEIGHTLESS
    }
