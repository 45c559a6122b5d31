"""LoRA around subclasses with constructors and forwards of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core import AdapterLayer, PeftModel, get_peft_config, get_peft_model, get_peft_model_state_dict

CONSTRUCTED: list[str] = []


@dataclass(frozen=True)
class Recipe:
    """What the classes below are made of: no constructor here has the arguments of its parent's."""

    width: int
    depth: int = 6


class OnlyOnce:
    """Notes each constructor call, and refuses arguments that are no recipe, as the classes of many models do."""

    def __init__(self, recipe: Recipe, **settings: Any) -> None:
        assert isinstance(recipe, Recipe)
        CONSTRUCTED.append(type(self).__name__)
        super().__init__(*self.parts(recipe), **settings)
        self.recipe = recipe

    @staticmethod
    def parts(recipe: Recipe) -> tuple[int, ...]:
        return recipe.width, recipe.depth


class Head(OnlyOnce, nn.Linear):
    """A Linear with a child of its own, and a forward that takes more than the input."""

    def __init__(self, recipe: Recipe, **settings: Any) -> None:
        super().__init__(recipe, **settings)
        self.spy = nn.Identity()

    def forward(self, x: Tensor, note: str = "") -> Tensor:
        return F.linear(self.spy(x), self.weight, self.bias)


class Slotted(OnlyOnce, nn.Linear):
    """A Linear that never calls its parent's constructor and forbids unknown attributes."""

    ALLOWED: ClassVar[set[str]] = {"in_features", "out_features", "weight", "bias", "training", "recipe"}

    def __init__(self, recipe: Recipe) -> None:
        CONSTRUCTED.append("Slotted")
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.recipe = recipe.width, recipe.depth, recipe
        self.weight = nn.Parameter(torch.randn(recipe.depth, recipe.width))
        self.bias = nn.Parameter(torch.randn(recipe.depth))

    def __setattr__(self, name: str, value: Any) -> None:
        assert name in self.ALLOWED or name.startswith("_"), name
        super().__setattr__(name, value)


class Scaled(OnlyOnce, nn.Embedding):
    """An embedding that multiplies what it finds, as those of Gemma do."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, padding_idx=0)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


class Causal(OnlyOnce, nn.Conv1d):
    """A Conv1d that pads on the left, by what its constructor computed."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, kernel_size=3, dilation=2)
        self.left = (self.kernel_size[0] - 1) * self.dilation[0]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.left, 0)))


class Static(OnlyOnce, nn.Conv2d):
    """A Conv2d like EfficientNet's: padding is a module, the stride a list."""

    def __init__(self, recipe: Recipe, image: int | None = None, groups: int = 1) -> None:
        super().__init__(recipe, kernel_size=3, stride=2, groups=groups, bias=False)
        assert image is not None
        self.stride = [2, 2]
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1)) if image % 2 == 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Trimmed(OnlyOnce, nn.Conv3d):
    """A Conv3d that cuts its output to the length of its input."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, kernel_size=(2, 1, 3), padding=(1, 0, 1), padding_mode="replicate")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :, : x.shape[2]]


class Attentive(OnlyOnce, nn.MultiheadAttention):
    """An attention to itself, that returns its output only."""

    @staticmethod
    def parts(recipe: Recipe) -> tuple[int, ...]:
        return recipe.width, 2

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, batch_first=True)

    def forward(self, query: Tensor) -> Tensor:
        return super().forward(query, query, query, need_weights=False)[0]


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    x: Tensor
    settings: dict[str, Any]


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


CASES = {
    "linear": Case(lambda: Head(Recipe(4)), floats(2, 3, 4), {}),
    "linear-strict": Case(lambda: Slotted(Recipe(4)), floats(3, 4), {}),
    "linear-dora": Case(lambda: Head(Recipe(4)), floats(2, 4), {"use_dora": True}),
    "embedding": Case(lambda: Scaled(Recipe(9)), torch.tensor([[1, 8, 0], [3, 3, 5]]), {}),
    "embedding-dora": Case(lambda: Scaled(Recipe(9)), torch.tensor([[1, 8, 0], [3, 3, 5]]), {"use_dora": True}),
    "conv1d": Case(lambda: Causal(Recipe(4)), floats(2, 4, 7), {}),
    "conv1d-dora": Case(lambda: Causal(Recipe(4)), floats(2, 4, 7), {"use_dora": True}),
    "conv2d": Case(lambda: Static(Recipe(4), image=6), floats(2, 4, 6, 6), {}),
    "conv2d-unpadded": Case(lambda: Static(Recipe(4), image=7), floats(2, 4, 7, 7), {"use_dora": True}),
    "conv2d-grouped": Case(lambda: Static(Recipe(4), image=6, groups=2), floats(2, 4, 6, 6), {"grouped_convolutions": True}),
    "conv2d-grouped-dora": Case(lambda: Static(Recipe(4), image=6, groups=2), floats(2, 4, 6, 6), {"grouped_convolutions": True, "use_dora": True}),
    "conv3d": Case(lambda: Trimmed(Recipe(2)), floats(2, 2, 3, 2, 4), {}),
    "conv3d-dora": Case(lambda: Trimmed(Recipe(2)), floats(2, 2, 3, 2, 4), {"use_dora": True}),
    "attention": Case(lambda: Attentive(Recipe(4)), floats(2, 3, 4), {}),
}
each = pytest.mark.parametrize("name", CASES)


class Holder(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


def base_of(name: str) -> Holder:
    torch.manual_seed(0)
    return Holder(CASES[name].make()).double().eval()


def adapted(name: str) -> Any:
    config = get_peft_config({"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["part"], **CASES[name].settings})
    model = get_peft_model(base_of(name), config).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))
    return model


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


def with_changed_weights(name: str, model: Any) -> nn.Module:
    """The plain class, with the weights that the adapter's change makes of its own: what the adapted model has to compute."""
    plain = base_of(name)
    with torch.no_grad():
        for layer in layers(model):
            place = plain.part.out_proj if type(layer).__name__ == "OutProjection" else plain.part
            place.get_parameter(layer.weight_name).add_(layer.get_delta_weight("default"))
    return plain


