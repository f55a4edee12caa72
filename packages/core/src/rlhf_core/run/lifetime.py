"""The life of a run: what is opened for it, in which order, and closed at the end whatever happens.

Each part is entered into one `ExitStack` as soon as it exists, so that an error in the next one leaves nothing open.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from rlhf_core.contract.options import TrainedOptions
from rlhf_core.errors import UsageError, options_under, run_option, spell_options
from rlhf_core.lazy import torch
from rlhf_core.models.loading.hub import is_adapter
from rlhf_core.models.loading.optional_imports import check_peft
from rlhf_core.models.loading.vocabulary import check_vocabularies
from rlhf_core.rollout.episodes import check_messages
from rlhf_core.run.collecting import check_ahead
from rlhf_core.run.epochs import count_steps
from rlhf_core.run.publishing import check_hub
from rlhf_core.training.credit import check_rows
from rlhf_core.training.reference_cache import cache_frozen_roles
from rlhf_core.training.step_metrics import Meter
from rlhf_core.training.tracking import begin_tracking
from rlhf_core.util.messages import log, progress
from rlhf_core.util.random_states import seed_libraries

if TYPE_CHECKING:
    from rlhf_core.checkpoint.background import Background
    from rlhf_core.contract.plan import Plan
    from rlhf_core.run.run import Run

__all__ = ["check", "open_run", "open_untrained"]

NOT_OPENED = frozenset({"advantage", "launcher", "loss", "observer", "rollout", "strategy"})
"""Kinds that are not opened with the others: terms bring advantages, roles hold losses, a launcher places the rollout
engine, and observers, strategies and launchers are opened by a call."""


def check(plan: Plan) -> None:
    """Let every provider report what it misses, before anything heavy starts.

    Raises:
        UsageError: a package, a key or a file is missing, or roles do not fit together.
    """
    with spell_options(plan.config.option_names):
        for path, provider in plan.config.provider_paths():
            with options_under(path):
                provider.check()
        for role, spec in plan.roles.items():
            if isinstance(spec.options, TrainedOptions) and spec.options.lora.rank:
                check_peft(run_option(f"{role}.lora"))
            elif importlib.util.find_spec("peft") is None and _is_adapter(spec.options.model):
                check_peft(f"the {role} model {spec.options.model} is an adapter, which")
        if plan.online and "rollout" in plan.config.providers:
            with options_under("/rollout"):
                plan.config.providers["rollout"].check_plan(plan)
        if "launcher" in plan.config.providers:
            with options_under("/launcher"):
                plan.config.providers["launcher"].check_plan(plan)
        check_ahead(plan)
        check_vocabularies(plan)
        check_hub(plan.config)


def _is_adapter(model: str) -> bool:
    """Return True for an adapter. What is wrong with a model's name or folder is reported when the model is loaded."""
    try:
        return is_adapter(model)
    except UsageError:
        return False


@contextmanager
def open_run(run: Run) -> Iterator[Run]:
    """Check providers and rows, place roles, restore a checkpoint and call observers; close everything at the end."""
    if not run.plan.terms:
        raise UsageError(
            f"the algorithm {type(run.config.algorithm).__qualname__} returns no terms, so nothing would be "
            "trained; return at least one Term"
        )
    if not run.lives.revives:  # in a later life the run is the one that was checked, and places are drawn once
        check(run.plan)
    if run.config.epochs:
        run.configure(replace(run.config, steps=count_steps(run.plan)))
    with ExitStack() as stack:
        stack.enter_context(_open_providers(run))
        with options_under("/data"):
            check_rows(run.plan, run.data.rows)  # reads the data's beginning, before anything is written
            check_messages(run.config, run.data)
        stack.enter_context(run.folder.open())
        _place_roles(run)
        stack.callback(run.stream.close)
        stack.callback(_stop_collecting, run)
        if run.config.resume:
            run.lives.restore()
        stack.enter_context(run.observers.watch(run, run.engines))
        _check_states_taken(run)
        stack.enter_context(_ending(run))
        run.notify("rlhf_run_start")
        yield run


