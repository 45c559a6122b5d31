"""The distribution called peft that other libraries ask for, and the upstream package beside it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

import peft

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[2] / "packages" / "peft-compat"


def test_the_version_that_libraries_see() -> None:
    assert peft.__version__ == importlib.metadata.version("peft") == "0.21.2"
    assert not Version(peft.__version__).is_prerelease
    assert importlib.metadata.metadata("peft")["Name"] == "peft"


def test_libraries_find_it() -> None:
    spec = importlib.util.find_spec("peft")
    assert spec is not None
    assert spec.origin
    assert peft.__file__ == spec.origin
    from transformers.utils import is_peft_available
    from transformers.utils.import_utils import is_peft_greater_or_equal
    from transformers.utils.peft_utils import check_peft_version

    assert is_peft_available()
    check_peft_version("0.20.0")
    assert is_peft_greater_or_equal("0.21.0")
    from accelerate.utils.imports import is_peft_available as is_available_for_accelerate

    assert is_available_for_accelerate()


def test_the_paths_in_the_wheel_have_the_versions_that_they_must() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    ours = settings["project"]["version"]
    paths = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].values()
    assert sorted(paths) == [f"peft_compat-{ours}.data/purelib/peft-{peft.__version__}.dist-info/{name}" for name in ("INSTALLER", "METADATA")]
    metadata = (ROOT / "dist-info" / "METADATA").read_text()
    assert f"\nVersion: {peft.__version__}\n" in metadata
    assert (ROOT / "dist-info" / "INSTALLER").read_text().strip() == "peft-compat"


@pytest.mark.parametrize("version", ["0.21.2", "0.18.0"])
def test_upstream_beside_it_is_refused(tmp_path: Path, version: str) -> None:
    info = tmp_path / f"peft-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: peft\nVersion: {version}\n")
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text("peft/__init__.py,,\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", "import peft"], capture_output=True, text=True, env=environment)
    assert found.returncode
    assert f"ImportError: peft {version} and peft-compat are both installed" in found.stderr
    assert "pip uninstall -y peft peft-compat" in found.stderr
