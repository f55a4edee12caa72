"""Schema of a run's options: the sections of its providers and roles, flattened to dotted paths.

`reward.limit` is the path of the flag `--reward.limit` and of the key `limit` in the TOML table `[reward]`. The schema
follows from the names chosen, so that help, errors and the written file speak of exactly those options.

    ""            RunConfig's own numbers, and `sampling.*` where the algorithm samples
    <role>        one section per role of the algorithm
    algorithm     the algorithm's own fields
    <kind>        the chosen provider's fields; with several (such as evaluators) `evaluator.<name>` each, of one name
                  `evaluator.<name>.1` and so on
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf_core.config.foreign_flags import find_answer, read_answer
from rlhf_core.config.option_fields import Option, Use, annotation_of, option_fields, options_of
from rlhf_core.config.roles import roles_of
from rlhf_core.contract.hooks import CHOSEN, OF_ROLES, OPTIONAL, SEVERAL
from rlhf_core.contract.options import RunConfig, TrainedOptions
from rlhf_core.errors import UsageError, run_option
from rlhf_core.option_text import OptionNames
from rlhf_core.plugins.provider_checks import class_of
from rlhf_core.util.repeats import number_repeats
from rlhf_core.util.suggestions import closest_names, did_you_mean

if TYPE_CHECKING:
    from rlhf_core.contract.optimizers import OptimizerProvider
    from rlhf_core.contract.providers import Algorithm
    from rlhf_core.plugins.registry import Registry

__all__ = [
    "Schema",
    "Section",
    "build_schema",
    "make_schema",
    "provider_fields",
    "provider_sections",
    "unused_fields",
]

STRUCTURE = ("algorithm", "providers", "names", "roles", "uses", "registry", "callbacks", "option_names")
"""Fields of RunConfig that are what the sections are made of, and not options."""

ALWAYS = {"strategy": "torch", "launcher": "local", "evaluator": "", "observer": ""}
"""Kinds that every algorithm has, with their usual providers."""

FOLLOWING = {"environment": {"reward": "environment"}}
"""Usual providers of other kinds for a run that has one of this kind."""

HELDOUT_LOSS = "heldout_loss"
"""The evaluator of an offline algorithm whose data holds rows out, where the user chose none and declined none."""

FIXED = {
    "config": "TOML file with options; flags override it",
    "dry_run": "check everything that can be checked before the first step, and train nothing",
    "help": "show the options of exactly the chosen providers, and name those of the run and its roles",
    "help_all": "explain every option",
}
"""Flags that are no options of the run."""


@dataclass(frozen=True)
class Section:
    """The options of one thing."""

    prefix: str
    title: str
    """title in errors and help, such as `reward 'length'`"""
    cls: type
    base: Any = None
    """the instance whose values are the defaults; None where the class has required fields"""
    skip: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    kind: str = ""
    """the kind, where the section is a provider's"""
    uses: Mapping[str, Use] = field(default_factory=dict)
    """the providers inside it, by path"""


