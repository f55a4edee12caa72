"""A name that the registry does not have, or whose target does not work, is answered with what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from made_plugins import GOOD, Install, install, plugin

from rlhf_core import plugin as core
from rlhf_core.errors import MissingPackage, PluginError, UnknownName, UsageError
from rlhf_core.plugins.known_packages import INSTALL
from rlhf_core.plugins.registry import Registry

__all__ = ["install"]  # a fixture


def test_an_unknown_name_is_answered_with_the_near_and_the_installed_ones() -> None:
    with pytest.raises(UnknownName) as caught:
        Registry(autoload=False).resolve("reward", "lenght")
    installed = ", ".join(sorted(core.rlhf_reward()))
    assert str(caught.value) == f"no reward is called 'lenght' (did you mean 'length'?); installed: {installed}"


def test_a_known_name_whose_package_is_absent_says_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_core.plugins.registry.INSTALL", {"rollout": {"warp": "rlhf-rollout-warp"}})
    with pytest.raises(MissingPackage) as caught:
        Registry(autoload=False).resolve("rollout", "warp")
    installed = ", ".join(sorted(core.rlhf_rollout()))
    assert str(caught.value) == (
        f"rollout 'warp' comes with rlhf-rollout-warp: python3 -m pip install rlhf-rollout-warp; installed: {installed}"
    )


def test_a_known_name_whose_plugin_is_not_loaded_says_so(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("rlhf-warp", GOOD, "warp")
    monkeypatch.setattr("rlhf_core.plugins.registry.INSTALL", {"reward": {"terse": "rlhf-warp"}})
    with pytest.raises(UnknownName, match="comes with rlhf-warp, whose plugin 'warp' is not loaded: drop -p no:warp"):
        Registry(autoload=False).resolve("reward", "terse")


def test_an_unknown_name_mentions_the_plugins_that_may_have_had_it(install: Install) -> None:
    install("rlhf-torn", "import package_that_is_absent", "torn", "9.9")
    registry = Registry()
    with pytest.raises(UnknownName) as caught:
        registry.resolve("reward", "xyzzy")
    assert str(caught.value).endswith("; plugins that failed to load: torn (see rlhf-run plugins)")
    with pytest.raises(UnknownName) as caught:
        registry.resolve("reward", "torn")
    assert "; plugin 'torn' of rlhf-torn 9.9 failed to load: ModuleNotFoundError: No module" in str(caught.value)
    with pytest.raises(UnknownName) as caught:
        registry.resolve("reward", "lenght")
    assert "torn" not in str(caught.value), "a slip has nothing to do with it"


@pytest.mark.parametrize("hook", ["rlhf_frobnicator", "rlhf_dashboard"])
def test_a_hook_that_resembles_none_is_not_compared_by_the_prefix_of_all(hook: str) -> None:
    with pytest.raises(PluginError) as caught:
        Registry(autoload=False).register(plugin(**{hook.removeprefix("rlhf_"): {}}), "mine")
    assert str(caught.value).startswith(f"{hook}() is not a hook; hooks are rlhf_data, ")


def test_a_target_that_cannot_be_imported_names_kind_provider_and_distribution() -> None:
    registry = Registry(autoload=False)
    registry.register(plugin(loss={"gone": "absent_module:Loss"}), "mine", "rlhf-mine", "0.3")
    with pytest.raises(MissingPackage) as caught:
        registry.resolve("loss", "gone")
    assert str(caught.value) == (
        "loss 'gone' of rlhf-mine 0.3 needs the module 'absent_module', which is not installed"
    )


def test_the_table_of_names_and_packages_is_what_the_packages_provide() -> None:
    tool = Path(__file__).parents[4] / "tools/install_table.py"
    done = subprocess.run([sys.executable, str(tool), "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert INSTALL["rollout"]["vllm"] == "rlhf-rollout-vllm"
    assert INSTALL["algorithm"]["grpo"] == "rlhf-algos"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "absent_module:X",
            "reward absent_module:X: no module is called 'absent_module' in the working folder or the environment",
        ),
        ("json:JSONDecodr", "reward json:JSONDecodr: json has no 'JSONDecodr' (did you mean 'JSONDecoder'?)"),
        ("json:", "reward json:: expected a provider's name or module:Class"),
        ("json:JSONDecoder", "reward json:JSONDecoder is not a frozen dataclass"),
    ],
)
def test_a_local_target_that_does_not_work_says_why(target: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Registry(autoload=False).resolve("reward", target)
    assert str(caught.value).startswith(message)


def test_an_error_inside_the_users_module_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("users_module.py").write_text("import package_that_is_absent")
    with pytest.raises(ModuleNotFoundError, match="package_that_is_absent"):
        Registry(autoload=False).resolve("reward", "users_module:Anything")
