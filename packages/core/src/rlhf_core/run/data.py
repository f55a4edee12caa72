"""The data of a run: its training rows, its held-out rows, and the encoder and the stream that read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.engines import Stateful
from rlhf_core.contract.plan import DATA
from rlhf_core.data.shuffling import SHUFFLED, can_read_ahead
from rlhf_core.errors import ContractError, UsageError, options_under, run_option
from rlhf_core.util.random_states import read_apart

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Example
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.engines import Engines
    from rlhf_core.contract.plan import Plan
    from rlhf_core.data.encoder import Encoder
    from rlhf_core.data.prefetch import Prefetcher

__all__ = ["RunData"]


class RunData:
    """Data of a run while its reader is open. Each part is built on first use."""

    def __init__(self, plan: Plan, engines: Engines) -> None:
        self.plan = plan
        self.engines = engines
        self._encoders: dict[str, Encoder] = {}

    @cached_property
    def encoder(self) -> Encoder:
        """The way from rows to token ids, with the tokenizer of the role that reads them."""
        from rlhf_core.data.encoder import Encoder
        from rlhf_core.models.loading.end_tokens import listed_ends, report_ends
        from rlhf_core.models.loading.image_reader import load_reader
        from rlhf_core.models.loading.tokenizer import load_tokenizer

        config, spec = self.plan.config, self.plan.roles[self.plan.tokenizer_role]
        tokenizer = load_tokenizer(spec.options.model, spec.options)
        reader = load_reader(spec.options.model, spec.options, tokenizer)
        listed = listed_ends(spec.options.model, spec.options)
        encoder = Encoder.for_data(config.providers["data"], tokenizer, config.max_prompt_tokens, reader, listed)
        report_ends(tokenizer, encoder.ends, listed)
        self._hold_to_positions(encoder)
        return encoder

    def with_language(self, plan: Plan) -> Plan:
        """Return a plan whose roles that read the rows know how turns end, and the chat template that came from a file."""
        readers = {name: spec for name, spec in plan.roles.items() if spec.reads}
        if not readers:
            return plan
        ends, template = self.encoder.ends, self.encoder.given_template
        spoken = {name: replace(spec, ends=ends, template=template) for name, spec in readers.items()}
        return replace(plan, roles={**plan.roles, **spoken})

    def _hold_to_positions(self, encoder: Encoder) -> None:
        """Let rows be no longer than what every role that reads them has positions for.

        Raises:
            UsageError: completions leave no room for a prompt.
        """
        from rlhf_core.models.loading.limits import most_positions

        readers = [spec for spec in self.plan.roles.values() if spec.reads]
        known = [found for spec in readers if (found := most_positions(spec.options.model, spec.options)) is not None]
        if not known:
            return
        encoder.positions = min(known)
        encoder.new_tokens = self.plan.config.sampling.max_new_tokens if any(spec.sampled for spec in readers) else 1
        if encoder.new_tokens >= encoder.positions:
            raise UsageError(
                f"{run_option('sampling.max_new_tokens')} {encoder.new_tokens} leaves no room for a prompt in the "
                f"{encoder.positions} positions of the model; lower it"
            )

    def encoder_of(self, role: str) -> Encoder:
        """Return the encoder of a role that reads texts, with its own tokenizer; what is too long is cut."""
        if role not in self._encoders:
            from rlhf_core.data.encoder import Encoder, Encoding
            from rlhf_core.models.loading.end_tokens import listed_ends
            from rlhf_core.models.loading.limits import most_positions
            from rlhf_core.models.loading.tokenizer import load_tokenizer

            options, encoding = self.plan.roles[role].options, Encoding(too_long="truncate")
            tokenizer = load_tokenizer(options.model, options)
            self._encoders[role] = encoder = Encoder(
                tokenizer, encoding.max_tokens, encoding, listed_ends=listed_ends(options.model, options)
            )
            encoder.positions = most_positions(options.model, options)
        return self._encoders[role]

    @cached_property
    def rows(self) -> Iterable[Example]:
        """The training rows."""
        return self.read("train")

    def read(self, split: str) -> Iterable[Example]:
        """Return the rows of a split."""
        with options_under("/data"):
            rows: Iterable[Example] = self.engines["data"](split)
        found: object = rows
        if not isinstance(found, (Iterable, Sized)):
            who = f"data {type(provider := self.plan.config.providers['data']).__qualname__} of {type(provider).__module__}"
            raise ContractError(
                f"{who} returned {type(found).__name__} for the split {split!r}; return rows, [] for none"
            )
        return rows

    def read_apart(self, split: str) -> Iterable[Example]:
        """Return the rows of a split; what a row draws from global random generators follows from seed and number alone."""
        rows, config = self.read(split), self.plan.config
        return rows if can_read_ahead(config.providers["data"], rows) else read_apart(rows, config.seed)

    def stream(self, world: World) -> Prefetcher:
        """Return this rank's rows, shuffled by the seed, from the first one on."""
        from rlhf_core.data.prefetch import Prefetcher

        config, online = self.plan.config, DATA not in self.plan.sources
        sampler = self._sampler()
        readers = partial(self.engines.state_dict, "data", clone=True) if self.engines.stateful("data") else None
        return Prefetcher.for_data(
            self.rows, self.encoder, config.providers["data"], online, config, world, readers, sampler
        )

    def _sampler(self) -> Any:
        """The engine that orders rows.

        Raises:
            ContractError: it reacts to scores and has no state, or the other way round.
        """
        provider = self.plan.config.providers.get("sampler", SHUFFLED)
        engine = self.engines.get("sampler") or provider
        if provider.reacts != isinstance(engine, Stateful):
            wrong = (
                "reacts to scores, so open() must return an object with state_dict and load_state_dict"
                if provider.reacts
                else "has a state, but declares that it does not react to scores; remove one of the two"
            )
            raise ContractError(f"sampler {type(provider).__qualname__} of {type(provider).__module__} {wrong}")
        return engine

    def heldout(self, most: int | None) -> Sequence[Example]:
        """Return the held-out rows, the first `most` of them.

        Raises:
            UsageError: there are none.
        """
        with options_under("/data"):
            found = self.read_apart("heldout")
            rows = found[:most] if isinstance(found, Sequence) else list(islice(found, most))
        if not rows:
            raise UsageError("the data has no held-out rows to evaluate on; see the data provider's options")
        return rows
