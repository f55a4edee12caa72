"""Check that roles that read the same token ids use the same vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError, run_option

if TYPE_CHECKING:
    from rlhf_core.contract.plan import Plan

__all__ = ["check_vocabularies"]


def check_vocabularies(plan: Plan) -> None:
    """Check every role against the one whose tokenizer reads the data. Tokenizers are loaded only where models differ.

    Special tokens may differ, as those of a base model and its chat version do.

    Raises:
        UsageError: a role's model has another vocabulary.
    """
    from rlhf_core.models.loading.tokenizer import load_tokenizer

    first = plan.roles[plan.tokenizer_role]
    others = [spec for spec in plan.roles.values() if spec.reads and spec.options.model != first.options.model]
    if not others:
        return
    expected = _ordinary_tokens(load_tokenizer(first.options.model, first.options))
    for spec in others:
        found = _ordinary_tokens(load_tokenizer(spec.options.model, spec.options))
        if found != expected:
            raise UsageError(
                f"the {spec.name}, {spec.options.model!r}, has another vocabulary ({len(found)} tokens) than the "
                f"{first.name}, {first.options.model!r} ({len(expected)}), but must read its token ids; pass "
                f"{run_option(f'{spec.name}.model')} of the same family"
            )


def _ordinary_tokens(tokenizer: Any) -> dict[str, int]:
    """Tokens that text becomes, and their ids."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return {token: number for token, number in tokenizer.get_vocab().items() if number not in special}
