"""From a checkpoint to a Hugging Face folder, by the role that wrote it: the same model, strategy and options, nothing else.

A checkpoint holds what a strategy saves, not what `transformers` reads. The role is built again from OUTPUT/config.toml, takes
the weights of the checkpoint and exports itself, so that adapters, averages and heads are written as at the end of a run.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rlhf_core.checkpoint.manifest import find_damage
from rlhf_core.config.builder import from_names
from rlhf_core.config.value_types import MASK
from rlhf_core.contract.options import RunConfig
from rlhf_core.errors import UsageError
from rlhf_core.models.loading.names import is_checkpoint
from rlhf_core.run.publishing import write_card
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from rlhf_core.plugins.registry import Registry

__all__ = ["export_checkpoint", "with_exported_models"]


def export_checkpoint(checkpoint: Path, output: Path, registry: Registry, role: str = "") -> None:
    """Write a role of OUTPUT/checkpoints/step-N as a Hugging Face folder. Under torchrun every rank takes part.

    Args:
        checkpoint: the folder step-N; OUTPUT/config.toml is read two folders above it.
        output: the folder to write.
        registry: where the run's providers are looked up.
        role: the role to export; the policy if empty.

    Raises:
        UsageError: this is no checkpoint, it is damaged or has no such role, or its run cannot be built here.
    """
    from rlhf_core.run.run import Run

    if not is_checkpoint(checkpoint):
        raise UsageError(f"{str(checkpoint)!r} is not a checkpoint; name a folder OUTPUT/checkpoints/step-N")
    if damage := find_damage(checkpoint):
        raise UsageError(f"{checkpoint} is damaged ({damage}); export another one")
    config = _read_config(checkpoint.absolute().parent.parent / "config.toml", registry)
    run = Run(config, registry)
    name = role or run.plan.policy
    saved = sorted(path.name for path in (checkpoint / "roles").iterdir())
    if name not in saved:
        raise UsageError(f"{checkpoint} has no role {name!r}; it has {', '.join(saved)}")
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    run.state.load_state_dict(state)
    partners = {partner for _, term in run.plan.roles[name].terms for partner in term.partners}
    roles = {each: spec for each, spec in run.plan.roles.items() if each == name or each in partners}
    run.placed = config.providers["launcher"](run.data.with_language(replace(run.plan, roles=roles)))
    held = run.roles[name]
    held.load(str(checkpoint / "roles" / name))
    held.export(str(output))
    if run.leader:
        write_card(run, output, name, f"From the checkpoint of step {run.step}.")


def _read_config(path: Path, registry: Registry) -> RunConfig:
    """Return the configuration of a run without what only matters while it trains; masked secrets are left out."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}, the configuration of the checkpoint, is missing; restore it") from None
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}); restore it") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); restore it") from None
    if not tree.get("algorithm"):
        raise UsageError(f"{path} is damaged (it names no algorithm); restore it")
    tree = {**_without_secrets(tree), "evaluator": "none", "observer": "none", "launcher": "local"}
    return from_names(tree, registry)


def _without_secrets(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return options without masked values, which the export of a model does not need."""
    return {
        name: _without_secrets(value) if isinstance(value, Mapping) else value
        for name, value in tree.items()
        if not (isinstance(value, str) and MASK in value)
    }


@contextmanager
def with_exported_models(config: RunConfig, registry: Registry) -> Iterator[RunConfig]:
    """Yield `config` with a temporary model folder in place of every checkpoint that it names as a model."""
    with TemporaryDirectory(prefix="rlhf-model-") as folder:
        made: dict[str, str] = {}

        def resolve(name: str) -> str:
            if not name or not is_checkpoint(Path(name).expanduser()):
                return name
            if name not in made:
                made[name] = str(Path(folder) / str(len(made)))
                log.info(f"exporting {name} to a temporary folder; rlhf-run export makes one that stays")
                export_checkpoint(Path(name).expanduser(), Path(made[name]), registry)
            return made[name]

        roles = {name: replace(options, model=resolve(options.model)) for name, options in config.roles.items()}
        yield replace(config, model=resolve(config.model), roles=roles)
