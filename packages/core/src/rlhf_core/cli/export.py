"""`rlhf-run export CHECKPOINT`: a model folder from a checkpoint, of a run that was stopped or of its best step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from rlhf_core.contract.commands import Command
from rlhf_core.util.places import new_folder, read_path

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext
    from rlhf_core.plugins.registry import Registry

__all__ = ["Export"]


@dataclass(frozen=True)
class Export(Command):
    """Write a checkpoint as a Hugging Face folder, or a PEFT folder for adapters; averaged weights if the run keeps them."""

    checkpoint: str
    """folder OUTPUT/checkpoints/step-N"""
    output: str = ""
    """new folder to write; empty takes OUTPUT/model-step-N"""
    role: str = ""
    """role to export; empty takes the policy"""

    def __call__(self, context: CommandContext) -> int:
        from rlhf_core.run.exporting import export_checkpoint

        checkpoint = read_path("export", self.checkpoint)
        beside = checkpoint.absolute().parent.parent / f"{self.role or 'model'}-{checkpoint.absolute().name}"
        output = new_folder("export --output", self.output or str(beside))
        export_checkpoint(checkpoint, output, cast("Registry", context.registry), self.role)
        print(f"model saved in {output}")
        return 0
