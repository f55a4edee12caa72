"""From a recipe to the list of its steps: which ingredient runs in which iteration, and which artifacts it reads.

    recipe = ["sft", ["rm", "ppo"], ["rm", "ppo"]]      (sft, 0) (rm, 0) (ppo, 0) (rm, 1) (ppo, 1)

A string is one step at the current iteration. A list is a group: its steps run in order in one iteration, and the iteration
increases by one after it. `{repeat = n, steps = [...]}` stands for n equal groups, as `[[...]] * n` does in Python. Only steps
with `start_t <= iteration < stop_t` run.

Artifacts are joined by name. A step that writes `policy` makes a new version of it, and

    policy              is the newest version that an earlier step makes
    policy@previous     is the one before that
    policy@initial      is the first one
    pairs@all           are all versions: data sets one after the other, metrics as a table with a row for each version
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_core.contract.ingredients import Artifact, ArtifactKind, Ingredient
from rlhf_core.errors import UsageError
from rlhf_core.util.suggestions import did_you_mean

__all__ = ["Recipe", "Source", "Step", "expand", "make_plan"]

VERSIONS = ("newest", "previous", "initial", "all")
JOINED: Mapping[ArtifactKind, ArtifactKind] = {"dataset": "dataset", "metrics": "table"}
"""The kinds of artifacts of which `@all` can be read, and the kind that all of them make together."""


@dataclass(frozen=True)
class Recipe:
    """A pipeline.

    From Python:

        recipe = Recipe(
            ["rows"] + [["dpo", "generate"]] * 3,
            ingredients={"dpo": {"use": "train", "reads": {"model": "policy"}, …}, …},
            artifacts={"policy": Artifact("model", Path("smollm2-135m"))},
            output="runs/recipe",
        )
    """

    steps: Sequence[Any]
    """names of ingredients, groups (lists of names), and `{"repeat": n, "steps": [...]}`"""
    ingredients: Mapping[str, Mapping[str, Any]]
    """ingredients by name: `use` (a registered name, or an `Ingredient` from Python), its options, `reads` and
    `writes`"""
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)
    """artifacts that are there before the first step"""
    output: str | Path = "recipe"
    """folder of everything that the steps make"""
    seed: int = 0
    """seed of the random draws; the same seed gives the same artifacts"""
    start_t: int = 0
    """first iteration that runs"""
    stop_t: int | None = None
    """iteration at which the recipe stops; None runs all"""
    total_T: int = 1
    """number of iterations that the recipe is planned for, such as the number of slices of the prompts"""


@dataclass(frozen=True)
class Source:
    """An artifact that a step reads: one given by the recipe, or an output of an earlier step."""

    artifact: str
    given: Artifact | None = None
    step: str = ""
    output: str = ""


@dataclass(frozen=True)
class Step:
    """One run of an ingredient."""

    name: str
    """`t1-dpo`, and `t1-dpo-2` for its second run in one iteration"""
    ingredient: str
    iteration: int
    provider: Ingredient
    use: str
    distribution: str
    """distribution and version of the provider"""
    reads: Mapping[str, tuple[Source, ...]]
    """the sources of every input; several with `@all`"""
    writes: Mapping[str, str]
    """the artifact that every output makes"""
    runs: bool = True
    """False outside of `start_t` and `stop_t`"""

    @property
    def producers(self) -> set[str]:
        """Names of the steps that this one waits for."""
        return {source.step for sources in self.reads.values() for source in sources if source.step}


def expand(steps: Sequence[Any]) -> Iterator[tuple[str, int]]:
    """Yield (ingredient, iteration) of every step in order.

    Raises:
        UsageError: an element is none of a name, a group and a repeated group.
    """
    iteration = 0
    for element in steps:
        if isinstance(element, str):
            yield element, iteration
            continue
        group, count = element, 1
        if isinstance(element, Mapping):
            if set(element) != {"repeat", "steps"} or type(element["repeat"]) is not int or element["repeat"] < 0:
                raise UsageError(f"a repeated group must be {{repeat = N, steps = [...]}}, not {dict(element)}")
            group, count = element["steps"], element["repeat"]
        if not isinstance(group, (list, tuple)) or not all(isinstance(name, str) for name in group):
            raise UsageError(f"a group must be a list of names of ingredients, not {group!r}")
        for _ in range(count):
            yield from ((name, iteration) for name in group)
            iteration += 1


def make_plan(recipe: Recipe, providers: Mapping[tuple[str, int], tuple[Ingredient, str, str]]) -> list[Step]:
    """Join the steps of a recipe by their artifacts.

    Args:
        recipe: the recipe.
        providers: for each (ingredient, iteration) its provider, the name it is registered under, and its distribution.

    Raises:
        UsageError: a name leads nowhere, or an artifact is not of the kind that its reader asks for.
    """
    versions: dict[str, list[tuple[Source, ArtifactKind]]] = {
        name: [(Source(name, given=artifact), artifact.kind)] for name, artifact in recipe.artifacts.items()
    }
    steps: list[Step] = []
    for ingredient, iteration in expand(recipe.steps):
        provider, use, distribution = providers[ingredient, iteration]
        name = _step_name(ingredient, iteration, steps)
        table = recipe.ingredients[ingredient]
        reads = dict(_reads(name, provider, table.get("reads", {}), versions))
        try:
            provider.check_inputs(reads.keys())
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        step = Step(
            name,
            ingredient,
            iteration,
            provider,
            use,
            distribution,
            reads=reads,
            writes=_writes(name, provider, table.get("writes", {})),
            runs=recipe.start_t <= iteration and (recipe.stop_t is None or iteration < recipe.stop_t),
        )
        for output, artifact in step.writes.items():
            versions.setdefault(artifact, []).append(
                (Source(artifact, step=name, output=output), provider.outputs[output])
            )
        steps.append(step)
    return steps


def _step_name(ingredient: str, iteration: int, before: Sequence[Step]) -> str:
    """Return a name that stays the same when steps are added after it."""
    same = sum(step.ingredient == ingredient and step.iteration == iteration for step in before)
    return f"t{iteration}-{ingredient}" + (f"-{same + 1}" if same else "")


def _reads(
    step: str,
    provider: Ingredient,
    reads: Mapping[str, str],
    versions: Mapping[str, list[tuple[Source, ArtifactKind]]],
) -> Iterator[tuple[str, tuple[Source, ...]]]:
    """Yield the sources of every input of a step."""
    for name in reads:
        if name not in provider.inputs:
            raise UsageError(
                f"{step}: reads.{name}: there is no such input; the inputs are {', '.join(provider.inputs) or 'none'}"
            )
    for name, kind in provider.inputs.items():
        if name in provider.optional and name not in reads:
            continue
        reference = reads.get(name, name)
        artifact, _, which = reference.partition("@")
        found = versions.get(artifact, [])
        if not found:
            raise UsageError(
                f"{step} reads {artifact!r} as its {name}, but no artifact or earlier step has this "
                f"name{did_you_mean(artifact, versions)}; write reads.{name} = NAME"
            )
        chosen = _version(step, reference, which or "newest", found)
        made = JOINED.get(chosen[0][1]) if which == "all" else chosen[0][1]
        if made != kind or len({each for _, each in chosen}) > 1:
            raise UsageError(
                f"{step} reads {reference!r} as its {name}, which must be a {kind}, not a {made or found[0][1]}; "
                f"change reads.{name}"
            )
        yield name, tuple(source for source, _ in chosen)


def _version(
    step: str, reference: str, which: str, found: Sequence[tuple[Source, ArtifactKind]]
) -> Sequence[tuple[Source, ArtifactKind]]:
    """Return the versions of an artifact that a reference means."""
    match which:
        case "newest":
            return found[-1:]
        case "previous":
            return found[-2:-1] or found[-1:]  # in the first iteration the initial one is the previous one too
        case "initial":
            return found[:1]
        case "all":
            return found
    raise UsageError(
        f"{step}: {reference!r}: write one of {', '.join(VERSIONS)} after @{did_you_mean(which, VERSIONS)}"
    )


def _writes(step: str, provider: Ingredient, writes: Mapping[str, str]) -> dict[str, str]:
    """Return the artifact that every output makes."""
    for name in writes:
        if name not in provider.outputs:
            raise UsageError(
                f"{step}: writes.{name}: there is no such output; the outputs are "
                f"{', '.join(provider.outputs) or 'none'}"
            )
    return {name: writes.get(name, name) for name in provider.outputs}
