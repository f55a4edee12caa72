"""Publish OUTPUT/model when a run ends: its card reports how it was trained and how it performs, and it goes to the
Hugging Face hub if that was asked for.

Uploads are private, and the token is the environment's (HF_TOKEN) or that of `hf auth login`; it is no option, so that no file
of a run holds it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.config.python_values import python_text, text_of_value
from rlhf_core.contract.options import TrainedOptions
from rlhf_core.errors import OptionError, UsageError
from rlhf_core.util.atomic_files import write_text

if TYPE_CHECKING:
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.contract.roles import Role
    from rlhf_core.contract.run_view import RunView

__all__ = ["check_hub", "export_best", "publish"]

BEST = "model-best"
"""The folder of the best checkpoint's policy, by --keep-best."""
AVERAGE = "These weights are an exponential moving average; evaluations were made with the trained weights themselves."


def check_hub(config: RunConfig) -> None:
    """Check that an upload can work before anything is trained for it.

    Raises:
        UsageError: no user is logged in.
    """
    if not config.push_to_hub:
        return
    from huggingface_hub import get_token

    if get_token() is None:
        raise OptionError("/push_to_hub", f"{config.push_to_hub} needs a login: set HF_TOKEN, or run hf auth login")


def export_best(checkpoint: Path | None, policy: Role, output: Path) -> None:
    """With `--keep-best`, write the policy of the best checkpoint to OUTPUT/model-best; the role then holds its weights."""
    if checkpoint is not None:
        policy.load(str(checkpoint / "roles" / policy.name))
        policy.export(str(output / BEST))


def publish(run: RunView) -> None:
    """Complete the cards of the exported folders and upload the model if asked."""
    homes = {"model": run.config.push_to_hub or "."}
    for name, role in {"model": run.plan.policy, **{name: name for name in run.plan.exports}}.items():
        options = run.plan.roles[role].options
        instead = isinstance(options, TrainedOptions) and options.ema > 0 and options.ema_export == "model"
        write_card(run, run.output / name, role, AVERAGE if instead else "", homes.get(name, "."))
        average = run.output / f"{name}-ema"
        if average.is_dir():
            write_card(run, average, role, AVERAGE)
    if run.config.keep_best and (run.output / BEST).is_dir():
        write_card(run, run.output / BEST, run.plan.policy, f"The best checkpoint by {run.config.keep_best}.")
    if run.config.push_to_hub:
        _push(run.output / "model", run.config.push_to_hub)


def write_card(run: RunView, folder: Path, role: str, note: str, home: str = ".") -> None:
    """Complete the card of an exported folder; `home` is its name on the hub if it goes there."""
    from rlhf_core.models.export.card import Card

    card = Card(
        base=run.plan.roles[role].options.model,
        algorithm=run.config.names.get("algorithm", ""),
        steps=run.step,
        data=_describe_data(run),
        evaluation=run.evaluations[-1][1] if run.evaluations else {},
        note=note,
        home=home,
    )
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        classifier = json.loads(adapter.read_text(encoding="utf-8"))["task_type"] == "SEQ_CLS"
        write_text(folder / "README.md", card.text("LoRA", True, classifier))
    elif (folder / "config.json").is_file():  # what simulates a model has none
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        write_text(folder / "README.md", card.text(name, False, name.endswith("ForSequenceClassification")))


def _describe_data(run: RunView) -> str:
    """The data in words: its reader, and what that cannot do without. Of paths, only the last part."""
    provider = run.config.providers.get("data")
    given = [
        _in_words(getattr(provider, each.name))
        for each in (dataclasses.fields(provider) if dataclasses.is_dataclass(provider) else ())
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    ]
    names = ", ".join(Path(value).name if Path(value).exists() else value for value in given)
    rows = f", {run.config.batch_size} rows per step"
    return f"Read by `{run.config.names.get('data', '')}`{': ' + names if names else ''}{rows}."


def _in_words(value: Any) -> str:
    """An option as text; of rows and other objects of Python the kind alone."""
    return value if isinstance(value, str) else text_of_value(python_text(value))


def _push(folder: Path, name: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Trained by rlhf-core")
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{folder} is saved, but the upload to the hub failed: {first}; try again with hf upload {name} {folder}"
        ) from error
