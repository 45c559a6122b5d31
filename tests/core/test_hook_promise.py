"""What docs/plugins.md promises plugins: the oldest one works, nothing is taken away, and what goes is announced by name."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import support
from peft_core import PeftWarning, PluginError, __version__
from peft_core.plugins import discovery, hookimpl, hookspec, hookspecs
from peft_core.plugins.registry import Registry

OLDEST = Path(__file__).parent / "oldest_plugin"
#: of the files of the oldest plugin, as they were frozen
DIGEST = "673d6995a12fac7a9fae8e60e53614e17462bba1240a3dd0d645a9e76dad267b"
#: the hooks of 0.1.0, with their arguments
PROMISED = {
    "peft_tuners": (),
    "peft_default_targets": ("peft_type", "model_type"),
    "peft_make_layer": ("peft_type", "base_layer", "selection"),
    "peft_convert_state_dict": ("peft_type", "state_dict", "config"),
    "peft_adapter_added": ("model", "adapter_name", "config"),
    "peft_adapter_loaded": ("model", "adapter_name", "path", "source"),
    "peft_adapter_saved": ("model", "adapter_name", "path"),
    "peft_adapter_activated": ("model", "adapter_names"),
    "peft_adapter_merged": ("model", "adapter_names"),
    "peft_adapter_unmerged": ("model", "adapter_names"),
    "peft_adapter_unloaded": ("model", "adapter_names", "merged"),
    "peft_adapter_deleted": ("model", "adapter_name"),
}


# ---- the oldest plugin --------------------------------------------------------------------------------------------------


def digest_of(folder: Path) -> str:
    """Return one digest of the names and bytes of all files, leaving out what Python writes beside them."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        if path.is_file() and not {"__pycache__", ".ruff_cache", ".mypy_cache"} & set(path.parts):
            digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).digest())
    return digest.hexdigest()


def test_the_oldest_plugin_is_as_it_was_frozen() -> None:
    assert digest_of(OLDEST) == DIGEST, "tests/core/oldest_plugin was edited: it stands for plugins that nobody edits; mend core instead"


