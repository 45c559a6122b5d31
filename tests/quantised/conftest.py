"""LoRA on the real libraries for quantised layers, on CPU: `nox -s quantised` installs them."""

from __future__ import annotations

import logging

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """One thread: products are then rounded the same way each time."""
    torch.set_num_threads(1)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
