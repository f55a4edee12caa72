"""Peculiarities of architectures in transformers that loading settles: attention that they lack, and a body of another name.

They are found out from the model, not listed by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rlhf_core.contract.options import ModelOptions

__all__ = ["choose_attention", "name_body", "report_attention"]


def choose_attention(name: str, config: PretrainedConfig, options: ModelOptions) -> str | None:
    """Return the attention to load with; None lets transformers take sdpa where it has one for the architecture.

    sdpa has no cap on attention logits, and transformers leaves the cap out silently. `varlen` is sdpa but for packed rows.

    Raises:
        UsageError: the model caps attention logits, and `varlen` was asked for.
    """
    if options.attention not in ("sdpa", "varlen"):
        return options.attention
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        if options.attention == "varlen":
            raise UsageError(
                f"{name} caps attention logits, which attention varlen does not support; choose eager or "
                "flash_attention_2"
            )
        log.info(f"{name} caps attention logits, which sdpa does not support, so it uses eager attention")
        return "eager"
    return None


def report_attention(name: str, model: Any, options: ModelOptions) -> None:
    """Log one line if transformers has no sdpa for this architecture and computes with eager instead.

    Raises:
        UsageError: `varlen` was asked for, which needs it.
    """
    if options.attention == "varlen" and not model._supports_sdpa:
        raise UsageError(f"{name}: transformers supports only eager attention for {type(model).__name__}; choose eager")
    if options.attention == "sdpa" and not model._supports_sdpa:
        log.info(f"{name}: transformers has no sdpa for {type(model).__name__}, so it uses eager attention")


def name_body(model: Any) -> None:
    """Let `model.base_model` be the body where its prefix names none, as that of Llama 4's text model."""
    if model.base_model is not model:
        return
    from transformers import PreTrainedModel

    bodies = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    if len(bodies) == 1:
        model.base_model_prefix = bodies[0]
