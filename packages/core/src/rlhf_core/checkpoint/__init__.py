"""Checkpoints: everything a run needs to continue as if it had never stopped.

    OUTPUT/checkpoints/step-N/
        state.json           step, data position, KL coefficient, role versions, metrics, evaluations so far
        random.safetensors   random states of torch, numpy and Python, per rank
        roles/<name>/        what the role's strategy saves
        providers/rank-R/    states of engines (`rlhf_core.contract.engines`) of each rank, a file per engine
        run.json             which run wrote it
        manifest.json        size and checksum of every file above, and of this list
    OUTPUT/checkpoints/best.json   which one is best by `--keep-best`, and its value
    OUTPUT/run.json                which files in OUTPUT are the run's; each checkpoint has a copy

`OutputFolder` locks the folder of a run, and refuses to write over what is not the run's.
`Checkpoints` is the object that a run holds. `saving` writes one, in the loop or in the background; `rotation` removes what is
no longer wanted; `restoring` finds the newest one that `manifest` calls whole.
"""

from __future__ import annotations

from rlhf_core.checkpoint.checkpoints import Checkpoints
from rlhf_core.checkpoint.manifest import valid_checkpoints
from rlhf_core.checkpoint.output import OutputFolder
from rlhf_core.checkpoint.rotation import check_metric

__all__ = ["Checkpoints", "OutputFolder", "check_metric", "valid_checkpoints"]
