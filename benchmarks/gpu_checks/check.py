"""A check, what it is given, and the table of all of them, in the order of their worth."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["CHECKS", "Check", "Context", "find", "load"]


@dataclass(frozen=True)
class Check:
    """One check.

    A check runs in a process that may have run others before it, if they ended well.
    """

    name: str
    title: str
    """what it is about, a line of the page"""
    module: str
    """the file that holds its function, which has the check's name"""
    seconds: float
    """most seconds that it may take on a GPU, and then it is cut"""
    fresh: bool = False
    """whether it needs a process of its own, since it changes what cannot be changed back"""


CHECKS = (
    Check("limits", "The machine: versions, and the rates that everything below is measured against", "limits", 40),
    Check("training", "Training at 1.5B: share of the matrix-product rate (MFU)", "training", 60),
    Check("decoding", "Sampling at batch 256: share of the memory-bandwidth bound", "decoding", 100),
    Check("training_compiled", "Training at 1.5B with `--actor.compile`", "training", 120, fresh=True),
    Check("suite", "Tests marked gpu", "suite", 60, fresh=True),
    Check("logprobs", "Chunked log-probabilities against the plain head", "logprobs", 40),
    Check(
        "algorithms",
        "One update of each algorithm: bfloat16 on the device against float32 on the CPU",
        "algorithms",
        60,
    ),
    Check("attention", "Packed rows against padded ones", "attention", 40),
    Check(
        "deterministic", "Two runs with `--deterministic`, and a third that was cut and resumed", "runs", 40, fresh=True
    ),
    Check("out_of_memory", "Out of memory: the phase in the message, and `--on-oom halve`", "runs", 40, fresh=True),
    Check("peak_memory", "Peak memory of a training step against `rlhf-run plan`", "memory", 50),
    Check("offload", "Memory by role: training, offloaded, reloaded", "memory", 40),
    Check("generate", "`--rollout hf` against transformers", "decoding", 50),
    Check("checkpoint", "Seconds that a checkpoint stops the loop", "memory", 40),
    Check("optimizer", "The optimizer step against its bandwidth bound", "training", 30),
    Check("training_small", "Training at 0.5B", "training", 50),
    Check("two_processes", "Two processes on one GPU", "engines", 50, fresh=True),
    Check("installed_engines", "vLLM, DeepSpeed and Ray, where they are installed", "engines", 60, fresh=True),
)
"""All checks, most worth first: what does not fit into the minutes is left out from the end."""


def find(name: str) -> Check:
    """Return the check of this name; `module:function` is one of the user's own, which gets a `Context`.

    Raises:
        SystemExit: there is none.
    """
    for each in CHECKS:
        if each.name == name:
            return each
    if ":" in name:
        return Check(name, f"`{name}`", name.split(":")[0], 60)
    raise SystemExit(f"gpu.py: no check is called {name!r}; there are {', '.join(each.name for each in CHECKS)}")


def load(check: Check) -> Callable[[Context], None]:
    """Import the function of a check."""
    own = ":" in check.name
    module = importlib.import_module(check.module if own else f"gpu_checks.{check.module}")
    function: Callable[[Context], None] = getattr(module, check.name.split(":")[-1])
    return function


@dataclass
class Context:
    """Inputs of a check: its machine, earlier measurements, and the destination of results."""

    rehearse: bool
    """tiny sizes on the CPU; figures mean nothing"""
    device: str
    """`cuda`, or `cpu` in a rehearsal"""
    folder: Path
    """an empty folder for files"""
    send: Callable[[Mapping[str, Any]], None]
    """takes an event to the page"""
    limits: Mapping[str, float] = field(default_factory=dict)
    """rates of this machine by name, measured by the check `limits` in the same run"""
    deadline: float = math.inf
    """`time.monotonic()` at which the check is cut"""

    def row(self, **columns: Any) -> None:
        """Add a row to the check's table; the page has it at once."""
        self.send({"row": columns})

    def note(self, text: str) -> None:
        """Add a line below the table."""
        self.send({"note": text})

    def goal(self, what: str, value: float, target: float, at_least: bool = True) -> bool:
        """Judge a figure against its goal, and return whether it is met. No goal is judged in a rehearsal."""
        met = value >= target if at_least else value <= target
        goal = {
            "what": what,
            "value": value,
            "target": target,
            "at_least": at_least,
            "met": None if self.rehearse else met,
        }
        self.send({"goal": goal})
        return met or self.rehearse

    def expect(self, what: str, holds: bool, seen: str = "") -> None:
        """Add a row that says whether something holds; the check has failed if it does not."""
        self.row(expected=what, holds="yes" if holds else "NO", seen=seen)
        if not holds:
            self.send({"wrong": what})

    def profile(self, title: str, found: Mapping[str, Any]) -> None:
        """Add a profile: how long a kernel ran, and the kernels that took most."""
        self.send({"profile": {"title": title, **found}})

    def pick(self, real: Any, rehearsal: Any) -> Any:
        """Return the size for this run."""
        return rehearsal if self.rehearse else real

    def left(self) -> float:
        """Return the seconds until the check is cut."""
        return self.deadline - time.monotonic()
