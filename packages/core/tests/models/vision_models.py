"""Vision-language models of a few thousand random weights, with their processors, and images to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from rlhf_core.models.inputs.processor import _without_video
from rlhf_core.models.loading.byte_tokenizer import EOS, PAD, byte_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def llava(folder: Path, side: int = 8) -> str:
    """A LLaVA: each image becomes a square of `side` pixels, four tokens of it."""
    torch.manual_seed(0)
    tokenizer: Any = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    token = tokenizer.convert_tokens_to_ids("<image>")
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=side // 2,
        projection_dim=16,
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=token)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=side // 2,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    ).save_pretrained(folder)
    return str(folder)


def qwen(folder: Path) -> str:
    """A Qwen2-VL: patches of all images in one list, as many as an image's size asks for, and positions in three dimensions.

    Its processor has a part for video, which needs torchvision: written as the checkpoints on the hub have it.
    """
    torch.manual_seed(0)
    tokenizer: Any = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN)})
    start, end, image, video = (tokenizer.convert_tokens_to_ids(token) for token in QWEN)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 16,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    _without_video(Qwen2VLProcessor)(
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=1024
        ),
        tokenizer=tokenizer,
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    ).save_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text('{"video_processor_type": "Qwen2VLVideoProcessor"}')
    return str(folder)


def picture(path: Path, colour: str, size: tuple[int, int] = (20, 12)) -> str:
    """An image of one colour."""
    Image.new("RGB", size, colour).save(path)
    return path.name


def asked(text: str, *images: str, answer: str | None = None) -> dict[str, Any]:
    """A row: a chat whose user shows images and says something."""
    shown = [{"type": "image", "path": image} for image in images]
    user = {"role": "user", "content": [*shown, {"type": "text", "text": text}]}
    answered = [{"role": "assistant", "content": answer}] if answer is not None else []
    return {"messages": [user, *answered]}
