"""`rlhf-run merge-lora`: an adapter and its base as one model that needs no PEFT."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.contract.commands import Command
from rlhf_core.errors import UsageError
from rlhf_core.util.places import new_folder

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext

__all__ = ["MergeLora"]


@dataclass(frozen=True)
class MergeLora(Command):
    """Merge an adapter of a language or reward model into its base, as a folder that plain transformers loads."""

    adapter: str
    """the adapter: OUTPUT/model of a run, another folder, or a hub name"""
    output: str = ""
    """folder to write; must be new"""
    base: str = ""
    """model that the adapter belongs to; empty takes the one that the adapter names"""
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    """dtype of the written weights; `base` takes the base model's. The merge itself is computed in float32"""

    def __call__(self, context: CommandContext) -> int:
        from rlhf_core.models.loading.hub import resolve_name

        source = resolve_name(self.adapter)
        if source.kind != "adapter":
            raise UsageError(f"merge-lora {self.adapter}: this is a full model, not an adapter; use it directly")
        if not self.output:
            raise UsageError("merge-lora needs --output FOLDER for the merged model")
        output = new_folder("merge-lora --output", self.output)
        self._merge(Path(source.location), output)
        print(f"model saved in {output}")
        return 0

    def _merge(self, adapter: Path, output: Path) -> None:
        from rlhf_core.contract.options import ModelOptions
        from rlhf_core.models.build import set_pad
        from rlhf_core.models.export.card import Card, read_card
        from rlhf_core.models.export.folder import padding_like
        from rlhf_core.models.export.precision import saved_dtype
        from rlhf_core.models.heads.modules import HEADS_FILE
        from rlhf_core.models.loading.adapters import has_score, merge_adapter, read_base_model
        from rlhf_core.models.loading.end_tokens import find_end_tokens, listed_ends, save_ends
        from rlhf_core.models.loading.image_reader import load_reader
        from rlhf_core.models.loading.load import load_model, load_scorer
        from rlhf_core.models.loading.tokenizer import load_tokenizer
        from rlhf_core.models.loading.transformers_calls import no_progress_bars
        from rlhf_core.util.atomic_files import fresh_folder

        options, base = ModelOptions(), self.base or read_base_model(adapter)
        tokenizer, classifier = load_tokenizer(str(adapter), options), has_score(adapter)
        model: Any = load_scorer(base, options)[0] if classifier else load_model(base, options)
        reader = None if classifier else load_reader(base, options, tokenizer)
        model = merge_adapter(model, adapter)
        model.to(saved_dtype(self.dtype, base, options))
        if classifier:
            set_pad(model.config, tokenizer)
        save_ends(model, find_end_tokens(tokenizer, (), listed_ends(str(adapter), options)))
        with fresh_folder(output, replace=False) as folder, no_progress_bars():
            model.save_pretrained(folder)
            if reader is not None:
                reader.save(folder)
            else:
                padding_like(model, tokenizer).save_pretrained(folder)
            if (adapter / HEADS_FILE).is_file():
                copyfile(adapter / HEADS_FILE, folder / HEADS_FILE)
            card = replace(read_card(adapter) or Card(base, "LoRA"), note="The adapter is merged into the weights.")
            (folder / "README.md").write_text(card.text(type(model).__name__, False, classifier), encoding="utf-8")
