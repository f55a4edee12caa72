"""A role held by a group of Ray actors, and a rollout engine held by others, as the loop sees them.

Both look like their local counterparts. A batch is put into the object store once and read in slices; weights stream from
the trained role to the engines through the store in buckets and never pass through the controller.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf_core.contract.batch import Batch, Prompts, Rollouts
from rlhf_core.contract.plan import RoleSpec
from rlhf_core.contract.providers import Rollout
from rlhf_core.contract.requirements import place
from rlhf_core.contract.roles import Role
from rlhf_core.errors import NotFinite, UsageError
from rlhf_core.lazy import torch
from rlhf_core.training.mismatch import compared_extras
from rlhf_core.util.atomic_files import write_text
from rlhf_core.util.messages import PREFIX, log, progress
from rlhf_distributed_ray.arrays import buckets, from_array
from rlhf_distributed_ray.crew import Crew
from rlhf_distributed_ray.replacing import EngineCrew
from rlhf_distributed_ray.sending import Shipment
from rlhf_distributed_ray.transport import Shipper, sources_of, split_groups, with_texts

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.options import Sampling

__all__ = ["EngineGroup", "RoleGroup", "StoredWeights"]

CLOSE_SECONDS = 10.0
"""Seconds that rollout engines have to close."""
BUCKET_SECONDS = 600.0
"""Seconds that the transfer of a bucket of weights to this node may take."""


class RoleGroup(Role):
    """The role `spec.name`, held by `crew` (an actor per rank), of the run that writes to `output`."""

    def __init__(self, spec: RoleSpec, crew: Crew, shipper: Shipper, output: str) -> None:
        self.name = spec.name
        self.spec = spec
        self.crew = crew
        self.shipper = shipper
        self.output = output
        self._version = 0

    def begin_again(self, crew: Crew) -> None:
        """Be held by new actors, which have taken no step."""
        self.crew, self._version = crew, 0

    @property
    def version(self) -> int:
        """Optimiser steps so far."""
        return self._version

    @version.setter
    def version(self, version: int) -> None:
        self._version = version
        self.call("set_version", version)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the role's model, in this process."""
        from rlhf_core.models.loading.tokenizer import load_tokenizer

        return load_tokenizer(self.spec.options.model, self.spec.options)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call `method` on every rank at once; results in rank order."""
        return self.crew.call(method, *args)

    def infer(self, batch: Batch, names: frozenset[str], source: str = "") -> dict[str, Tensor]:
        """The wanted outputs of all rows."""
        shares = split_groups(batch, len(self.crew))
        busy = next(rows for rows in shares if rows)
        # ranks step together, since weights may be sharded over them: one without rows repeats another's
        parts = [self.shipper.columns(batch, rows or busy) for rows in shares]
        called = self.crew.send(lambda actor, rank: actor.infer.remote(parts[rank], sorted(names)))
        answers = called.in_order()
        found: dict[str, Tensor] = {}
        for rows, outputs in zip(shares, answers, strict=True):
            for name, values in outputs.items() if rows else ():
                place(found, name, rows, torch.from_numpy(values.copy()), batch.tokens_NT.shape)
        return found

    def train(self, work: Mapping[str, Batch]) -> dict[str, float]:
        """Optimiser steps over the credited batches, each rank on its share of the groups; a rank may have none.

        Raises:
            NotFinite: as under any launcher, with the samples' texts, which only the controller has.
        """
        shares = {key: split_groups(batch, len(self.crew)) for key, batch in work.items()}
        read = {key: self._read(key, batch) for key, batch in work.items()}
        steps = {key: batch.step for key, batch in work.items()}
        parts = [
            [
                reference
                for key, batch in work.items()
                for reference in (
                    self.shipper.columns(batch, shares[key][rank]),
                    *self.shipper.extras(batch, read[key], shares[key][rank]),
                )
            ]
            for rank in range(len(self.crew))
        ]

        def call(actor: Any, rank: int) -> Any:
            sources = {key: sources_of(batch, shares[key][rank]) for key, batch in work.items()}
            return actor.train.remote(*parts[rank], read=read, steps=steps, sources=sources)

        try:
            answers = self.crew.send(call).in_order()
        except NotFinite as error:
            error.samples = [with_texts(sample, work.values()) for sample in error.samples]
            raise
        notices = dict.fromkeys(line for *_, said in answers for line in said.splitlines())
        for line in notices:
            if line.startswith(PREFIX):
                log.warning(line.removeprefix(PREFIX))
            else:
                progress.info(line)
        if notices:
            self._tell_texts(work)
        metrics, self._version, _ = answers[0]
        return dict(metrics)

    def _tell_texts(self, work: Mapping[str, Batch]) -> None:
        """Complete the samples that workers kept of a step that was skipped."""
        step = max(batch.step.number for batch in work.values())
        path = Path(self.output) / "failed" / f"step-{step}.jsonl"
        if path.exists():
            rows = [with_texts(json.loads(line), work.values()) for line in path.read_text("utf-8").splitlines()]
            write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))

    def _read(self, key: str, batch: Batch) -> list[str]:
        """The extras that this role's terms read from the credited batch `key`, and those that core reads in every step."""
        needed = {name for term_key, term in self.spec.terms if term_key == key for name in term.needs}
        return sorted((needed | {"uids_N", "versions_NT"} | compared_extras(batch)) & set(batch.extras))

    def buckets(self) -> Iterator[Any]:
        """References to buckets of weights on rank 0; the last may be empty."""
        self.call("open_weights")
        more = True
        while more:
            buckets_of: dict[int, Any] = {}

            def call(actor: Any, rank: int, found: dict[int, Any] = buckets_of) -> Any:
                # two results each: the bucket stays in the store, only the flag comes here; all ranks gather together
                found[rank], flag = actor.next_weights.options(num_returns=2).remote()
                return flag

            more = self.crew.send(call).in_order()[0]
            yield buckets_of[0]

    def send_weights(self, engines: list[Any], sync: int) -> Shipment:
        """Let rank 0 send the weights to these engines; every rank is called once."""
        shipment: Shipment = self.call("send_weights", engines, sync, self.crew.limits.patience)[0]
        return shipment

    def weights(self) -> StoredWeights:
        """Full tensors under their Hugging Face names."""
        return StoredWeights(self.buckets())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], decay: float = 0.0) -> None:
        """Take another role's weights in buckets; those of a group go from its workers to these, past the controller."""
        import ray

        stored = weights.buckets if isinstance(weights, StoredWeights) else map(ray.put, buckets(iter(weights)))
        for count, reference in enumerate(stored):
            self.call("take_weights", reference, decay, count == 0)
        self.call("check_weights")

    def save(self, folder: str) -> None:
        """Checkpoint state; every rank writes its part (a folder that all nodes see)."""
        self.call("save", folder)

    def load(self, folder: str) -> None:
        """Restore checkpoint state."""
        self.call("load", folder)

    def export(self, folder: str) -> None:
        """Write a Hugging Face folder."""
        self.call("export", folder)

    def awake(self) -> AbstractContextManager[None]:
        """While it is open, the states are on their devices; they always are where devices are not shared."""
        return nullcontext()

    def sleep(self) -> int:
        """Give device memory back; the most bytes of any rank."""
        return int(max(self.call("sleep")))

    def wake(self) -> int:
        """Take it again; the most bytes of any rank."""
        return int(max(self.call("wake")))


