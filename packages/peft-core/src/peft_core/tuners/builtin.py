"""Parts of an adapter that core supplies for every method: modules saved in full, trained embedding rows, and trained biases of the base.

They are implemented as tuners like any other: they make plans, the index lists their modules, they support per-sample routing, and their slots
are saved in the adapter's file.
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
    """Yield (kind, tuner, request) for each built-in part that the config and the task require.

    Args:
        tuners: the tuners that the model already has, by kind.
        selection: the selection of the model.
        options: the shared options of the config.
        view: the view of the base model; its `heads` are the modules that the task saves.
        main: the plan of the adapter's own method.

    Raises:
        ConfigError: `bias` has an unknown value; or two modules have tied weights that must stay tied, and one of them is adapted while the
            other is saved in full.
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
