"""Help texts: plain, in two columns, as wide as the terminal. Everything in them is read from where it is defined."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rlhf_core.config.docstrings import docs_of, first_line
from rlhf_core.config.option_fields import Option, flag, format_default
from rlhf_core.config.parsing import Settings
from rlhf_core.config.schema import FIXED, Schema, Section
from rlhf_core.config.value_types import is_secret, metavar
from rlhf_core.contract.commands import Command
from rlhf_core.contract.hooks import OPTIONAL, SEVERAL
from rlhf_core.contract.options import RunConfig

if TYPE_CHECKING:
    from rlhf_core.plugins.registry import Registry

__all__ = ["algorithm", "command", "overview"]

FIRST = (
    *(
        "model",
        "data.path",
        "epochs",
        "steps",
        "batch_size",
        "{role}.optim.lr",
        "sampling.n",
        "sampling.max_new_tokens",
    ),
    *("loss.beta", "algorithm.kl.coef", "{role}.lora.rank", "eval_every", "output", "data.encoding.max_tokens"),
)
"""Options that a first run sets, most wanted first; `{role}` is the role that the algorithm trains."""

MOST_FIRST = 10
"""Options that come before the others."""

MORE = "explained by --help-all:"
"""Words before the flags that `--help` only names."""

LEFT = 34
"""Columns of names; what does not fit has its explanation on the next line."""


def overview(registry: Registry) -> str:
    """`rlhf-run --help`."""
    main = ("model", "output", "steps", "seed", "resume")
    docs = docs_of(RunConfig).fields
    return _text(
        [
            "usage: rlhf-run ALGORITHM [flags]        train; `--help` shows its main flags, `--help-all` explains every flag",
            "       rlhf-run --config FILE [flags]    train with the options of a file; flags override it",
            "       rlhf-run COMMAND [flags]",
        ],
        ["algorithms"],
        _rows((name, first_line(each.target)) for name, each in registry.table("algorithm").items()),
        ["commands"],
        _rows((name, first_line(each.target)) for name, each in registry.table("command").items()),
        ["flags of every algorithm"],
        _rows((flag(name), docs[name]) for name in main),
        _rows(
            [
                ("--config FILE", FIXED["config"]),
                ("--KIND NAME", "choose a provider; `rlhf-run plugins` lists kinds and names"),
            ]
        ),
        _rows([("-p NAME, -p no:NAME", "load a plugin; do not load one")]),
        ["try", "  rlhf-run grpo --model tiny --data prompts --reward length --steps 20"],
    )


def algorithm(schema: Schema, settings: Settings, registry: Registry, everything: bool = False) -> str:
    """`rlhf-run ALGORITHM --help`: the options of exactly the chosen providers.

    Options of the run and its roles are named only, unless they are set or `everything` is asked for (`--help-all`).
    """
    name = schema.names["algorithm"]
    (own,) = (section for section in schema.sections if section.kind == "algorithm")
    first = _first(schema)
    choices = [(f"{flag(kind)} {chosen or 'none'}", _choices(kind, registry)) for kind, chosen in schema.names.items()]
    blocks = [
        [f"usage: rlhf-run {name} [flags]", "", *docs_of(own.cls).doc.split("\n")],
        ["main options"],
        _rows(_row(option, settings) for option in first),
        ["providers (chosen one, then all of its kind)"],
        _rows(choices[1:]),
    ]
    for section in schema.sections:
        if rest := [option for option in section.options if option not in first]:
            explained = [option for option in rest if everything or _is_explained(option, section, settings)]
            named = [flag(option.path) for option in rest if option not in explained and not option.elsewhere]
            blocks += [[_title(section)], _rows(_row(option, settings) for option in explained), _names(named)]
    others = [("--config FILE", "config"), ("--dry-run", "dry_run"), ("-h, --help", "help"), ("--help-all", "help_all")]
    blocks += [["other"], _rows((name, FIXED[key]) for name, key in others)]
    return _text(*blocks)


def _first(schema: Schema) -> list[Option]:
    """The options that a first run sets: those that must be given, and the most wanted others."""
    role = next((path.partition(".")[0] for path in schema.options if path.endswith(".optim.lr")), "")
    wanted = [path.replace("{role}", role) for path in FIRST]
    required = [path for path, option in schema.options.items() if option.required and path not in wanted]
    return [schema.options[path] for path in (*required, *wanted) if path in schema.options][:MOST_FIRST]


def _is_explained(option: Option, section: Section, settings: Settings) -> bool:
    """Return True for the options that `--help` explains: those of providers, and those that are set."""
    chosen = [path for path in section.uses if f"{path}.use" in settings]
    return bool(section.kind) or option.path in settings or option.path.startswith(tuple(f"{path}." for path in chosen))


def command(schema: Schema, settings: Settings, registry: Registry) -> str:
    """`rlhf-run COMMAND --help`: the command's own options, and those of the providers that it uses."""
    (_, name), *kinds = schema.names.items()
    own, *others = schema.sections
    positional = [option for option in own.options if option.required]
    reads = issubclass(own.cls, Command) and own.cls.reads_run
    flags = ["ALGORITHM", "[flags]", "[flags of the run]"] if reads else ["[flags]"]
    usage = " ".join([f"usage: rlhf-run {name}", *(option.path.upper() for option in positional), *flags])
    blocks = [[usage, "", *docs_of(own.cls).doc.split("\n")]]
    if kinds:
        choices = [(f"{flag(kind)} {chosen or 'NAME'}", _choices(kind, registry)) for kind, chosen in kinds]
        blocks += [["providers (chosen one, then all of its kind)"], _rows(choices)]
    if own.options:
        blocks += [["options"], _rows((option.path.upper(), option.doc) for option in positional)]
        blocks += [_rows(_row(option, settings) for option in own.options if not option.required)]
    for section in others:
        if section.options:
            blocks += [[_title(section)], _rows(_row(option, settings) for option in section.options)]
    return _text(*blocks)