class StoredWeights(Iterator[tuple[str, "Tensor"]]):
    """Weights in the object store, as references to buckets; tensors come here only on iteration.

    Args:
        buckets: the references, each valid until the next one is asked for.
    """

    def __init__(self, buckets: Iterator[Any]) -> None:
        self.buckets = buckets
        self._tensors = self._read()

    def __next__(self) -> tuple[str, Tensor]:
        return next(self._tensors)

    def _read(self) -> Iterator[tuple[str, Tensor]]:
        import ray

        for reference in self.buckets:
            for name, packed in ray.get(reference, timeout=BUCKET_SECONDS):
                yield name, from_array(packed)


class EngineGroup(Rollout):
    """Rollout engines, each an actor; prompts are dealt to them in turn."""

    has_own_weights: ClassVar[bool] = True
    """their processes have their own weights"""

    def __init__(self, engines: EngineCrew) -> None:
        self.engines = engines

    @property
    def crew(self) -> Crew:
        """The actors that the engines are now."""
        return self.engines.crew

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        import ray

        engines = min(len(self.crew), len(prompts))
        dealt = [list(range(k, len(prompts), engines)) for k in range(engines)]
        shipped = [ray.put(prompts.rows(rows)) for rows in dealt]
        answers = self.engines.ask(
            lambda actor, rank: actor.sample.remote(role.name, shipped[rank], sampling), range(engines)
        )
        parts = [answers[rank] for rank in range(engines)]
        for part, rows in zip(parts, dealt, strict=True):
            assert len(part) == len(rows) * sampling.n, "every prompt is answered once"
        together = Rollouts.cat(parts)
        if "kept_mass" in together.scalars:  # a mean over tokens, of which each engine has its own number
            kept = sum(part.scalars["kept_mass"] * float(part.mask_NT.sum()) for part in parts)
            together.scalars["kept_mass"] = kept / max(1.0, float(together.mask_NT.sum()))
        place = {p: i for i, p in enumerate(p for rows in dealt for p in rows)}  # prompt -> place of its group now
        order = [place[p] * sampling.n + k for p in range(len(prompts)) for k in range(sampling.n)]
        ordered: Rollouts = together.rows(order)
        ordered.group_N = torch.arange(len(prompts)).repeat_interleave(sampling.n)
        return ordered

    def sync(self, role: Role) -> Mapping[str, float]:
        """Weights from the role's rank 0 to every engine, bucket by bucket; of each metric the largest of all engines."""
        assert isinstance(role, RoleGroup)
        metrics = self.engines.bring_weights(role.name, role.version, role.send_weights)
        names = {name: None for each in metrics.values() for name in each}  # an engine that was replaced counts less
        slowest = {name: max(each[name] for each in metrics.values() if name in each) for name in names}
        calls = len(role.crew) + len(self.crew)
        counts = {"sync/buckets": float(self.engines.buckets(role.name)), "sync/controller_calls": float(calls)}
        return {**slowest, **counts}

    def sleep(self, level: Literal[1, 2] = 1) -> int:
        """Give device memory back; the most bytes of any engine."""
        return int(max(self.engines.call("sleep", level)))

    def wake(self, part: Literal["weights", "cache", "all"] = "all") -> int:
        """Take the memory of a part again; the most bytes of any engine."""
        return int(max(self.engines.call("wake", part)))

    def state_dict(self) -> Mapping[str, Any]:
        """The states of the engines, by number."""
        states = self.engines.call("state_dict")
        self.engines.remember(dict(enumerate(states)))
        return {str(number): state for number, state in enumerate(states) if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let each engine continue from its own.

        Raises:
            UsageError: there were more engines.
        """
        if len(state) > len(self.crew):
            raise UsageError(
                f"the checkpoint has the states of {len(state)} rollout engines, but this run has {len(self.crew)}; "
                "start the same number"
            )
        states = {int(number): each for number, each in state.items()}
        self.engines.remember(states)
        self.engines.ask(lambda actor, rank: actor.load_state_dict.remote(states[rank]), list(states))

    def close(self) -> None:
        """Do nothing: the engines end with the placement, which may outlive this life of the run (`end`)."""

    def end(self) -> None:
        """Let the engines free what they hold, for a while: the launcher ends their processes afterwards."""
        import ray

        with suppress(ray.exceptions.RayActorError, ray.exceptions.RaySystemError):  # who is gone holds nothing
            calls = [actor.close.remote() for actor in self.crew.actors]
            ready, _ = ray.wait(calls, num_returns=len(calls), timeout=CLOSE_SECONDS)
            ray.get(ready)
