"""Derive the plan of a configuration before anything heavy starts: roles, sources, credits and needs.

A plan is plain data. It is the same in every process: a worker builds it again from names and options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rlhf_core.contract import requirements as needs_
from rlhf_core.contract.kept_sets import replays
from rlhf_core.contract.optimizers import OptimizerProvider
from rlhf_core.contract.options import KL, ModelOptions, RunConfig, Sampling, TrackingOptions, TrainedOptions
from rlhf_core.contract.plan import CREDIT, DATA, CreditSpec, Plan, RoleSpec
from rlhf_core.contract.providers import Algorithm, Reward
from rlhf_core.contract.requirements import LANGUAGE, Need, split_output
from rlhf_core.contract.terms import ProviderChoices, Term
from rlhf_core.errors import OptionError, UsageError, run_option
from rlhf_core.training.dynamic_sampling import DynamicSampling, choose_filter
from rlhf_core.training.evaluator_needs import evaluator_needs
from rlhf_core.training.old_logprobs import FULL_OLD, OLD, OLDS
from rlhf_core.training.output_table import OutputTable
from rlhf_core.training.reward_shaping import RewardShaping

__all__ = ["make_plan"]

RUN_FOLDERS = frozenset(
    {"checkpoints", "failed", "mlartifacts", "model", "model-best", "model-ema", "tensorboard", "wandb"}
)
"""Folders in OUTPUT that a run and its trackers write."""


def make_plan(config: RunConfig) -> Plan:
    """Work `config` out.

    Raises:
        UsageError: terms, needs and roles do not fit together.
    """
    choices = ProviderChoices(
        advantage=config.providers.get("advantage"),
        loss=config.providers.get("loss"),
        sampling=config.sampling,
        providers=config.providers,
    )
    if config.minibatches > config.batch_size:
        raise OptionError(
            "/minibatches",
            f"{config.minibatches} is more than the {config.batch_size} rows of {run_option('batch_size')}; lower "
            "the first or raise the second",
        )
    terms = with_corrections(_terms(config.algorithm, choices), config)
    choose_filter(config)  # refuses two of them
    kl: KL | None = config.algorithm.kl
    kl = kl if kl is not None and kl.coef > 0 else None
    table = OutputTable(config.registry)
    credits: dict[str, CreditSpec] = {}
    keyed: list[tuple[str, Term]] = []
    for term in terms:
        key = _credit_key(credits, term)
        credit = credits.setdefault(
            key, CreditSpec(key, _source(term), term.advantage, every=term.every, after=term.after, parts=_parts(term))
        )
        credits[key] = _add_needs(credit, term, kl, table, config.sampling)
        keyed.append((key, term))
    launcher = config.providers.get("launcher")
    if launcher is not None and not launcher.one_process and config.providers["strategy"].ranks_per_row > 1:
        raise UsageError(
            f"the launcher {type(launcher).__qualname__} gives each rank separate rows, but with this strategy "
            f"several ranks share rows; use {run_option('launcher', 'local')} under torchrun"
        )
    for term in terms:
        if term.partners and launcher is not None and not launcher.one_process:
            raise UsageError(
                f"the loss {type(term.loss).__qualname__} compares whole distributions of {term.role} and "
                f"{', '.join(sorted(term.partners))}, which the launcher {type(launcher).__qualname__} puts into different "
                f"processes; use {run_option('launcher', 'local')}"
            )
    also = config.algorithm.samples  # roles that are sampled though no term trains on it
    sources = tuple(dict.fromkeys((*(name for term in terms for name in _parts(term) or (term.source,)), *also)))
    rewarding = _reward_needs(config, table)
    roles = _roles(config, keyed, credits, sources, table, rewarding)
    policy, exports = config.algorithm.policy, tuple(config.algorithm.exports)
    plan = Plan(config, terms, sources, credits, roles, policy, exports, rewarding, kl)
    _check_order(plan)
    _check_exports(plan)
    _check_tracking(plan)
    return plan


def _terms(algorithm: Algorithm, choices: ProviderChoices) -> tuple[Term, ...]:
    """Return the terms of `algorithm`, if it and its capabilities are what core takes them for."""
    name, terms = type(algorithm).__qualname__, algorithm(choices)
    if not (isinstance(terms, tuple) and all(isinstance(term, Term) for term in terms)):
        raise UsageError(f"the algorithm {name} returned {terms!r}; return a tuple of Terms")
    expected: Mapping[str, type] = {"kl": KL, "shaping": RewardShaping, "dynamic": DynamicSampling}
    found = {"kl": algorithm.kl, "shaping": algorithm.shaping, "dynamic": algorithm.dynamic}
    for each, value in found.items():
        if value is not None and not isinstance(value, expected[each]):
            raise UsageError(
                f"the algorithm {name} has {each} = {value!r}, but core reads {each} as a "
                f"{expected[each].__name__}; give it that type, or rename it"
            )
    if not isinstance(algorithm.cache, str):
        raise UsageError(
            f"the algorithm {name} has cache = {algorithm.cache!r}, but core reads cache as a folder; give it a "
            "string, or rename it"
        )
    return terms


def with_corrections(terms: tuple[Term, ...], config: RunConfig) -> tuple[Term, ...]:
    """Return terms whose losses correct for the age of what a role sampled, if the run samples ahead and is to do so."""
    if not (config.ahead and config.stale.correct == "on"):
        return terms
    return tuple(term if term.source == DATA else replace(term, loss=term.loss.with_correction()) for term in terms)


def _term_in_words(term: Term) -> str:
    """Return a term in words, for messages."""
    return f"the term that trains {term.role} on {'data' if term.source == DATA else f'samples of {term.source}'}"


def _check_order(plan: Plan) -> None:
    """Check that terms come after roles that are trained, and that some role can be the first."""
    trained = plan.trained_roles
    for term in plan.terms:
        if term.after and (term.after not in trained or term.after == term.role):
            which = "which it trains itself" if term.after == term.role else "which no term trains"
            raise UsageError(
                f"{type(plan.config.algorithm).__qualname__}: {_term_in_words(term)} waits for the update of "
                f"{term.after!r}, {which}; change its `after`"
            )


def _check_exports(plan: Plan) -> None:
    """Check that the policy is trained, and that every role to export has its own weights and its own folder."""
    algorithm, trained = type(plan.config.algorithm).__qualname__, plan.trained_roles
    if trained and plan.policy not in trained:
        raise UsageError(
            f"{algorithm}: the policy is the role {plan.policy!r}, which no term trains (trained: {', '.join(trained)}); "
            "let the algorithm declare another `policy`"
        )
    for name in plan.exports:
        if name not in plan.changing_roles:
            raise UsageError(f"{algorithm} exports the role {name!r}, which no term trains; leave it out of `exports`")
        if name in RUN_FOLDERS or f"{name}-ema" in RUN_FOLDERS:
            raise UsageError(
                f"{algorithm} exports the role {name!r} to OUTPUT/{name}, which the run uses for itself; rename the role"
            )


def _check_tracking(plan: Plan) -> None:
    """Check that tracking roles follow trained ones, and can hold what they take."""
    for name in plan.tracking_roles:
        options, track = plan.roles[name].options, plan.roles[name].tracking
        assert track is not None
        if plan.terms and track.of not in plan.trained_roles:
            raise UsageError(
                f"{run_option(f'{name}.track.of')} {track.of}: no term trains a role {track.of!r} in this run; name one "
                f"of {', '.join(plan.trained_roles)}"
            )
        if options.quantize != "none":
            raise UsageError(
                f"the {name} tracks the {track.of}, but 4-bit weights cannot be updated: leave out "
                f"{run_option(f'{name}.quantize')}"
            )
        if track.decay and options.dtype != "float32":
            raise UsageError(
                f"the {name} averages the weights of the {track.of}, but {options.dtype} loses small changes: pass "
                f"{run_option(f'{name}.dtype', 'float32')}, or {run_option(f'{name}.track.decay', 0)}"
            )


def _credit_key(credits: Mapping[str, CreditSpec], term: Term) -> str:
    """The key of the term's credit: an existing one with the same source, advantage, cadence and place, or a new one."""
    same_source = [credit for credit in credits.values() if credit.source == _source(term)]
    for credit in same_source:
        if (credit.advantage, credit.every, credit.after) == (term.advantage, term.every, term.after):
            return credit.key
    return f"{_source(term)}#{len(same_source)}" if same_source else _source(term)


