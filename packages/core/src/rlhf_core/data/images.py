"""Images of rows: the ways they are written down, their places in a chat, and the pixels.

An image is a part of a message, `{"type": "image"}` with `path`, `url` (of a file), `base64` or `image`, or is in a column
for images. All become `{"type": "image", "path": …}`, the path absolute, or `{"type": "image", "base64": …}`: plain values,
as a chat of text has them. The images of a column go where a message has `{"type": "image"}` alone, where its text has
`<image>`, or before the first user's text. Files are looked for when a row is read, and opened when it is tokenized.

Left out on purpose: downloading, and images that an answer would have to draw.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from rlhf_core.contract.batch import Message
from rlhf_core.errors import DataError, run_option

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["attach_images", "base_folder", "has_images", "image_part", "images_of", "make_paths_absolute", "open_image"]

Chat = tuple[Message, ...]
Part = dict[str, Any]

SOURCES = ("path", "url", "base64", "image", "image_url")
MARK = "<image>"
"""Placeholder of an image in a text, if a column has the images."""
HERE: Part = {"type": "image"}
"""Placeholder of an image in a message, if a column has the images."""
MAGIC = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
"""Beginnings of PNG, JPEG, GIF and WebP files in base64."""


def image_part(part: Mapping[str, Any]) -> Part:
    """A message's image in the one form, `HERE` if a column has it.

    Raises:
        ValueError: it locates the image in an unknown way, or in two ways.
    """
    given = [name for name in SOURCES if part.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"an image has {' and '.join(given)}; give only one of them")
    return _image(part[given[0]]) if given else dict(HERE)


def _image(value: Any) -> Part:
    """An image in the one form: a path, a file's URL, base64, bytes, what `datasets` has for one, or a Pillow image."""
    if isinstance(value, Mapping):  # OpenAI's image_url, or an undecoded image of `datasets`
        found = next((value[name] for name in ("url", "bytes", "path") if value.get(name) is not None), None)
        return _image(found)
    if isinstance(value, bytes) and value:
        return {"type": "image", "base64": base64.b64encode(value).decode()}
    if hasattr(value, "save") and hasattr(value, "size"):
        stream = io.BytesIO()
        value.save(stream, format="PNG")
        return _image(stream.getvalue())
    if not isinstance(value, str) or not value:
        raise ValueError(f"an image should be a path or base64, not {type(value).__name__}")
    scheme = value.partition(":")[0].lower()
    if scheme in ("http", "https"):
        raise ValueError(f"the image {value} is not on this machine; download it, and give its path")
    if scheme == "file":
        return {"type": "image", "path": unquote(urlsplit(value).path)}
    if scheme == "data" or (value.startswith(MAGIC) and len(value) > 64):
        return {"type": "image", "base64": value.rpartition(",")[2]}
    return {"type": "image", "path": value}


# ----------------------------------------------------------------------------------------------------------------------
# their places
# ----------------------------------------------------------------------------------------------------------------------


def attach_images(prompt: str | Chat, column: Any) -> str | Chat:
    """The prompt with the images of a column: one, or a list of them.

    Raises:
        ValueError: there are more or fewer places for images in the prompt than images.
    """
    several = isinstance(column, Sequence) and not isinstance(column, (str, bytes))
    images = [_image(value) for value in (column if several else [column]) if value is not None and value != ""]
    chat: Chat = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    places = sum(_places(message) for message in chat)
    if not images and not any(HERE in _parts(message) for message in chat):
        return prompt
    if not places:
        first = next((i for i, message in enumerate(chat) if message["role"] == "user"), None)
        if first is None:
            raise ValueError("the prompt has no user message for its images")
        asked = {**chat[first], "content": [*images, *_parts(chat[first])]}
        return (*chat[:first], asked, *chat[first + 1 :])
    if places != len(images):
        raise ValueError(f"the prompt has places for {places} images, but the row has {len(images)}")
    rest = iter(images)
    return tuple(_fill_places(message, rest) for message in chat)


def _parts(message: Message) -> list[Part]:
    content = message.get("content")
    return content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []


def _places(message: Message) -> int:
    """Return how many images of a column belong to a message."""
    if message["role"] == "assistant":
        return 0
    return sum(part["text"].count(MARK) if part["type"] == "text" else part == HERE for part in _parts(message))


def _fill_places(message: Message, images: Iterator[Part]) -> Message:
    """The message with the next images in its places."""
    if not _places(message):
        return message
    parts: list[Part] = []
    for part in _parts(message):
        if part["type"] != "text":
            parts.append(next(images) if part == HERE else part)
            continue
        for i, text in enumerate(part["text"].split(MARK)):
            parts += [next(images)] if i else []
            parts += [{"type": "text", "text": text}] if text else []
    return {**message, "content": parts}


def has_images(chat: object) -> bool:
    """Return True if a prompt or completion contains an image."""
    return any(True for _ in images_of(chat))


def images_of(chat: object) -> Iterator[Part]:
    """The images of a prompt or completion, in order."""
    if isinstance(chat, tuple):
        for message in chat:
            if isinstance(content := message.get("content"), list):
                yield from (part for part in content if part["type"] == "image")


def make_paths_absolute(chat: Chat, origin: str, most: int) -> Chat:
    """The chat with absolute paths of its images.

    Raises:
        ValueError: a file is not there, an image is nowhere, or there are more than `most` (0: any number).
    """
    count = sum(1 for _ in images_of(chat))
    if most and count > most:
        raise ValueError(f"the prompt has {count} images, more than {run_option('data.max_images')} {most}")
    folder = base_folder(origin)
    return tuple(
        {**message, "content": [_make_path_absolute(part, folder) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in chat
    )


def _make_path_absolute(part: Part, folder: Path) -> Part:
    if part == HERE:
        raise ValueError("a message has an image without path, url or base64, and there is no column of images for it")
    if "path" not in part or part["type"] != "image":
        return part
    path = (folder / part["path"]).absolute()
    if not path.is_file():
        raise ValueError(f"there is no image file {path}")
    return {**part, "path": str(path)}


def base_folder(origin: str) -> Path:
    """The folder that paths in a row are relative to: its file's, or the set's; `origin` as `Example` has it."""
    place = Path(origin.rpartition(":")[0].rpartition("@")[2])
    return place if place.is_dir() else place.parent


# ----------------------------------------------------------------------------------------------------------------------
# pixels
# ----------------------------------------------------------------------------------------------------------------------


def open_image(part: Part, origin: str) -> Image:
    """The image as the camera held it, in color.

    Raises:
        DataError: it cannot be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        source = part["path"] if "path" in part else io.BytesIO(base64.b64decode(part["base64"], validate=True))
        with Image.open(source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
        what = part.get("path", "in base64")
        reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{origin}: the image {what} cannot be read: {reason}") from None
