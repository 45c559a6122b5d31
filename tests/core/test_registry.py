"""The registry: who offers which `peft_type`, found in the metadata of installed distributions, imported when asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import support
from peft_core import DuplicateTunerError, IncompatiblePluginError, PeftWarning, PluginError, UnknownTunerError
from peft_core.plugins import discovery
from peft_core.plugins.registry import Registry


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path; what is imported from it is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def info(registry: Registry, peft_type: str) -> list:
    return [entry for entry in registry.info() if entry.peft_type == peft_type]


# ---- finding ----------------------------------------------------------------------------------------------------------


def test_a_distribution_is_found_by_its_entry_point(site: Path) -> None:
    support.distribution(site, "peft-zip", tuners={"zip": "zip_plugin"}, version="2.3")
    [entry] = info(Registry(), "ZIP")
    assert (entry.distribution, entry.version, entry.module, entry.state) == ("peft-zip", "2.3", "zip_plugin", "available")


def test_a_tuner_is_imported_when_it_is_asked_for(site: Path) -> None:
    support.distribution(site, "peft-zip", tuners={"zip": "zip_plugin"})
    registry = Registry()
    registry.info()
    assert "zip_plugin" not in sys.modules
    assert registry.resolve("ZIP").parameter_prefix == "zip_"
    assert "zip_plugin" in sys.modules
    assert info(registry, "ZIP")[0].state == "loaded"


def test_names_are_found_in_any_case(site: Path) -> None:
    support.distribution(site, "peft-zip", tuners={"zip": "zip_plugin"})
    registry = Registry()
    assert registry.resolve("zip") is registry.resolve("Zip")


def test_classes_are_imported_by_their_places(site: Path) -> None:
    support.distribution(site, "peft-zip", tuners={"zip": "zip_plugin"})
    registry = Registry()
    assert registry.config_class("ZIP").__name__ == "Config"
    assert registry.tuner_class("ZIP").__name__ == "Tuner"


def test_one_distribution_may_offer_several_types(site: Path) -> None:
    source = """
        from peft_core.plugins import TunerSpec
        calls = []
        def peft_tuners():
            calls.append(1)
            yield TunerSpec("ZIP", "m:C", "m:T", "zip_")
            yield TunerSpec("ZAP", "m:C", "m:T", "zap_")
    """
    support.distribution(site, "peft-zips", tuners={"zip": "zips_plugin", "zap": "zips_plugin"}, modules={"zips_plugin": source})
    registry = Registry()
    assert registry.resolve("ZIP").parameter_prefix == "zip_"
    assert registry.resolve("ZAP").parameter_prefix == "zap_"


def test_an_editable_install_beside_its_stale_twin_is_one_distribution(site: Path) -> None:
    support.distribution(site, "peft-zip", tuners={"zip": "zip_plugin"}, version="1.0")
    support.distribution(site, "peft-zip", tuners={"zip": "zip_plugin"}, version="0.9")
    assert len(info(Registry(), "ZIP")) == 1


def test_refresh_finds_what_was_installed_meanwhile(site: Path) -> None:
    registry = Registry()
    assert not info(registry, "ZIP")
    support.distribution(site, "peft-zip", tuners={"zip": "zip_plugin"})
    importlib.invalidate_caches()
    registry.refresh()
    assert registry.resolve("ZIP").peft_type == "ZIP"


def test_owner_is_the_distribution(site: Path) -> None:
    support.distribution(site, "peft-zip", tuners={"zip": "zip_plugin"}, version="2.3")
    assert str(Registry().owner("ZIP")) == "peft-zip 2.3"


# ---- unknown types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peft_type", "package"),
    [("QWERTYUI", "peft-qwertyui"), ("PREFIX_TUNING", "peft-prompt"), ("CPT", "peft-prompt"), ("MY_TYPE", "peft-my-type")],
)
def test_an_unknown_type_names_the_package_to_install(peft_type: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "claims", lambda group, *, switched_off=False: iter(()))  # nothing is installed
    with pytest.raises(UnknownTunerError, match=f"pip install {package}"):
        Registry().resolve(peft_type)


def test_a_type_that_is_switched_off_is_not_said_to_be_missing(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    support.distribution(site, "peft-zip", tuners={"zip": "zip_plugin"})
    monkeypatch.setenv("PEFT_CORE_PLUGINS", "-peft-zip")
    with pytest.raises(UnknownTunerError, match=r"'ZIP' is offered by peft-zip .*, which PEFT_CORE_PLUGINS switches off"):
        Registry().resolve("ZIP")


def test_an_unknown_type_names_the_nearest_and_all_known(site: Path) -> None:
    support.distribution(site, "peft-zipper", tuners={"zipper": "zipper_plugin"})
    with pytest.raises(UnknownTunerError, match=r"'ZIPER' \(known: .*'ZIPPER'.*did you mean 'ZIPPER'\?"):
        Registry().resolve("ZIPER")


def test_an_unknown_type_names_its_package_also_when_another_name_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    only = discovery.Claim("lora", "fake_lora_plugin", "peft-lora", "1.0", ())
    monkeypatch.setattr(discovery, "claims", lambda group, *, switched_off=False: iter(() if switched_off else (only,)))
    with pytest.raises(UnknownTunerError) as caught:
        Registry().resolve("LOHA")
    assert "'LORA'" in str(caught.value)
    assert "pip install peft-loha" in str(caught.value)


# ---- broken plugins ---------------------------------------------------------------------------------------------------

BROKEN = {
    "raises": "raise RuntimeError('no such GPU')",
    "misses a dependency": "import a_module_that_is_not_there",
    "has a syntax error": "def peft_tuners(:",
    "offers nothing": "",
    "fails when asked": "def peft_tuners():\n    raise RuntimeError('not today')",
    "offers nonsense": "def peft_tuners():\n    return 3",
    "offers strings": "def peft_tuners():\n    return ['ZIP']",
    "offers another type": "from peft_core.plugins import TunerSpec\ndef peft_tuners():\n    yield TunerSpec('ZAP', 'm:C', 'm:T', 'z_')",
    "has a malformed spec": "from peft_core.plugins import TunerSpec\ndef peft_tuners():\n    yield TunerSpec('zip', 'm:C', 'm:T', 'z_')",
    "implements an unknown hook": "from peft_core.plugins import hookimpl\n@hookimpl\ndef peft_tunerz():\n    return []",
    "takes unknown arguments": "from peft_core.plugins import hookimpl\n@hookimpl\ndef peft_adapter_added(what):\n    return []",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_plugin_is_named_with_its_distribution_while_others_work(site: Path, how: str) -> None:
    support.distribution(site, "peft-zip", tuners={"zip": "bad_plugin"}, version="7.1", modules={"bad_plugin": BROKEN[how]})
    support.distribution(site, "peft-fine", tuners={"fine": "fine_plugin"})
    registry = Registry()
    for _ in range(2):  # the second time as the first
        with pytest.raises(PluginError, match=r"peft-zip 7\.1"):
            registry.resolve("ZIP")
    assert registry.resolve("FINE").peft_type == "FINE"
    assert info(registry, "ZIP")[0].state == "broken"
    assert "peft-zip" in str(info(registry, "ZIP")[0].error)
    assert info(registry, "FINE")[0].state == "loaded"


def test_a_broken_plugin_keeps_its_cause(site: Path) -> None:
    support.distribution(site, "peft-zip", tuners={"zip": "bad_plugin"}, modules={"bad_plugin": "raise RuntimeError('no such GPU')"})
    with pytest.raises(PluginError, match=r"RuntimeError: no such GPU.*other tuners are not affected") as caught:
        Registry().resolve("ZIP")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert isinstance(caught.value, ImportError)


def test_a_repaired_plugin_works_after_refresh(site: Path) -> None:
    support.distribution(site, "peft-zip", tuners={"zip": "bad_plugin"}, modules={"bad_plugin": "import a_module_that_is_not_there"})
    registry = Registry()
    with pytest.raises(PluginError):
        registry.resolve("ZIP")
    (site / "bad_plugin.py").write_text(support.PLUGIN.format(peft_type="ZIP", module="bad_plugin", prefix="zip_"))
    importlib.invalidate_caches()
    registry.refresh()
    assert registry.resolve("ZIP").peft_type == "ZIP"


def test_an_entry_point_that_promises_what_its_module_lacks(site: Path) -> None:
    support.distribution(site, "peft-zip", tuners={"zip": "bad_plugin"}, modules={"bad_plugin": BROKEN["offers another type"]})
    with pytest.raises(PluginError, match=r"entry point 'zip' of peft-zip 1\.0 promises the tuner ZIP, but its module bad_plugin offers 'ZAP'"):
        Registry().resolve("ZIP")


def test_a_type_without_an_entry_point_of_its_own_stays_unknown(site: Path) -> None:
    source = "from peft_core.plugins import TunerSpec\ndef peft_tuners():\n    yield TunerSpec('ZIP', 'm:C', 'm:T', 'z_')\n"
    source += "    yield TunerSpec('STOWAWAY', 'm:C', 'm:T', 's_')\n"
    support.distribution(site, "peft-zip", tuners={"zip": "zip_plugin"}, modules={"zip_plugin": source})
    registry = Registry()
    registry.resolve("ZIP")
    with pytest.raises(UnknownTunerError):
        registry.resolve("STOWAWAY")


@pytest.mark.parametrize("method", ["config_class", "tuner_class"])
def test_a_class_that_is_not_there_is_named_with_the_distribution(site: Path, method: str) -> None:
    source = "from peft_core.plugins import TunerSpec\ndef peft_tuners():\n    yield TunerSpec('ZIP', 'zip_nowhere:C', 'zip_nowhere:T', 'z_')"
    support.distribution(site, "peft-zip", tuners={"zip": "zip_plugin"}, modules={"zip_plugin": source})
    with pytest.raises(PluginError, match=r"'zip_nowhere:[CT]' of the tuner ZIP \(peft-zip 1\.0\) can't be imported"):
        getattr(Registry(), method)("ZIP")


def test_a_half_removed_distribution_does_not_hide_the_others(site: Path) -> None:
    support.distribution(site, "peft-gone", tuners={"gone": "gone_plugin"})
    (site / "peft_gone-1.0.dist-info" / "METADATA").unlink()
    support.distribution(site, "peft-fine", tuners={"fine": "fine_plugin"})
    assert Registry().resolve("FINE").peft_type == "FINE"


# ---- conflicts and versions -------------------------------------------------------------------------------------------


@pytest.fixture
def conflict(site: Path) -> Registry:
    support.distribution(site, "peft-zip", tuners={"zip": "zip_one"})
    support.distribution(site, "peft-zip-fork", tuners={"zip": "zip_two"}, version="3.0")
    return Registry()


def test_two_distributions_with_one_type_are_both_named(conflict: Registry) -> None:
    with pytest.raises(DuplicateTunerError, match=r"'ZIP' is offered by two distributions: peft-zip.* and peft-zip") as caught:
        conflict.resolve("ZIP")
    assert {"peft-zip 1.0", "peft-zip-fork 3.0"} <= {part for part in ("peft-zip 1.0", "peft-zip-fork 3.0") if part in str(caught.value)}
    assert [entry.state for entry in info(conflict, "ZIP")] == ["conflict", "conflict"]


def test_a_conflict_imports_neither(conflict: Registry) -> None:
    with pytest.raises(DuplicateTunerError):
        conflict.resolve("ZIP")
    assert not {"zip_one", "zip_two"} & set(sys.modules)


def test_a_conflict_is_settled_by_the_switch(conflict: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_CORE_PLUGINS", "-peft-zip-fork")
    assert Registry().resolve("ZIP").config == "zip_one:Config"


@pytest.mark.parametrize("requirement", ["peft-core>=999", "peft_core<0.0.1", "peft.core ==0.0.1", "Peft-Core>=999 ; python_version > '3'"])
def test_a_plugin_for_another_core_version_is_refused_before_it_is_imported(site: Path, requirement: str) -> None:
    support.distribution(site, "peft-zip", tuners={"zip": "zip_plugin"}, requires=(requirement,))
    with pytest.raises(IncompatiblePluginError, match=r"peft-zip 1\.0 requires .*, but peft-core .* is running"):
        Registry().resolve("ZIP")
    assert "zip_plugin" not in sys.modules


@pytest.mark.parametrize(
    "requirement",
    ["peft-core", "peft-core>=0.1,<999", "peft-core-extras>=999", "peft-core>=999 ; extra == 'test'", "peft-core>=999 ; python_version < '3'"],
)
def test_a_requirement_that_is_met_or_about_something_else_is_no_obstacle(site: Path, requirement: str) -> None:
    support.distribution(site, "peft-zip", tuners={"zip": "zip_plugin"}, requires=(requirement, "torch>=999"))
    assert Registry().resolve("ZIP").peft_type == "ZIP"


# ---- the switch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switch", "found"),
    [
        ("", {"ZIP", "ZAP"}),
        ("none", set()),
        ("peft-zip", {"ZIP"}),
        ("peft-zip,peft-zap", {"ZIP", "ZAP"}),
        ("peft_zip", {"ZIP"}),
        ("-peft-zip", {"ZAP"}),
        (" -peft-zip , -peft-zap ", set()),
        ("peft-zip,-peft-zip", set()),
    ],
)
def test_peft_core_plugins_lets_in_and_keeps_out(site: Path, monkeypatch: pytest.MonkeyPatch, switch: str, found: set[str]) -> None:
    support.distribution(site, "peft-zip", tuners={"zip": "zip_plugin"})
    support.distribution(site, "peft-zap", tuners={"zap": "zap_plugin"})
    monkeypatch.setenv("PEFT_CORE_PLUGINS", switch)
    assert {"ZIP", "ZAP"} & set(Registry().names()) == found


# ---- plugins that offer no tuner --------------------------------------------------------------------------------------


def test_a_general_plugin_is_loaded_when_a_hook_is_first_called(site: Path) -> None:
    source = "from peft_core.plugins import hookimpl\n@hookimpl\ndef peft_default_targets(peft_type, model_type):\n    return ['wq']"
    support.distribution(site, "peft-extras", plugins={"extras": "extras_plugin"}, modules={"extras_plugin": source})
    registry = Registry()
    registry.info()
    assert "extras_plugin" not in sys.modules
    assert registry.manager().hook.peft_default_targets(peft_type="LORA", model_type="any") == ["wq"]


def test_a_broken_general_plugin_is_a_warning(site: Path) -> None:
    support.distribution(site, "peft-extras", plugins={"extras": "extras_plugin"}, modules={"extras_plugin": "import a_module_that_is_not_there"})
    with pytest.warns(PeftWarning, match=r"peft-extras 1\.0.*goes on without it") as caught:
        Registry().manager()
    assert len(caught) == 1


# ---- re-entrancy: in a process of its own, since plugins speak to the registry of the process ---------------------------


def test_a_plugin_may_ask_for_another_tuner_while_it_is_imported(tmp_path: Path) -> None:
    source = "import peft_core\nassert peft_core.get_tuner_spec('OTHER').peft_type == 'OTHER'\npeft_core.list_tuners()\n"
    source += support.PLUGIN.format(peft_type="ZIP", module="zip_plugin", prefix="zip_")
    support.distribution(tmp_path, "peft-zip", tuners={"zip": "zip_plugin"}, modules={"zip_plugin": source})
    support.distribution(tmp_path, "peft-other", tuners={"other": "other_plugin"})
    code = "import peft_core; print(peft_core.get_tuner_spec('ZIP').peft_type)"
    assert support.run_python(code, path=tmp_path) == "ZIP"


def test_a_plugin_that_asks_for_itself_is_told_so(tmp_path: Path) -> None:
    source = "import peft_core\npeft_core.get_tuner_spec('ZIP')\n" + support.PLUGIN.format(peft_type="ZIP", module="zip_plugin", prefix="zip_")
    support.distribution(tmp_path, "peft-zip", tuners={"zip": "zip_plugin"}, modules={"zip_plugin": source})
    code = """
        import peft_core
        try:
            peft_core.get_tuner_spec("ZIP")
        except peft_core.PluginError as error:
            print("peft-zip" in str(error), "asks for its own tuner" in str(error))
    """
    assert support.run_python(code, path=tmp_path) == "True True"


def test_a_plugin_that_goes_on_after_being_refused_itself_is_loaded(tmp_path: Path) -> None:
    source = "import peft_core\ntry:\n    peft_core.get_tuner_spec('ZIP')\nexcept peft_core.PluginError:\n    pass\n"
    source += support.PLUGIN.format(peft_type="ZIP", module="zip_plugin", prefix="zip_")
    support.distribution(tmp_path, "peft-zip", tuners={"zip": "zip_plugin"}, modules={"zip_plugin": source})
    code = """
        import peft_core
        peft_core.get_tuner_spec("ZIP")
        print([(t.state, t.error) for t in peft_core.list_tuners() if t.peft_type == "ZIP"])
    """
    assert support.run_python(code, path=tmp_path) == "[('loaded', None)]"


def test_threads_that_ask_at_once_get_one_spec(tmp_path: Path) -> None:
    source = "import time\ntime.sleep(0.1)\n" + support.PLUGIN.format(peft_type="ZIP", module="zip_plugin", prefix="zip_")
    support.distribution(tmp_path, "peft-zip", tuners={"zip": "zip_plugin"}, modules={"zip_plugin": source})
    code = """
        import peft_core
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(8) as pool:
            print(len({id(spec) for spec in pool.map(peft_core.get_tuner_spec, ["ZIP"] * 8)}))
    """
    assert support.run_python(code, path=tmp_path) == "1"