def _parts(term: Term) -> tuple[str, ...]:
    """The sources whose rows the term's advantage joins; none where it has those of one."""
    return (term.source, term.advantage.joins) if term.advantage is not None and term.advantage.joins else ()


def _source(term: Term) -> str:
    """The name of the batch that the term's credit reads."""
    return "+".join(_parts(term)) or term.source


def _add_needs(credit: CreditSpec, term: Term, kl: KL | None, table: OutputTable, sampling: Sampling) -> CreditSpec:
    """`credit` with what this term's advantage and loss need, and the KL penalty in the reward.

    Where kept sets are replayed, the KL is measured with the policy's log-probabilities over the whole vocabulary.
    """
    asked: list[tuple[str, object]] = [
        (name, asker) for asker in (term.advantage, term.loss) if asker is not None for name in sorted(asker.needs)
    ]
    raw = term.advantage is not None and term.advantage.raw_rewards
    if kl is not None and kl.where == "reward" and term.source == term.role and not raw:
        asked += [("ref_logprobs_NT", kl), ("old_logprobs_NT", kl)]
    if kl is not None and replays(sampling) and any(name == OLD for name, _ in asked):
        asked.append((FULL_OLD, kl))
    have = {need.name: need for need in credit.needs}
    earned = sorted(name for name in term.needs if name in CREDIT)
    if term.advantage is None and earned:
        raise UsageError(
            f"the loss {type(term.loss).__qualname__} needs {earned[0]}, but {_term_in_words(term)} assigns no "
            "credit; choose a loss on given completions (sft, dpo, …), or an algorithm that samples and scores"
        )
    for name, asker in asked:
        role = term.source if name in OLDS and term.source != DATA else term.role
        need = needs_.resolve(name, role, asker, table.names)
        have.setdefault(name, need)
    return replace(credit, needs=tuple(have.values()))


