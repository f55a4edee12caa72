"""End tokens: the tokens after which a completion is over, worked out once and the same everywhere.

Three places name them: the chat template writes one after an assistant's turn, the tokenizer has its EOS, and the model's
generation config lists some. Training rows, every rollout engine and the saved folder use the union, without two kinds of
tokens that end nothing: ordinary ones that a stale generation config lists by number, and those that open a turn.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError, run_option
from rlhf_core.models.loading import tiny
from rlhf_core.models.loading.adapters import read_base_model
from rlhf_core.models.loading.byte_tokenizer import EOS
from rlhf_core.models.loading.hub import find_companion_file, resolve_name
from rlhf_core.models.loading.transformers_calls import loadable_path
from rlhf_core.util.limits import OverLimit, rendering_limits
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from rlhf_core.contract.options import ModelOptions
    from rlhf_core.contract.plan import RoleSpec

__all__ = ["end_ids", "find_end_tokens", "listed_ends", "report_ends", "save_ends", "template_end"]

PROBE = "probe-7c1d0f"
"""An answer whose place in a rendered chat shows what the template writes after it."""


def find_end_tokens(tokenizer: Any, templates: Iterable[str | None], listed: Collection[int] = ()) -> tuple[int, ...]:
    """Return the ids of all tokens that end a completion; those that chat templates write come first, then EOS.

    Args:
        tokenizer: a Hugging Face tokenizer.
        templates: the chat templates in force, as text; None stands for no template.
        listed: ids that the model's generation config lists.
    """
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    known = [template for template in dict.fromkeys((*templates, own)) if template]
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    opening = set().union(*(_opening(tokenizer, template) for template in known))
    found = [template_end(tokenizer, template) for template in known]
    found += [tokenizer.eos_token_id, *(number for number in listed if number in added and number not in opening)]
    return tuple(dict.fromkeys(number for number in found if number is not None))


def template_end(tokenizer: Any, template: str) -> int | None:
    """Return the token with which a chat template ends an assistant's turn; None if it writes none.

    After the last turn some templates write more (Phi 3: `<|end|>`, then EOS), and before the next one too. The last special
    token that follows the turn in both places ends it; where the two have none in common (gpt-oss: `<|return|>` and
    `<|end|>`), the first one after a last turn.
    """
    asked: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": PROBE}]
    last = _ids_after_probe(tokenizer, template, asked)
    middle = _ids_after_probe(tokenizer, template, [*asked, {"role": "user", "content": "Hi"}])
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    shared = [number for number in last[: _common(last, middle)] if number in added]
    return next((number for number in (*shared[::-1], *last) if number in added), None)


def listed_ends(name: str, options: ModelOptions) -> tuple[int, ...]:
    """Return the end tokens in the generation config of the model called `name`, or in its config if it has no such file."""
    source = resolve_name(name)
    if source.kind == "tiny":
        tiny.parse(name)
        return (EOS,)
    converted = Path(loadable_path(source)) if source.kind == "gguf" else None
    for file in ("generation_config.json", "config.json"):
        path = converted / file if converted else find_companion_file(name, file)
        if path is not None and path.is_file():
            return _read(path)
    return listed_ends(read_base_model(Path(source.location)), options) if source.kind == "adapter" else ()


def end_ids(spec: RoleSpec, tokenizer: Any) -> tuple[int, ...]:
    """Return the end tokens of a role: those of its run, or outside a run those of its model and its own template."""
    return spec.ends or find_end_tokens(tokenizer, (), listed_ends(spec.options.model, spec.options))


def save_ends(model: Any, ends: Sequence[int]) -> None:
    """Write end tokens into the generation config of a model that generates, so that plain transformers stops there too."""
    if ends and model.can_generate():
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else [*ends]


def report_ends(tokenizer: Any, ends: Sequence[int], listed: Sequence[int]) -> None:
    """Log, on the first rank, end tokens other than the tokenizer's EOS, and listed ones that end nothing."""
    if int(os.environ.get("RANK", "0")):
        return

    def spell(numbers: Iterable[int]) -> str:
        return ", ".join(repr(str(tokenizer.convert_ids_to_tokens(number))) for number in numbers)

    if ends[0] != tokenizer.eos_token_id:
        eos = "there is no EOS" if tokenizer.eos_token_id is None else f"EOS is {tokenizer.eos_token!r}"
        log.info(f"the chat template ends a turn with {spell(ends[:1])}, but {eos}: completions end with {spell(ends)}")
    if idle := [number for number in listed if number not in ends and number < len(tokenizer)]:
        log.info(f"the generation config lists the end tokens {spell(idle)}, which do not end a turn: they are ignored")


# ----------------------------------------------------------------------------------------------------------------------


def _ids_after_probe(tokenizer: Any, template: str, chat: Sequence[dict[str, Any]]) -> list[int]:
    """The tokens of what the template writes after the probe; none if it cannot write such a chat."""
    return _ids(tokenizer, _render(tokenizer, template, chat, False).rpartition(PROBE)[2])


def _opening(tokenizer: Any, template: str) -> set[int]:
    """The tokens of what opens an assistant's turn."""
    chat = [{"role": "user", "content": PROBE}]
    before, whole = (_ids(tokenizer, _render(tokenizer, template, chat, generation)) for generation in (False, True))
    return {*whole[_common(before, whole) :]}


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _render(tokenizer: Any, template: str, chat: Sequence[dict[str, Any]], generation: bool) -> str:
    """The chat as text, empty if the template does not show it. Those of models with images want contents in parts."""
    parts = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in chat]
    for messages in (list(chat), parts):
        try:
            with rendering_limits():
                text = tokenizer.apply_chat_template(
                    messages, chat_template=template, add_generation_prompt=generation, tokenize=False
                )
        except OverLimit as error:
            raise UsageError(
                f"the chat template cannot be rendered: {error}; pass {run_option('data.encoding.template_file', 'FILE')}"
            ) from None
        except Exception:  # noqa: S112  # of any kind: a template is a program
            continue  # one that takes neither is reported with the first row of data that it cannot render
        if PROBE in text:
            return str(text)
    return ""


def _read(path: Path) -> tuple[int, ...]:
    """The ids under `eos_token_id` of a JSON file.

    Raises:
        UsageError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a JSON file ({error}); restore it") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} should hold a JSON object, not {type(content).__name__}; restore it")
    listed = content.get("eos_token_id", (content.get("text_config") or {}).get("eos_token_id"))
    several = listed if isinstance(listed, list) else [listed]
    return tuple(number for number in several if isinstance(number, int))
