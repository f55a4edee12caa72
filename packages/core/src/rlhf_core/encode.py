"""From rows to tokens: the chat template, the boundary between prompt and completion, and the loss mask.

One rule holds everywhere: a prompt and its completion are tokenised apart and their ids joined, so that training reads
exactly the ids that sampling would have seen and produced. Nothing is tokenised across the boundary, and the EOS or
end-of-turn token that ends a completion belongs to it.

Text that a template puts after the end-of-turn token is the beginning of the next turn, not of the completion. Packing
is not here: the loop cuts micro-batches by tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.data.chats import Chat, Text, as_dialogue
from rlhf_core.errors import DataError, UsageError
from rlhf_core.lazy import torch
from rlhf_core.types import Batch, Example, Prompts

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = ["Completion", "Encoder", "Encoding", "Row"]


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens."""

    template: Literal["auto", "chat", "raw"] = "auto"
    """chat: the tokenizer's chat template, a plain prompt being one user message; raw: plain text, a chat being written
    as a Human/Assistant dialogue; auto: chat if the tokenizer has a template"""
    template_file: str = ""
    """a Jinja chat template to use instead of the tokenizer's"""
    input_template: str = ""
    """text around plain prompts, {} standing for the prompt: 'Question: {} Answer:'; implies raw"""
    max_tokens: int = 2048
    """prompt and completion together, of rows that have completions"""
    too_long: Literal["drop", "truncate"] = "drop"
    """rows that are too long are left out and counted, or lose the beginning of the prompt and the end of the completion"""


@dataclass(frozen=True)
class Completion:
    """One tokenised completion."""

    text: str
    ids: list[int]
    mask: list[bool]
    """true where the loss applies: assistant turns with the token that ends them"""


@dataclass(frozen=True)
class Row:
    """One tokenised example."""

    text: str
    """the rendered prompt"""
    ids: list[int]
    """its tokens"""
    completions: tuple[Completion, ...]


