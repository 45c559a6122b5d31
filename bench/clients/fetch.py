"""Gets the Python files of a released package that mention `peft`, with pip, and keeps only those."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

WORD = b"peft"
PYTHONS = ("3.12", "3.11", "3.10", "3.9")  # of wheels that are made for one of them
PLATFORMS = ("manylinux2014_x86_64", "linux_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(5, 40)))
#: seconds for one try of pip
PATIENCE = 300
_SIZE = re.compile(r"Downloading .*\((\d+(?:\.\d+)?) (bytes|kB|MB|GB)\)")
_MEGABYTES = {"bytes": 1e-6, "kB": 1e-3, "MB": 1.0, "GB": 1e3}


class SkippedError(Exception):
    """A release that is not read, and why."""


def sources(name: str, version: str, cache: Path, limit: float) -> Path:
    """Return the folder with the files of a release that mention `peft`, in the tree they have there.

    The wheel is taken; where there is none, the source archive, for which pip may call its build tool to ask for the metadata (nothing is
    built). The archive is deleted when it was read, the folder stays in the cache.

    Args:
        name: the package's, as in the index.
        version: one that the index has.
        cache: where folders are kept.
        limit: the largest download, in MB.

    Raises:
        SkippedError: the archive is larger, or there is none that pip takes.
    """
    kept = cache / f"{name}-{version}"
    if kept.is_dir():
        return kept
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        room = Path(scratch)
        (room / "build").mkdir()
        archive = _wheel(f"{name}=={version}", room, limit) or _source_archive(f"{name}=={version}", room, limit)
        picked = room / "picked"
        picked.mkdir()
        for path, content in _python_files(archive) if archive else _unpacked(room / "build"):
            if WORD in content:
                (picked / path).parent.mkdir(parents=True, exist_ok=True)
                (picked / path).write_bytes(content)
        shutil.move(picked, kept)
    return kept


def _wheel(requirement: str, room: Path, limit: float) -> Path | None:
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    for python in PYTHONS:
        _pip(["--only-binary=:all:", "--ignore-requires-python", "--python-version", python, *platforms, requirement], room, limit)
        if found := next(room.glob("*.whl"), None):
            return found
    return None


def _source_archive(requirement: str, room: Path, limit: float) -> Path | None:
    """Return the archive; None if pip has unpacked it and then stumbled over its build tool: the files are under `build`."""
    said = _pip(["--no-binary=:all:", "--ignore-requires-python", "--no-build-isolation", "--no-clean", requirement], room, limit)
    archive = next((path for path in room.iterdir() if path.name.endswith((".tar.gz", ".zip"))), None)
    if archive is None and not any((room / "build").rglob("*.py")):
        raise SkippedError(f"no archive of it: {said}")
    return archive


def _pip(arguments: list[str], room: Path, limit: float) -> str:
    """Run `pip download` without dependencies, and end it where the file is too large. Returns the last line that it said."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--progress-bar=off", "--no-cache-dir", "--dest", str(room), *arguments]
    patient = ["timeout", str(PATIENCE)] if shutil.which("timeout") else []
    environment = {**os.environ, "TMPDIR": str(room / "build")}
    last = ""
    with subprocess.Popen([*patient, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as running:
        assert running.stdout is not None
        for line in running.stdout:
            last = line.strip() or last
            size = _SIZE.search(line)
            if size and (megabytes := float(size[1]) * _MEGABYTES[size[2]]) > limit:
                running.terminate()
                raise SkippedError(f"{megabytes:.0f} MB, more than {limit:.0f}")
    return last


def _python_files(archive: Path) -> Iterator[tuple[Path, bytes]]:
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                if name.endswith(".py"):
                    yield _inside(name), opened.read(name)
        return
    with tarfile.open(archive) as packed:
        for member in packed:
            if member.isfile() and member.name.endswith(".py") and (content := packed.extractfile(member)):
                yield _inside(member.name).relative_to(_inside(member.name).parts[0]), content.read()


def _unpacked(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield what pip has left of a source archive, in a folder of its own in a folder of its own."""
    for path in folder.rglob("*.py"):
        inside = path.relative_to(folder)
        if path.is_file() and len(inside.parts) > 2 and not inside.parts[0].startswith("pip-build-env"):
            yield Path(*inside.parts[2:]), path.read_bytes()


def _inside(name: str) -> Path:
    """Return a member's path without what would lead out of the folder."""
    return Path(*(part for part in Path(name).parts if part not in ("..", "/", "\\")))