@pytest.mark.parametrize("edit", ["a byte", "a new file", "a file less", "another name"])
def test_an_edit_of_it_is_seen(edit: str, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(OLDEST, copied, ignore=shutil.ignore_patterns("__pycache__"))
    assert digest_of(copied) == DIGEST
    file = copied / "peft_oldest" / "tuner.py"
    if edit == "a byte":
        file.write_text(file.read_text() + "#\n")
    elif edit == "a new file":
        (copied / "new.py").touch()
    elif edit == "a file less":
        file.unlink()
    else:
        file.rename(copied / "peft_oldest" / "tuners.py")
    assert digest_of(copied) != DIGEST


def implemented(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return hook → arguments of what the sources of a plugin mark, without importing them."""
    found = {}
    for path in folder.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("hookimpl" in ast.unparse(decorator) for decorator in node.decorator_list):
                found[node.name] = tuple(argument.arg for argument in node.args.args)
    return found


def test_it_implements_each_hook_of_its_version_with_all_arguments() -> None:
    found = implemented(OLDEST)
    assert found.pop("peft_adapter_forgotten") == ("model",), "the optional hook that nobody specifies"
    assert found == PROMISED


def test_what_was_promised_is_still_there() -> None:
    """Arguments may be added, nothing may be taken away before 1.0."""
    assert int(__version__.partition(".")[0]) == 0, "a new major version: decide what is the oldest plugin now"
    for hook, arguments in PROMISED.items():
        spec = getattr(hookspecs, hook)
        assert set(arguments) <= set(inspect.signature(spec).parameters), hook


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder for the import path on which the oldest plugin looks installed."""
    site = tmp_path / "site"
    shutil.copytree(OLDEST / "peft_oldest", site / "peft_oldest", ignore=shutil.ignore_patterns("__pycache__"))
    tuners = dict.fromkeys(("oldest", "oldest_gain", "oldest_cue"), "peft_oldest.plugin")
    plugins = {"oldest": "peft_oldest.extension"}
    support.distribution(site, "peft-oldest", tuners=tuners, plugins=plugins, requires=("peft-core>=0.1,<1",), version="0.1.0")
    return site


def test_it_is_discovered_without_being_imported(installed: Path) -> None:
    code = """
        import sys
        from peft_core import get_peft_config, list_tuners
        found = {i.peft_type: (i.distribution, i.version, i.state) for i in list_tuners() if i.distribution == "peft-oldest"}
        assert found == {name: ("peft-oldest", "0.1.0", "available") for name in ("OLDEST", "OLDEST_GAIN", "OLDEST_CUE")}, found
        assert not any(name.startswith("peft_oldest") for name in sys.modules)
        config = get_peft_config({"peft_type": "OLDEST", "alpha": 3})
        assert type(config).__module__ == "peft_oldest.config" and config.alpha == 3
        assert "torch" not in sys.modules
    """
    support.run_python(code, path=installed)


def test_it_trains_saves_loads_merges_and_hears_everything(installed: Path, tmp_path: Path) -> None:
    """Warnings are errors: nothing that it uses may be deprecated before it is announced here."""
    code = """
        import json, os, warnings
        from pathlib import Path
        warnings.simplefilter("error")
        import torch
        from safetensors.torch import load_file, save_file
        from peft_core import PeftModel, get_peft_config, get_peft_model
        from peft_core.testing import tiny
        from peft_oldest.extension import heard
        from peft_oldest.layer import GainLayer, OldestEmbedding, OldestLayer, OldestPackedLayer, PackedLinear

        os.chdir(os.environ["FOLDER"])
        ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])

        def base():
            model = tiny("llama")
            block = model.model.layers[0].mlp
            packed = PackedLinear(block.down_proj.in_features, block.down_proj.out_features, bias=False)
            packed.load_state_dict(block.down_proj.state_dict())
            block.down_proj = packed
            return model

        def config(peft_type, **fields):
            return get_peft_config({"peft_type": peft_type, "task_type": "CAUSAL_LM", **fields})

        # added: default targets and the layer for a packed Linear come from its hooks
        plain = base()(ids).logits
        model = get_peft_model(base(), config("OLDEST", alpha=2.0, alpha_pattern={"q_proj": 4.0}), "old")
        assert model.peft_config["old"].target_modules == {"q_proj", "down_proj", "embed_tokens"}
        inner = model.get_base_model().model
        assert type(inner.layers[0].mlp.down_proj) is OldestPackedLayer and type(inner.layers[1].mlp.down_proj) is OldestLayer
        assert type(inner.embed_tokens) is OldestEmbedding
        assert inner.layers[0].self_attn.q_proj.scaling == {"old": 4.0} and inner.layers[1].mlp.down_proj.scaling == {"old": 2.0}
        assert torch.equal(model(ids).logits, plain), "a new adapter changes nothing"

        # trained: only its own parameters
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        losses = []
        for _ in range(2):
            optimiser.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[1] < losses[0], losses
        assert all(".oldest_" in name for name, p in model.named_parameters() if p.grad is not None)

        # with its other methods: a factor, virtual tokens with an argument of their own, rows
        model.add_adapter("gain", config("OLDEST_GAIN", target_modules=["v_proj"]))
        model.add_adapter("cue", config("OLDEST_CUE", num_virtual_tokens=3))
        model.eval()
        with torch.no_grad():
            model.get_submodule("prompt_encoder.cue").vector.normal_()
            old, mixed = model(ids).logits, model(ids, adapter_names=["cue", ["old", "gain"]], cue_volume=1.0).logits
            assert mixed.shape[1] == 8
            loud, quiet = (model(ids, adapter_names=["cue", "cue"], cue_volume=volume).logits for volume in (1.0, 0.5))
            assert not torch.allclose(loud, quiet)
            assert not torch.allclose(old, plain)

        # saved, the key renamed as an older file would have it, and loaded
        model.save_pretrained("out", save_embedding_layers=False)
        file = Path("out/old/adapter_model.safetensors")
        tensors = load_file(file)
        assert any(key.endswith(".oldest_u") for key in tensors)
        save_file({key.replace(".oldest_u", ".ancient_u"): value for key, value in tensors.items()}, file)
        loaded = PeftModel.from_pretrained(base(), "out/old", "old")
        loaded.load_adapter("out/gain", "gain")
        loaded.load_adapter("out/cue", "cue")
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, old)
            assert torch.equal(loaded(ids, adapter_names=["cue", ["old", "gain"]]).logits, mixed)

            # merged, taken out bit for bit, merged for good
            loaded.set_adapter(["old", "gain"])
            both = loaded(ids).logits
            loaded.merge_adapter()
            assert torch.allclose(loaded(ids).logits, both, atol=1e-5)
            loaded.unmerge_adapter()
            assert torch.equal(loaded(ids).logits, both)
            loaded.delete_adapter("cue")
            result = loaded.merge_and_unload()
            assert torch.allclose(result(ids).logits, both, atol=1e-5)
            assert not any(isinstance(module, (OldestLayer, GainLayer)) for module in result.modules())
            assert torch.equal(model.unload()(ids).logits, plain)
        print(json.dumps(heard))
    """
    out = tmp_path / "work"
    out.mkdir()
    heard = json.loads(support.run_python(code, path=installed, FOLDER=str(out)))
    assert {base for _, base, *_ in heard} == {"LlamaForCausalLM"}
    folder = str((out / "out").resolve())
    assert [[event, *rest] for event, _, *rest in heard] == [
        ["added", "old", "OLDEST"],
        ["activated", "old"],
        ["added", "gain", "OLDEST_GAIN"],
        ["added", "cue", "OLDEST_CUE"],
        ["saved", "old", "out/old"],
        ["saved", "gain", "out/gain"],
        ["saved", "cue", "out/cue"],
        ["added", "old", "OLDEST"],
        ["activated", "old"],
        ["loaded", "old", f"{folder}/old", "out/old"],
        ["added", "gain", "OLDEST_GAIN"],
        ["loaded", "gain", f"{folder}/gain", "out/gain"],
        ["added", "cue", "OLDEST_CUE"],
        ["loaded", "cue", f"{folder}/cue", "out/cue"],
        ["activated", "old", "gain"],
        ["merged", "old", "gain"],
        ["unmerged", "old", "gain"],
        ["deleted", "cue"],
        ["merged", "old", "gain"],
        ["unloaded", ["old", "gain"], ["old", "gain"]],
        ["unloaded", ["old", "gain", "cue"], []],
    ]


# ---- what goes is announced ---------------------------------------------------------------------------------------------


class Specifications:
    """Hooks of which something is on its way out."""

    @hookspec(deprecated="since 0.2: implement peft_zip_packed")
    def peft_zip_made(self, path: str) -> None: ...

    @hookspec(deprecated_arguments={"folder": "since 0.2: take `path`"})
    def peft_zip_packed(self, path: str, folder: str) -> None: ...


@pytest.fixture
def registry() -> Registry:
    """A registry of its own, with those hooks."""
    made = Registry()
    made.manager().add_hookspecs(Specifications)
    return made


def plugin(**functions: Callable[..., Any]) -> SimpleNamespace:
    return SimpleNamespace(**{name: hookimpl(function) for name, function in functions.items()})


def warnings_of(act: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    assert {warning.category for warning in caught} <= {PeftWarning}
    return [str(warning.message) for warning in caught]


def test_who_implements_a_deprecated_hook_is_named(registry: Registry) -> None:
    assert warnings_of(partial(registry.register_plugin, plugin(peft_zip_made=lambda: None), "peft-old")) == [
        "the plugin peft-old (registered in this process) implements peft_zip_made, which is deprecated since 0.2: implement peft_zip_packed"
    ]


def test_who_takes_a_deprecated_argument_is_named(registry: Registry) -> None:
    assert warnings_of(partial(registry.register_plugin, plugin(peft_zip_packed=lambda folder: None), "peft-old")) == [
        "the plugin peft-old (registered in this process) takes the argument 'folder' of peft_zip_packed, which is deprecated since 0.2: take `path`"
    ]


def test_who_does_not_use_what_is_deprecated_hears_nothing(registry: Registry) -> None:
    assert warnings_of(partial(registry.register_plugin, plugin(peft_zip_packed=lambda path: None, peft_adapter_added=lambda model: None))) == []


def test_a_deprecated_hook_is_called_as_before(registry: Registry) -> None:
    old = plugin(peft_zip_made=lambda path: f"made {path}", peft_zip_packed=lambda folder: f"packed {folder}")
    assert len(warnings_of(partial(registry.register_plugin, old))) == 2
    hooks = registry.manager().hook
    assert hooks.peft_zip_made(path="a") == ["made a"]
    assert hooks.peft_zip_packed(path="a", folder="b") == ["packed b"]


@pytest.mark.parametrize("group", ["tuners", "plugins"])
def test_an_installed_plugin_is_named_by_its_distribution(group: str, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = support.PLUGIN.format(peft_type="ZIP", module="zip_old", prefix="zip_") + (
        "from peft_core.plugins import hookimpl\n@hookimpl\ndef peft_zip_made(path): pass\n"
    )
    offers = {group: {"zip": "zip_old"}}
    support.distribution(tmp_path, "peft-zip", version="7.1", modules={"zip_old": source}, **offers)  # type: ignore[arg-type]
    monkeypatch.syspath_prepend(tmp_path)
    if group == "tuners":
        said = warnings_of(partial(registry.resolve, "ZIP"))
    else:
        claim = next(claim for claim in discovery.claims(discovery.PLUGINS) if claim.distribution == "peft-zip")
        said = warnings_of(partial(registry.import_plugin, claim))
    sys.modules.pop("zip_old")
    assert said == ["the plugin peft-zip 7.1 implements peft_zip_made, which is deprecated since 0.2: implement peft_zip_packed"]


def test_a_deprecated_argument_that_is_none_is_refused() -> None:
    def peft_zip(path: str) -> None: ...

    with pytest.raises(PluginError, match=r"deprecated_arguments of peft_zip names 'folder'; it takes 'path'"):
        hookspec(deprecated_arguments={"folder": "since 0.2"})(peft_zip)
