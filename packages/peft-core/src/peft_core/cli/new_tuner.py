"""Writes a new tuner package, which can be built, is discovered as a plugin and passes the conformance suite. Does not import torch."""

from __future__ import annotations

import re
import string
import tempfile
from importlib import resources
from pathlib import Path

import importlib_metadata

from ..errors import ConfigError, DuplicateTunerError, did_you_mean
from ..plugins import discovery, list_tuners

KINDS = ("layer", "prompt")
LONGEST = 30  # longest name with which all lines of the templates are within the package's line-length limit

_COMMON = {
    ".gitignore": "common/gitignore",
    ".github/workflows/ci.yml": "common/ci.yml",
    "LICENSE": "common/LICENSE",
    "README.md": "common/README.md",
    "noxfile.py": "common/noxfile.py",
    "pyproject.toml": "common/pyproject.toml",
    "src/{module}/__init__.py": "common/__init__.py",
    "src/{module}/plugin.py": "common/plugin.py",
}
_OF_KIND = {
    "src/{module}/config.py": "config.py",
    "src/{module}/formulas.py": "formulas.py",
    "src/{module}/tuner.py": "tuner.py",
    "tests/test_{name}.py": "test.py",
}
_PART = {"layer": "layer", "prompt": "encoder"}
_VALUES = {
    "layer": {
        "formula": "ΔW = alpha·u vᵀ with two learned vectors",
        "options": '"target_modules": ["q_proj"]',
        "spec": (
            "        capabilities=Capability.MERGE | Capability.PER_SAMPLE,\n"
            "        examples={  # what the conformance suite runs\n"
            '            "linear": {"alpha": 2.0, "target_modules": ["q_proj", "down_proj"]},\n'
            '            "classifier": {"target_modules": ["query"], "base": "bert-seq-cls"},\n'
            "        },\n"
        ),
    },
    "prompt": {
        "formula": "a learned table of tokens, each with a learned gain",
        "options": '"num_virtual_tokens": 8',
        "spec": (
            '        base_prefix="base_model.",\n'
            "        capabilities=Capability.PER_SAMPLE,\n"
            "        examples={  # what the conformance suite runs\n"
            '            "causal": {"num_virtual_tokens": 3},\n'
            '            "classifier": {"num_virtual_tokens": 2, "base": "bert-seq-cls"},\n'
            "        },\n"
        ),
    },
}


class _Template(string.Template):
    delimiter = "@@"  # `$` is common in workflows and shells


def create(name: str, kind: str = "layer", directory: Path | None = None) -> Path:
    """Write a complete tuner package and return its folder, `peft-<name>`. If an error occurs, nothing is written.

    Args:
        name: name of the method, such as ``"my-method"`` or ``"my_method"``; its `peft_type` is then ``"MY_METHOD"``.
        kind: ``"layer"`` (wraps layers of the base) or ``"prompt"`` (virtual tokens).
        directory: where the folder is created; None: the working directory.

    Raises:
        ConfigError: `name` is malformed, `kind` is unknown, `directory` does not exist, or the folder exists and is not empty.
        DuplicateTunerError: an installed tuner or distribution already has this name.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r} is unknown", hint=did_you_mean(kind, KINDS, f"write one of {', '.join(KINDS)}"), code="new-tuner-kind")
    name = _checked_name(name)
    _refuse_taken(name)
    parent = Path.cwd() if directory is None else Path(directory)
    if not parent.is_dir():
        raise ConfigError(f"there is no folder {str(parent)!r}", hint="make it first, or name another", code="new-tuner-folder")
    folder = parent / f"peft-{name.replace('_', '-')}"
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise ConfigError(f"{str(folder)!r} exists and is not an empty folder", hint="choose another name, or move it away", code="new-tuner-folder")
    files = render(name, kind)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{folder.name}-") as staging:
        whole = Path(staging) / folder.name
        for path, text in files.items():
            (whole / path).parent.mkdir(parents=True, exist_ok=True)
            (whole / path).write_text(text, encoding="utf-8", newline="\n")
        was_there = folder.exists()
        if was_there:
            folder.rmdir()  # some systems can't rename onto an existing folder; rmdir fails if the folder is no longer empty
        try:
            whole.rename(folder)
        except BaseException:
            if was_there:
                folder.mkdir(exist_ok=True)
            raise
    return folder


def render(name: str, kind: str) -> dict[str, str]:
    """Return {path: text} for the files of a new package; `name` must be valid, such as ``"my_method"``."""
    values = {
        "name": name,
        "module": f"peft_{name}",
        "distribution": f"peft-{name.replace('_', '-')}",
        "peft_type": name.upper(),
        "klass": "".join(part.capitalize() for part in name.split("_")),
        "part": _PART[kind],
        **_VALUES[kind],
    }
    part = _PART[kind]
    sources = {**_COMMON, **{path: f"{kind}/{source}" for path, source in _OF_KIND.items()}, f"src/{{module}}/{part}.py": f"{kind}/{part}.py"}
    folder = resources.files(__package__).joinpath("templates")
    files = {
        path.format(**values): _Template(folder.joinpath(f"{source}.tmpl").read_text(encoding="utf-8")).substitute(values)
        for path, source in sources.items()
    }
    files[f"src/peft_{name}/py.typed"] = ""
    return dict(sorted(files.items()))


def _checked_name(given: str) -> str:
    """Return the name with underscores instead of hyphens; raise `ConfigError` if it is not a valid name."""
    if re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", given) and len(given) <= LONGEST and not re.match(r"peft[-_]", given):
        return given.replace("-", "_")
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", given).lower()
    plain = re.sub(r"^[^a-z]+|^peft[^a-z0-9]+", "", re.sub(r"[^a-z0-9]+", "-", plain)).strip("-")[:LONGEST].strip("-")
    better = f"for example {plain!r}" if plain and plain != "peft" else "for example 'my-method'"
    raise ConfigError(
        f"{given!r} can't be the name of a tuner: it takes lower-case letters, digits and single '-' or '_', begins with a letter, has at most "
        f"{LONGEST} characters and no 'peft-' in front (that comes by itself)",
        hint=better,
        code="new-tuner-name",
    )


def _refuse_taken(name: str) -> None:
    """Raise `DuplicateTunerError` if an installed tuner (even a switched-off one) or an installed distribution has this name."""
    peft_type, distribution = name.upper(), f"peft-{name.replace('_', '-')}"
    owners = {info.peft_type: f"{info.distribution} {info.version}".strip() for info in list_tuners()}
    owners.update({claim.name.upper(): str(claim) for claim in discovery.claims(discovery.TUNERS, switched_off=True)})
    if peft_type in owners:
        raise DuplicateTunerError(f"peft_type {peft_type!r} is already offered by {owners[peft_type]}", hint="choose another name")
    try:
        version = importlib_metadata.version(distribution)
    except importlib_metadata.PackageNotFoundError:
        return
    raise DuplicateTunerError(f"a distribution {distribution} {version} is already installed", hint="choose another name")
