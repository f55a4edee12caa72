"""Checksums of the segments of a file: each is of its own bytes, so that damage anywhere in a large file is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xxhash

from rlhf_core.checkpoint import manifest
from rlhf_core.checkpoint.manifest import find_damage, seal

CONTENT = bytes(range(250)) + b"tail"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sealed folder whose file has four segments of 64 bytes, the last one shorter."""
    monkeypatch.setattr(manifest, "SEGMENT", 64)
    monkeypatch.setattr(manifest, "BLOCK", 24)
    (tmp_path / "weights").write_bytes(CONTENT)
    seal(tmp_path)
    return tmp_path


def test_a_file_has_the_checksum_of_each_segment(folder: Path) -> None:
    entry = json.loads((folder / "manifest.json").read_text())["files"]["weights"]
    parts = [CONTENT[start : start + 64] for start in (0, 64, 128, 192)]
    assert entry == {"bytes": 254, "xxh3": [xxhash.xxh3_128_hexdigest(part) for part in parts]}
    assert find_damage(folder) == ""


@pytest.mark.parametrize("place", [0, 63, 64, 150, 253])
def test_a_flipped_byte_is_found_wherever_it_is(folder: Path, place: int) -> None:
    damaged = bytearray(CONTENT)
    damaged[place] ^= 1
    (folder / "weights").write_bytes(damaged)
    assert find_damage(folder) == "weights does not match its checksum"
