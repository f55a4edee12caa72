"""`rlhf-run chat`: talk to a model in the terminal, or ask it one thing.

With a chat template the conversation is remembered; a model without one continues each line separately.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from rlhf_core.contract.commands import Command
from rlhf_core.contract.options import ModelOptions, Sampling
from rlhf_core.contract.ranges import at_least
from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext
    from rlhf_core.plugins.registry import Registry

__all__ = ["Chat"]


@dataclass(frozen=True)
class Chat(Command):
    """Chat with a model, one line of input per answer; input may be piped. Ctrl-D ends the chat."""

    model: str
    """hub name, folder (OUTPUT/model of a run, or a checkpoint), GGUF file, or `tiny`"""
    prompt: str = ""
    """prompt to answer once before the command ends; empty starts a conversation"""
    max_new_tokens: int = 256
    """maximum number of tokens per answer"""
    temperature: float = 0.7
    """randomness of the answer; 0 always takes the likeliest token"""
    seed: int = 0
    """seed of the random draws; the same seed gives the same answers"""

    def __post_init__(self) -> None:
        at_least(0, self, "seed")

    def __call__(self, context: CommandContext) -> int:
        Sampling(max_new_tokens=self.max_new_tokens, temperature=self.temperature)  # refuses what cannot be
        from rlhf_core.run.exporting import with_exported_models

        with with_exported_models(context.config, cast("Registry", context.registry)) as config:
            return self._talk(config.model)

    def _talk(self, name: str) -> int:
        """Answer line by line with the model `name`."""
        from rlhf_core.models.loading.end_tokens import find_end_tokens, listed_ends, save_ends
        from rlhf_core.models.loading.image_reader import load_reader
        from rlhf_core.models.loading.load import load_model
        from rlhf_core.models.loading.tokenizer import load_tokenizer, render_chat

        options = ModelOptions(model=name)
        tokenizer, model = load_tokenizer(name, options), load_model(name, options)
        reader = load_reader(name, options, tokenizer)
        save_ends(model, find_end_tokens(tokenizer, (), listed_ends(name, options)))
        model.eval()
        torch.manual_seed(self.seed)
        history: list[dict[str, Any]] = []
        for line in [self.prompt] if self.prompt else _lines():
            if not tokenizer.chat_template:
                self._answer(model, tokenizer, tokenizer(line, return_tensors="pt"))
                continue
            said: Any = line if reader is None else [{"type": "text", "text": line}]  # as templates with images want it
            history.append({"role": "user", "content": said})
            text = render_chat(tokenizer, history)
            inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)  # the template writes them
            said = self._answer(model, tokenizer, inputs)
            history.append(
                {"role": "assistant", "content": said if reader is None else [{"type": "text", "text": said}]}
            )
        return 0

    def _answer(self, model: Any, tokenizer: Any, inputs: Any) -> str:
        """Print the answer while it is sampled, and return it. Ids that no token has are never drawn.

        Raises:
            UsageError: the model has too few positions for the chat and an answer.
        """
        from transformers import TextStreamer

        from rlhf_core.models.loading.limits import lacking_ids, window_of

        window, length = window_of(model.config), inputs["input_ids"].shape[1]
        if window is not None and length + self.max_new_tokens > window:
            raise UsageError(
                f"{length} tokens of the chat and {self.max_new_tokens} of an answer exceed the {window} positions "
                "of the model; lower --max-new-tokens, or start a new chat"
            )
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0}
        lacking = lacking_ids(tokenizer, model.get_output_embeddings().weight.shape[0])
        with torch.inference_mode():
            tokens = model.generate(
                **{name: inputs[name] for name in ("input_ids", "attention_mask")},
                **sampling,
                max_new_tokens=self.max_new_tokens,
                suppress_tokens=list(lacking) or None,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
        answer: str = tokenizer.decode(tokens[0, length:], skip_special_tokens=True)
        return answer


def _lines() -> Iterator[str]:
    """Lines of input that are not empty; with a prompt in front of each where a person types them."""
    if not sys.stdin.isatty():
        yield from filter(None, (line.strip() for line in sys.stdin))
        return
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line
