"""What looks at an adapter before it is added, on behalf of the object that a user holds."""

from __future__ import annotations

from typing import Any

from ..base.view import BaseView
from ..layers.init_options import InitOptions
from .tuner import TunerBase


class InjectionReview:
    """Is shown what is about to be added, and may say otherwise. This one lets everything pass."""

    def options(self, options: InitOptions) -> InitOptions:
        """Return how the weights of an adapter are made, where `options` were asked for."""
        return options

    def view(self, adapter: str, config: Any, tuner: TunerBase, view: BaseView) -> BaseView:
        """Return the view with which `tuner` plans `adapter`, with `config`, instead of `view`: it may choose other modules. Changes nothing."""
        return view

    def filled(self, adapter: str, config: Any, options: InitOptions) -> None:
        """Look at the weights of `adapter` when they are there, and those of a file are not written yet; `options` are those asked for."""


#: lets everything pass
PASSES = InjectionReview()
