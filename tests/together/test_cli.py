"""The commands of `peft-core`: the transcript in `docs/cli.md`, their JSON, their exit codes, and what those that only read find."""

from __future__ import annotations

import doctest
import importlib.metadata
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="the command line is an extra of peft-core")

from peft_core import PeftModel, get_peft_config, get_peft_model, register_tuner, unregister_tuner
from peft_core.cli.app import app
from peft_core.plugins import discovery, registry
from peft_core.testing import tiny
from support import DENSE, distribution, files_in, run_python
from together.commands import LORA, checks, report, rewrite, run, saved

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"

# ---- transcript -------------------------------------------------------------------------------------------------------


def transcript() -> list[tuple[str, str]]:
    """The blocks of the page that begin with a prompt: command and output."""
    return re.findall(r"^```text\n\$ (peft-core [^\n]*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


OURS = ("peft-lora", "peft-loha", "peft-prompt", "peft-tokens")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process in which only our tuners are installed."""
    every = discovery.metadata.entry_points

    def ours(**group: str) -> list[importlib.metadata.EntryPoint]:
        return [point for point in every(**group) if point.dist is not None and point.dist.name in OURS]

    monkeypatch.setattr(discovery.metadata, "entry_points", ours)
    monkeypatch.setattr(registry, "_loaded", {})
    registry.refresh()
    yield
    monkeypatch.undo()
    registry.refresh()


def test_the_page_is_what_the_commands_print(here: Path, fresh: None) -> None:
    shown = transcript()
    for command, expected in shown:
        printed = run(*shlex.split(command)[1:]).stdout
        same = doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        assert same, f"$ {command}\n{printed}"
    assert {command.split()[1] for command, _ in shown} == {command.name or command.callback.__name__ for command in app.registered_commands}


def test_every_command_has_json(here: Path) -> None:
    words = {
        "plugins": [],
        "doctor": [],
        "new-tuner": ["my-method"],
        "inspect": ["my-adapter"],
        "verify": ["my-adapter"],
        "targets": ["base"],
        "merge": ["my-adapter", "--base", "base", "--out", "merged"],
        "convert": ["my-adapter", "other"],
    }
    assert set(words) == {command.name or command.callback.__name__ for command in app.registered_commands}
    for command, arguments in words.items():
        assert isinstance(report(command, *arguments), dict)


# ---- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "nowhere"], "there is no folder 'nowhere'"),
        (["inspect", "base"], "holds no adapter"),
        (["targets", "nowhere"], "there is no 'nowhere'"),
        (["targets", "my-adapter"], "can't be used as a transformers model"),
        (["merge", "my-adapter", "--base", "base", "--out", "base"], "not an empty folder"),
        (["merge", "my-adapter", "--base", "nowhere", "--out", "x"], "there is no folder 'nowhere'"),
        (["convert", "my-adapter", "x", "--dtype", "int8"], "--dtype 'int8' is unknown"),
        (["convert", "my-adapter", "x", "--format", "safetensor"], "did you mean 'safetensors'?"),
        (["convert", "my-adapter", "x", "--rename", "zz=y"], "matches no tensor"),
        (["convert", "my-adapter", "x", "--rename", "nothing"], "no REGEX=REPLACEMENT"),
        (["convert", "my-adapter", "x", "--rename", "(=y"], "no regular expression"),
        (["convert", "my-adapter", "x", "--rename", r"q_proj=\9"], "can't be applied"),
        (["convert", "my-adapter", "x", "--rename", "[AB].weight=C"], "two tensors"),
        (["new-tuner", "Bad Name"], "can't be the name of a tuner"),
        (["new-tuner", "lora"], "already offered by peft-lora"),
        (["new-tuner", "fine", "--kind", "layers"], "did you mean 'layer'?"),
    ],
)
def test_a_refusal_has_message_and_code_and_leaves_nothing(here: Path, words: list[str], message: str) -> None:
    before = files_in(here)
    done = run(*words)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    error = report(*words, code=2)["error"]
    assert message in f"{error['message']} {error['hint']}"
    assert files_in(here) == before
    assert sorted(path.name for path in here.iterdir()) == ["base", "my-adapter"]


def test_wrong_usage_is_code_2(here: Path) -> None:
    assert run("merge", "my-adapter").exit_code == 2
    assert run("no-such-command").exit_code == 2


def test_a_fault_of_the_program_is_code_3(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(directory: Path) -> None:
        raise RuntimeError("oh")

    monkeypatch.setattr("peft_core.cli.inspecting.inspect", fails)
    done = run("inspect", "my-adapter")
    assert done.exit_code == 3
    assert "RuntimeError: oh" in done.stderr


# ---- plugins and doctor -----------------------------------------------------------------------------------------------

COMMAND = """
import sys
from peft_core.cli import main
sys.argv = ["peft-core", {}]
try:
    main()
except SystemExit as end:
    print("code", end.code)
"""


def command(words: str, path: Path | None = None, **environment: str) -> str:
    return run_python(COMMAND.format(", ".join(map(repr, words.split()))), path=path, **environment)


@pytest.mark.parametrize("heavy", ["torch", "transformers", "peft_lora", "pluggy"])
def test_plugins_imports_nothing_heavy(heavy: str) -> None:
    said = run_python(COMMAND.format("'plugins'") + f"print({heavy!r} in sys.modules)")
    assert said.endswith("code 0\nFalse")


def test_it_is_installed_as_a_command() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="peft-core")
    assert script.value == "peft_core.cli:main"


GOOD = """
from peft_core.plugins import TunerSpec
def peft_tuners():
    yield TunerSpec("{0}", "good:Config", "good:Tuner", "{1}_")
"""
CLASSES = "from peft_core import LayerConfig, LayerTuner\nclass Config(LayerConfig): pass\nclass Tuner(LayerTuner): pass\n"


@pytest.fixture
def ward(tmp_path: Path) -> Path:
    """A folder of distributions, one for each thing that can be wrong."""
    site = tmp_path / "site"
    modules = {"good": CLASSES, "fine_plugin": GOOD.format("FINE", "fine")}
    distribution(site, "peft-fine", tuners={"fine": "fine_plugin"}, modules=modules)
    distribution(site, "peft-torn", tuners={"torn": "torn_plugin"}, modules={"torn_plugin": "import no_such_module"})
    distribution(site, "peft-quits", tuners={"quits": "quits_plugin"}, modules={"quits_plugin": "raise SystemExit(0)"})
    late = "import time\ntime.sleep(1.1)\n" + GOOD.format("LATE", "late")
    distribution(site, "peft-late", tuners={"late": "late_plugin"}, modules={"late_plugin": late})
    distribution(site, "peft-old", tuners={"old": "old_plugin"}, requires=("peft-core<0.1",))
    distribution(site, "peft-hollow", tuners={"hollow": "hollow_plugin"})
    distribution(site, "peft-one", tuners={"twice": "one_plugin"})
    distribution(site, "peft-two", tuners={"twice": "two_plugin"})
    distribution(site, "peft-ear", plugins={"ear": "ear_plugin"}, modules={"ear_plugin": "def broken(:"})
    distribution(site, "peft-away", tuners={"away": "away_plugin"})
    return site


def test_the_doctor_finds_every_fault(ward: Path) -> None:
    text, _, code = command("doctor --json", ward, PEFT_CORE_PLUGINS="-peft-away").rpartition("\n")
    found = json.loads(text)
    states = {row["distribution"]: row["state"] for row in found["plugins"]}
    expected = {
        **dict.fromkeys([*OURS, "peft-fine"], "ok"),
        **dict.fromkeys(["peft-torn", "peft-quits", "peft-hollow", "peft-ear"], "broken"),
        **dict.fromkeys(["peft-one", "peft-two"], "conflict"),
        "peft-late": "slow-import",
        "peft-old": "incompatible",
        "peft-away": "off",
    }
    assert code == "code 1"
    assert {name: states.get(name) for name in expected} == expected
    assert found["faults"] == 8


@pytest.mark.parametrize("verbose", [False, True])
def test_tracebacks_are_shown_if_asked_for(ward: Path, verbose: bool) -> None:
    said = command("doctor --verbose" if verbose else "doctor", ward)
    assert "No module named 'no_such_module'" in said
    assert ("Traceback" in said) is verbose
    assert said.endswith("faults\ncode 1")


def test_what_a_plugin_prints_stays_out_of_the_json(tmp_path: Path) -> None:
    distribution(tmp_path, "peft-loud", plugins={"loud": "loud"}, modules={"loud": "print('hello')"})
    text, _, code = command("doctor --json", tmp_path).rpartition("\n")
    assert code == "code 0"
    assert json.loads(text)["ok"] is True


# ---- inspect and verify -----------------------------------------------------------------------------------------------


def test_inspect_says_what_is_in_it(here: Path) -> None:
    (adapter,) = report("inspect", "my-adapter")["adapters"]
    assert adapter["config"]["changed"] == {"inference_mode": True, "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    assert adapter["total"] == {"tensors": 4, "numbers": 256, "bytes": 1024}
    assert adapter["writer"]["tuner"].startswith("peft-lora ")
    assert adapter["base"]["class"] == "LlamaForCausalLM"


def test_inspect_works_without_the_tuner(here: Path) -> None:
    said = command(f"inspect {here / 'my-adapter'} --json", PEFT_CORE_PLUGINS="none").removesuffix("\ncode 0")
    (adapter,) = json.loads(said)["adapters"]
    assert adapter["installed"] is None
    assert adapter["config"]["compared"] is False
    assert adapter["config"]["changed"]["r"] == 2
    assert adapter["total"]["tensors"] == 4


def test_a_pickled_file_is_inspected_too(here: Path) -> None:
    assert run("convert", "my-adapter", "old", "--format", "bin").exit_code == 0
    (old,), (new,) = report("inspect", "old")["adapters"], report("inspect", "my-adapter")["adapters"]
    assert old["file"] == "adapter_model.bin"
    assert old["tensors"] == new["tensors"]


def test_all_adapters_of_a_stack_are_looked_at(here: Path) -> None:
    model = saved(here / "stack")
    model.add_adapter("ha", get_peft_config({"peft_type": "LOHA", "r": 2, "target_modules": ["q_proj"]}))
    model.save_pretrained(here / "stack")
    assert [a["name"] for a in report("inspect", "stack")["adapters"]] == ["default", "ha"]
    assert [len(a["checks"]) for a in report("verify", "stack", "--base", "base")["adapters"]] == [5, 5]
    assert report("convert", "stack", "half", "--dtype", "bfloat16")["files"].count("peft_stack.json") == 1
    assert list(PeftModel.from_stack(tiny(), here / "half").peft_config) == ["default", "ha"]


@pytest.mark.parametrize(
    ("change", "check", "detail"),
    [
        (lambda t: t[next(iter(t))].fill_(float("nan")), "values", "64 NaN"),
        (lambda t: t[next(iter(t))].fill_(float("inf")), "values", "64 infinite"),
        (lambda t: t.pop(next(iter(t))), "keys", "has 'lora_B.weight', but lacks 'lora_A.weight'"),
        (lambda t: t.clear(), "keys", "no tensors"),
        (lambda t: t.update({key.replace("q_proj", "other"): value.clone() for key, value in t.items()}), "keys", "does not match"),
    ],
)
def test_verify_finds_bad_tensors(here: Path, change: Any, check: str, detail: str) -> None:
    rewrite(here / "my-adapter", change)
    found = checks("my-adapter", code=1)
    assert found[check][0] == "fault"
    assert detail in found[check][1]


def test_verify_finds_a_cut_file(here: Path) -> None:
    path = here / "my-adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert checks("my-adapter", code=1)["file"][0] == "fault"


def test_verify_finds_two_files(here: Path) -> None:
    (here / "my-adapter" / "adapter_model.bin").touch()
    assert checks("my-adapter", code=1)["file"][0] == "fault"


@pytest.mark.parametrize(
    ("text", "state", "detail"),
    [
        ("{", "fault", "JSON"),
        ('{"peft_type": "LORA", "r": -1}', "fault", "positive integer"),
        ('{"peft_type": "LORA", "from_the_future": 1}', "note", "from_the_future"),
        ('{"peft_type": "NOBODYS"}', "note", "no tuner is installed"),
    ],
)
def test_verify_reads_the_config(here: Path, text: str, state: str, detail: str) -> None:
    (here / "my-adapter" / "adapter_config.json").write_text(text)
    found = checks("my-adapter", code=int(state == "fault"))["config"]
    assert found[0] == state
    assert detail in found[1]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"target_modules": ["embed_tokens"]},
        {"peft_type": "LOHA"},
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
    ],
    ids=str,
)
def test_what_was_saved_is_whole_and_fits_its_base(here: Path, fields: dict[str, Any]) -> None:
    merged = {**LORA, **fields}
    if "num_virtual_tokens" in merged:
        merged = {key: merged[key] for key in ("peft_type", "task_type", "num_virtual_tokens")}
    get_peft_model(tiny(), get_peft_config(merged)).save_pretrained(here / "a", save_embedding_layers=False)
    assert {state for state, _ in checks("a", "--base", "base").values()} == {"ok"}


def test_verify_says_that_it_does_not_fit(here: Path) -> None:
    tiny("gpt2").save_pretrained(here / "other")
    state, detail = checks("my-adapter", "--base", "other", code=1)["base"]
    assert state == "fault"
    assert "q_proj" in detail


def test_a_base_with_another_fingerprint_is_a_note(here: Path) -> None:
    model = tiny()
    model.resize_token_embeddings(70)
    model.save_pretrained(here / "larger")
    state, detail = checks("my-adapter", "--base", "larger")["base"]
    assert state == "note"
    assert "fingerprint" in detail


def test_a_saved_head_says_how_many_labels_there_are(here: Path) -> None:
    tiny("bert").save_pretrained(here / "bert")
    saved(here / "classifier", "bert-seq-cls", task_type="SEQ_CLS", target_modules=["query"])
    assert checks("classifier", "--base", "bert")["base"] == ("ok", "")


# ---- targets ----------------------------------------------------------------------------------------------------------


def test_targets_counts_layers_and_asks_each_tuner(here: Path) -> None:
    found = report("targets", "base/config.json")
    assert next(m for m in found["modules"] if m["name"] == "k_proj") == {
        "name": "k_proj",
        "kind": "linear",
        "count": 2,
        "shapes": [[16, 32]],
        "example": "model.layers.0.self_attn.k_proj",
    }
    tuners = {t["peft_type"]: t for t in found["tuners"]}
    assert (tuners["LORA"]["targets"], tuners["LORA"]["modules"]) == (["q_proj", "v_proj"], 4)
    assert "virtual tokens" in tuners["PREFIX_TUNING"]["note"]


def test_a_tuner_that_knows_no_such_layer_says_so(here: Path) -> None:
    tiny("gpt2").save_pretrained(here / "gpt2")
    register_tuner(DENSE)
    try:
        tuners = {t["peft_type"]: t for t in report("targets", "gpt2")["tuners"]}
    finally:
        unregister_tuner("DENSE")
    assert tuners["LORA"]["modules"] == 2
    assert "Conv1D" in tuners["DENSE"]["note"]