class Encoder:
    """Tokenises examples for one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_prompt_tokens: longer prompts are dropped (or truncated) and counted.
        encoding: how rows become tokens; `Encoder.of` takes it from a data provider.
    """

    dropped: int
    """rows left out so far"""
    truncated: int
    """rows cut so far"""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int = 1024, encoding: Encoding = Encoding()
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.encoding = encoding
        self.dropped = self.truncated = 0
        self._template = _template(tokenizer, encoding)
        if tokenizer.eos_token_id is None:
            raise UsageError("the tokenizer has no EOS token, so completions would never end; set eos_token in its folder")
        self._eos: int = tokenizer.eos_token_id
        self._pad_id = self._eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        added = tokenizer.added_tokens_decoder.items()
        self._special = {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}

    @classmethod
    def of(cls, data: object, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int = 1024) -> Encoder:
        """The encoder that `data`, a data provider, asks for by its field `encoding`."""
        return cls(tokenizer, max_prompt_tokens, getattr(data, "encoding", Encoding()))

    def fits(self, example: Example) -> bool:
        """Whether the example is short enough to be used, after truncation if that was chosen."""
        return self._shorten(self.row(example)) is not None

    def fits_prompt(self, example: Example) -> bool:
        """Whether the prompt alone is short enough: what matters where completions will be sampled."""
        return self._shorten(Row(*self._prompt(example), completions=())) is not None

    def prompts(self, examples: Sequence[Example], uids: Sequence[int]) -> Prompts:
        """The prompts of `examples`, completions ignored.

        Raises:
            UsageError: every one of them is too long.
        """
        rows, kept = self._select([Row(*self._prompt(example), completions=()) for example in examples])
        return Prompts(
            texts=[row.text for row in rows],
            token_ids=[row.ids for row in rows],
            examples=[examples[i] for i in kept],
            uids=[uids[i] for i in kept],
        )

    def batch(self, examples: Sequence[Example], uids: Sequence[int]) -> Batch:
        """One row per completion; the completions of an example are adjacent and share a group. `uids` become `uids_N`.

        Raises:
            UsageError: every one of them is too long, or one has no completion.
        """
        rows, kept = self._select([self.row(example) for example in examples])
        flat = [(group, row, side) for group, row in enumerate(rows) for side in row.completions]
        prompt_NL, prompt_lengths_N = self._pad([row.ids for _, row, _ in flat])
        tokens_NT, lengths_N = self._pad([side.ids for *_, side in flat])
        mask_NT, _ = self._pad([side.mask for *_, side in flat], filler=False)
        chosen = [examples[kept[group]] for group, *_ in flat]
        extras = {f"{name}_N": _column(chosen, name) for name in dict.fromkeys(n for e in chosen for n in e.fields)}
        return Batch(
            prompts=[row.text for _, row, _ in flat],
            texts=[side.text for *_, side in flat],
            prompt_NL=prompt_NL,
            prompt_lengths_N=prompt_lengths_N,
            tokens_NT=tokens_NT,
            lengths_N=lengths_N,
            mask_NT=mask_NT,
            group_N=torch.tensor([group for group, *_ in flat]),
            labels=[example.label for example in chosen],
            meta=[example.meta for example in chosen],
            extras={**extras, "uids_N": torch.tensor([uids[kept[group]] for group, *_ in flat])},
        )

    def row(self, example: Example) -> Row:
        """`example`, tokenised at full length.

        Raises:
            DataError: it has no completion, or the template cannot render it.
        """
        if not example.completions:
            raise DataError(f"{example.origin}: no completion to train on; pass --data.completion-key if there is one")
        text, ids = self._prompt(example)
        return Row(text, ids, tuple(self._completion(example, completion) for completion in example.completions))

    # ------------------------------------------------------------------------------------------------------------------

    def _prompt(self, example: Example) -> tuple[str, list[int]]:
        """The rendered prompt and its tokens, at least one."""
        chat = self._chat(example)
        if chat is not None:
            text = self._render(example, chat, generation=True)
        else:
            assert isinstance(example.prompt, str)
            text = example.prompt
            if self.encoding.input_template and text:
                text = self.encoding.input_template.replace("{}", text)
        templated = chat is not None and self._template is not None  # then BOS is the template's business
        ids = self._ids(text, special=not templated)
        if ids and ids[-1] == self._eos and not templated:
            ids = ids[:-1]  # some tokenizers end every text
        if not ids:  # the first completion token needs something before it to be predicted from
            ids = [self._eos if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id]
        return text, ids

    def _chat(self, example: Example) -> Chat | None:
        """The prompt as messages, or None where it stays plain text."""
        if not isinstance(example.prompt, str):
            return example.prompt
        plain = all(isinstance(completion, str) for completion in example.completions)
        if plain and (self._template is None or not example.prompt):
            return None
        return ({"role": "user", "content": example.prompt},)

    def _completion(self, example: Example, completion: Text) -> Completion:
        """A completion's tokens: assistant turns are trained, what others say between them is not."""
        chat = self._chat(example)
        if chat is None:
            assert isinstance(completion, str)
            pieces = iter([(completion, True)])
        else:
            turns = ({"role": "assistant", "content": completion},) if isinstance(completion, str) else completion
            pieces = self._pieces(example, chat, turns)
        ids: list[int] = []
        mask: list[bool] = []
        for text, trained in pieces:
            new = self._ids(text)
            end = self._end(new) if trained else 0
            if end is None:
                new, end = [*new, self._eos], len(new) + 1
            ids += new
            mask += [True] * end + [False] * (len(new) - end)
        if not any(mask):
            raise DataError(f"{example.origin}: no assistant turn to train on")
        length = len(mask) - mask[::-1].index(True)
        ids, mask = ids[:length], mask[:length]
        text = completion if isinstance(completion, str) else self.tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(str(text), ids, mask)

    def _pieces(self, example: Example, prompt: Chat, turns: Chat) -> Iterator[tuple[str, bool]]:
        """The text that each turn adds to the prompt, and whether it is trained."""
        done = self._render(example, prompt, generation=True)
        for i, message in enumerate(turns):
            if message["role"] != "assistant":
                continue  # its text is part of what leads to the next assistant turn
            before = self._render(example, (*prompt, *turns[:i]), generation=True)
            if not before.startswith(done):
                raise DataError(
                    f"{example.origin}: the chat template rewrites earlier turns, so they cannot all be trained on; "
                    "pass --data.turns last, or another --data.encoding.template-file"
                )
            yield before[len(done) :], False
            done = self._render(example, (*prompt, *turns[: i + 1]), generation=False)
            content = message.get("content")
            if done.startswith(before):
                yield done[len(before) :], True
            elif isinstance(content, str) and content.strip() in done:  # the generation prompt opens more: <think>
                yield done[done.rindex(content.strip()) :], True
            else:
                raise DataError(f"{example.origin}: the chat template does not show the assistant's turn after its prompt")

    def _render(self, example: Example, chat: Chat, generation: bool) -> str:
        """The text of `chat`, with what opens the assistant's turn if `generation`."""
        try:
            if self._template is None:
                return as_dialogue(chat) + ("\n\nAssistant:" if generation else "")
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in chat],
                    tools=example.meta.get("tools"),
                    chat_template=self._template,
                    add_generation_prompt=generation,
                    tokenize=False,
                )
            )
        except (ValueError, _template_error()) as error:
            raise DataError(f"{example.origin}: the chat cannot be rendered: {error}") from None

    def _end(self, ids: list[int]) -> int | None:
        """The length of `ids` up to the special token that ends them, blanks after it allowed; None without one."""
        for i in reversed(range(len(ids))):
            if ids[i] in self._special:
                return i + 1
            if str(self.tokenizer.decode([ids[i]])).strip():
                return None
        return None

    def _ids(self, text: str, special: bool = False) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def _shorten(self, row: Row) -> Row | None:
        """The row within its limits, or None to drop it."""
        limit, budget = self.max_prompt_tokens, self.encoding.max_tokens
        longest = max((len(side.ids) for side in row.completions), default=0)
        if len(row.ids) <= limit and (not longest or len(row.ids) + longest <= budget):
            return row
        if self.encoding.too_long == "drop":
            return None
        ids = row.ids[-min(limit, budget - 1 if longest else limit) :]  # at least one token of the completion is left
        room = budget - len(ids)
        sides = tuple(Completion(side.text, side.ids[:room], side.mask[:room]) for side in row.completions)
        if not all(any(side.mask) for side in sides):
            return None  # nothing to train on is left
        return Row(row.text if ids == row.ids else str(self.tokenizer.decode(ids)), ids, sides)

    def _select(self, rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
        """The rows that can be used, shortened where that was chosen, and their positions. Counts the others."""
        short = [(self._shorten(row), i) for i, row in enumerate(rows)]
        kept = [(row, i) for row, i in short if row is not None]
        self.dropped += len(rows) - len(kept)
        self.truncated += sum(row is not rows[i] for row, i in kept)
        if not kept:
            raise UsageError(
                f"all {len(rows)} rows of a batch are too long: raise --max-prompt-tokens ({self.max_prompt_tokens}) or "
                f"--data.encoding.max-tokens ({self.encoding.max_tokens}), or pass --data.encoding.too-long truncate"
            )
        return [row for row, _ in kept], [i for _, i in kept]

    def _pad(self, rows: Sequence[Sequence[int]], filler: int | None = None) -> tuple[Tensor, Tensor]:
        """(N, longest) padded on the right, and the N lengths."""
        pad = self._pad_id if filler is None else filler
        width = max(map(len, rows))
        padded = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
        return padded, torch.tensor([len(row) for row in rows])


def _column(examples: Sequence[Example], name: str) -> Tensor:
    """The numbers called `name`, one per row."""
    for example in examples:
        if name not in example.fields:
            raise DataError(f"{example.origin}: expected a number {name!r}, which other rows of the batch have")
    return torch.tensor([example.fields[name] for example in examples], dtype=torch.float32)


def _template(tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> str | None:
    """The chat template in force, None for raw text."""
    if encoding.template == "chat" and encoding.input_template:
        raise UsageError("--data.encoding.input-template is for raw prompts; leave out --data.encoding.template chat")
    if encoding.input_template and "{}" not in encoding.input_template:
        raise UsageError("--data.encoding.input-template needs {} where the prompt goes")
    if encoding.template == "raw" or encoding.input_template:
        return None
    if encoding.template_file:
        try:
            return Path(encoding.template_file).read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--data.encoding.template-file {encoding.template_file}: {error.strerror}") from None
    own: Any = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if own is None and encoding.template == "chat":
        raise UsageError(
            "the tokenizer has no chat template: pass --data.encoding.template-file FILE, or --data.encoding.template raw"
        )
    return own or None


def _template_error() -> type[Exception]:
    """Jinja's error, imported only when something is rendered."""
    from jinja2 import TemplateError

    return TemplateError
