"""From names and options to a RunConfig, and back: the same from the command line, from TOML and from Python.

A file has one table per section, and `use` names the provider of a kind (`reward = "length"` is short for the table):

    steps = 20

    [algorithm]
    use = "grpo"

    [reward]
    use = "length"
    limit = 40

    [actor.optim]
    lr = 1e-5

`to_names` gives this tree as plain data, `from_names` builds the run from it in another process, `to_toml` writes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.config.callbacks import read_callbacks
from rlhf_core.config.given_model import FOLDER, GivenModel
from rlhf_core.config.length import check_length, with_given_length, without_unused_length
from rlhf_core.config.option_fields import Use, annotation_of, default_of, nested_dataclass, option_fields
from rlhf_core.config.parsing import Settings, parse_tree, put, read, use_of, with_spelling
from rlhf_core.config.python_values import from_python, function_name, python_text
from rlhf_core.config.schema import HELDOUT_LOSS, Schema, Section, unused_fields
from rlhf_core.config.value_types import MASK, given_by, is_secret, may_be_python, to_plain
from rlhf_core.contract.hooks import CHOSEN, OPTIONAL, SEVERAL
from rlhf_core.contract.options import RunConfig
from rlhf_core.errors import OptionError, UsageError, options_under, run_option, spell_options, text_of
from rlhf_core.option_text import OptionNames
from rlhf_core.plugins.provider_checks import class_of
from rlhf_core.util.repeats import number_repeats
from rlhf_core.util.secrets import redact_addresses, redact_tree

if TYPE_CHECKING:
    from rlhf_core.plugins.registry import Registry

__all__ = ["construct", "from_names", "make_config", "parse", "split_sections", "to_names", "to_toml"]


def parse(argv: Sequence[str], registry: Registry) -> RunConfig:
    """The run that `[algorithm] [flags]` describe.

    Raises:
        UsageError: states what is wrong and what to do.
    """
    return _build(*read(argv, registry), registry)


def make_config(
    algorithm: str | object,
    registry: Registry | None = None,
    *,
    tokenizer: Any = None,
    callbacks: Any = (),
    **overrides: Any,
) -> RunConfig:
    """A run from Python; exported as `rlhf_core.make_config`.

        from rlhf_core import Run, make_config

        config = make_config("grpo", model="tiny", steps=20, reward=count_digits, data=rows, actor={"optim": {"lr": 1e-5}})
        result = Run(config).train()

    Args:
        algorithm: a name, a provider instance, or a mapping with `use` and options.
        registry: where names are looked up; everything installed if absent.
        tokenizer: of a `model` that is a module; that of the module's own name if absent.
        callbacks: a function or a list of them, called after each step with any of `run`, `step` and `metrics`; or a
            mapping from observer hooks to functions.
        overrides: RunConfig's own fields; for a kind a name, a provider instance, or a mapping with `use` and options;
            for a role or `sampling` a mapping or an instance. Several evaluators or observers are a list of them. A reward
            may be a function or a list of rewards, data a list of dictionaries or a Dataset, and `model` a Hugging Face
            model, which is written to OUTPUT/base-model.

    Raises:
        UsageError: a value does not fit; the message states what to pass.
    """
    from rlhf_core.plugins.registry import default_registry

    registry = registry or default_registry()
    with spell_options(OptionNames(language="python")):
        check_length(overrides)
    model = overrides.get("model")
    given = None
    if model is not None and not isinstance(model, str):
        given = GivenModel(model, tokenizer)
        overrides["model"] = str(Path(overrides.get("output", RunConfig.output)) / FOLDER)
    elif tokenizer is not None:
        raise UsageError(
            "tokenizer works only with a model that is a module; a model given by name brings its own, so leave it out"
        )
    hooks = read_callbacks(callbacks)
    roles = _algorithm_class(algorithm, registry).roles
    tree, instances = _tree_and_instances({"algorithm": algorithm, **overrides}, roles, registry)
    schema, settings = parse_tree(tree, registry, instances=instances)
    made = {**instances, **{name: value for name, value in overrides.items() if name not in CHOSEN}}
    config = _build(with_spelling(schema, "python", classes=dict(_classes(made))), settings, registry)
    if given is not None:  # not before everything else fits
        given.write(config.output)
    return replace(config, callbacks=hooks)


def _tree_and_instances(
    values: Mapping[str, Any], roles: Collection[str], registry: Registry
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values from Python as a tree of names and options, and the ready-made providers among them by kind."""
    tree: dict[str, Any] = {}
    instances: dict[str, Any] = {}
    for name, given in values.items():
        chosen = name in CHOSEN and name not in roles
        value = from_python(name, given, registry) if chosen else given
        if not chosen or isinstance(value, (str, Mapping)):
            tree[name] = value
            continue
        if not isinstance(value, (list, tuple)):
            tree[name], instances[name] = registry.name_of(name, type(value)), value
            continue
        several = list(value)
        plain = [isinstance(each, (str, Mapping)) for each in several]
        tree[name] = [each if told else registry.name_of(name, type(each)) for told, each in zip(plain, several)]
        uses = number_repeats([use_of(each, name) for each in tree[name]])
        for told, use, each in zip(plain, uses, several, strict=True):
            if not told:
                instances[name if len(several) == 1 else f"{name}.{use}"] = each
    return tree, instances


