"""Generation configurations that contradict themselves: transformers reads them, and refuses to save them."""

from __future__ import annotations

from typing import Any

from rlhf_core.util.messages import log

__all__ = ["repair_generation"]

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings that mean nothing without `do_sample`."""

BEAMS = ("early_stopping", "length_penalty")
"""Settings that mean nothing without several beams."""

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def repair_generation(name: str, model: Any) -> None:
    """Make the model's generation configuration one that can be saved; `generate` does what it did. Log one line if it was not.

    Settings without effect are left out. Of a configuration that is wrong otherwise, the special tokens are kept.
    """
    if not model.can_generate() or (first := _fault(model.generation_config)) is None:
        return
    config = model.generation_config
    useless = (*(SAMPLING if config.do_sample is not True else ()), *(BEAMS if (config.num_beams or 1) == 1 else ()))
    given = [each for each in useless if getattr(config, each) is not None]
    given += ["pad_token_id"] if (config.pad_token_id or 0) < 0 else []
    for each in given:
        setattr(config, each, None)
    if _fault(config) is None:
        log.info(
            f"{name}: its generation_config.json sets {', '.join(given)} without effect; the saved model omits them"
        )
        return
    kept = {each: getattr(config, each) for each in TOKENS}
    model.generation_config = type(config)(**kept)
    log.info(f"{name}: its generation_config.json is invalid, so only its special tokens are kept: {first}")


def _fault(config: Any) -> str | None:
    """Return the first line of what transformers has against saving it; None if nothing."""
    try:
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        lines = [line.strip("- ") for line in str(error).splitlines() if line.strip()]
        return next((line for line in lines if not line.endswith(":")), type(error).__name__)
    return None