def _term_outputs(
    config: RunConfig, terms: list[Term], sources: tuple[str, ...], table: OutputTable
) -> dict[str, set[str]]:
    """The outputs that losses, optimizers and sampling ask of each role."""
    outputs: dict[str, set[str]] = {}
    for term in terms:
        own: list[tuple[str, object]] = [(name, term.loss) for name in term.outputs if not split_output(name)[0]]
        if optim := _optimizer_of(config.roles.get(term.role)):
            own += [(name, optim) for name in optim.outputs if optim.observes]
        outputs.setdefault(term.role, set()).update(table.check(name, asker) for name, asker in own)
        for other in term.partners:
            for role in (term.role, other):
                outputs.setdefault(role, set()).add("logprobs_NT")
    for source in sources:
        if source != DATA:
            outputs.setdefault(source, set()).add("logprobs_NT")
    return outputs


def _roles(
    config: RunConfig,
    keyed: list[tuple[str, Term]],
    credits: Mapping[str, CreditSpec],
    sources: tuple[str, ...],
    table: OutputTable,
    rewarding: tuple[Need, ...],
) -> dict[str, RoleSpec]:
    """Every role that a term trains, a source samples, or a need (of a credit, or of an evaluator) asks for."""
    outputs = _term_outputs(config, [term for _, term in keyed], sources, table)
    needs = [need for credit in credits.values() for need in credit.needs]
    evaluators = config.providers.get("evaluator", ())
    first = config.algorithm.policy if keyed else next(iter(config.roles), "")
    needs += evaluator_needs(config, first, outputs, table.names)
    for need in needs:
        if need.role:
            outputs.setdefault(need.role, set()).add(need.output)
    reward: Reward | None = config.providers.get("reward")
    own_rows = reward is not None and reward.reads_texts
    readers = {*outputs, *(need.role for need in rewarding if not own_rows)}
    for need in rewarding:
        outputs.setdefault(need.role, set()).add(need.output)
    opponents = {name for evaluator in evaluators for name in evaluator.opponents}
    for name in opponents:
        outputs.setdefault(name, set()).add("logprobs_NT")
    unknown = [name for name in outputs if name not in config.roles]
    if unknown:
        kind, asker = _asker(unknown[0], config, [term for _, term in keyed])
        raise UsageError(
            f"the {kind} {type(asker).__name__} needs a role {unknown[0]!r}, but {type(config.algorithm).__name__} "
            f"has only {', '.join(config.roles)}; choose another {kind}, or another algorithm"
        )
    online = any(source != DATA for source in sources)
    temperature = config.sampling.temperature if online and config.sampling.temperature > 0 else 1.0
    given = [term.role for _, term in keyed if term.source == DATA and term.outputs & LANGUAGE]
    if given and temperature != 1:
        raise UsageError(
            f"the {given[0]} is trained on samples drawn at {run_option('sampling.temperature')} {temperature:g} "
            "and on data at temperature 1, but a role has one temperature; pass "
            f"{run_option('sampling.temperature', 1)}, or switch off the options that train on data (such as ptx)"
        )
    return {
        name: RoleSpec(
            name=name,
            options=_options_of(config, name),
            outputs=frozenset(outputs[name]),
            terms=tuple((key, term) for key, term in keyed if term.role == name),
            sampled=name in {*sources, *opponents},
            reads=name in readers,
            temperature=temperature,
            providers=table.providers(outputs[name]),
        )
        for name in outputs
    }


