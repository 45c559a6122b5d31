"""Core is tested with tuners of its own tests, so that it can be tested alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import support


@pytest.fixture(autouse=True)
def small_tuners() -> Iterator[None]:
    """The tuners DENSE (wraps layers) and CUE (virtual tokens) are known during each test."""
    with support.registered(support.DENSE, support.CUE):
        yield
