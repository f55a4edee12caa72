"""Entry point of `rlhf-run`: choose the command, run it, and set the exit code.

A user's mistake prints one line and exits with 2; Ctrl-C exits with 130; a run that stopped itself prints why and exits
with its own code; anything else is a bug and keeps its traceback. Only work that came to its end exits with 0: a reader
of the output that goes away ends nothing, and neither does a plugin that calls `sys.exit`.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

from rlhf_core.cli import help as help_
from rlhf_core.config.parsing import read, wants_dry_run
from rlhf_core.contract.registry_view import failure_place
from rlhf_core.errors import RunStopped, UnknownName, UsageError, spell_options
from rlhf_core.plugins.registry import Registry, as_default
from rlhf_core.run.command import read_command, run_command
from rlhf_core.run.signals import PreemptionExit
from rlhf_core.run.stop_watch import EXIT_CODES, leave_in_time
from rlhf_core.util.exits import no_silent_exit
from rlhf_core.util.messages import console_messages
from rlhf_core.util.secrets import redact, show_traceback
from rlhf_core.util.streams import outlive_readers
from rlhf_core.util.suggestions import closest_names, or_list

__all__ = ["main"]

HELP_ALL = "--help-all"
HELP = ("-h", "--help", HELP_ALL)
"""Words that ask for help in place of work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    sys.excepthook = show_traceback  # of a bug
    with outlive_readers() as lost_output, no_silent_exit():
        code = _exit_code(list(sys.argv[1:] if argv is None else argv))
        failure = lost_output()
        if failure is not None:
            _say(f"standard output could not be written: {failure.strerror}")
        if argv is None and code in EXIT_CODES.values():  # of a signal, in a process of our own
            leave_in_time(code)
        return code or int(failure is not None)


def _exit_code(argv: list[str]) -> int:
    try:
        with console_messages():
            return _run(argv)
    except UsageError as error:
        _say(str(error))
        return 2
    except RunStopped as stopped:
        _say(str(stopped))
        return stopped.exit_code
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        _say(f"{error.filename}: {error.strerror}; give a shorter path")  # a path of ours is never that long
        return 2
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except PreemptionExit as end:
        return int(str(end))
    except SystemExit as end:
        called = f"sys.exit({'' if end.code is None else repr(end.code)}) was called{failure_place(end)}"
        _say(f"{called} before the work was done; nothing else was saved")
        return 1


def _say(message: str) -> None:
    """One line on stderr, whatever the message contains."""
    print(f"rlhf-run: {redact(' '.join(message.split()))}", file=sys.stderr)


def _run(argv: list[str]) -> int:
    if argv and argv[0].startswith("--local_rank="):  # the launcher `deepspeed` adds it; LOCAL_RANK has it too
        argv = argv[1:]
    for word in argv:
        if any("\ud800" <= letter <= "\udfff" for letter in word):  # how Python shows a byte that it cannot read
            raise UsageError(f"{word!a} is not UTF-8 text; rename the file")
    words, load, blocked = _take_plugins(argv)
    if words == ["--version"]:
        from importlib.metadata import version

        print(version("rlhf-core"))
        return 0
    registry = Registry(blocked=blocked, load=load)
    with as_default(registry):
        return _obey(words, registry)


def _obey(words: list[str], registry: Registry) -> int:
    """Show help, run a command, or train."""
    if not words or words[0] in HELP:
        print(help_.overview(registry))
        return 0
    if registry.is_command(words[0]):
        if wants_help(words):
            print(help_.command(*read_command(words, registry), registry))
            return 0
        return run_command(words, registry)
    _check_first(words[0], registry)
    if wants_help(words):
        print(help_.algorithm(*read(words, registry), registry, everything=HELP_ALL in words))
        return 0
    return _train(words, registry)


def _train(words: Sequence[str], registry: Registry) -> int:
    from rlhf_core.config.builder import parse

    config = parse(words, registry)
    from rlhf_core.run.run import Run

    run = Run(config, registry=registry)
    if wants_dry_run(words):
        run.check()
        with spell_options(config.option_names):
            run.folder.check()
        print("nothing is missing; the run can start")
    else:
        run.train()
    return 0


def _take_plugins(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The words without `-p …`; the plugins to load; those to block. Decided before any plugin is loaded."""
    words: list[str] = []
    load: list[str] = []
    blocked: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word != "-p":
            words.append(word)
            continue
        name = next(rest, "")
        if not name or name == "no:":
            raise UsageError("-p takes a plugin to load, or no:NAME to block one")
        if name.startswith("no:"):
            blocked.append(name.removeprefix("no:"))
        else:
            load.append(name)
    return words, load, blocked


def _check_first(word: str, registry: Registry) -> None:
    """An unknown first word may be a command misspelt as well as an algorithm."""
    algorithms, commands = registry.table("algorithm"), registry.table("command")
    if word.startswith("-") or ":" in word or word in algorithms:
        return
    close = closest_names(word, [*commands, *algorithms])
    if any(each in commands for each in close):
        raise UnknownName(f"no algorithm or command is called {word!r}; did you mean {or_list(close)}?")


def wants_help(words: Sequence[str]) -> bool:
    """Return True if help is asked for."""
    return any(word in HELP for word in words)
