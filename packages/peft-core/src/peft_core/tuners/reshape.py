"""A change of the structure of a base that adapters need before they are planned, and its way back."""

from __future__ import annotations

from typing import ClassVar


class Reshape:
    """One change of which modules a base has. It is made before the first adapter is planned, and undone when no adapter is left.

    Adapters of a tuner that ask for an equal change share it.

    Attributes:
        what: the setting that asks for it, for messages: ``"layer_replication=[(0, 3), (1, 4)]"``. Changes are equal when this is.
        shares_weights: afterwards modules share weights that have an adapter each, so that none can be merged.
    """

    what: str
    shares_weights: ClassVar[bool] = False

    def apply(self) -> None:
        """Change the base. Nothing has changed if this raises.

        Raises:
            ConfigError: it can't be done to this base.
        """
        raise NotImplementedError(f"{type(self).__name__} must define apply()")

    def undo(self) -> None:
        """Restore the base as `apply` found it."""
        raise NotImplementedError(f"{type(self).__name__} must define undo()")
