"""`import peft_core` is cheap: torch and transformers come when a model does."""

from __future__ import annotations

from pathlib import Path

import pytest

import peft_core
import support

BLOCKED = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"


@pytest.mark.parametrize("code", ["import peft_core", "import peft_core; peft_core.list_tuners()", "import peft_core; dir(peft_core)"])
@pytest.mark.parametrize("heavy", ["torch", "transformers", "safetensors", "huggingface_hub", "pluggy"])
def test_nothing_heavy_is_loaded(code: str, heavy: str) -> None:
    assert support.run_python(f"{code}\nimport sys; print({heavy!r} in sys.modules)") == "False"


def test_listing_tuners_imports_no_plugin(tmp_path: Path) -> None:
    support.distribution(tmp_path, "peft-zip", tuners={"zip": "peft_zip_plugin"})
    code = "import sys, peft_core; print('ZIP' in [t.peft_type for t in peft_core.list_tuners()], 'peft_zip_plugin' in sys.modules)"
    assert support.run_python(code, path=tmp_path) == "True False"


def test_configs_work_without_torch(tmp_path: Path) -> None:
    support.distribution(
        tmp_path,
        "peft-zip",
        tuners={"zip": "peft_zip_plugin"},
        modules={
            "peft_zip_plugin": """
                from peft_core.plugins import TunerSpec
                def peft_tuners():
                    yield TunerSpec("ZIP", "peft_zip_config:ZipConfig", "peft_zip_tuner:ZipTuner", "zip_")
            """,
            "peft_zip_config": """
                from dataclasses import dataclass
                from typing import ClassVar
                from peft_core.config import LayerConfig
                @dataclass
                class ZipConfig(LayerConfig):
                    r: int = 8
                    default_peft_type: ClassVar = "ZIP"
            """,
            "peft_zip_tuner": "import torch",
        },
    )
    code = """
        import peft_core, pathlib
        config = peft_core.get_peft_config({"peft_type": "ZIP", "r": 3, "target_modules": ["b", "a"]})
        config.save_pretrained("FOLDER")
        again = peft_core.PeftConfig.from_pretrained("FOLDER")
        assert again == config
        print(again.r, peft_core.get_tuner_spec("ZIP").parameter_prefix)
    """.replace("FOLDER", str(tmp_path / "saved"))
    assert support.run_python(f"{BLOCKED}{__import__('textwrap').dedent(code)}", path=tmp_path) == "3 zip_"


def test_errors_and_the_registry_work_without_torch() -> None:
    code = BLOCKED + (
        "import peft_core\n"
        "try:\n    peft_core.get_peft_config({'peft_type': 'NOBODYS'})\n"
        "except peft_core.UnknownTunerError as error:\n    print(error.code)\n"
    )
    assert support.run_python(code) == "unknown-tuner"


def test_a_name_that_needs_torch_says_that_it_is_missing() -> None:
    code = BLOCKED + "import peft_core\ntry:\n    peft_core.PeftModel\nexcept ImportError as error:\n    print('torch' in str(error))\n"
    assert support.run_python(code) == "True"


@pytest.mark.parametrize("name", peft_core.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(peft_core, name) is not None
    assert name in dir(peft_core)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="get_peft_modell"):
        _ = peft_core.get_peft_modell
