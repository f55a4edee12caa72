"""`rlhf-run recipe FILE`: run a pipeline of ingredients, continue one that was stopped, or explain what would run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.commands import Command
from rlhf_core.errors import OptionError, UsageError
from rlhf_core.plugins.registry import Registry

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext
    from rlhf_core.recipe.engine import Engine
    from rlhf_core.recipe.plan import Step

__all__ = ["RecipeCommand"]


@dataclass(frozen=True)
class RecipeCommand(Command):
    """Run the steps of a recipe. Finished steps are reused while their inputs do not change."""

    file: str
    """TOML file; docs/recipes.md describes it"""
    output: str = ""
    """folder of the recipe; empty takes the one in the file"""
    seed: int | None = None
    """seed of the recipe; the default takes the one in the file"""
    start_t: int | None = None
    """first iteration to run; the default takes the one in the file"""
    stop_t: int | None = None
    """iteration at which the recipe stops; the default takes the one in the file"""
    set: tuple[str, ...] = ()
    """values of the file's variables, as NAME=VALUE"""
    jobs: int = 1
    """number of independent steps that run at the same time"""
    report: bool = True
    """write report.html in the output when all steps have run: metrics by iteration, and times"""
    show: bool = False
    """print the plan with every artifact that is read and written, and run nothing"""
    list: bool = False
    """print the state of every step, and run nothing"""
    dry_run: bool = False
    """check everything that can be checked before the first step, and run nothing"""
    why: str = ""
    """print why this step runs again, or why it does not, and run nothing"""
    forget: str = ""
    """remove what this step made, so that it runs again the next time, and run nothing"""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise OptionError("jobs", f"must be at least 1, not {self.jobs}")
        for each in self.set:
            if "=" not in each:
                raise OptionError("set", f"takes NAME=VALUE, not {each!r}")

    def __call__(self, context: CommandContext) -> int:
        from rlhf_core.analysis.report.writing import report_at_end
        from rlhf_core.recipe.engine import Engine
        from rlhf_core.recipe.reading import read_recipe

        given: dict[str, Any] = {"seed": self.seed, "start_t": self.start_t, "stop_t": self.stop_t}
        overrides = {name: value for name, value in given.items() if value is not None}
        if self.output:
            overrides["output"] = self.output
        recipe = read_recipe(self.file, dict(each.split("=", 1) for each in self.set), **overrides)
        if "output" not in overrides and recipe.output == type(recipe).output:
            raise UsageError(f"{self.file} sets no output; add output = FOLDER, or pass --output FOLDER")
        registry = context.registry
        assert isinstance(registry, Registry)
        engine = Engine(recipe, registry, report=lambda line: print(line, flush=True))
        if self.forget:
            engine.forget(self.forget)
            print(f"{self.forget} runs again the next time")
        elif self.why:
            print(_reason(engine, self.why))
        elif self.show:
            print("\n".join(_drawing(engine)))
        elif self.list:
            print(_table(engine))
        elif self.dry_run:
            engine.check()
            print(f"{sum(step.runs for step in engine.steps)} steps can run; nothing is missing")
        else:
            signal.signal(
                signal.SIGTERM, signal.default_int_handler
            )  # runs of steps are stopped, saved, and continue later
            engine.run(self.jobs)
            print(f"all results are in {Path(recipe.output) / 'steps'}")
            if self.report:
                report_at_end(Path(recipe.output))
        return 0


def _reason(engine: Engine, name: str) -> str:
    """Return why a step runs or does not."""
    states = engine.states()
    if name not in states:
        raise UsageError(f"the recipe has no step {name!r}; its steps are {', '.join(states)}")
    state = states[name]
    return f"{name}: {state.word}" + (f"; {state.reason}" if state.reason else "; none of its inputs has changed")


def _table(engine: Engine) -> str:
    """Return a line per step: its name, its state and the reason."""
    states = engine.states()
    widths = [
        max((len(name) for name in states), default=0),
        max((len(state.word) for state in states.values()), default=0),
    ]
    return "\n".join(
        f"{name.ljust(widths[0])}  {state.word.ljust(widths[1])}  {state.reason}".rstrip()
        for name, state in states.items()
    )


def _drawing(engine: Engine) -> Iterator[str]:
    """Yield the plan: every step with what it reads and writes."""
    for name, given in engine.recipe.artifacts.items():
        yield f"given  {name}: {given.kind} {given.path}"
    for step in engine.steps:
        yield f"{step.name}  ({step.use})" + ("" if step.runs else "  left out")
        yield from (f"    reads   {line}" for line in _sources(step))
        folder = engine.folder(step)
        for output, artifact in step.writes.items():
            yield f"    writes  {artifact}: {step.provider.outputs[output]} in {folder}"


def _sources(step: Step) -> Iterator[str]:
    """Yield where each input of a step comes from."""
    for name, sources in step.reads.items():
        found = ", ".join(source.artifact + (f" of {source.step}" if source.step else " (given)") for source in sources)
        yield f"{name} = {found}"