@dataclass(frozen=True)
class Schema:
    """All options of a run."""

    names: Mapping[str, str]
    """the name of the algorithm or command, then the chosen name of each kind; empty where a kind is left out"""
    sections: tuple[Section, ...]
    options: Mapping[str, Option] = field(default_factory=dict)
    option_names: OptionNames = OptionNames()
    """spelling of these options for the user who chose them"""
    declined: frozenset[str] = frozenset()
    """kinds that the user chose to have none of"""

    def is_group(self, path: str) -> bool:
        """Return True if `path` may contain options."""
        known = [*self.options, *(f"{section.prefix}." for section in self.sections)]
        return any(each.startswith(f"{path}.") for each in known) or path in self.names

    def hint(self, path: str, spell: Callable[[str], str]) -> str:
        """Return a hint for the unknown option `path`; `spell` writes a path as a flag or key."""
        head = path.partition(".")[0]
        (subject, name), *chosen = self.names.items()
        kinds = [kind for kind, _ in chosen]
        section = next((each for each in self.sections if each.prefix == head), None)
        trained = next((each.prefix for each in self.sections if f"{each.prefix}.optim.use" in self.options), "")
        if answer := find_answer(path, trained, {*self.options, *kinds}):
            return self._spell_answer(answer, spell)
        if head in OF_ROLES:
            paths = [each.removesuffix(".use") for each in self.options if each.endswith(".use")]
            return f"; an optimizer belongs to a role: {' or '.join(f'{spell(each)}.use NAME' for each in paths)}"
        if head in CHOSEN and head not in self.names and section is None:
            uses = f" (it uses {', '.join(kinds)})" if kinds else ""
            return f"; {subject} {name!r} has no {head}{uses}"
        if section is not None and not section.options:
            return f"; {section.title} has no options"
        group = self._group(path)
        tail = path.removeprefix(group)
        among = [known.removeprefix(group) for known in self.options if known.startswith(group)]
        same = [known for known in among if known.endswith(f".{tail}")]  # `--lr` for `--actor.optim.lr`
        if close := same or closest_names(tail, among if group else [*among, *kinds, *FIXED]):
            right = group + close[0]
            meant = self.options[right].describe(spell(right)) if right in self.options else spell(right)
            return f"; did you mean {meant}?"
        if group:
            title = section.title if section is not None and group == f"{head}." else group[:-1]
            other = f"; {spell(head)} NAME chooses another provider" if section is not None and section.kind else ""
            other = f"; the first word chooses another {subject}" if head == subject else other
            return f"; {title} has the options {', '.join(among)}{other}"
        return f"; see rlhf-run {name} --help"

    def _spell_answer(self, answer: str, spell: Callable[[str], str]) -> str:
        """The answer to a flag of another library, its options as the user writes them."""
        pairs, remark = read_answer(answer)
        (path, value), *others = pairs
        if not others and not value and path in self.options:
            written = self.options[path].describe(spell(path))
        elif spell(path).startswith("--"):
            written = " ".join(f"{spell(each)} {value}".strip() for each, value in pairs)
        else:
            written = ", ".join(f"{each} = {value or '…'}" for each, value in pairs)
        return f"; write {written}{'; ' * bool(remark)}{remark}"

    def _group(self, path: str) -> str:
        """The longest beginning of `path` that is right: `actor.optim.` of `actor.optim.lrr`."""
        parts = path.split(".")
        groups = [".".join(parts[:n]) + "." for n in range(len(parts) - 1, 0, -1)]
        return next((group for group in groups if any(known.startswith(group) for known in self.options)), "")


# ----------------------------------------------------------------------------------------------------------------------
# the schema of a run
# ----------------------------------------------------------------------------------------------------------------------


def make_schema(
    algorithm: str,
    chosen: Mapping[str, str],
    registry: Registry,
    instances: Mapping[str, Any] | None = None,
    uses: Mapping[str, str] | None = None,
) -> Schema:
    """The schema of a run of `algorithm` with the providers `chosen` by kind, its usual ones elsewhere.

    `instances` are ready-made providers by kind; their values are used. `uses` are names of providers inside roles'
    options, by path (`actor.optim`).

    Raises:
        UsageError: a name is unknown, or a kind is chosen that the algorithm does not have.
    """
    instances = instances or {}
    made = instances.get("algorithm")
    cls = class_of("algorithm", algorithm, made, registry)
    names = {"algorithm": algorithm, **_names(cls, algorithm, chosen)}
    sections: list[Section] = []
    for role, options in roles_of(cls, names, registry, instances).items():
        what = "trained" if isinstance(options, TrainedOptions) else "frozen"
        inside = _make_uses(role, options, uses or {}, registry)
        sections.append(Section(role, f"role {role!r} ({what})", type(options), options, uses=inside))
    optimizers = [use.cls for section in sections for use in section.uses.values()]
    sections = [_run_section(cls, optimizers, unused_fields(names)), *sections]
    sections += provider_sections(names, registry, instances)
    declined = frozenset(kind for kind, name in chosen.items() if name == "none")
    return dataclasses.replace(build_schema(names, sections), declined=declined)


def provider_sections(
    names: Mapping[str, str], registry: Registry, instances: Mapping[str, Any] | None = None
) -> Iterator[Section]:
    """A section per chosen provider, by kind; several of a kind are several sections."""
    instances = instances or {}
    for kind, name in names.items():
        several = name.split(",") if kind in SEVERAL else [name]
        for each, own in zip(several, number_repeats(several), strict=True):
            if not each:
                continue
            prefix = kind if len(several) == 1 else f"{kind}.{own}"
            base = instances.get(prefix)
            provider = class_of(kind, each, base, registry)
            yield Section(prefix, f"{kind} {each!r}", provider, base, kind=kind)


