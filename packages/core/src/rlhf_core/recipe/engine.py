"""Run the steps of a recipe: each once, in order or several at a time, and never again while what it is made of stays.

    OUTPUT/steps/NAME           the outputs of a finished step, and its record
    OUTPUT/steps/.NAME.work     a step that is at work, or was stopped; it continues there if it is still made of the same

The work folder takes the step's name when its outputs are on the disk and its record is written, so that a step is finished or
not begun, whenever the process dies. Every folder of the engine has the mark of this engine in it, and it removes no other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING

import xxhash

from rlhf_core.checkpoint.lock import RunLock
from rlhf_core.checkpoint.own_files import claim_folder
from rlhf_core.contract.ingredients import Artifact
from rlhf_core.errors import ContractError, UsageError
from rlhf_core.recipe.context import StepContext
from rlhf_core.recipe.joining import join
from rlhf_core.recipe.plan import Recipe, Source, Step
from rlhf_core.recipe.reading import plan_of
from rlhf_core.recipe.record import Record, checksum, differences, option_checksums, read_record
from rlhf_core.util.atomic_files import discard, force, fresh_folder, fsync_tree, temporary_name, write_text
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from rlhf_core.plugins.registry import Registry

__all__ = ["Engine", "State", "run_recipe"]

MADE_OF = "made-of.json"
"""Marks a work folder, and holds what its step is made of."""


@dataclass(frozen=True)
class State:
    """Progress of a step, and the reason to run it if there is one."""

    word: str
    """`finished`, `left out`, or `to run`"""
    reason: str = ""


class Engine:
    """The steps of a recipe and the folder they work in.

    Args:
        recipe: the recipe.
        registry: where its ingredients are looked up.
        report: called with a line of text when a step begins or ends.

    Raises:
        UsageError: the recipe cannot work; the message states why.
    """

    def __init__(self, recipe: Recipe, registry: Registry, report: Callable[[str], None] = print) -> None:
        self.recipe, self.registry, self.report = recipe, registry, report
        self.output = Path(recipe.output)
        self.steps = plan_of(recipe, registry)
        self._by_name = {step.name: step for step in self.steps}
        self._checksums: dict[str, str] = {}
        """checksums of artifacts that the recipe gives, which do not change while it runs"""

    # ------------------------------------------------------------------------------------------------------------------
    # what is to be done

    def states(self) -> dict[str, State]:
        """Return how far every step is, as far as it is known before the steps ahead of it have run."""
        states: dict[str, State] = {}
        for step in self.steps:
            ahead = [name for name in sorted(step.producers) if states[name].word == "to run"]
            states[step.name] = self._state(step, ahead)
        return states

    def _state(self, step: Step, ahead: Sequence[str]) -> State:
        """Return how far a step is, of whose producers those `ahead` will run."""
        if not step.runs:
            return State("left out", "its iteration is outside start_t and stop_t")
        record = read_record(self.folder(step))
        if record is None:
            begun = (self._work(step) / MADE_OF).exists()
            return State("to run", "it was interrupted" if begun else "it has not run yet")
        changed = differences(record.made_of, self._made_of(step))
        if changed:
            return State("to run", f"changed: {', '.join(changed)}")
        if ahead:
            return State("to run", f"{', '.join(ahead)} runs first; this step is skipped if the result is the same")
        return State("finished")

    def folder(self, step: Step) -> Path:
        """Return the folder of a finished step."""
        return self.output / "steps" / step.name

    def check(self) -> None:
        """Check everything that can be known before the first step: packages, files, and results of steps that are left out.

        Raises:
            UsageError: something is missing; the message states what.
        """
        for step in self.steps:
            if not step.runs:
                continue
            try:
                step.provider.check()
            except UsageError as error:
                raise UsageError(f"{step.name}: {error}") from None
            for source in (each for sources in step.reads.values() for each in sources):
                if source.given is not None:
                    self._checksum_of_given(source)
                elif not self._by_name[source.step].runs and read_record(self.output / "steps" / source.step) is None:
                    raise UsageError(
                        f"{step.name} reads {source.artifact} of {source.step}, which is outside start_t and stop_t "
                        "and has not run; run it first"
                    )

    def forget(self, name: str) -> None:
        """Remove what a step made, so that it runs again.

        Raises:
            UsageError: there is no such step.
        """
        if name not in self._by_name:
            raise UsageError(f"the recipe has no step {name!r}; its steps are {', '.join(self._by_name)}")
        with self._hold_lock():
            for folder in (self.folder(self._by_name[name]), self._work(self._by_name[name])):
                self._remove(folder)

    # ------------------------------------------------------------------------------------------------------------------
    # doing it

    def run(self, jobs: int = 1) -> None:
        """Run what is not finished, up to `jobs` steps at a time.

        With one job, the generators of all libraries are seeded before each step.

        Raises:
            UsageError: something is missing, or another process runs the recipe.
            Exception: a step failed; those that were running then have ended, and no other has begun.
        """
        self.check()
        with self._hold_lock():
            self._remove_leftovers()
            if jobs == 1:
                for step in self.steps:
                    if step.runs:
                        self._run_step(step, seed_libraries=True)
            else:
                self._run_together([step for step in self.steps if step.runs], jobs)

    def _run_together(self, left: list[Step], jobs: int) -> None:
        """Run steps whose producers are finished, up to `jobs` at a time."""
        running: dict[Future[None], str] = {}
        unfinished = {step.name for step in left}
        with ThreadPoolExecutor(jobs) as pool:
            while left or running:
                for step in [each for each in left if not each.producers & unfinished][: jobs - len(running)]:
                    left.remove(step)
                    running[pool.submit(self._run_step, step)] = step.name
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    unfinished.discard(running.pop(future))
                    future.result()  # the pool lets the others end before the exception leaves

    def _run_step(self, step: Step, seed_libraries: bool = False) -> None:
        """Run a step unless it is finished."""
        made_of, folder, work = self._made_of(step), self.folder(step), self._work(step)
        record = read_record(folder)
        if record is not None and record.made_of == made_of:
            return
        started = time.monotonic()
        finished = read_record(work)
        if finished is None or finished.made_of != made_of:  # else it was killed between its record and its name
            self._prepare(work, made_of)
            self.report(f"{step.name}: started")
            context = StepContext(
                folder=work,
                inputs=self._inputs(step, work),
                seed=self._seed(step),
                iteration=step.iteration,
                registry=self.registry,
            )
            if seed_libraries:
                context.seed_libraries()
            outputs = _check_outputs(step, dict(step.provider(context)), work)
            fsync_tree(work)
            Record(made_of, outputs, time.monotonic() - started).write(work)
        self._remove(folder)
        work.rename(folder)
        force(folder.parent)
        self.report(f"{step.name}: finished in {time.monotonic() - started:.0f} s")

    def _prepare(self, work: Path, made_of: Mapping[str, str]) -> None:
        """Make the work folder, or keep the one of a step that was stopped and is made of the same."""
        mark = work / MADE_OF
        try:
            if json.loads(mark.read_bytes()) == made_of:
                return
        except (OSError, ValueError):
            pass
        self._remove(work)
        with fresh_folder(work) as new:  # it has its mark from the first moment
            write_text(new / MADE_OF, json.dumps(dict(made_of)))

    def _inputs(self, step: Step, work: Path) -> dict[str, Artifact]:
        """Return the artifacts that a step reads; several of one name are joined to a file in its folder."""
        inputs = {}
        for name, sources in step.reads.items():
            found = [self._artifact(source) for source in sources]
            kind = step.provider.inputs[name]
            single = len(found) == 1 and found[0].kind == kind
            inputs[name] = found[0] if single else join(found, kind, work / f"{name}-all")
        return inputs

    def _artifact(self, source: Source) -> Artifact:
        """Return an artifact that is given, or was made by an earlier step."""
        if source.given is not None:
            return source.given
        folder = self.output / "steps" / source.step
        record = read_record(folder)
        if record is None:
            raise UsageError(f"{folder} is damaged or missing; run the recipe again")
        return record.artifact(source.output, folder)

    def _made_of(self, step: Step) -> dict[str, str]:
        """Return what decides the outputs of a step, by name."""
        parts = {
            "provider": f"{step.use}, {step.distribution}",
            "seed": str(self._seed(step)),
            **option_checksums(step.provider),
        }
        for name, sources in step.reads.items():
            for number, source in enumerate(sources):
                parts[f"input {name}" + (f" {number}" if len(sources) > 1 else "")] = self._checksum(source)
        return parts

    def _checksum(self, source: Source) -> str:
        if source.given is not None:
            return self._checksum_of_given(source)
        record = read_record(self.output / "steps" / source.step)
        return record.outputs[source.output]["xxh3"] if record is not None else "not made yet"

    def _checksum_of_given(self, source: Source) -> str:
        assert source.given is not None
        if source.artifact not in self._checksums:
            self._checksums[source.artifact] = checksum(source.given)
        return self._checksums[source.artifact]

    def _seed(self, step: Step) -> int:
        """Return the seed of a step: another one in each iteration, for each ingredient."""
        return xxhash.xxh3_64_intdigest(f"{self.recipe.seed}/{step.name}".encode()) % 2**31

    # ------------------------------------------------------------------------------------------------------------------
    # folders

    def _work(self, step: Step) -> Path:
        return self.output / "steps" / f".{step.name}.work"

    def _remove(self, folder: Path) -> None:
        """Remove a folder of the engine's own.

        Raises:
            UsageError: it belongs to someone else.
        """
        if not folder.exists() and not folder.is_symlink():
            return
        if folder.is_symlink() or not (folder / MADE_OF).is_file():
            raise UsageError(f"{folder} was not made by this recipe; move it away")
        discard(folder)  # by another name first: half of a folder would have lost its mark

    def _remove_leftovers(self) -> None:
        """Remove what a kill left of folders that were being made or removed."""
        for step in self.steps:
            for folder in (self.folder(step), self._work(step)):
                rmtree(temporary_name(folder), ignore_errors=True)

    @contextmanager
    def _hold_lock(self) -> Iterator[None]:
        """Claim the folder of the recipe, and hold its lock."""
        claim_folder(self.output, ["steps/"])
        lock = RunLock(self.output)
        lock.acquire()
        try:
            yield
        finally:
            lock.release()


def run_recipe(recipe: Recipe, jobs: int = 1, registry: Registry | None = None) -> None:
    """Run a recipe from Python: what is finished stays, and what was stopped continues.

    Args:
        recipe: the recipe, given from Python or read by `read_recipe`.
        jobs: steps at a time, where they do not depend on each other.
        registry: where ingredients are looked up; everything installed if absent.

    Raises:
        UsageError: the recipe cannot work; the message states why.
        Exception: a step failed.
    """
    from rlhf_core.plugins.registry import default_registry

    Engine(recipe, registry or default_registry(), report=lambda line: log.info(line)).run(jobs)


def _check_outputs(step: Step, made: Mapping[str, Artifact], work: Path) -> dict[str, dict[str, str]]:
    """Return the outputs for the record, after checking that they are what the ingredient declares."""
    who = f"{step.name}: the ingredient {step.use} of {step.distribution}"
    if set(made) != set(step.provider.outputs):
        raise ContractError(
            f"{who} must make {', '.join(step.provider.outputs) or 'nothing'}, not {', '.join(made) or 'nothing'}"
        )
    outputs = {}
    for name, artifact in made.items():
        path, kind = artifact.path, step.provider.outputs[name]
        if artifact.kind != kind or not path.exists() or not path.resolve().is_relative_to(work.resolve()):
            raise ContractError(f"{who} must write a {kind} {name!r} to its folder, not {artifact}")
        relative = path.resolve().relative_to(work.resolve())
        outputs[name] = {"kind": artifact.kind, "path": str(relative), "xxh3": checksum(artifact)}
    return outputs
