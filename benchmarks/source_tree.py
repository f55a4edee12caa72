"""Running from the source tree with nothing installed: the packages' sources, their entry points, and wheels carried along.

What is not installed has no entry points and no version, and both are how plugins are found. `activate` writes them beside
the sources, as pip would: a folder with `NAME.dist-info` of every package, made from its pyproject.toml. It goes in front of
the module search path, in child processes too.

    python -c "import sys; sys.path.insert(0, 'benchmarks'); import source_tree; source_tree.activate()"

Wheels that lie in a folder (`.whl`) are unpacked beside them, so that pure-Python packages can be carried to a machine
without a network. An installed package wins against a wheel.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

__all__ = ["ROOT", "WHEELS", "activate", "download_line", "missing_wheels"]

ROOT = Path(__file__).resolve().parents[1]

WHEELS = ".whl"
"""The folder with wheels, in the repository's root; it is in no commit."""

CARRIED = {
    "tomli_w": ("tomli-w", "core: writes config.toml"),
    "xxhash": ("xxhash", "core: checksums"),
    "pluggy": ("pluggy", "core: finds plugins"),
    "pytest": ("pytest", "the tests marked gpu"),
    "hypothesis": ("hypothesis", "tests that draw their inputs"),
    "peft": ("peft", "adapters that come as PEFT folders"),
}
"""Modules that a machine with torch and transformers may lack: the distribution, and who needs it."""

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def activate(folder: Path | None = None, wheels: Path | None = None) -> Path:
    """Put the sources of all packages on the path of this process and of those that it starts.

    Args:
        folder: where entry points are written; a temporary folder if absent.
        wheels: folder whose wheels are unpacked there; `.whl` of the repository if absent. It need not exist.

    Returns:
        The folder.
    """
    folder = folder or Path(tempfile.mkdtemp(prefix="rlhf-source-tree-"))
    for project in sorted(ROOT.glob("packages/*/pyproject.toml")):
        _write_metadata(folder, tomllib.loads(project.read_text(encoding="utf-8"))["project"])
    for wheel in sorted((wheels or ROOT / WHEELS).glob("*.whl")):
        if not importlib.util.find_spec(wheel.name.split("-")[0]):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
    paths = [str(folder), *(str(path) for path in sorted(ROOT.glob("packages/*/src")))]
    sys.path[:0] = [path for path in paths if path not in sys.path]
    importlib.invalidate_caches()
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *(path for path in inherited if path and path not in paths)])
    return folder


def _write_metadata(folder: Path, project: dict[str, object]) -> None:
    """Write what an installed distribution tells of itself: name, version, needs and entry points."""
    name, version = project["name"], project["version"]
    place = folder / f"{str(name).replace('-', '_')}-{version}.dist-info"
    place.mkdir(parents=True, exist_ok=True)
    lines = ["Metadata-Version: 2.3", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {need}" for need in project.get("dependencies", [])]  # type: ignore[attr-defined]
    for extra, needs in project.get("optional-dependencies", {}).items():  # type: ignore[attr-defined]
        lines += [f"Provides-Extra: {extra}", *(f"Requires-Dist: {need}; extra == '{extra}'" for need in needs)]
    (place / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    groups = project.get("entry-points", {})
    text = [
        line
        for group, points in groups.items()  # type: ignore[attr-defined]
        for line in (f"[{group}]", *(f"{key} = {value}" for key, value in points.items()))
    ]
    (place / "entry_points.txt").write_text("\n".join(text) + "\n", encoding="utf-8")


def missing_wheels() -> dict[str, str]:
    """Return the distributions that are needed and absent here, each with who needs it."""
    return {name: why for module, (name, why) in CARRIED.items() if importlib.util.find_spec(module) is None}


def download_line(names: list[str], python: str = "3.12") -> str:
    """Return the pip command that fetches wheels of `names` for a Linux machine with this Python."""
    platforms = " ".join(f"--platform {each}" for each in PLATFORMS)
    return (
        f"python3 -m pip download --no-deps --only-binary=:all: --python-version {python} --implementation cp {platforms} "
        f"-d {WHEELS} {' '.join(names)}"
    )