@each
def test_it_computes_as_the_class_itself_would_with_changed_weights(name: str) -> None:
    model, x = adapted(name), CASES[name].x
    expected = with_changed_weights(name, model)(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, base_of(name)(x), atol=1e-2)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.settings.get("use_dora")])  # whose norm is a constant on purpose
def test_gradients_are_those_of_the_changed_weights(name: str) -> None:
    """∂/∂B of the adapted model against finite differences."""
    model, x = adapted(name), CASES[name].x
    layer = layers(model)[0]
    b = next(value for key, value in layer.parameters_of("default").items() if "B" in key)
    model(x).square().sum().backward()
    step = 1e-6
    direction = torch.randn(b.shape, generator=torch.Generator().manual_seed(2), dtype=b.dtype)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            b.add_(sign * step * direction)
            values.append(model(x).square().sum().item())
            b.sub_(sign * step * direction)
    assert (b.grad * direction).sum().item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


@each
def test_no_constructor_is_called_again(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    CONSTRUCTED.clear()
    model.add_adapter("second", get_peft_config({"peft_type": "LORA", "r": 2, "target_modules": ["part"], **CASES[name].settings}))
    copy.deepcopy(model)
    model(CASES[name].x)
    model.save_pretrained(str(tmp_path))
    model.delete_adapter("second")
    model.merge_and_unload()
    assert CONSTRUCTED == []


@each
def test_merged_and_unmerged(name: str) -> None:
    model, x = adapted(name), CASES[name].x
    expected = model(x)
    before = {key: value.clone() for key, value in model.get_base_model().state_dict().items() if "lora" not in key}
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.get_base_model().state_dict().items() if key in before)
    base = model.merge_and_unload()
    assert type(base.part) is type(base_of(name).part)
    torch.testing.assert_close(base(x), expected, rtol=1e-9, atol=1e-9)


@each
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, x = adapted(name), CASES[name].x
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(base_of(name), str(tmp_path)).eval()
    with torch.no_grad():  # with gradients an attention chooses its kernel by what trains
        assert torch.equal(again(x), model(x))
    shapes = {key: value.shape for key, value in get_peft_model_state_dict(model).items()}
    assert shapes == {key: value.shape for key, value in get_peft_model_state_dict(again).items()}
    assert not [key for key in shapes if "padding" in key or "spy" in key or "embed_scale" in key]


@each
@torch.no_grad()
def test_rows_with_and_without(name: str) -> None:
    model, x = adapted(name), CASES[name].x
    rows = ["default", "__base__", "default"][: x.shape[0]]
    mixed = model(x, adapter_names=rows)
    with model.disable_adapter():
        plain = model(x)
    torch.testing.assert_close(plain, base_of(name)(x), rtol=0, atol=0)
    full = model(x)
    for row, adapter in enumerate(rows):
        torch.testing.assert_close(mixed[row], (full if adapter == "default" else plain)[row], rtol=1e-9, atol=1e-9)


def test_more_arguments_reach_the_base() -> None:
    model = adapted("linear")
    x = CASES["linear"].x
    assert torch.equal(model.get_base_model().part(x, note="kept"), model(x))
    with pytest.raises(TypeError, match="unexpected keyword"):
        model.get_base_model().part(x, unknown=1)


def test_the_padding_of_the_copy_follows_its_base_to_another_mode_and_dtype() -> None:
    model = adapted("conv2d")
    x = CASES["conv2d"].x.float()
    expected = model(CASES["conv2d"].x)
    model.float()
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-4)
    twin = layers(model)[0].lora_A["default"]
    assert twin.static_padding is not layers(model)[0].get_base_layer().static_padding
    assert list(twin.parameters()) == [twin.weight]
    model.train()
    assert twin.static_padding.training
