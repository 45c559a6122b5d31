"""Parts of an adapter that core supplies for every method: modules saved whole, rows of embeddings, and trained biases of the base.

They are tuners like any other: they plan, their modules stand in the index, rows are routed to them, files hold their slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..base.view import BaseView
from ..config import Extras
from ..errors import ConfigError
from ..selection.selection import Activation
from . import tying
from .biases import BIAS, Biases, BiasRequest
from .saved_modules import SAVED, SavedModules, SavedRequest
from .tokens import TOKENS, TokenRequest, TrainedTokens
from .tuner import Plan, TunerBase


def requests(
    tuners: Mapping[str, TunerBase], activation: Activation, extras: Extras, view: BaseView, main: Plan
) -> Iterator[tuple[str, TunerBase, SavedRequest | TokenRequest | BiasRequest]]:
    """Yield the built-in parts that a config and a task ask for: kind, tuner, and what it is told.

    Args:
        tuners: those that the model has already.
        activation: of the model.
        extras: what the config asks for.
        view: the base; its `heads` are what the task asks for.
        main: the plan of the adapter's own method.

    Raises:
        ConfigError: an unknown choice of biases; or of modules whose weights are to stay tied, one is adapted and one saved whole.
    """
    found = tuners.get(SAVED)
    saved = found if isinstance(found, SavedModules) else SavedModules(activation)
    request = SavedRequest(tuple(name for name in extras.modules_to_save if name not in view.heads), view.heads, bool(extras.ensure_weight_tying))
    inside = tuple(saved.paths(view, request)) if request.required or request.optional else ()
    targets = tuple(wrap.path for wrap in main.wraps)
    tying.check(view, extras.ensure_weight_tying, targets, inside)
    if request.required or request.optional:
        yield SAVED, saved, request
    if extras.token_indices is not None:
        yield TOKENS, tuners.get(TOKENS) or TrainedTokens(activation), TokenRequest(extras.token_indices, inside)
    if extras.bias != "none":
        if extras.bias not in ("all", "targets"):
            raise ConfigError(f"bias={extras.bias!r}", hint="write 'none', 'all' or 'targets'")
        yield BIAS, tuners.get(BIAS) or Biases(activation), BiasRequest(targets, extras.bias == "all", inside)
