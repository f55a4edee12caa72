"""Agreement of sampler and trainer: both computed the log-probabilities of the same tokens from the same weights.

Weights that did not arrive, another attention mask, a wrong template or precision all show here, in the first step. The
numbers cost no forward pass: the engine sent its own with every token, and the trainer's are those of its training pass
before the first update of a step. Late tokens and those after them are left out, since other weights took part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_core.contract.batch import Batch
from rlhf_core.errors import RunStopped
from rlhf_core.training.old_logprobs import current_mask
from rlhf_core.training.reduction import Means
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.contract.plan import RoleSpec

__all__ = ["Mismatch", "bound_of", "compared_extras", "report_mismatch"]

BOUND = 1e-3  # float32 engines agree to 1e-5 on average; a layer whose weights did not arrive differs by more than this
NARROW_BOUND = 0.05  # 16-bit engines differ by 0.01 to 0.03 on average


def bound_of(config: RunConfig, spec: RoleSpec) -> float:
    """Return the largest mean difference that passes: the option's, or that of the role's dtype."""
    return config.max_mismatch or (BOUND if spec.options.compute_dtype == "float32" else NARROW_BOUND)


def compared_extras(batch: Batch) -> frozenset[str]:
    """Return the names of the extras that the comparison reads; none if the batch's numbers cannot be compared."""
    names = frozenset({"sampler_logprobs_NT", "versions_NT"})
    if batch.kept_sets:  # both are over the kept tokens
        return names if names <= batch.extras.keys() else frozenset()
    if "sampler_log_mass_NT" in batch:
        return names | {"sampler_log_mass_NT"}
    comparable = names <= batch.extras.keys() and "kept_mass" not in batch.scalars
    return names if comparable else frozenset()


class Mismatch:
    """The differences that one rank of a role saw in one optimizer step.

    Args:
        config: how large they may be, and what happens beyond that.
        spec: the role.
        version: of its weights in this step.
    """

    def __init__(self, config: RunConfig, spec: RoleSpec, version: int) -> None:
        self.config = config
        self.spec = spec
        self.version = version
        self.means = Means()
        """mean, largest and KL of the differences, as the metrics that they become"""

    def add(self, micro: Batch, logprobs_NT: Tensor) -> None:
        """Count the sampled tokens of a micro-batch: `logprobs_NT` are the trainer's.

        With d = log trainer - log sampler, exp(d) - 1 - d estimates KL(sampler || trainer) (Schulman 2020). Truncated sampling
        reports probabilities over the kept tokens, and so does a trainer that replays the kept sets. For one that does not, the
        log of the kept mass is added, and without it nothing is counted.
        """
        names = compared_extras(micro)
        if not names:
            return
        sampler_NT = micro["sampler_logprobs_NT"]
        if "sampler_log_mass_NT" in names:
            sampler_NT = sampler_NT + micro["sampler_log_mass_NT"]
        d = (logprobs_NT.detach() - sampler_NT)[micro.mask_NT & current_mask(micro, self.version)].double()
        if len(d):
            k3 = d.clamp(max=20.0).exp() - 1 - d
            self.means.add(f"{self.spec.name}/mismatch", float(d.abs().sum()), len(d))
            self.means.add(f"{self.spec.name}/mismatch_kl", float(k3.sum()), len(d))
            self.means.add_largest(f"{self.spec.name}/mismatch_max", float(d.abs().max()))

    def check(self, world: World) -> None:
        """Do what `report_mismatch` does with the differences of all ranks, before the update. Collective."""
        everyone = Means()
        for means in world.gather(self.means):
            everyone.merge(means)
        report_mismatch(everyone.reduce(), self.config, self.spec, world)


def report_mismatch(metrics: Mapping[str, float], config: RunConfig, spec: RoleSpec, world: World) -> None:
    """Warn if the mean difference in `metrics` is beyond the bound, or stop the run.

    Raises:
        RunStopped: it is, and the run stops at that.
    """
    mean, bound = metrics.get(f"{spec.name}/mismatch", 0.0), bound_of(config, spec)
    if mean <= bound:  # False for nan, too
        return
    largest = metrics[f"{spec.name}/mismatch_max"]
    text = (
        f"log-probabilities of the rollout engine differ from those of role {spec.name!r} by {mean:.2g} on "
        f"average and {largest:.2g} at most, above {bound:g}: the engine has other weights, or computes the "
        "model differently. Compare with the rollout hf, or raise max_mismatch"
    )
    if config.on_mismatch == "stop":
        raise RunStopped(text)
    if world.leads:
        log.warning(text)
