"""The DeepSpeed configuration of a role: what the run decides, good defaults, and what the user's file adds.

Gradients are summed by core's count over a whole optimizer step whose micro-batches are not announced beforehand, so
DeepSpeed must not count micro-batches: `managed_gradient_accumulation` is off, `backward` only accumulates and `step`
is the boundary. Learning rate, clipping and batch size are the run's own options; a file may leave them out or say
"auto" (the custom of transformers), so that a file written for another program can be used here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import OptionError, UsageError, option, run_option

if TYPE_CHECKING:
    from rlhf_core.contract.optimizers import OptimizerProvider
    from rlhf_strategy_deepspeed.options import DeepSpeedOptions

__all__ = ["configuration", "zero_settings"]

Json = dict[str, Any]

REFUSED = {
    "train_batch_size": f"{run_option('batch_size')} and {run_option('micro_tokens')} set the batch sizes",
    "train_micro_batch_size_per_gpu": f"{run_option('batch_size')} and {run_option('micro_tokens')} set the batch sizes",
    "gradient_accumulation_steps": f"{run_option('batch_size')} and {run_option('micro_tokens')} set the batch sizes",
    "optimizer": "--<role>.optim chooses the optimizer",
    "scheduler": "--<role>.optim.schedule sets the schedule",
    "zero_optimization.offload_optimizer.device": f"{option('offload', 'optimizer')} sets it",
    "zero_optimization.offload_param.device": f"{option('offload', 'all')} sets it",
    "tensor_parallel": f"{option('tensor')} sets it",
    "sequence_parallel_size": f"{option('sequence')} sets it",
    "hybrid_engine": "the rollout engine samples completions",
    "elasticity": "the launcher sets the world size",
    "checkpoint.load_universal": "checkpoints always store states by parameter, and load under every stage and number of ranks",
}
"""Keys a user's file may not switch on, and what to use instead."""


def configuration(options: DeepSpeedOptions, dtype: str, optim: OptimizerProvider | None) -> Json:
    """Build the configuration of `deepspeed.initialize` for a role that computes in `dtype`; `optim` is None if it is frozen.

    Raises:
        UsageError: the user's file cannot be read, or contradicts the run.
    """
    fixed = _fixed_settings(options, dtype, optim)
    free = _defaults(options, optim)
    if not options.config:
        return _merge(free, fixed)
    user = _drop_auto(_read(options.config))
    _check(user, fixed, options.config)
    return _merge(_merge(free, user), fixed)


def zero_settings(options: DeepSpeedOptions) -> Json:
    """Return the section `zero_optimization`, without what is offloaded: defaults, what the file adds, and the options.

    Raises:
        UsageError: the user's file cannot be read.
    """
    user = _drop_auto(_read(options.config)) if options.config else {}
    found: Json = _merge(_merge(_defaults(options, None), user), _fixed_settings(options, "float32", None))
    return found["zero_optimization"]  # type: ignore[no-any-return]


