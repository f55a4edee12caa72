"""From rows to tokens: the boundary between prompt and completion, the loss mask, and lengths.

A prompt has the same ids in training and sampling, and its completion those that it has in the whole text after them
(`data.boundary`). The end token of a completion belongs to it. Text that a template puts after that token opens the next
turn and is not part of the completion. `meta["prompt"]` keeps the prompt as the row had it, for models with another
template.

Packing is not here: the loop cuts micro-batches by tokens.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.batch import Batch, Example, Prompts
from rlhf_core.contract.episode import Feedback
from rlhf_core.data.boundary import TextTokenizer, common_length
from rlhf_core.data.chats import Text
from rlhf_core.data.images import images_of, open_image
from rlhf_core.data.preview import render_row
from rlhf_core.data.render import LIMITS_ADVICE, Encoding, Renderer
from rlhf_core.data.rows import TokenizedCompletion, TokenizedRow
from rlhf_core.errors import DataError, UsageError, advice, run_option
from rlhf_core.lazy import torch
from rlhf_core.models.loading.end_tokens import find_end_tokens
from rlhf_core.util.messages import progress
from rlhf_core.util.padding import pad_rows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.contract.providers import Data
    from rlhf_core.models.inputs.processor import ImageReader

__all__ = ["Encoder", "Encoding"]

FORMAT = 3
"""Raise it when a row becomes other tokens than before, or is stored in another form: what is cached then counts no more."""
COMPLETION_ADVICE = advice(
    f"pass {run_option('data.completion_key')} if there is one (preferences need both chosen and rejected)",
    "choose data that has completions (preferences need both chosen and rejected)",
)
OPENINGS = 256
"""Openings of chats that are remembered: one for each system prompt."""
DEFAULT = Encoding()
"""Encoding of rows where the data provider has none."""


class Encoder:
    """Tokenizes examples for one tokenizer. Several threads may use one.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_prompt_tokens: longer prompts are dropped (or truncated) and counted.
        encoding: how rows become tokens; `Encoder.for_data` takes it from a data provider.
        preview: so many of the first rows are printed.
        reader: what reads prompts with images, for a model that does.
        listed_ends: end tokens that the model's generation config lists.
    """

    ends: tuple[int, ...]
    """ids of the tokens that end a completion (`models.loading.end_tokens`)"""
    positions: int | None = None
    """tokens of prompt and completion that every role has positions for; None knows no limit"""
    new_tokens: int = 1
    """tokens that a prompt without completions leaves room for"""
    dropped: int
    """rows left out so far"""
    truncated: int
    """rows cut so far"""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int = 1024,
        encoding: Encoding = DEFAULT,
        preview: int = 0,
        reader: ImageReader | None = None,
        listed_ends: Collection[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.encoding = encoding
        self.dropped = self.truncated = 0
        self.reader = reader
        self._renderer = Renderer(tokenizer, encoding, reader)
        self.listed_ends = listed_ends
        self.ends = find_end_tokens(tokenizer, (self._renderer.template,), listed_ends)
        self._text = TextTokenizer(tokenizer)
        self._openings: dict[str, list[int]] = {}
        self._lock = threading.Lock()  # a tokenizer is no place for two threads at once
        self._to_show = preview if os.environ.get("RANK", "0") == "0" else 0
        if not self.ends:
            raise UsageError("the tokenizer has no EOS token, so completions would never end; set its eos_token")
        self._eos: int = self.ends[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self._bos: int = self._eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self._pad_id: int = self._eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @classmethod
    def for_data(
        cls,
        data: Data,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int = 1024,
        reader: ImageReader | None = None,
        listed_ends: Collection[int] = (),
    ) -> Encoder:
        """The encoder that `data`, a data provider, asks for by the fields `encoding` and `preview` of a `Preparation`."""
        from rlhf_core.data.prepare import Preparation

        if not isinstance(data, Preparation):
            return cls(tokenizer, max_prompt_tokens, reader=reader, listed_ends=listed_ends)
        return cls(tokenizer, max_prompt_tokens, data.encoding, data.preview, reader, listed_ends)

    @property
    def given_template(self) -> str:
        """The chat template of a file that replaces the tokenizer's; empty without one."""
        return (self._renderer.template or "") if self.encoding.template_file else ""

    def fits_prompt(self, example: Example) -> bool:
        """Return True if the example's prompt leaves room for an answer."""
        return self.truncate(self.prompt_row(example)) is not None

    def fitting_prompts(self, examples: Sequence[Example], uids: Sequence[int]) -> Prompts:
        """The prompts that are short enough to be answered; maybe none of them. Each is tokenized once."""
        rows = [self.truncate(self.prompt_row(example)) for example in examples]
        kept = [i for i, row in enumerate(rows) if row is not None]
        return self.prompts(
            [examples[i] for i in kept], [uids[i] for i in kept], [row for row in rows if row is not None]
        )

    def prompts(
        self, examples: Sequence[Example], uids: Sequence[int], rows: Sequence[TokenizedRow] | None = None
    ) -> Prompts:
        """The prompts of `examples`, completions ignored; `rows` where they are tokenized and short enough already.

        Raises:
            UsageError: every one of them is too long.
        """
        if rows is None:
            rows, kept = self._select([self.prompt_row(example) for example in examples])
            examples, uids = [examples[i] for i in kept], [uids[i] for i in kept]
        self._show(rows)
        return Prompts(
            texts=[row.text for row in rows],
            token_ids=[row.ids for row in rows],
            examples=[replace(example, meta=_meta(example)) for example in examples],
            uids=list(uids),
            images=[row.images for row in rows] if self.reader is not None else [],
        )

    def batch(
        self, examples: Sequence[Example], uids: Sequence[int], rows: Sequence[TokenizedRow] | None = None
    ) -> Batch:
        """One row per completion; the completions of an example are adjacent and share a group. `uids` become `uids_N`.

        Args:
            examples: with a completion each.
            uids: a number for each.
            rows: the examples tokenized and short enough already, if they were prepared.

        Raises:
            UsageError: every one of them is too long, or one has no completion.
        """
        if rows is None:
            rows, kept = self._select([self.row(example) for example in examples])
            examples, uids = [examples[i] for i in kept], [uids[i] for i in kept]
        self._show(rows)
        flat = [(group, row, side) for group, row in enumerate(rows) for side in row.completions]
        prompt_NL, prompt_lengths_N = pad_rows([row.ids for _, row, _ in flat], self._pad_id)
        tokens_NT, lengths_N = pad_rows([side.ids for *_, side in flat], self._pad_id)
        mask_NT, _ = pad_rows([side.mask for *_, side in flat], False, torch.bool)
        chosen = [examples[group] for group, *_ in flat]
        numbers = dict.fromkeys(name for example in chosen for name in example.fields)
        return Batch(
            prompts=[row.text for _, row, _ in flat],
            texts=[side.text for *_, side in flat],
            prompt_NL=prompt_NL,
            prompt_lengths_N=prompt_lengths_N,
            tokens_NT=tokens_NT,
            lengths_N=lengths_N,
            mask_NT=mask_NT,
            group_N=torch.tensor([group for group, *_ in flat], dtype=torch.long),
            labels=[example.label for example in chosen],
            meta=[_meta(example) for example in chosen],
            images=[row.images for _, row, _ in flat] if self.reader is not None else [],
            extras={
                "uids_N": torch.tensor([uids[group] for group, *_ in flat], dtype=torch.long),
                "row_N": torch.tensor([example.row for example in chosen], dtype=torch.long),
                **{f"{name}_N": _column(chosen, name) for name in numbers},
            },
        )

    def row(self, example: Example) -> TokenizedRow:
        """`example`, tokenized at full length.

        Raises:
            DataError: it has no completion, or the template cannot render it.
        """
        if not example.completions:
            begun = not isinstance(example.prompt, str) and example.prompt[-1]["role"] == "assistant"
            why = (
                (
                    " (in a chat called 'prompt' the last turn is the beginning of the answer; rename the column to "
                    "'messages')"
                )
                if begun
                else ""
            )
            raise DataError(f"{example.origin}: no completion to train on{why}; {COMPLETION_ADVICE}")
        with self._lock:
            row = self._prompt(example)
            completions = tuple(self._completion(example, row.text, completion) for completion in example.completions)
        return replace(row, completions=completions)

    def prompt_row(self, example: Example) -> TokenizedRow:
        """The prompt of `example`, tokenized at full length."""
        with self._lock:
            return self._prompt(example)

    def fingerprint(self) -> str:
        """One word for everything that decides what an example becomes: tokenizer, template, and the versions at work."""
        import tokenizers
        import transformers

        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr([FORMAT, transformers.__version__, tokenizers.__version__]).encode())
        digest.update(repr([*self._renderer.identity, self.ends, self._bos]).encode())
        with TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    digest.update(repr([path.name, path.read_bytes()]).encode())
        return digest.hexdigest()

    # ------------------------------------------------------------------------------------------------------------------

    def _prompt(self, example: Example) -> TokenizedRow:
        """The rendered prompt and its tokens, at least one: the first completion token is predicted from something."""
        text = self._renderer.prompt(example)
        if self.reader is not None and (parts := [*images_of(example.prompt)]):
            pictures = [open_image(part, example.origin) for part in parts]
            ids, images = self.reader(text, pictures, example.origin)
            return TokenizedRow(text, ids, images=images, sizes=tuple(picture.size for picture in pictures))
        if not self._renderer.uses_template(example):
            ids = self._check_images(self._text.with_bos(text, example.origin), example.origin)
            return TokenizedRow(text, ids or [self._bos], opening=int(self._begins_with_bos(ids)))
        ids = self._check_images(self._text.ids(text, example.origin), example.origin)
        return TokenizedRow(text, ids or [self._bos], opening=self._opening(example, ids))

    def _opening(self, example: Example, ids: list[int]) -> int:
        """Return the number of a chat's ids before its first user message."""
        key, render = self._renderer.opening(example)
        if key not in self._openings:
            if len(self._openings) >= OPENINGS:
                self._openings.clear()
            self._openings[key] = self._text.ids(render())
        return common_length(self._openings[key], ids) or int(self._begins_with_bos(ids))

    def _begins_with_bos(self, ids: list[int]) -> bool:
        return ids[:1] == [self.tokenizer.bos_token_id]

    def _completion(self, example: Example, prompt: str, completion: Text) -> TokenizedCompletion:
        """A completion's tokens: assistant turns are trained, texts of others between them are not."""
        ids: list[int] = []
        mask: list[bool] = []
        before = prompt
        for text, trained in self._renderer.pieces(example, prompt, completion):
            new = self._check_images(self._text.following(before, text, example.origin), example.origin)
            new = new[not before and self._begins_with_bos(new) :]  # it is the prompt of a text without one
            before += text
            end = self._end(new) if trained else 0
            if end is None:
                new, end = [*new, self._eos], len(new) + 1
            ids += new
            mask += [True] * end + [False] * (len(new) - end)
        if not any(mask):
            raise DataError(f"{example.origin}: no assistant turn to train on")
        length = len(mask) - mask[::-1].index(True)
        said = completion if isinstance(completion, str) else self.tokenizer.decode(ids, skip_special_tokens=True)
        return TokenizedCompletion(str(said), ids[:length], mask[:length])

    def feedback(self, example: Example, feedback: Feedback, turn_ids: Sequence[int]) -> list[int]:
        """Return the tokens of `feedback` to a turn of `example`'s episode whose sampled tokens are `turn_ids`.

        Messages follow the text that closes the turn: all of it after a turn that was cut, else what follows its end token.

        Raises:
            DataError: the template cannot render the messages.
        """
        if feedback.token_ids:
            return list(feedback.token_ids)
        if not feedback.messages:
            return self._text.piece(feedback.text, example.origin) if feedback.text else []
        closing, text = self._renderer.continuation(example, feedback.messages)
        if turn_ids[-1] not in self.ends:
            return self._text.piece(text, example.origin)
        ids = self._text.ids(text, example.origin)
        # in some templates what opens the next turn ends one (GLM): one more token than what both texts begin with
        closed = ids[: common_length(self._text.ids(closing), ids) + 1]
        end = next((i for i, number in enumerate(closed, start=1) if number in self.ends), None)
        if end is not None:
            return ids[end:]
        return self._text.following(str(self.tokenizer.convert_ids_to_tokens(turn_ids[-1])), text, example.origin)

    def _end(self, ids: list[int]) -> int | None:
        """The length of `ids` up to the end token that ends them, None without one. Blanks and more ends may follow it."""
        end = None
        for i in reversed(range(len(ids))):
            if ids[i] in self.ends:
                end = i + 1
            elif str(self.tokenizer.decode([ids[i]])).strip():
                break
        return end

    def _check_images(self, ids: list[int], origin: str) -> list[int]:
        """The ids of a text without images."""
        if self.reader is not None and self.reader.token in ids:
            token = self.tokenizer.convert_ids_to_tokens(self.reader.token)
            raise DataError(
                f"{origin}: the text contains the image token {token!r}, but the row has no image; remove the "
                "token, or add the image"
            )
        return ids

    def truncate(self, row: TokenizedRow) -> TokenizedRow | None:
        """The row within its limits, or None to drop it."""
        longest = max((len(side.ids) for side in row.completions), default=0)
        limit, budget = self._limits(answered=longest > 0)
        if len(row.ids) <= limit and (not longest or len(row.ids) + longest <= budget):
            return row
        if self.encoding.too_long == "drop":
            return None
        most = min(limit, budget - 1 if longest else limit)  # at least one token of the completion is left
        ids = row.ids
        if len(ids) > most:
            kept = row.opening if row.opening < most else int(self._begins_with_bos(ids) and most > 1)
            ids = [*ids[:kept], *ids[len(ids) - most + kept :]]
        if row.images and ids != row.ids:
            return None  # half an image is none
        room = budget - len(ids)
        sides = tuple(TokenizedCompletion(side.text, side.ids[:room], side.mask[:room]) for side in row.completions)
        if not all(any(side.mask) for side in sides):
            return None  # nothing to train on is left
        text = row.text if ids == row.ids else str(self.tokenizer.decode(ids))
        return replace(row, text=text, ids=ids, completions=sides, cut=True)

    def _limits(self, answered: bool) -> tuple[int, int]:
        """Return the maximum tokens of a prompt, and of a prompt with its completion."""
        limit, budget = self.max_prompt_tokens, self.encoding.max_tokens
        if self.positions is None:
            return limit, budget
        return min(limit, self.positions - (1 if answered else self.new_tokens)), min(budget, self.positions)

    def _select(self, rows: Sequence[TokenizedRow]) -> tuple[list[TokenizedRow], list[int]]:
        """The rows that can be used, shortened where that was chosen, and their positions. Counts the others."""
        short = [(self.truncate(row), i) for i, row in enumerate(rows)]
        kept = [(row, i) for row, i in short if row is not None]
        self.dropped += len(rows) - len(kept)
        self.truncated += sum(row.cut for row, _ in kept)
        if rows and not kept:
            limit, budget = self._limits(answered=bool(rows and rows[0].completions))
            raise UsageError(
                f"all {len(rows)} rows of a batch are longer than {limit} prompt tokens or {budget} tokens in "
                f"total: {LIMITS_ADVICE}"
            )
        return [row for row, _ in kept], [i for _, i in kept]

    def _show(self, rows: Sequence[TokenizedRow]) -> None:
        """Print rows while some are still to be shown."""
        for row in rows[: self._to_show]:
            progress.info(render_row(row, self.tokenizer, self.reader.token if self.reader is not None else None))
        self._to_show = max(0, self._to_show - len(rows))


def _meta(example: Example) -> dict[str, Any]:
    """The row's metadata, and its prompt as it was: a reward model has another template than the policy."""
    return {"prompt": example.prompt, **example.meta}


def _column(examples: Sequence[Example], name: str) -> Tensor:
    """The numbers called `name`, one per row."""
    for example in examples:
        if name not in example.fields:
            raise DataError(
                f"{example.origin}: the number {name!r} is missing, but other rows of the batch have it; add it to "
                "every row"
            )
    return torch.tensor([example.fields[name] for example in examples], dtype=torch.float32)
