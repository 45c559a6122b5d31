"""What libraries do with an adapted model that know nothing of adapters: opacus, and moving averages in the manner of diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from peft_core import get_peft_config, get_peft_model
from peft_core.testing import tiny
from peft_core.testing.helpers import randomise

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 2, "target_modules": ["first", "second"]},
    "dropout": {"peft_type": "LORA", "r": 2, "target_modules": ["first", "second"], "lora_dropout": 0.0},
    "bias": {"peft_type": "LORA", "r": 2, "target_modules": ["first", "second"], "lora_bias": True},
}
X = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(x)))
        return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_per_sample_gradients_of_opacus(name: str) -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(Block(), get_peft_config(CONFIGS[name])).train()
    randomise(model, "default", 1)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    alone = []
    for row in range(len(X)):
        model(X[row : row + 1]).square().sum().backward()
        alone.append({key: p.grad.clone() for key, p in trained.items()})
        model.zero_grad()
    wrapped = GradSampleModule(model, loss_reduction="sum")
    wrapped(X).square().sum().backward()
    for key, p in trained.items():
        samples: Tensor = p.grad_sample
        assert samples.shape == (len(X), *p.shape)
        for row, expected in enumerate(alone):
            torch.testing.assert_close(samples[row], expected[key], atol=1e-5, rtol=1e-4)


class MovingAverage:
    """An exponential moving average that is used as that of diffusers: `store`, `copy_to`, `restore` around an evaluation."""

    def __init__(self, parameters: list[nn.Parameter], decay: float = 0.5) -> None:
        self.decay, self.stored = decay, [p.detach().clone() for p in parameters]
        self.shadow = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def step(self, parameters: list[nn.Parameter]) -> None:
        for shadow, p in zip(self.shadow, parameters, strict=True):
            shadow.sub_((1 - self.decay) * (shadow - p))

    def store(self, parameters: list[nn.Parameter]) -> None:
        self.stored = [p.detach().cpu().clone() for p in parameters]

    def copy_to(self, parameters: list[nn.Parameter]) -> None:
        for shadow, p in zip(self.shadow, parameters, strict=True):
            p.data.copy_(shadow.to(p.device).data)

    def restore(self, parameters: list[nn.Parameter]) -> None:
        for stored, p in zip(self.stored, parameters, strict=True):
            p.data.copy_(stored.data)


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
    "dora": {"peft_type": "LORA", "r": 2, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "loha": {"peft_type": "LOHA", "r": 2, "target_modules": ["q_proj", "down_proj"]},
    "rows": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "tokens": {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3, 5]},
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
    "p-tuning": {"peft_type": "P_TUNING", "num_virtual_tokens": 3},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
}
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1]])


@pytest.mark.parametrize("name", METHODS)
def test_evaluation_of_a_moving_average(name: str) -> None:
    def made() -> Any:
        torch.manual_seed(0)
        model: Any = get_peft_model(tiny("llama"), get_peft_config({"task_type": "CAUSAL_LM", **METHODS[name]}))
        randomise(model, "default", 1)
        return model

    def evaluated(model: Any) -> tuple[Tensor, Tensor]:
        model.eval()
        with torch.no_grad():
            return model(input_ids=IDS).logits, model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)

    model, fresh = made(), made()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, average = torch.optim.AdamW(parameters, lr=0.1), MovingAverage(parameters)
    for _ in range(3):
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step(parameters)
        before = evaluated(model)
        average.store(parameters)
        average.copy_to(parameters)
        found = evaluated(model)
        fresh.load_state_dict(model.state_dict())
        expected = evaluated(fresh)
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-4)
        assert torch.equal(found[1], expected[1])
        average.restore(parameters)
        torch.testing.assert_close(evaluated(model)[0], before[0])
        assert not torch.allclose(found[0], before[0], atol=1e-4)
