"""Base class for a reversible change of the base model's structure that is made before adapters are planned."""

from __future__ import annotations

from typing import ClassVar


class Reshape:
    """A change of the set of modules in a base model. It is applied before the first adapter is planned, and undone when no adapter is left.

    Adapters of the same tuner that require an equal change share one change.

    Attributes:
        what: the config setting that requires the change, used in messages: ``"layer_replication=[(0, 3), (1, 4)]"``. Two changes are equal if
            their `what` is equal.
        shares_weights: True if, after the change, several modules share one weight but each has an adapter of its own, so that no adapter can
            be merged.
    """

    what: str
    shares_weights: ClassVar[bool] = False

    def apply(self) -> None:
        """Change the base model. If this raises an error, the base model is unchanged.

        Raises:
            ConfigError: the change is not possible on this base model.
        """
        raise NotImplementedError(f"{type(self).__name__} must define apply()")

    def undo(self) -> None:
        """Restore the structure that the base model had before `apply`."""
        raise NotImplementedError(f"{type(self).__name__} must define undo()")
