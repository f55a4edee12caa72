"""Commands of ingredients in the process of the test: starting a process takes longer than a tiny step."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf_core.cli.app import main
from rlhf_core.contract.registry_view import RegistryView
from rlhf_core.recipe import process
from rlhf_core.recipe.ingredients import generate


def run_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ingredients run their commands here, one after the other."""

    def run_all(commands: Sequence[tuple[Sequence[str], Path]], registry: RegistryView) -> list[str]:
        texts = []
        for words, log in commands:
            with log.open("a+") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                begun = file.tell()
                code = main([*words])
                file.seek(begun)
                texts.append(file.read())
            assert code == 0, f"rlhf-run {shlex.join(words)}: {texts[-1][-2000:]}"
        return texts

    monkeypatch.setattr(process, "rlhf_run_all", run_all)
    monkeypatch.setattr(generate, "rlhf_run_all", run_all)