def _choices(kind: str, registry: Registry) -> str:
    names = list(registry.table(kind))
    found = ", ".join(["none", *names] if kind in (*SEVERAL, *OPTIONAL) else names)
    return f"{found}; several with blanks between" if kind in SEVERAL else found


def _title(section: Section) -> str:
    line = first_line(section.cls) if section.kind and section.kind != "algorithm" else ""
    return f"{section.title}: {line}" if line else section.title


def _row(option: Option, settings: Settings) -> tuple[str, str]:
    """An option with its documentation and the value it has unless a flag changes it."""
    note = f"set: {format_default(settings[option.path])}" if option.path in settings else option.note
    if is_secret(option.annotation):
        note = "secret; give it as env:NAME"
    if option.elsewhere:
        return option.path, f"{option.doc} ({option.elsewhere}; {note})".lstrip()
    return f"{flag(option.path)} {metavar(option.annotation)}", f"{option.doc} ({note})".lstrip()


def _rows(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Two columns, the right one wrapped."""
    width = _width()
    lines: list[str] = []
    for left, right in rows:
        wrapped = textwrap.wrap(right, width - LEFT) or [""]
        if len(left) + 4 > LEFT:
            lines.append(f"  {left}")
        else:
            lines.append(f"  {left}".ljust(LEFT) + wrapped.pop(0))
        lines += [" " * LEFT + line for line in wrapped]
    return [line.rstrip() for line in lines]


def _names(flags: list[str]) -> list[str]:
    """Return the flags that are named only, as wrapped lines."""
    if not flags:
        return []
    return textwrap.wrap(
        " ".join([MORE, *flags]), _width() - 2, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )


def _width() -> int:
    """Return the columns of a help text."""
    return max(60, min(120, shutil.get_terminal_size((100, 24)).columns))


def _text(*blocks: list[str]) -> str:
    """Blocks one under the other; a heading has an empty line above it."""
    lines: list[str] = []
    for block in blocks:
        if block and lines and not block[0].startswith("  "):
            lines.append("")
        lines += block
    return "\n".join(lines)
