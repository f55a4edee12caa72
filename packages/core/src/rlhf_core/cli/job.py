"""Commands that use providers without training: `generate`, `score`, `eval`. Their flags are read as a run's are.

A job is a frozen dataclass like every command, with two class attributes: `kinds` (the usual provider of each kind it
uses; `""` must be chosen, None may be left out) and `roles` (default options). Called with a RunConfig, it does the work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.cli.command import JOBS
from rlhf_core.config.builder import construct, split_sections
from rlhf_core.config.parsing import Settings, from_flags, single_word, split_flags
from rlhf_core.config.schema import Schema, Section, build_schema, flag, provider_sections
from rlhf_core.contract.hooks import KINDS
from rlhf_core.contract.options import RunConfig
from rlhf_core.contract.terms import ProviderChoices, Term
from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch
from rlhf_core.plugins.import_paths import load
from rlhf_core.util.atomic_files import force, write_bytes, write_text
from rlhf_core.util.secrets import redact

if TYPE_CHECKING:
    from rlhf_core.plugins.registry import Registry
    from rlhf_core.run.run import Run

__all__ = ["Untrained", "append_lines", "continue_output", "open_untrained", "read_job", "read_lines", "run_job"]


@dataclasses.dataclass(frozen=True)
class Untrained:
    """An algorithm without terms: roles that are sampled or asked, and never trained."""

    samples: tuple[str, ...] = ("actor",)

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return ()


def read_job(words: Sequence[str], registry: Registry) -> tuple[Schema, Settings]:
    """The options there are and those that are set, without building anything: enough for `--help`."""
    name = words[0]
    cls = load(JOBS[name])
    given, flags = split_flags(words[1:])
    chosen = {kind: single_word(flag(kind), flags.pop(kind)) for kind in KINDS if kind in flags}
    asked_help = flags.pop("help", None) is not None
    schema = _schema(name, cls, chosen, registry)
    positional = [option for option in schema.sections[0].options if option.required]
    usage = " ".join([f"rlhf-run {name}", *(option.path.upper() for option in positional)])
    if len(given) > len(positional):
        raise UsageError(f"unexpected {given[len(positional)]!r}: {usage}")
    settings: Settings = {option.path: word for option, word in zip(positional, given)} | from_flags(flags, schema)
    if not asked_help:
        for option in positional:
            if option.path not in settings:
                raise UsageError(f"{name} needs {option.path.upper()}, {option.doc}: {usage}")
        for kind, usual in cls.kinds.items():
            if usual is not None and not schema.names[kind]:
                raise UsageError(f"{name} needs --{kind} NAME; see rlhf-run plugins --kind {kind}")
    return schema, settings


def run_job(words: Sequence[str], registry: Registry) -> int:
    """Read, build and run."""
    schema, settings = read_job(words, registry)
    made = construct(schema, settings)
    job = made[""]
    shared = {each.name for each in dataclasses.fields(RunConfig)} & {each.name for each in dataclasses.fields(job)}
    names = {kind: name for kind, name in schema.names.items() if name}
    own = {name: getattr(job, name) for name in shared}
    return int(job(RunConfig(Untrained(), names=names, **split_sections(schema, made), **own), registry))


def _schema(name: str, cls: Any, chosen: Mapping[str, str], registry: Registry) -> Schema:
    for kind in chosen:
        if kind not in cls.kinds:
            raise UsageError(f"{name} has no {kind}, it uses {', '.join(cls.kinds)}")
    names = {"algorithm": name, **{kind: chosen.get(kind) or usual or "" for kind, usual in cls.kinds.items()}}
    sections = [Section("", name, cls)]
    sections += [Section(role, f"role {role!r} (frozen)", type(base), base) for role, base in cls.roles.items()]
    kinds = {kind: each for kind, each in names.items() if kind != "algorithm"}
    return build_schema(names, [*sections, *provider_sections(kinds, registry)])


# ----------------------------------------------------------------------------------------------------------------------
# what jobs share
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def open_untrained(config: RunConfig, registry: Registry) -> Iterator[Run]:
    """A run whose roles are placed and which is not trained: it has no checkpoint and tells no observer."""
    from rlhf_core.run.run import Run

    run = Run(config, registry)
    run.check()
    torch.manual_seed(config.seed)
    run.placed = config.providers["launcher"](run.plan)
    try:
        if run.world.size > 1:
            raise UsageError("start this command as one process; split the work with --shard where it has one")
        yield run
    finally:
        run.placed.close()


def continue_output(path: Path, **options: object) -> None:
    """Let a command write to `path`, and go on with what is there if the options that made it were these.

    Fingerprints of the options are kept beside it, in PATH.options.json; those that change no result are left out.

    Raises:
        UsageError: nothing can be written there, or the file was begun with other options.
    """
    note = path.with_name(f"{path.name}.options.json")
    told = {name: hashlib.sha256(repr(_plain(value)).encode()).hexdigest()[:16] for name, value in options.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UsageError(f"--output {path} is a folder; name a file")
        begun = json.loads(note.read_bytes()) if path.exists() and note.exists() else told
        write_text(note, json.dumps(begun, indent=1) + "\n")
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {path}: {getattr(error, 'strerror', None) or error}") from None
    changed = [name for name in told if begun.get(name) != told[name]]
    if changed:
        raise UsageError(f"{path} was begun with another --{changed[0]}; name another --output, or remove the file")


def _plain(value: object) -> object:
    """A provider's or role's options without those that change no result."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    free = {each.name: each.default for each in dataclasses.fields(value) if each.metadata.get("free")}
    return dataclasses.replace(value, **free)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file that an earlier run of the command left; a half-written last line is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.split(b"\n")[:-1]]
    except ValueError:
        raise UsageError(f"{path} holds something else than JSON lines; name another --output") from None
    if len(whole) != len(content):
        write_bytes(path, whole)
    return lines


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add a line per row in one write, and force it to the disk: what was killed leaves at most its last line half."""
    content = redact("".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)
    force(path)
