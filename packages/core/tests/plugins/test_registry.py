"""The registry finds plugins, survives broken ones, and says what to do about a name it does not have."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_plugins import GOOD, Fake, Install, install, plugin

from rlhf_core import plugin as core
from rlhf_core.cli import main
from rlhf_core.contract.hooks import hookimpl
from rlhf_core.errors import NameConflict, PluginError, UnknownName, UsageError
from rlhf_core.plugins.registry import Registry

__all__ = ["install"]  # a fixture


# ----------------------------------------------------------------------------------------------------------------------
# finding
# ----------------------------------------------------------------------------------------------------------------------


def test_an_installed_plugin_is_found_with_its_distribution_and_version(install: Install) -> None:
    install("rlhf-terse", GOOD, "terse", "1.2")
    registry = Registry()
    assert registry.resolve("reward", "terse").__name__ == "Terse"
    found = registry.provenance("reward", "terse")
    assert (found.name, found.distribution, found.version) == ("terse", "rlhf-terse", "1.2")
    assert not registry.broken_plugins


def test_built_ins_come_through_the_same_hooks_and_name_core() -> None:
    registry = Registry(autoload=False)
    assert list(registry.table("reward")) == sorted(core.rlhf_reward())
    assert registry.provenance("reward", "length").distribution == "rlhf-core"
    assert registry.resolve("reward", "length").__name__ == "Length"


def test_every_built_in_name_leads_to_a_provider() -> None:
    registry = Registry(autoload=False)
    tables = [registry.table(kind) for kind in ("data", "rollout", "reward", "strategy", "launcher", "evaluator")]
    for entry in (entry for table in tables for entry in table.values()):
        assert callable(registry.resolve(entry.kind, entry.name))


def test_a_string_target_is_imported_when_it_is_chosen_and_not_before(install: Install) -> None:
    install(
        "heavy-impl", GOOD.replace("@hookimpl", "").replace("def rlhf_reward", "def _unused"), "not-a-plugin-module"
    )
    hook = "from rlhf_core import hookimpl\n@hookimpl\ndef rlhf_reward():\n    return {'late': 'heavy_impl:Terse'}\n"
    install("rlhf-light", hook, "light")
    registry = Registry(blocked=["not-a-plugin-module"])
    assert "heavy_impl" not in sys.modules
    assert registry.resolve("reward", "late").__module__ == "heavy_impl"


def test_module_and_class_name_a_provider_without_packaging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("local_rewards.py").write_text(GOOD)
    registry = Registry(autoload=False)
    assert registry.resolve("reward", "local_rewards:Terse").__name__ == "Terse"
    assert str(registry.provenance("reward", "local_rewards:Terse")) == "(local)"
    assert sys.path[0] == str(tmp_path)


def test_the_name_of_a_class_is_its_registered_one_else_its_path() -> None:
    registry = Registry(autoload=False)
    registry.register(plugin(reward={"fake": Fake}), "mine")
    assert registry.name_of("reward", Fake) == "fake"
    assert registry.name_of("reward", registry.resolve("reward", "length")) == "length"
    assert registry.name_of("loss", Fake) == "made_plugins:Fake"


# ----------------------------------------------------------------------------------------------------------------------
# isolating
# ----------------------------------------------------------------------------------------------------------------------

BREAKS = {
    "import-fails": ("import package_that_is_absent", "ModuleNotFoundError: No module named 'package_that_is_absent'"),
    "exits": ("import sys\nsys.exit('I need Windows')", "SystemExit: I need Windows"),
    "misspelt-hook": (
        GOOD.replace("rlhf_reward", "rlhf_rewards"),
        "rlhf_rewards() is not a hook (did you mean 'rlhf_reward'?) (rlhf_misspelt_hook.py, line 12)",
    ),
    "forgot-the-mark": (GOOD.replace("@hookimpl", ""), "rlhf_reward() lacks @hookimpl"),
    "takes-an-argument": (GOOD.replace("rlhf_reward()", "rlhf_reward(config)"), "Argument(s) {'config'} are declared"),
    "returns-a-list": (GOOD.replace('{"terse": Terse}', "[Terse]"), "must return {name: provider}, not list"),
    "bad-name": (GOOD.replace('"terse"', '"very terse"'), "names are letters, digits and _ . + -"),
    "bad-target": (GOOD.replace("Terse}", "'terse'}"), "gives 'terse' as 'terse', which is not 'module:Class'"),
    "no-dataclass": (GOOD.replace("Terse}", "int}"), "neither a dataclass nor 'module:Class'"),
    "raises": (GOOD.replace("return {", "raise OSError('no disk'); {"), "OSError: no disk"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_plugin_is_listed_with_its_reason_and_the_rest_work(install: Install, case: str) -> None:
    source, reason = BREAKS[case]
    install(f"rlhf-{case}", source, case, "9.9")
    install("rlhf-terse2", GOOD, "terse2")
    registry = Registry()
    (broken,) = registry.broken_plugins
    assert str(broken).startswith(f"plugin '{case}' of rlhf-{case} 9.9 failed to load: ")
    assert reason in str(broken)
    assert "\n" not in str(broken)
    assert registry.provenance("reward", "terse").distribution == "rlhf-terse2"
    assert case not in registry.plugins


def test_a_broken_plugin_leaves_nothing_behind(install: Install) -> None:
    two = GOOD + "\n@hookimpl\ndef rlhf_step_end():\n    raise OSError\n\n@hookimpl\ndef rlhf_loss():\n    return 3\n"
    install("rlhf-half", two, "half")
    registry = Registry()
    assert len(registry.broken_plugins) == 1
    assert "terse" not in registry.table("reward")
    assert "half" not in [each.plugin_name for each in registry.hook.rlhf_step_end.get_hookimpls()]


def test_strict_mode_raises_what_would_be_listed(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("rlhf-strict", "import package_that_is_absent", "strict")
    monkeypatch.setenv("RLHF_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError, match="plugin 'strict' of rlhf-strict 1.0 failed to load") as caught:
        Registry()
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_two_distributions_with_one_entry_point_name_are_both_reported(install: Install) -> None:
    install("rlhf-first", GOOD, "same")
    install("rlhf-second", GOOD.replace('"terse"', '"other"'), "same")
    registry = Registry()
    (broken,) = registry.broken_plugins
    assert {registry.plugins["same"].distribution, broken.plugin.distribution} == {"rlhf-first", "rlhf-second"}
    assert str(registry.plugins["same"]) in str(broken)


def test_a_clash_matters_only_to_whoever_chooses_the_name(install: Install) -> None:
    install("rlhf-one", GOOD, "one")
    install("rlhf-two", GOOD, "two", "2.0")
    registry = Registry()
    assert registry.resolve("reward", "length")
    assert [entry.name for entries in registry.conflicts for entry in entries] == ["terse", "terse"]
    with pytest.raises(NameConflict, match="choose 'one/terse' or 'two/terse', or block one with -p no:two") as caught:
        registry.resolve("reward", "terse")
    assert "rlhf-one 1.0 (plugin 'one')" in str(caught.value)
    assert "rlhf-two 2.0 (plugin 'two')" in str(caught.value)
    assert Registry(blocked=["two"]).resolve("reward", "terse").__module__ == "rlhf_one"


def test_a_name_of_core_that_a_stranger_provides_too_can_still_be_chosen(install: Install) -> None:
    """Else one installed package could take `--reward length` away from everybody."""
    install("rlhf-grab", GOOD.replace('"terse"', '"length"'), "grab")
    registry = Registry()
    with pytest.raises(NameConflict, match="choose 'core/length' or 'grab/length', or block one with -p no:grab"):
        registry.resolve("reward", "length")
    assert registry.resolve("reward", "core/length").__module__ == "rlhf_core.reward.length"
    assert registry.resolve("reward", "grab/length").__module__ == "rlhf_grab"
    assert registry.provenance("reward", "grab/length").distribution == "rlhf-grab"
    assert registry.name_of("reward", registry.resolve("reward", "core/length")) == "core/length"
    assert Registry(blocked=["grab"]).resolve("reward", "length").__module__ == "rlhf_core.reward.length"
    with pytest.raises(UnknownName, match="no reward is called 'grab/regex'"):
        registry.resolve("reward", "grab/regex")


def test_an_exception_in_an_observer_says_whose_it_is() -> None:
    def failing(step: int) -> None:
        raise OSError("disk full")

    failing.__name__ = "rlhf_step_end"
    registry = Registry(autoload=False, blocked=["console", "files"])
    registry.register(SimpleNamespace(rlhf_step_end=hookimpl(failing)), "tracker")
    registry.register(SimpleNamespace(rlhf_step_end=hookimpl(lambda metrics: None)), "innocent")
    with pytest.raises(OSError, match="disk full") as caught:
        registry.hook.rlhf_step_end(run=None, step=1, metrics={})
    assert caught.value.__notes__ == ["in rlhf_step_end() of the plugin 'tracker'"]


def test_an_exception_in_an_observer_of_a_run_names_the_observer() -> None:
    """Check that the message has no address of an object."""

    def failing(step: int) -> None:
        raise OSError("disk full")

    failing.__name__ = "rlhf_step_end"
    registry = Registry(autoload=False, blocked=["console", "files"])
    registry.register(plugin(observer={"tracker": Fake}), "mine")
    observers = {
        "observer 'tracker'": SimpleNamespace(),
        "observer 'tracker.2'": SimpleNamespace(rlhf_step_end=hookimpl(failing)),
    }
    with (
        registry.with_observers(observers),
        pytest.raises(OSError, match="disk full") as caught,
    ):
        registry.hook.rlhf_step_end(run=None, step=1, metrics={})
    assert caught.value.__notes__ == ["in rlhf_step_end() of observer 'tracker.2'"]
    assert registry.hook.rlhf_step_end(run=None, step=1, metrics={}) == [], "closed, nothing watches"


# ----------------------------------------------------------------------------------------------------------------------
# blocking and loading by hand
# ----------------------------------------------------------------------------------------------------------------------


def test_a_blocked_plugin_is_not_even_imported(install: Install) -> None:
    install("rlhf-noisy", "raise OSError", "noisy")
    assert not Registry(blocked=["noisy"]).broken_plugins


def test_autoload_can_be_switched_off_and_a_plugin_asked_for(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("rlhf-asked", GOOD, "asked")
    install("rlhf-unasked", GOOD.replace('"terse"', '"unasked"'), "unasked")
    monkeypatch.setenv("RLHF_DISABLE_PLUGIN_AUTOLOAD", "1")
    assert set(Registry().plugins) == {"core", "console", "files", "report"}
    assert set(Registry(load=["asked"]).plugins) == {"core", "console", "files", "report", "asked"}


def test_a_module_that_is_no_entry_point_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("loose_plugin.py").write_text(GOOD)
    assert "terse" in Registry(autoload=False, load=["loose_plugin"]).table("reward")


def test_the_module_of_an_installed_plugin_is_loaded_once(install: Install) -> None:
    install("rlhf-once", GOOD, "once")
    registry = Registry(load=["rlhf_once"])
    assert registry.provenance("reward", "terse").distribution == "rlhf-once"
    assert registry.conflicts == [] and "rlhf_once" not in registry.plugins


@pytest.mark.parametrize("case", [case for case in BREAKS if case != "import-fails"])
def test_a_broken_module_that_is_asked_for_is_one_line_too(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`-p MODULE` answers as an installed plugin does: no traceback, and no silent exit of a module that exits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    source, reason = BREAKS[case]
    name = f"asked_{case.replace('-', '_')}"
    Path(f"{name}.py").write_text(source)
    assert main(["-p", name, "plugins"]) == 2
    printed = capsys.readouterr()
    start = f"rlhf-run: -p {name}: plugin '{name}' of (local) failed to load: "
    assert printed.err.startswith(start) and printed.err.count("\n") == 1
    assert reason.partition(" (rlhf_")[0] in printed.err
    assert f"{name}.py, line " in printed.err or case == "takes-an-argument"


def test_the_line_that_failed_is_named(install: Install, tmp_path: Path) -> None:
    install("rlhf-lines", "import json\n\n\njson.loads('{')\n", "lines")
    (broken,) = Registry().broken_plugins
    assert str(broken).endswith(" (rlhf_lines.py, line 4)")


def test_the_line_is_the_authors_and_not_the_one_of_a_library_that_it_calls(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "library.py").write_text("import sys\n\n\ndef leave(text):\n    raise SystemExit(text)\n")
    monkeypatch.syspath_prepend(tmp_path)
    install("rlhf-leaves", "import library\n\nlibrary.leave('enough')\n", "leaves")
    (broken,) = Registry().broken_plugins
    assert str(broken).endswith("SystemExit: enough (rlhf_leaves.py, line 3)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocked": ["core"]}, "-p no:core: the plugin 'core' cannot be blocked"),
        ({"blocked": ["nobody"]}, "-p no:nobody: no plugin is called 'nobody'; plugins are "),
        ({"load": ["no_such_module"]}, "-p no_such_module: no plugin or module is called 'no_such_module'"),
    ],
)
def test_asking_for_a_plugin_that_is_not_there_is_a_users_mistake(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Registry(**arguments)
    assert str(caught.value).startswith(message)
