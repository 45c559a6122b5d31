"""Files of the peer (peft 0.21.2, written by `data/make.py`) are read, compute what they computed there, and are written the same."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft_core import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"


class Net(nn.Module):
    """Weights that no generator decides."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(5, 4)
        self.up = nn.Linear(4, 7, bias=False)
        self.down = nn.Linear(7, 3)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.sin(torch.arange(parameter.numel()) * 1.7 + number).view(parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.key(x))))


INPUT = torch.cos(torch.arange(15) * 0.9).view(3, 5)


@torch.no_grad()
def test_computes_what_the_peer_computed() -> None:
    model = PeftModel.from_pretrained(Net(), DATA).eval()
    expected = torch.tensor(json.loads((DATA / "output.json").read_text()))
    torch.testing.assert_close(model(INPUT), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.merge_and_unload()(INPUT), expected, rtol=1e-5, atol=1e-6)


def test_writes_what_the_peer_wrote(tmp_path: Path) -> None:
    PeftModel.from_pretrained(Net(), DATA).save_pretrained(tmp_path)
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (DATA, tmp_path))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    written, read = (json.loads((folder / "adapter_config.json").read_text()) for folder in (DATA, tmp_path))
    assert _sorted(written) == _sorted(read)


def test_a_new_adapter_has_the_same_tensors() -> None:
    loaded = PeftModel.from_pretrained(Net(), DATA)
    config = type(loaded.peft_config["default"]).from_pretrained(DATA)
    config.inference_mode = False
    new = get_peft_model(Net(), config)
    assert {key: value.shape for key, value in new.state_dict().items()} == {key: value.shape for key, value in loaded.state_dict().items()}


def _sorted(config: dict) -> dict:
    known = {key: value for key, value in config.items() if key != "auto_mapping"}  # names the module that defines Net
    return {key: sorted(value) if isinstance(value, list) else value for key, value in known.items()}


def test_the_seed_draws_what_the_peer_drew() -> None:
    from peft_vera.formulas import draw

    theirs = load_file(DATA / "adapter_model.safetensors")
    a, b = draw(4, 7, 6, seed=11)
    assert torch.equal(a, theirs["base_model.vera_A"])
    assert torch.equal(b, theirs["base_model.vera_B"])
