"""Comparisons with the peer, Hugging Face's peft. It is run, never read; it is no dependency of ours."""

from __future__ import annotations

import logging

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """One thread: sums are then added in the same order on both sides."""
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
