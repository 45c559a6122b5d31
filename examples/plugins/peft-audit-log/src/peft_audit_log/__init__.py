"""An audit log of adapters for peft-core: one line of JSON per event. `read` it, and ask what has `changed` since."""

from __future__ import annotations

from .log import ENVIRONMENT, Event, changed, digests, read

__version__ = "0.1.0"
__all__ = ["ENVIRONMENT", "Event", "__version__", "changed", "digests", "read"]
