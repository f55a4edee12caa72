"""Checkpoints: everything a run needs to go on as if it had never stopped.

    OUTPUT/checkpoints/step-N/
        state.json        step, data position, KL coefficient, role versions, evaluations so far
        random.pt         random states of torch, numpy and Python, per rank
        roles/<name>/     what the role's strategy saves
        manifest.json     size and SHA-256 of every file above, and of this list

A checkpoint is written under a temporary name, forced to the disk and renamed; the newest one whose manifest holds is used
on resume. A damaged one is named and set aside as `damaged-step-N`, so that the run can write that step again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError
from rlhf_core.files import discard, force, fresh_folder, temporary_name, write_text
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from rlhf_core.run import Run

__all__ = ["prepare_output", "restore", "save", "valid_checkpoints"]


def prepare_output(run: Run) -> None:
    """Make the output folder and write the resolved configuration. Of several ranks, all look and the first writes.

    Raises:
        UsageError: the folder already holds a run and `--resume` was not given, or is not a folder; or `--resume` was
            given and there is no run, or one with other options.
    """
    from rlhf_core.configure import to_toml
    from rlhf_core.resume import check_resume

    if run.output.exists() and not run.output.is_dir():
        raise UsageError(f"--output {run.output} is a file; name a folder")
    begun = any((run.output / name).exists() for name in ("metrics.jsonl", "checkpoints"))  # not: ended by a mistake
    if begun and not run.config.resume:
        raise UsageError(f"{run.output} already holds a run; add --resume to continue it, or name another --output")
    if run.config.resume:
        check_resume(run.config)
    if int(os.environ.get("RANK", "0")) > 0:  # no rank has joined the others yet
        return
    try:
        run.output.mkdir(parents=True, exist_ok=True)
        for leftover in (run.output / "checkpoints").glob(".step-*"):  # of a process killed while it saved
            rmtree(leftover)
        write_text(run.output / "config.toml", to_toml(replace(run.config, resume=False, resume_changed=False)))
    except OSError as error:
        raise UsageError(f"cannot write to --output {run.output}: {error.strerror}") from None


def save(run: Run) -> None:
    """Write OUTPUT/checkpoints/step-N, then remove the oldest beyond `keep`. Nothing if it is there already.

    Every rank takes part: the leader opens and closes the folder, and all write their shards into it in between.
    """
    folder = run.output / "checkpoints" / f"step-{run.step}"
    if not folder.exists():
        _write(run, folder)
    if run.leader:  # also if it was there: a run may have been killed between the two
        for old in sorted(folder.parent.glob("step-*"), key=_step)[: -run.config.keep]:
            discard(old)
    run.world.barrier()  # nobody stops, or looks for it, before it has its name


def _write(run: Run, folder: Path) -> None:
    """Write every rank's part of a checkpoint."""
    with fresh_folder(folder) if run.leader else nullcontext(temporary_name(folder)) as temporary:
        run.world.barrier()  # the folder is there
        for name in run.plan.trained:
            (temporary / "roles" / name).mkdir(parents=True, exist_ok=True)
            run.roles[name].save(str(temporary / "roles" / name))
        random_states = run.world.gather(_random_states())  # and so every rank has saved
        if run.leader:
            torch.save(random_states, temporary / "random.pt")
            _describe(run, temporary)
            for log in run.output.glob("*.jsonl"):  # lines up to this step must not be lost when it is not
                force(log)


def _describe(run: Run, folder: Path) -> None:
    """Write the run's own state, and the manifest of everything in `folder`."""
    state = {
        "step": run.step,
        "stream": run.stream.state_dict(),
        "kl_coef": run.kl_coef,
        "versions": {name: run.roles[name].version for name in run.plan.trained},
        "evaluations": run.evaluations,
        "strategy": run.config.names.get("strategy", ""),
    }
    write_text(folder / "state.json", json.dumps(state, indent=1))
    files = _manifest(folder)
    write_text(folder / "manifest.json", json.dumps({"files": files, "sha256": _digest(files)}, indent=1))


def restore(run: Run) -> None:
    """Continue from the newest valid checkpoint; from the start if none was written. Says which, and what was damaged.

    Raises:
        UsageError: there are checkpoints, but each is damaged, or another strategy wrote them.
    """
    found = run.world.gather(_newest_valid(run.output) if run.leader else None)[0]  # one rank looks, for all
    if isinstance(found, str):
        raise UsageError(found)
    if found is None:
        return
    state = json.loads((found / "state.json").read_text(encoding="utf-8"))
    now = run.config.names.get("strategy", "")
    if state["strategy"] != now:
        raise UsageError(
            f"{found} was written by --strategy {state['strategy']}, which {now} cannot read; resume with it"
        )
    for name in run.plan.trained:
        run.roles[name].load(str(found / "roles" / name))
        run.roles[name].version = state["versions"][name]
    run.step = state["step"]
    run.evaluations = [(step, metrics) for step, metrics in state["evaluations"]]
    run.stream.load_state_dict(state["stream"])
    if run.kl is not None:
        run.kl.coef = state["kl_coef"]
    states = torch.load(found / "random.pt", weights_only=True)
    _set_random_states(states[min(run.world.rank, len(states) - 1)])
    run.sync()


def _newest_valid(output: Path) -> Path | str | None:
    """The newest undamaged checkpoint, None if there is none at all, and what to say if all are damaged.

    Damaged ones that are newer are named and set aside, once an older one is found to go on from.
    """
    folders = sorted((output / "checkpoints").glob("step-*"), key=_step, reverse=True)
    damages: list[tuple[Path, str]] = []
    for folder in folders:
        damage = _damage(folder)
        if damage:
            damages.append((folder, damage))
            continue
        for broken, what in damages:
            aside = broken.with_name(f"damaged-{broken.name}")
            rmtree(aside, ignore_errors=True)
            broken.rename(aside)
            print(f"rlhf-run: {broken} is damaged ({what}), now {aside.name}; using {folder.name}", file=sys.stderr)
        return folder
    if damages:
        listed = "; ".join(f"{folder.name}: {what}" for folder, what in damages)
        return f"every checkpoint in {output / 'checkpoints'} is damaged ({listed}); begin again with another --output"
    return None


def valid_checkpoints(output: Path) -> list[Path]:
    """Checkpoint folders whose manifest holds, oldest first."""
    return [f for f in sorted((output / "checkpoints").glob("step-*"), key=_step) if not _damage(f)]


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below `folder`."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _digest(files: dict[str, Any]) -> str:
    """SHA-256 of the manifest's own list."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint, empty if nothing."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        files = manifest["files"]
        if manifest["sha256"] != _digest(files):
            return "manifest.json does not match its checksum"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, TypeError, KeyError):  # whatever a flipped byte makes of it
        return "manifest.json is unreadable"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            return f"{name} does not match its checksum"
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _random_states() -> dict[str, Any]:
    import numpy

    kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    version, words, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.tensor(numpy.asarray(keys, "int64")), position, has_gauss, gauss],
        "python": [version, list(words), gauss_next],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    import numpy

    torch.set_rng_state(states["torch"])
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    version, words, gauss_next = states["python"]
    random.setstate((version, tuple(words), gauss_next))
