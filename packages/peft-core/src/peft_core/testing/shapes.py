"""Checks on shapes that nobody thought of: hypothesis draws them, the same ones each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import AdapterLayer, Capability, ConfigError, MergeError, PeftModel
from .base import SuiteBase
from .conditions import offers_tokens, only, wraps_layers
from .helpers import layers_of, parameters_of, tensor_of
from .models import VOCABULARY, OneLayer, seeded, unsettle


class ShapeChecks(SuiteBase):
    """Checks on drawn shapes."""

    @only(wraps_layers)
    def test_shapes(self, name: str) -> None:
        """For Linear layers and inputs of any shape, empty ones too, in float32 and bfloat16, an adapter adds x ΔWᵀ; gradients are finite.

        Protects from an adapter that only works with three dimensions, a batch that is not empty, or equal numbers of features.
        """
        st = strategies()
        sizes, leading = st.integers(1, 12), st.lists(st.integers(0, 4), max_size=3)
        draws(self._shape, name, sizes, sizes, leading, st.sampled_from((torch.float32, torch.bfloat16)), st.booleans())

    def _shape(self, name: str, inp: int, out: int, leading: list[int], dtype: torch.dtype, bias: bool) -> None:
        case = f"Linear({inp}, {out}, bias={bias}) in {dtype} on x of shape {(*leading, inp)}"
        generator = torch.Generator().manual_seed(inp * 100 + out)
        x = torch.randn(*leading, inp, generator=generator).to(dtype).requires_grad_()
        with seeded(0):
            model = self.model_on(name, unsettle(OneLayer(nn.Linear(inp, out, bias))).to(dtype).eval())
        layer = layers_of(model)[0]
        with torch.no_grad():
            plain = layer.get_base_layer()(x)
        found: Tensor = model(x)
        assert found.shape == plain.shape, f"{case}: the output has the shape {tuple(found.shape)}, the base's {tuple(plain.shape)}"
        assert found.dtype == plain.dtype, f"{case}: the output is {found.dtype}, the base's {plain.dtype}"
        torch.autograd.backward(found.float().sum())
        gradients = {"x": x.grad, **{key: p.grad for key, p in parameters_of(model, "default").items()}}
        for key, gradient in gradients.items():
            assert gradient is not None, f"{case}: {key} has no gradient"
            assert torch.isfinite(gradient).all(), f"{case}: {key} has a gradient that is not finite"
        if self.spec.can(Capability.MERGE) and plain.numel():
            self._effect(model, layer, x.detach(), plain.float(), found.detach().float(), case)

    def _effect(self, model: PeftModel, layer: AdapterLayer, x: Tensor, plain: Tensor, found: Tensor, case: str) -> None:
        """Compare with what ΔW says, or, where the effect is no sum, with the merged layer."""
        with torch.no_grad():
            if layer.is_additive("default"):
                try:
                    moved = layer.merged_bias("default", layer.bias)
                except MergeError:  # a bias that this base has no place for: no weights say what to expect
                    return
                shift = 0.0 if moved is None or layer.bias is None else moved.float() - layer.bias.float()
                expected = plain + x.float() @ layer.get_delta_weight("default").float().T + shift
            else:
                model.merge_adapter()
                expected = model(x).float()
        scale = float(torch.stack([plain.abs().max(), expected.abs().max(), (expected - plain).abs().max()]).max())
        tolerance = 10 * self.tolerance if x.dtype == torch.float32 else 8 * torch.finfo(x.dtype).eps
        error = float((found - expected).abs().max())
        assert error <= tolerance * scale, f"{case}: off by {error:.2e} from what the weights say, the largest term is {scale:.2e}"

    @only(offers_tokens)
    def test_padding(self, name: str) -> None:
        """Batches of texts of any lengths, padded on the right (decoders: on the left, too): each row is what it is alone without padding.

        Protects from answers that depend on how long the other texts of a batch are.
        """
        model = self.model(name)
        st = strategies()
        sides = ("right", "left") if model.task.generates else ("right",)
        lengths = st.lists(st.integers(1, 7), min_size=1, max_size=4)
        draws(self._padded, name, st.just(model), lengths, st.sampled_from(sides))

    def _padded(self, name: str, model: PeftModel, lengths: list[int], side: str) -> None:
        generator = torch.Generator().manual_seed(sum(lengths))
        width = max(lengths)
        ids = torch.randint(1, VOCABULARY, (len(lengths), width), generator=generator)
        mask = torch.zeros_like(ids)
        texts = []
        for row, length in enumerate(lengths):
            span = slice(0, length) if side == "right" else slice(width - length, width)
            mask[row, span] = 1
            texts.append((span, ids[row : row + 1, span]))
        whole = model.task.name == "SEQ_CLS"  # one answer for each text
        found = self._on(model, name, ids * mask, mask)
        for row, (span, text) in enumerate(texts):
            alone = self._on(model, name, text, torch.ones_like(text))[0]
            # virtual tokens come first: what is compared are the caller's own tokens
            got = found[row] if whole else found[row][-width:][span]
            expected = alone if whole else alone[-text.shape[1] :]
            self.close(got, expected, f"row {row} of texts of lengths {lengths}, padded on the {side}, differs from the row alone", 5)

    def _on(self, model: PeftModel, name: str, ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return tensor_of(model(input_ids=ids, attention_mask=mask, **self.arguments(name, len(ids))))


def strategies() -> Any:
    """Return `hypothesis.strategies`.

    Raises:
        ConfigError: hypothesis is not installed.
    """
    try:
        from hypothesis import strategies as found
    except ImportError as error:
        raise ConfigError("the checks on drawn shapes need hypothesis", hint="pip install 'peft-core[testing]'") from error
    return found


def draws(action: Callable[..., None], name: str, *drawn: Any) -> None:
    """Call `action(name, *values)` with values that hypothesis draws: 25 times, the same ones each time, nothing written to disk."""
    from hypothesis import HealthCheck, Phase, given, settings

    rules = settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=25,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )

    @rules
    @given(strategies().tuples(*drawn))
    def examples(values: tuple[Any, ...]) -> None:
        action(name, *values)

    examples()
