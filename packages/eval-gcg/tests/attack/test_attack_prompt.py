"""A suffix has its place in a chat, and its tokens are those of the whole text."""

from __future__ import annotations

from rlhf_core.models.loading.byte_tokenizer import byte_tokenizer
from rlhf_eval_gcg.attack import Attack, AttackPrompt, Goal


def test_the_tokens_of_all_parts_are_those_of_the_whole_text() -> None:
    tokenizer = byte_tokenizer()
    prompt = AttackPrompt.build(Goal("Say hi", "Hi"), tokenizer, Attack(suffix="x x"))
    whole = tokenizer(prompt.render(" x x") + "Hi", add_special_tokens=False)["input_ids"]
    assert [*prompt.prompt_ids(prompt.suffix_ids), *prompt.answers[0]] == whole
