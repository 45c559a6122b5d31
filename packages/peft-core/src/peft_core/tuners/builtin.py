"""Parts of an adapter that core supplies for every method: modules saved whole, rows of embeddings, and trained biases of the base.

They are tuners like any other: they plan, their modules stand in the index, rows are routed to them, files hold their slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..base.view import BaseView
from ..config import SharedOptions
from ..errors import ConfigError
from ..selection.selection import AdapterSelection
from . import tying
from .biases import BIAS, Biases, BiasRequest
from .saved_modules import SAVED, SavedModules, SavedRequest
from .tokens import TOKENS, TokenRequest, TrainedTokens
from .tuner import Plan, TunerBase


def requests(
    tuners: Mapping[str, TunerBase], selection: AdapterSelection, options: SharedOptions, view: BaseView, main: Plan
) -> Iterator[tuple[str, TunerBase, SavedRequest | TokenRequest | BiasRequest]]:
    """Yield the built-in parts that a config and a task ask for: kind, tuner, and its request.

    Args:
        tuners: those that the model has already.
        selection: of the model.
        options: what the config asks for.
        view: the base; its `heads` are what the task asks for.
        main: the plan of the adapter's own method.

    Raises:
        ConfigError: an unknown choice of biases; or of modules whose weights are to stay tied, one is adapted and one saved whole.
    """
    found = tuners.get(SAVED)
    saved = found if isinstance(found, SavedModules) else SavedModules(selection)
    request = SavedRequest(tuple(name for name in options.modules_to_save if name not in view.heads), view.heads, bool(options.ensure_weight_tying))
    inside = tuple(saved.paths(view, request)) if request.required or request.optional else ()
    targets = tuple(wrap.path for wrap in main.wraps)
    tying.check(view, options.ensure_weight_tying, targets, inside)
    if request.required or request.optional:
        yield SAVED, saved, request
    if options.token_indices is not None:
        yield TOKENS, tuners.get(TOKENS) or TrainedTokens(selection), TokenRequest(options.token_indices, inside)
    if options.bias != "none":
        if options.bias not in ("all", "targets"):
            raise ConfigError(f"bias={options.bias!r}", hint="write 'none', 'all' or 'targets'")
        yield BIAS, tuners.get(BIAS) or Biases(selection), BiasRequest(targets, options.bias == "all", inside)
