"""A vision-language checkpoint's processor: from a rendered prompt and its images to tokens and tensors, and back to the disk.

Images are prepared by Pillow and NumPy, whatever else is installed, so that the same image gives the same numbers on every
machine. The tokenizer is the role's own. Where the processor has a part for video that cannot be loaded (it needs torchvision),
it is used without, and the checkpoint's settings for video are copied when it is saved.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import DataError, MissingPackage, UsageError
from rlhf_core.models.inputs.images import PER_TOKEN

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.contract.options import ModelOptions

__all__ = ["ImageReader"]

VIDEO = "video_processor"
VIDEO_FILE = "video_preprocessor_config.json"


class ImageReader:
    """Reader of prompts with images for one model.

    Args:
        place: what transformers loads from.
        options: of the role.
        tokenizer: of the role.
        token: the placeholder of a piece of an image.
    """

    def __init__(self, place: str, options: ModelOptions, tokenizer: PreTrainedTokenizerBase, token: int) -> None:
        if importlib.util.find_spec("PIL") is None:
            raise MissingPackage("a vision-language model needs a package: pip install 'rlhf-core[images]'")
        self.place, self.options, self.tokenizer, self.token = place, options, tokenizer, token

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageReader, (self.place, self.options, self.tokenizer, self.token)

    @cached_property
    def processor(self) -> Any:
        """The Hugging Face processor.

        Raises:
            UsageError: the checkpoint has none that can be used.
        """
        from transformers.utils import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            processor = self._load()
        except (OSError, ValueError, ImportError, AttributeError, TypeError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(f"cannot load the processor of {self.place!r}: {first}") from error
        finally:
            logging.set_verbosity(verbosity)
        if not hasattr(processor, "image_processor"):
            raise UsageError(f"{self.place!r} has no image processor; save its AutoProcessor in the same folder")
        processor.tokenizer = self.tokenizer
        return processor

    def _load(self) -> Any:
        from transformers import AutoProcessor

        if importlib.util.find_spec("torchvision") is None and (kind := self._kind()) is not None:
            return _without_video(kind).from_pretrained(self.place, backend="pil")
        return AutoProcessor.from_pretrained(
            self.place, backend="pil", trust_remote_code=self.options.trust_remote_code
        )

    def _kind(self) -> Any:
        """The processor's class, if it is one of transformers' with a part for video."""
        from transformers import AutoConfig
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

        config = AutoConfig.from_pretrained(self.place, trust_remote_code=self.options.trust_remote_code)
        kind: Any = PROCESSOR_MAPPING.get(type(config), None)
        return kind if kind is not None and VIDEO in kind.get_attributes() else None

    @property
    def template(self) -> str | dict[str, str] | None:
        """The chat template, which places the images."""
        found: str | dict[str, str] | None = getattr(self.processor, "chat_template", None)
        return found or self.tokenizer.chat_template

    def __call__(self, text: str, images: Sequence[Image], origin: str) -> tuple[list[int], Mapping[str, Tensor]]:
        """The tokens of a rendered prompt, and what the model reads for its images.

        Raises:
            DataError: the template did not make a place for each image.
        """
        mark = getattr(self.processor, "boi_token", None) or getattr(self.processor, "image_token", "")
        if mark and (places := text.count(mark)) != len(images):
            raise DataError(
                f"{origin}: the rendered prompt has places ({mark}) for {places} images, but the row has {len(images)}"
            )
        try:
            found = self.processor(text=[text], images=[list(images)], return_tensors="pt", add_special_tokens=False)
        except (ValueError, TypeError, IndexError, StopIteration) as error:
            raise DataError(f"{origin}: the images cannot be prepared: {' '.join(str(error).split())}") from None
        ids: list[int] = found["input_ids"][0].tolist()
        if self.token not in ids:
            raise DataError(f"{origin}: the prompt's tokens do not include the image token (id {self.token})")
        tensors = {name: each for name, each in found.items() if name not in ("input_ids", "attention_mask")}
        return ids, {name: each[0] if name.endswith(PER_TOKEN) else each for name, each in tensors.items()}

    def save(self, folder: Path, template: str = "") -> None:
        """Write the processor, its tokenizer and template, or another `template`."""
        processor = copy.deepcopy(self.processor) if template else self.processor
        if template:
            processor.chat_template = processor.tokenizer.chat_template = template
        processor.save_pretrained(str(folder))
        if VIDEO not in self.processor.get_attributes() and (kept := self._video()):
            (folder / VIDEO_FILE).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")

    def _video(self) -> Mapping[str, Any] | None:
        """Return the checkpoint's settings for video."""
        from transformers.utils.hub import cached_file

        for name in ("processor_config.json", VIDEO_FILE):
            path = cached_file(self.place, name, _raise_exceptions_for_missing_entries=False)
            told = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
            if found := told.get(VIDEO) if name.startswith("processor") else told:
                return dict(found)
        return None


def _without_video(kind: Any) -> Any:
    """The class of processors without its part for video."""

    def attributes(cls: Any) -> list[str]:
        return [name for name in super(still, cls).get_attributes() if name != VIDEO]

    still: Any = type(kind.__name__, (kind,), {"get_attributes": classmethod(attributes)})
    return still
