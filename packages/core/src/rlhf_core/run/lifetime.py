"""The life of a run: what is opened for it, in which order, and closed at the end whatever happens.

Each part is entered into one `ExitStack` as soon as it exists, so that an error in the next one leaves nothing open.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from rlhf_core.checkpoint import prepare_output
from rlhf_core.errors import UsageError, options_under, spell_options
from rlhf_core.lazy import torch
from rlhf_core.models.loading.vocabulary import check_vocabularies
from rlhf_core.rollout.episodes import check_messages
from rlhf_core.run.publishing import check_hub
from rlhf_core.training.credit import check_rows
from rlhf_core.training.reference_cache import cache_frozen_roles
from rlhf_core.training.step_metrics import Meter
from rlhf_core.training.tracking import begin_tracking
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from rlhf_core.checkpoint.background import Background
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.contract.plan import Plan
    from rlhf_core.run.run import Run

__all__ = ["check", "open_run", "place_roles"]


def check(plan: Plan) -> None:
    """Let every provider report what it misses, before anything heavy starts.

    Raises:
        UsageError: a package, a key or a file is missing, or roles do not fit together.
    """
    with spell_options(plan.config.option_names):
        for path, provider in plan.config.provider_paths():
            with options_under(path):
                provider.check()
        check_vocabularies(plan)
        check_hub(plan.config)


@contextmanager
def open_run(run: Run) -> Iterator[Run]:
    """Check providers and rows, place roles, restore a checkpoint and call observers; close everything at the end."""
    if not run.plan.terms:
        raise UsageError(
            f"the algorithm {type(run.config.algorithm).__qualname__} gives no terms, so that nothing would be trained; "
            "return at least one Term"
        )
    check(run.plan)
    with options_under("/data"):
        check_rows(run.plan, run.data.rows)  # reads the data's beginning, before anything is written
        check_messages(run.config, run.data)
    prepare_output(run.config)
    with ExitStack() as stack:
        stack.enter_context(place_roles(run))
        stack.callback(run.stream.close)
        if run.config.resume:
            run.restore()
        stack.enter_context(run.observers.watch(run))
        stack.enter_context(_ending(run))
        run.notify("rlhf_run_start")
        yield run


@contextmanager
def place_roles(run: Run) -> Iterator[Run]:
    """Place the roles; at the end free them and what providers hold open. Nothing is written, no observer is called."""
    torch.manual_seed(run.config.seed)
    with ExitStack() as stack:
        with options_under("/launcher"):
            run.placed = run.config.providers["launcher"](run.plan)
        stack.callback(run.placed.close)
        run.meter = Meter(run.world)
        for kind, provider in _providers(run.config):
            if kind != "rollout":  # the placement closes its engine
                stack.callback(provider.close)
        cache_frozen_roles(run.placed, run.plan)
        begin_tracking(run.plan, run.roles)
        yield run


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


def _providers(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Yield every chosen provider with its kind."""
    for kind, chosen in config.providers.items():
        for provider in chosen if isinstance(chosen, tuple) else (chosen,):
            yield kind, provider
