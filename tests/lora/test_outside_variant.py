"""The example of a variant in a package of its own, installed: its own tests pass, and what configs and models without it say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import distribution, run_python

PACKAGE = Path(__file__).parents[2] / "examples" / "plugins" / "peft-lora-gated"


@pytest.fixture
def installed(tmp_path: Path) -> str:
    """An import path on which the example looks installed."""
    site = tmp_path / "site"
    requires = ("peft-core>=0.1,<0.2", "peft-lora>=0.1,<0.2")
    distribution(site, "peft-lora-gated", plugins={"lora-gated": "peft_lora_gated.plugin"}, requires=requires, version="0.1.0")
    return os.pathsep.join([str(site), str(PACKAGE / "src")])


def test_its_own_tests_pass(installed: str) -> None:
    path = os.pathsep.join(part for part in (installed, os.environ.get("PYTHONPATH", "")) if part)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "tests"],
        cwd=PACKAGE,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout


def test_configs_need_no_torch(installed: str) -> None:
    code = """
        import sys
        from peft_lora import LoraConfig
        config = LoraConfig(variant="gated", plugin_settings={"gated": {"start": 2.0}})
        print(config.plugin_settings, "torch" in sys.modules, "peft_lora_gated.gated" in sys.modules)
    """
    assert run_python(code, path=Path(installed)).strip() == "{'gated': GateSettings(start=2.0, penalty=0.0)} False False"


def test_without_the_package_the_settings_are_kept_as_they_are() -> None:
    from peft_core import ConfigError, get_peft_model
    from peft_lora import LoraConfig
    from support import net

    config = LoraConfig(target_modules=["up"], variant="gated", plugin_settings={"gated": {"start": 2.0}})
    assert config.to_dict()["plugin_settings"] == {"gated": {"start": 2.0}}
    with pytest.raises(ConfigError, match="variant='gated' is unknown"):
        get_peft_model(net(), config)