def _classes(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """The class by the path of every options object among `values`, for messages."""
    for name, value in values.items():
        path = f"{above}.{name}".lstrip(".")
        if is_dataclass(value) and not isinstance(value, type):
            yield path, type(value).__name__
            yield from _classes({each.name: getattr(value, each.name) for each in option_fields(type(value))}, path)


def from_names(tree: Mapping[str, Any], registry: Registry | None = None) -> RunConfig:
    """The run that `to_names` described, in any process that has the same plugins."""
    from rlhf_core.plugins.registry import default_registry

    registry = registry or default_registry()
    return _build(*parse_tree(tree, registry), registry)


def to_names(config: RunConfig) -> dict[str, Any]:
    """`config` as plain names and options: it pickles, and `from_names` gives an equal configuration.

    Secrets are in it as they are; `to_toml` masks them.
    """
    return _tree(config, masked=False)


def to_toml(config: RunConfig) -> str:
    """The file that repeats the run: every option, resolved. Secrets are masked unless given as `env:NAME`.

    A value that only Python can give is named, and must be given from Python again.
    """
    import tomli_w

    called = [function_name(each) for functions in config.callbacks.values() for each in functions]
    head = f"# callbacks given from Python, which no file repeats: {', '.join(called)}\n" if called else ""
    return head + tomli_w.dumps(without_unused_length(_tree(config, masked=True)))


# ----------------------------------------------------------------------------------------------------------------------
# building
# ----------------------------------------------------------------------------------------------------------------------


def _build(schema: Schema, settings: Settings, registry: Registry) -> RunConfig:
    """The run of a schema with these settings."""
    made = construct(schema, with_given_length(settings))
    run: RunConfig = made[""]
    names = {kind: name for kind, name in schema.names.items() if name}
    uses = {path: use.name for section in schema.sections for path, use in section.uses.items()}
    given: dict[str, Any] = {"names": names, "uses": uses, "registry": registry, "option_names": schema.option_names}
    config = replace(run, algorithm=made["algorithm"], **given, **split_sections(schema, made))
    return config if "evaluator" in schema.declined else _with_heldout_loss(config, registry)


def _with_heldout_loss(config: RunConfig, registry: Registry) -> RunConfig:
    """`config` with the evaluator of held-out loss, where rows are held out of offline data and nothing else measures them."""
    offline = "data" in config.providers and "rollout" not in config.providers
    if not offline or "evaluator" in config.providers or not config.providers["data"].holds_out:
        return config
    evaluator = registry.resolve("evaluator", HELDOUT_LOSS)()
    return replace(
        config,
        providers={**config.providers, "evaluator": (evaluator,)},
        names={**config.names, "evaluator": HELDOUT_LOSS},
    )


def construct(schema: Schema, settings: Settings) -> dict[str, Any]:
    """The instance of every section, by prefix."""
    with spell_options(schema.option_names):
        return {section.prefix: _construct_section(section, settings) for section in schema.sections}


def split_sections(schema: Schema, made: Mapping[str, Any]) -> dict[str, Any]:
    """Return the roles' options and the providers that `construct` made, as a RunConfig holds them."""
    roles = {section.prefix: made[section.prefix] for section in schema.sections if section.prefix and not section.kind}
    providers: dict[str, Any] = {}
    for section in schema.sections:
        if section.kind in SEVERAL:
            providers[section.kind] = (*providers.get(section.kind, ()), made[section.prefix])
        elif section.kind and section.kind != "algorithm":
            providers[section.kind] = made[section.prefix]
    return {"roles": roles, "providers": providers}


def _construct_section(section: Section, settings: Settings) -> Any:
    """The instance of a section; errors speak of it by its title."""
    for option in section.options:
        if option.required and option.path not in settings:
            wanted = option.describe(run_option(option.path))
            raise UsageError(f"{section.title} needs {wanted}")
    try:
        return _construct(section.cls, section.base, section.prefix, settings, section.skip, section.uses)
    except OptionError:  # names the option
        raise
    except ValueError as error:  # a provider's __post_init__ refuses a value
        raise UsageError(f"{section.title}: {text_of(error)}" if section.prefix else text_of(error)) from error


def _construct(
    cls: type,
    base: Any,
    prefix: str,
    settings: Settings,
    skip: tuple[str, ...] = (),
    uses: Mapping[str, Use] | None = None,
) -> Any:
    """`base` with what is set under `prefix`; a new `cls` where there is no base, or only some of its values."""
    changes: dict[str, Any] = {}
    for each in option_fields(cls, skip):
        path = f"{prefix}.{each.name}".lstrip(".")
        if uses and path in uses:
            changes[each.name] = _construct(uses[path].cls, uses[path].base, path, settings)
            continue
        inner, _ = nested_dataclass(annotation_of(cls, each.name))
        if path in settings:
            changes[each.name] = settings[path]
        elif inner is not None and any(known.startswith(f"{path}.") for known in settings):
            default = default_of(each, base)
            changes[each.name] = _construct(inner, None if default is MISSING else default, path, settings)
    with options_under(f"/{prefix}"):
        if base is None or isinstance(base, Mapping):
            return cls(**{**(base or {}), **changes})
        return replace(base, **changes) if changes else base


# ----------------------------------------------------------------------------------------------------------------------
# and back
# ----------------------------------------------------------------------------------------------------------------------


def _tree(config: RunConfig, masked: bool) -> dict[str, Any]:
    """Every option of `config` as plain data."""
    names = config.names
    tree: dict[str, Any] = {
        "algorithm": {"use": names["algorithm"], **_plain_options(config.algorithm, "algorithm", masked)}
    }
    tree |= _plain_options(config, "", masked, unused_fields(names))
    tree |= {role: _plain_options(options, role, masked, uses=config.uses) for role, options in config.roles.items()}
    for kind, provider in config.providers.items():
        tree[kind] = {"use": names[kind]}
        several = provider if isinstance(provider, tuple) else (provider,)
        listed = names[kind].split(",")
        for name, own, each in zip(listed, number_repeats(listed), several, strict=True):
            plain = _plain_options(each, kind, masked)
            if len(several) == 1:
                tree[kind] |= plain
            else:
                put(tree[kind], name, own, plain)
    absent = (*SEVERAL, *(OPTIONAL if "rollout" in names else ()))
    return {**dict.fromkeys(absent, "none"), **tree}  # omissions are stated too: an algorithm may have usual ones


def _plain_options(
    options: Any, prefix: str, masked: bool, skip: tuple[str, ...] = (), uses: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The options of a dataclass as plain data, with the names of the providers inside it."""
    tree: dict[str, Any] = {}
    for each in option_fields(type(options), skip):
        value, path = getattr(options, each.name), f"{prefix}.{each.name}".lstrip(".")
        annotation = annotation_of(type(options), each.name)
        if nested_dataclass(annotation)[0] is not None and value is not None:
            use = {"use": uses[path]} if uses and path in uses else {}
            tree[each.name] = {**use, **_plain_options(value, path, masked)}
        elif masked and is_secret(annotation) and value and not str(value).startswith("env:"):
            tree[each.name] = MASK
        elif masked and given_by(annotation) == "python" and value is default_of(each, None):
            continue  # a file repeats it by leaving it out
        elif masked and may_be_python(annotation):
            tree[each.name] = _file_value(annotation, value)
        else:
            try:
                tree[each.name] = redact_tree(to_plain(value), redact_addresses) if masked else to_plain(value)
            except ValueError:
                raise UsageError(
                    f"{path} is a {type(value).__name__}, which cannot be stored in a file or sent to a worker; "
                    "give the provider a path or module:Class instead"
                ) from None
    return tree


def _file_value(annotation: Any, value: Any) -> Any:
    """A value that Python may have given, as a file has it: its parts as they are, or the text that represents them."""
    if given_by(annotation) == "python":
        return to_plain(None) if value is None else python_text(value)
    if isinstance(value, (list, tuple)):
        return [_file_value(Any, each) for each in value]
    try:
        return redact_tree(to_plain(value), redact_addresses)
    except ValueError:
        return python_text(value)


def _algorithm_class(given: Any, registry: Registry) -> type[Any]:
    """The class of an algorithm given as name, table or instance."""
    if isinstance(given, Mapping):
        given = given.get("use", "")
    name, instance = (given, None) if isinstance(given, str) else ("", given)
    return class_of("algorithm", name, instance, registry)
