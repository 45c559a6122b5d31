"""Decide and check which adapters act on which samples of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import AdapterNotFoundError, RoutingError, did_you_mean, listed
from ..plugins.spec import Capability
from ..selection.route import BASE, Route, read_names
from ..tuners.index import AdapterIndex
from ..tuners.tokens import refuse_common_rows
from . import checkpointing


def check_route(index: AdapterIndex, route: Route) -> None:
    """Check that a call can use a route.

    Raises:
        AdapterNotFoundError: the route names an adapter that the model does not have.
        CapabilityError: the route uses different adapters for different samples, and a tuner in it does not declare PER_SAMPLE.
        RoutingError: adapters are merged, or two adapters of one sample train the embeddings of the same tokens.
    """
    checkpointing.prepare(index)  # layers that run again in the backward pass use the adapters of this call
    check_not_merged(index)
    unknown = [name for name in route.used if name not in index.configs]
    if unknown:
        raise AdapterNotFoundError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}",
            hint=did_you_mean(unknown[0], [*index.configs, BASE]) or f"the model has {listed(index.configs) or 'none'}",
        )
    for names in {route.names} if route.per_row is None else set(route.per_row):
        refuse_common_rows(index, names, RoutingError)
    if route.per_row is not None and len(set(route.per_row)) > 1:
        for name in route.used:
            index.require_capability(name, Capability.PER_SAMPLE, "used for some rows of a batch only")


def check_not_merged(index: AdapterIndex) -> None:
    """Check that no adapter is merged, so that a single call or block can use other adapters.

    Raises:
        RoutingError: adapters are merged.
    """
    merged = index.merged_adapters()
    if merged:
        raise RoutingError(
            f"adapters can't be chosen for this call: {listed(merged)} are merged, and act on all rows", hint="unmerge_adapter() first"
        )


def route_for(index: AdapterIndex, names: Sequence[Any] | None, batch: int | None = None) -> Route:
    """Return the route of a call: the per-sample adapters `names`, or the adapters that are active in this thread if `names` is None.

    Raises:
        RoutingError: the number of names differs from the number of samples, `batch`; or an error of `check_route`.
        AdapterNotFoundError, CapabilityError: errors of `check_route`.
    """
    if names is None:
        return index.selection.current()
    per_row = read_names(names)
    if batch is not None and len(per_row) != batch:
        raise RoutingError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(per_row)} and {batch} respectively",
            hint="give one entry per sample; '__base__' for none",
        )
    if not index.selection.enabled:
        return Route()
    checkpointing.prepare(index)  # layers that run again in the backward pass use the adapters of this call
    check_not_merged(index)
    scope = index.selection.cache()
    if scope is not None:  # layers cache their stacked weights with the route as the key, so the same names have to give the same object
        return scope.get(("route", tuple(index.configs), per_row), lambda: _checked(index, per_row))
    return _checked(index, per_row)


def _checked(index: AdapterIndex, per_row: tuple[tuple[str, ...], ...]) -> Route:
    check_route(index, Route(per_row=per_row))
    return _ordered(index, per_row)


def _ordered(index: AdapterIndex, per_row: tuple[tuple[str, ...], ...]) -> Route:
    """Return a route in which the adapters of each sample act in the order in which they were loaded, independent of the order in `per_row`."""
    load_order = {name: number for number, name in enumerate(index.configs)}
    ordered = {row: tuple(sorted(set(row), key=load_order.__getitem__)) for row in set(per_row)}
    if len(ordered) == 1:
        return Route(names=ordered[per_row[0]])
    used = sorted({name for row in ordered for name in row}, key=load_order.__getitem__)
    return Route(tuple(used), tuple(ordered[row] for row in per_row))