@contextmanager
def open_untrained(run: Run) -> Iterator[Run]:
    """Open providers and place roles; close everything at the end. Nothing is written, no observer is called."""
    with _open_providers(run):
        _place_roles(run)
        yield run


@contextmanager
def _open_providers(run: Run) -> Iterator[None]:
    """Open the providers that the loop calls; at the end close all that is open, the placement last.

    The rollout engine is not among them yet: it is opened over placed roles.
    """
    config = run.config
    seed_libraries(config.seed)
    with ExitStack() as stack:
        stack.enter_context(_freeing_placement(run))
        stack.enter_context(run.engines)
        for kind in (each for each in config.providers if each not in NOT_OPENED):
            several = isinstance(config.providers[kind], tuple)
            for (path, provider), name in zip(config.provider_paths(kind), config.names_of(kind), strict=True):
                with options_under(path):
                    run.engines.open(provider, f"{kind}.{name}" if several else kind)
        for key, credit in run.plan.credits.items():
            if credit.advantage is not None:
                with options_under("/advantage"):
                    run.engines.open(credit.advantage, f"advantage.{key}")
        yield


def _place_roles(run: Run) -> None:
    """Place the roles, and open the rollout engine over them."""
    torch.manual_seed(run.config.seed)
    run.plan = run.data.with_language(run.plan)
    _announce_loading(run.plan)
    with options_under("/launcher"):
        if run.lives.revives and run.placed is not None:
            run.placed.revive(list(run.plan.changing_roles))
        else:
            run.placed = run.config.providers["launcher"](run.plan)
            cache_frozen_roles(run.placed, run.plan)
    run.engines.bind(run.placed)
    run.meter = Meter(run.world)
    if run.placed.rollout is not None:
        with options_under("/rollout"):
            run.engines.open(run.placed.rollout, "rollout")
    begin_tracking(run.plan, run.roles)


def _announce_loading(plan: Plan) -> None:
    """Tell which models are about to be loaded, which takes its time; `tiny` is made in a moment."""
    models: dict[str, list[str]] = {}
    for role, spec in plan.roles.items():
        models.setdefault(spec.options.model, []).append(role)
    large = {model: roles for model, roles in models.items() if not model.startswith("tiny")}
    if large and int(os.environ.get("RANK", "0")) == 0:
        names = [f"{model} ({', '.join(roles)})" for model, roles in large.items()]
        progress.info(f"loading {', '.join(names)}")


def _stop_collecting(run: Run) -> None:
    """Let no iteration be sampled ahead any more."""
    if run.collecting is not None:
        run.collecting.close()


@contextmanager
def _freeing_placement(run: Run) -> Iterator[None]:
    """At the end, free the roles if they were placed, unless the run lives on with them."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        error = caught
        raise
    finally:
        if run.placed is not None and not run.lives.spares(error):
            run.lives.revives = False
            run.placed.close()


def _check_states_taken(run: Run) -> None:
    """Check that each state in the checkpoint has found its engine; with `--resume-changed`, report those that have not.

    Raises:
        UsageError: one has not.
    """
    if not run.engines.waiting:
        return
    missing = f"the checkpoint has the state of {', '.join(run.engines.waiting)}, which this run does not use"
    if not run.config.resume_changed:
        raise UsageError(f"{missing}; resume with the providers and versions that wrote it")
    log.warning(missing)


@contextmanager
def _ending(run: Run) -> Iterator[None]:
    """At the end, let a background save finish, then call the observers' last hook."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        error = caught
        raise
    finally:
        with ExitStack() as stack:
            stack.callback(lambda: run.notify("rlhf_run_end", error=error))
            _finish_saving(run.checkpoints.background, error)


def _finish_saving(background: Background, error: BaseException | None) -> None:
    """Let a checkpoint that is being written in the background finish, unless a second signal stops at once."""
    if error is not None and not isinstance(error, Exception):
        return
    try:
        background.wait()
    except Exception as failed:
        if error is None:
            raise
        log.error(f"the checkpoint that was being written failed too: {failed}")