def _fixed_settings(options: DeepSpeedOptions, dtype: str, optim: OptimizerProvider | None) -> Json:
    """Return settings that follow from the run's options and from how core trains."""
    zero: Json = {"stage": options.stage}
    if options.bucket is not None:
        zero |= dict.fromkeys(_bucket_keys(options.stage), options.bucket)
    if options.overlap is not None:
        zero["overlap_comm"] = options.overlap
    if options.persist is not None:
        zero["stage3_param_persistence_threshold"] = options.persist
    if options.hpz is not None and optim is not None:
        zero["zero_hpz_partition_size"] = options.hpz
    zero |= {part: {"device": "cpu"} for part in _offloaded_parts(options, optim)}
    narrow = dtype if options.stage > 0 else ""
    fixed: Json = {
        "train_micro_batch_size_per_gpu": 1,  # only its throughput timer reads it
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_allreduce_op": "mean",  # undone by the loss: stage 3 knows no sum
        "zero_optimization": zero,
        "bf16": {"enabled": narrow == "bfloat16"},
        "fp16": {"enabled": narrow == "float16"},
    }
    if dtype == "bfloat16" and options.stage == 0 and optim is not None:
        # nothing is sharded, so nothing is gained by a second copy of the weights: as in the strategy `torch`
        fixed["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if narrow in ("bfloat16", "float16"):
        fixed["data_types"] = {"grad_accum_dtype": "fp32"}
    if optim is not None:
        # stage 0 in DeepSpeed clips but does not report the norm, so the trainable clips there itself
        fixed["gradient_clipping"] = optim.max_grad_norm if options.stage > 0 else 0.0
        fixed["zero_force_ds_cpu_optimizer"] = False  # the role's optimizer works on CPUs too
        fixed["zero_allow_untested_optimizer"] = (
            True  # it knows some by name; those that need whole matrices are refused
        )
    return fixed


def _offloaded_parts(options: DeepSpeedOptions, optim: OptimizerProvider | None) -> list[str]:
    """Return the sections of what stays in main memory."""
    parts = ["offload_optimizer"] if options.offload != "none" and optim is not None else []
    return [*parts, "offload_param"] if options.offload == "all" else parts


def _defaults(options: DeepSpeedOptions, optim: OptimizerProvider | None) -> Json:
    """Return settings that a user's file may change."""
    zero: Json = dict.fromkeys(_bucket_keys(options.stage), 50_000_000)
    zero["overlap_comm"] = options.stage >= 2
    if options.stage == 3:
        zero |= {"stage3_param_persistence_threshold": 100_000, "memory_efficient_linear": False}
    zero |= {part: {"pin_memory": True} for part in _offloaded_parts(options, optim)}
    # the first overflow lowers the scale of float16, as torch's does
    scaling = {"initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1}
    return {"steps_per_print": None, "zero_optimization": zero, "fp16": scaling}


def _bucket_keys(stage: int) -> tuple[str, ...]:
    return ("reduce_bucket_size", "stage3_prefetch_bucket_size" if stage == 3 else "allgather_bucket_size")


def _read(path: str) -> Json:
    """The user's file."""
    try:
        user = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {option('config')} {path}: {error.strerror}") from None
    except ValueError as error:
        raise OptionError("config", f"{path} is not JSON: {error}") from None
    if not isinstance(user, dict):
        raise OptionError("config", f"{path} must hold a JSON object, not {type(user).__name__}")
    return user


def _check(user: Json, fixed: Json, path: str) -> None:
    """Refuse what contradicts the run, naming the key and the option that decides it."""
    decided = dict(_leaves(fixed))
    for key, value in _leaves(user):
        refused = next((why for name, why in REFUSED.items() if f"{key}.".startswith(f"{name}.")), None)
        off = key.endswith(".enabled") and value is False
        if refused is not None and not off and not _is_disabled(user, key) and decided.get(key) != value:
            raise OptionError("config", f"{path}: remove {key}: {refused}")
        if key in decided and decided[key] != value:
            raise OptionError(
                "config",
                f"{path}: {key} is {value!r}, but the options of the run set it to {decided[key]!r}; remove it",
            )


def _is_disabled(user: Json, key: str) -> bool:
    """Return True if the section of `key` is off (`enabled` false, `device` none)."""
    section: Any = user
    for name in key.split(".")[:-1]:
        section = section[name]
    return section.get("enabled") is False or section.get("device") == "none"


def _drop_auto(user: Json) -> Json:
    """`user` without the values it leaves to the program that reads it."""
    return {
        key: _drop_auto(value) if isinstance(value, dict) else value for key, value in user.items() if value != "auto"
    }


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is not a section."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merge(below: Json, above: Json) -> Json:
    """`below` with `above` laid over it, section by section."""
    both = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            both[key] = _merge(below[key], above[key])
    return both