def _options_of(config: RunConfig, name: str) -> ModelOptions:
    """The options of a role, with the run's where they leave something to it."""
    options = config.roles[name]
    dtype = config.dtype if options.dtype == "run" else options.dtype
    return replace(options, model=_model_of(config, name), dtype=dtype, add_tokens=config.add_tokens)


def _asker(role: str, config: RunConfig, terms: list[Term]) -> tuple[str, object]:
    """Return the kind and the provider that needs a role; the algorithm where a term trains or samples it."""
    asking: list[tuple[str, frozenset[str], object]] = []
    for term in terms:
        asking += [("loss", term.loss.needs | term.outputs, term.loss)]
        asking += [("advantage", term.advantage.needs, term.advantage)] if term.advantage is not None else []
    asking += [("reward", each.needs, each) for _, each in config.provider_paths("reward")]
    for kind, needs, asker in asking:
        if role in {split_output(needs_.SHORT.get(name, name))[0] for name in needs}:
            return kind, asker
    opposed = [each for _, each in config.provider_paths("evaluator") if role in each.opponents]
    return ("evaluator", opposed[0]) if opposed else ("algorithm", config.algorithm)


def _model_of(config: RunConfig, name: str) -> str:
    """The model of a role: its own, else that of the role it tracks, else the run's.

    Raises:
        UsageError: none of them is given.
    """
    options = config.roles[name]
    tracked = config.roles.get(options.track.of) if isinstance(options, TrackingOptions) else None
    model = options.model or (tracked.model if tracked is not None else "") or config.model
    if not model:
        raise UsageError(
            f"no model is given: pass {run_option('model', 'NAME')} (a hub name, folder or GGUF file), or "
            f"{run_option('model', 'tiny')} to try"
        )
    return model


def _reward_needs(config: RunConfig, table: OutputTable) -> tuple[Need, ...]:
    """Return the outputs of roles that the reward reads.

    Raises:
        UsageError: it needs something else, or numbers per token of rows that are its own.
    """
    reward: Reward | None = config.providers.get("reward")
    if reward is None:
        return ()
    needs = tuple(needs_.resolve(name, config.algorithm.policy, reward, table.names) for name in sorted(reward.needs))
    for need in needs:
        if not need.role or (reward.reads_texts and needs_.per_token(need.output)):
            what = "numbers per completion of its own rows" if need.role else "outputs of roles, as <role>.<output>"
            raise UsageError(
                f"the reward {type(reward).__qualname__} needs {need.name!r}, but a reward can only read {what}"
            )
    return needs


def _optimizer_of(options: ModelOptions | None) -> OptimizerProvider | None:
    """The optimizer of a role that has options for one."""
    return options.optim if isinstance(options, TrainedOptions) else None