def provider_fields(cls: type) -> Iterator[tuple[str, str]]:
    """The fields of a dataclass of options that hold a provider, each with its kind."""
    for each in option_fields(cls):
        if "kind" in each.metadata:
            yield each.name, each.metadata["kind"]


def _make_uses(role: str, options: Any, chosen: Mapping[str, str], registry: Registry) -> dict[str, Use]:
    """The providers inside a role's options: those chosen, else the role's own.

    A provider that takes the place of the role's own keeps the values of the fields that its kind has in common, but for
    those that it declares itself: a schedule stays, and a learning rate that belongs to one method does not.
    """
    uses = {}
    for name, kind in provider_fields(type(options)):
        own, path = getattr(options, name), f"{role}.{name}"
        use = chosen.get(path) or registry.name_of(kind, type(own))
        cls = type(own) if use == registry.name_of(kind, type(own)) else registry.resolve(kind, use)
        base: Any = own
        if cls is not type(own):
            common: Any = annotation_of(type(options), name)
            declared = [each for below in cls.__mro__[: cls.__mro__.index(common)] for each in _annotated_fields(below)]
            base = {each.name: getattr(own, each.name) for each in option_fields(common) if each.name not in declared}
        uses[path] = Use(use, cls, base, tuple(registry.table(kind)))
    return uses


def _annotated_fields(cls: type) -> Iterable[str]:
    """The names that a class annotates itself."""
    names: Mapping[str, Any] = vars(cls).get("__annotations__", {})
    return names


def build_schema(names: Mapping[str, str], sections: Iterable[Section]) -> Schema:
    """The schema of these sections, each with its options."""
    full = tuple(
        dataclasses.replace(s, options=tuple(options_of(s.cls, s.base, s.prefix, s.skip, s.uses))) for s in sections
    )
    return Schema(names, full, {option.path: option for section in full for option in section.options})


def _names(cls: type[Algorithm], algorithm: str, chosen: Mapping[str, str]) -> dict[str, str]:
    """The name of each kind the algorithm has."""
    usual = {**({"sampler": "shuffled"} if "data" in cls.defaults else {}), **cls.defaults}
    if "rollout" in usual:
        usual = {**dict.fromkeys(OPTIONAL, ""), **usual}
    chosen = {kind: name for kind, name in chosen.items() if kind != "algorithm"}
    kinds = {kind: usual.get(kind, ALWAYS.get(kind)) for kind in CHOSEN if kind in usual or kind in ALWAYS}
    for kind in chosen:
        if kind not in kinds:
            meant = did_you_mean(kind, [each.name for each in dataclasses.fields(RunConfig)])  # `--step` for `--steps`
            raise UsageError(f"algorithm {algorithm!r} has no {kind}{meant}; it uses {', '.join(kinds)}")
    may_lack = (*SEVERAL, *OPTIONAL)
    names = {kind: chosen.get(kind) or str(usual) for kind, usual in kinds.items()}
    names = {kind: "" if kind in may_lack and name == "none" else name for kind, name in names.items()}
    for kind in filter(names.get, FOLLOWING):
        names |= {other: name for other, name in FOLLOWING[kind].items() if other in names and other not in chosen}
    for kind, name in names.items():
        if not name and kind not in may_lack:
            raise UsageError(
                f"algorithm {algorithm!r} needs {run_option(kind, 'NAME')}; see rlhf-run plugins --kind {kind}"
            )
    return names


def unused_fields(names: Mapping[str, str]) -> tuple[str, ...]:
    """Return the fields of `RunConfig` that are no options of a run with these providers."""
    needed = {
        "sampling": "rollout",
        "episode": "environment",
        "ahead": "rollout",
        "stale": "rollout",
        "partial": "rollout",
        "replay": "rollout",
    }
    kinds = {kind for kind, name in names.items() if name}
    return (*STRUCTURE, *(name for name, kind in needed.items() if kind not in kinds))


def _run_section(cls: type[Algorithm], optimizers: Iterable[type[OptimizerProvider]], skip: tuple[str, ...]) -> Section:
    """Core's own options, with the defaults that the algorithm and its roles' optimizers have for them."""
    defaults = dict(cls.config_defaults)
    for optimizer in optimizers:
        defaults |= optimizer.config_defaults
    prototype = RunConfig(None, {}, {}, {}, **defaults)
    return Section("", "run", RunConfig, prototype, skip)
