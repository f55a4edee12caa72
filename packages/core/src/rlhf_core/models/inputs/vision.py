"""Models that read images and text: their inputs in addition to tokens, in one common form.

A processor (`models.inputs.processor`) makes a prompt with images into tokens, some of which are pieces of the images, and
tensors by name: `pixel_values` and whatever else its model asks for. Those go with each sample as they are; a micro-batch has
them one after another along the first dimension, whether that counts images (LLaVA), patches of all images (Qwen2-VL) or
samples (Idefics). Smaller tensors are padded with zeros, as processors themselves do. Names that end in
`token_type_ids` have one number per token and the layout of tokens.

A token that stands for a piece of an image means nothing in a completion, yet a policy can sample it. It is read as the token
0 then, in training and while sampling alike, and keeps its own log-probability.

Rows with images are never packed: positions of images (M-RoPE) and their attention are a model's own, and begin with each row.

Left out on purpose: video and audio; scalar heads on such models (critics, reward models); encoders that a decoder attends to.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.models.inputs.arrange import Inputs
    from rlhf_core.models.inputs.images import Images
    from rlhf_core.models.inputs.processor import ImageReader

__all__ = ["Vision", "is_vision", "placeholder"]

READ_AS = 0
"""The token that an image's token is read as in a completion."""


def is_vision(config: Any) -> bool:
    """Return True if a config is a vision-language model's: a decoder with tokens for images."""
    from transformers import AutoModelForImageTextToText

    known = type(config) in AutoModelForImageTextToText._model_mapping
    return (
        known
        and hasattr(config, "vision_config")
        and placeholder(config) is not None
        and not _is_encoder_decoder(config)
    )


def placeholder(config: Any) -> int | None:
    """The placeholder token of a piece of an image."""
    found: int | None = getattr(config, "image_token_id", None)
    return found


def _is_encoder_decoder(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


@dataclass(frozen=True)
class Vision:
    """Image inputs of one model.

    Args:
        reader: of its prompts.
        token: the placeholder of a piece of an image.
    """

    reader: ImageReader
    token: int

    def read(self, inputs: Inputs) -> Inputs:
        """The rows as the model reads them: completions show no images."""
        ids = inputs.ids_NS.flatten()
        said = inputs.states_M[ids[inputs.states_M + 1] == self.token] + 1
        if not len(said):
            return inputs
        return replace(inputs, ids_NS=ids.index_fill(0, said, READ_AS).view_as(inputs.ids_NS))

    def replace_image_tokens(self, tokens: Tensor) -> Tensor:
        """Sampled tokens as the model reads them."""
        return tokens.masked_fill(tokens == self.token, READ_AS)

    def arguments(self, images: Images, model: Any) -> dict[str, Tensor]:
        """Arguments of `model`'s forward pass over rows with these images, in its own names."""
        like = {"device": model.device, "dtype": model.dtype}
        return {
            name: each.to(**like) if each.is_floating_point() else each.to(model.device)
            for name, each in images.items()
        }

    def positions(self, body: Any, ids_RL: Tensor, mask_RL: Tensor, images: Images) -> tuple[Tensor, Tensor] | None:
        """Positions of prompts where an image takes another number of them than it has tokens (M-RoPE), and how far the next
        token's is from the number of tokens (R,); None where positions simply count."""
        if not images or not hasattr(body, "get_rope_index"):
            return None
        known = inspect.signature(body.get_rope_index).parameters
        own = {name: each for name, each in images.items() if name in known}
        position, shift_R1 = body.get_rope_index(ids_RL, **own, attention_mask=mask_RL.long())
        return position, shift_R1.squeeze(1)
