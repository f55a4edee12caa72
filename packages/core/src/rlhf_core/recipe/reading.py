"""Recipe files: TOML, read into a `Recipe`, and the providers of its ingredients.

    output = "runs/online-dpo"
    total_T = 3
    recipe = ["prompts", { repeat = 3, steps = ["slice", "generate", "score", "pairs", "dpo"] }]

    [artifacts.policy]
    kind = "model"
    path = "smollm2-135m"

    [ingredients.slice]
    use = "rows"
    part = "{t}/{total_T}"

    [ingredients.dpo]
    use = "train"
    reads = { model = "policy", data = "pairs", reference = "policy@initial" }
    writes = { model = "policy" }

In texts of options, `{t}` is replaced by the iteration and `{total_T}` by the number of iterations. A file can define
variables:

    output = "runs/deployment-{selector}"

    [variables]
    selector = "optimistic"
    n = 8

`{selector}` stands for the value in every text of the file; `n = "{n}"` is the number. `--set selector=drts` gives another one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.config.option_fields import annotation_of, default_of, option_fields
from rlhf_core.config.value_types import from_plain, metavar
from rlhf_core.contract.ingredients import ARTIFACT_KINDS, Artifact, Ingredient
from rlhf_core.errors import UsageError, options_under, text_of
from rlhf_core.recipe.plan import Recipe, Step, expand, make_plan
from rlhf_core.recipe.variables import fill, read_variables
from rlhf_core.util.suggestions import did_you_mean

if TYPE_CHECKING:
    from rlhf_core.plugins.registry import Registry

__all__ = ["plan_of", "read_recipe"]

KEYS = ("recipe", "ingredients", "artifacts", "output", "seed", "start_t", "stop_t", "total_T", "variables")
NUMBERS = ("seed", "start_t", "stop_t", "total_T")
OWN = ("use", "reads", "writes")
"""Keys of an ingredient's table that are no options of it."""


def read_recipe(path: str | Path, variables: Mapping[str, str] | None = None, **overrides: Any) -> Recipe:
    """Return the recipe that a file describes.

    Args:
        path: a TOML file; relative paths of artifacts start in the working folder, as in `rlhf-run`.
        variables: values that take the place of those in the file's [variables], as texts.
        overrides: fields of `Recipe` that override the file.

    Raises:
        UsageError: there is no such file, it is not TOML, or a key or value is wrong.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None
    if "algorithm" in tree:
        raise UsageError(f"{path} is the configuration of a run, not a recipe; pass it as rlhf-run --config {path}")
    for key in tree:
        if key not in KEYS:
            raise UsageError(f"{path}: unknown key {key!r}{did_you_mean(key, KEYS)}; a recipe has {', '.join(KEYS)}")
    tree = fill(tree, read_variables(path, tree.pop("variables", {}), variables or {}))
    if not isinstance(tree.get("recipe"), list) or not isinstance(tree.get("ingredients", {}), Mapping):
        raise UsageError(
            f"{path}: a recipe needs `recipe`, a list of ingredients, and a table [ingredients.NAME] for each"
        )
    fields = {key: tree[key] for key in ("output", *NUMBERS) if key in tree} | overrides
    for key in NUMBERS:
        if fields.get(key) is not None and (type(fields[key]) is not int or fields[key] < 0):
            raise UsageError(f"{path}: {key} must be a whole number of at least 0, not {fields[key]!r}")
    artifacts = {name: _artifact(path, name, value) for name, value in tree.get("artifacts", {}).items()}
    return Recipe(tree["recipe"], tree.get("ingredients", {}), artifacts, **fields)


def plan_of(recipe: Recipe, registry: Registry) -> list[Step]:
    """Return the steps of a recipe with their providers.

    Raises:
        UsageError: an ingredient or an option is unknown, or artifacts do not fit together.
    """
    providers = {}
    for name, iteration in dict.fromkeys(expand(recipe.steps)):
        if name not in recipe.ingredients:
            raise UsageError(
                f"the recipe runs {name!r}, but has no ingredient of that name{did_you_mean(name, recipe.ingredients)}"
            )
        table = recipe.ingredients[name]
        if not isinstance(table, Mapping):
            raise UsageError(f"ingredients.{name} must be a table with `use` and options, not {table!r}")
        providers[name, iteration] = _provider(name, table, {"t": iteration, "total_T": recipe.total_T}, registry)
    return make_plan(recipe, providers)


def _provider(
    name: str, table: Mapping[str, Any], numbers: Mapping[str, int], registry: Registry
) -> tuple[Ingredient, str, str]:
    """Return the provider of an ingredient in one iteration, its registered name, and its distribution."""
    use = table.get("use", name)
    if isinstance(use, Ingredient):
        cls = type(use)
        return use, cls.__qualname__, f"{cls.__module__}:{cls.__qualname__}"
    cls = registry.resolve("ingredient", str(use))
    texts = {key: str(number) for key, number in numbers.items()}
    options = {key: fill(value, texts) for key, value in table.items() if key not in OWN}
    known = {each.name: each for each in option_fields(cls)}
    for key in options:
        if key not in known:
            raise UsageError(
                f"ingredients.{name}: {use} has no option {key!r}{did_you_mean(key, known)}; it has {', '.join(known)}"
            )
    values: dict[str, Any] = {}
    for key, each in known.items():
        annotation = annotation_of(cls, key)
        if key not in options:
            if default_of(each, None) is MISSING:
                raise UsageError(f"ingredients.{name}: {use} needs {key} = {metavar(annotation)}")
            continue
        try:
            values[key] = from_plain(annotation, options[key])
        except ValueError:
            raise UsageError(f"ingredients.{name}: {key} must be {metavar(annotation)}, not {options[key]!r}") from None
    try:
        with options_under(f"ingredients.{name}"):
            return cls(**values), str(use), str(registry.provenance("ingredient", str(use)))
    except ValueError as error:
        raise UsageError(f"ingredients.{name}: {text_of(error)}") from None


def _artifact(path: Path, name: str, table: Any) -> Artifact:
    """Return an artifact that the recipe gives."""
    if not isinstance(table, Mapping) or set(table) != {"kind", "path"} or table["kind"] not in ARTIFACT_KINDS:
        raise UsageError(
            f"{path}: artifacts.{name} must be {{kind = KIND, path = PATH}}, with a kind of {', '.join(ARTIFACT_KINDS)}"
        )
    return Artifact(table["kind"], Path(str(table["path"])))
