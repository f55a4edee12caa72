"""The state of an estimator in the checkpoints of a run: how a later run, or an uncertainty, finds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_algos.one_pass.estimator import Estimator
from rlhf_algos.one_pass.mle import Mle
from rlhf_algos.one_pass.omd import Omd
from rlhf_algos.one_pass.omd_cg import OmdCg
from rlhf_core.checkpoint.manifest import valid_checkpoints
from rlhf_core.errors import UsageError
from rlhf_core.util.tensor_tree import read_tree

__all__ = ["load_estimator", "read_state"]

KINDS = {each.kind: each for each in (Omd, OmdCg, Mle)}


def read_state(folder: str | Path) -> Mapping[str, Any]:
    """Return the state of the estimator in the newest valid checkpoint of a run, or in the checkpoint `folder` itself.

    Raises:
        UsageError: there is none, or several roles have one.
    """
    path = Path(folder)
    checkpoints = [path] if (path / "roles").is_dir() else valid_checkpoints(path)
    if not checkpoints:
        raise UsageError(f"{folder} has no valid checkpoint; name the folder of a run, or one of its checkpoints")
    checkpoint, found = checkpoints[-1], []
    for file in sorted(checkpoint.glob("roles/*/optimizer.safetensors")):
        states = read_tree(file)["optimizer"]["state"].values()
        found += [state for state in states if isinstance(state, Mapping) and state.get("kind") in KINDS]
    if len(found) != 1:
        raise UsageError(
            f"{checkpoint} contains {len(found)} estimator states, not 1; name a run that was trained with one of "
            f"{', '.join(KINDS)}"
        )
    state: Mapping[str, Any] = found[0]
    return state


def load_estimator(folder: str | Path) -> Estimator:
    """Return the estimator in the checkpoints of a run, with theta, curvature and t.

    Its options, such as eta, are the defaults: it serves for rewards and uncertainties.

    Raises:
        UsageError: there is none.
    """
    state = read_state(folder)
    options = {"damping": state["damping"]} if "damping" in state else {}  # of mle: its curvature is made anew
    estimator: Estimator = KINDS[state["kind"]](int(state["d"]), **options)
    estimator.load_state_dict(state)
    return estimator
