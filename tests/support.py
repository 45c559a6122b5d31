"""What several test folders share: two small tuners, tiny models, fake distributions, and pictures of a model to compare.

The tuners are written as a third party would write them: only names of `peft_core` itself.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_core import (
    AdapterLayer,
    Call,
    Capability,
    InitOptions,
    LayerConfig,
    LayerTuner,
    Plan,
    PromptLearningConfig,
    SharedOptions,
    Slot,
    TunerBase,
    TunerSpec,
    VirtualTokens,
    register_tuner,
    unregister_tuner,
)

# ---- a tuner that wraps layers ----------------------------------------------------------------------------------------


@dataclass
class DenseConfig(LayerConfig):
    """DENSE: ΔW = alpha · D with a dense matrix D (out, in)."""

    alpha: int = 1
    start: str = "zero"
    bias: str = "none"

    default_peft_type: ClassVar[str | None] = "DENSE"

    def shared_options(self) -> SharedOptions:
        return SharedOptions(modules_to_save=tuple(self.modules_to_save or ()), bias=self.bias)


@dataclass(frozen=True)
class DenseSettings:
    alpha: float
    start: str


class DenseLayer(AdapterLayer):
    containers = ("dense_delta",)
    base_types = (nn.Linear, nn.Embedding)

    def add(self, adapter: str, config: DenseSettings) -> None:
        if config.start == "fail":
            raise RuntimeError("this layer refuses")
        self.new("dense_delta", adapter, self.matrix_shape, std=0.0 if config.start == "zero" else 1.0)
        self.scaling[adapter] = float(config.alpha)

    def delta_weight(self, adapter: str) -> Tensor:
        return self.scaling[adapter] * self.dense_delta[adapter]


class DenseTuner(LayerTuner):
    layers = (DenseLayer,)

    def settings(self, config: DenseConfig, module: Any) -> DenseSettings:
        # "fail-late": the last layer fails, when others are wrapped already
        start = config.start if config.start != "fail-late" else ("fail" if module.path.endswith("last") else "zero")
        return DenseSettings(module.alpha(config.alpha), start)


DENSE = TunerSpec("DENSE", DenseConfig, DenseTuner, "dense_", capabilities=Capability.MERGE | Capability.PER_SAMPLE | Capability.EMBEDDING)


# ---- a tuner that offers virtual tokens -------------------------------------------------------------------------------


@dataclass
class CueConfig(PromptLearningConfig):
    """CUE: a learned table of embeddings before the input."""

    default_peft_type: ClassVar[str | None] = "CUE"


class CueTable(nn.Module):
    def __init__(self, size: tuple[int, int], init_options: InitOptions) -> None:
        super().__init__()
        table = torch.empty(size, device="meta" if init_options.meta else "cpu")
        if not init_options.meta:
            table.normal_()
        self.table = nn.Parameter(table)

    def slots(self) -> dict[str, Slot]:
        return {"cue_table": Slot.of(self, "table")}


class CueTuner(TunerBase):
    def plan(self, base: Any, adapter: str, config: CueConfig) -> Plan:
        width = base.embeddings.weight.shape[1]
        size: Any = (config.num_virtual_tokens, width)
        return Plan(mounts={"cues": partial(CueTable, size)}, resolved={"token_dim": width})

    def prepare(self, call: Call) -> Call:
        tables: Any = self.mounted.get("cues", {})
        for adapter, rows in call.share(tables):
            call = call.adding(VirtualTokens(rows, embeds=tables[adapter].table))
        return call


CUE = TunerSpec("CUE", CueConfig, CueTuner, "cue_", base_prefix="base_model.", capabilities=Capability.PER_SAMPLE)


@contextlib.contextmanager
def registered(*specs: TunerSpec) -> Iterator[None]:
    """Make tuners known until the block ends."""
    for spec in specs:
        register_tuner(spec)
    try:
        yield
    finally:
        for spec in specs:
            unregister_tuner(spec.peft_type)


# ---- tiny models ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.tanh(self.up(x))))


class Net(nn.Module):
    """Two blocks in a list, then `last` and `head`: a model of nobody's library."""

    def __init__(self, width: int = 4, classes: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(width), Block(width)])
        self.last = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.last(x))


def net(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return Net(**kwargs)


def llama(**kwargs: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **kwargs})).eval()


def bert_classifier(**kwargs: Any) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(**{**sizes, **kwargs})).eval()


def gpt2(**kwargs: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**{"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, **kwargs})).eval()


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def features(rows: int = 3, width: int = 4) -> Tensor:
    """The same random rows each time."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


def dense(**fields: Any) -> DenseConfig:
    """A config for layers of two kinds in `net`, which changes outputs from the start."""
    return DenseConfig(**{"target_modules": ["up", "last"], "start": "random", **fields})


def logits(model: nn.Module, /, **inputs: Any) -> Tensor:
    """What a model returns for these inputs, without gradients."""
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def randomise(model: nn.Module, adapter: str, seed: int = 7) -> None:
    """Give an adapter's parameters random values, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if adapter in name.split("."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


# ---- pictures of a model ----------------------------------------------------------------------------------------------


def picture(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that an operation which failed must not have changed."""
    configs = getattr(model, "peft_config", None) or {}
    return {
        "modules": {name: (type(module).__name__, id(module), module.training) for name, module in model.named_modules()},
        "attributes": {name: sorted(key for key, value in vars(module).items() if not _empty_list(value)) for name, module in model.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "configs": {name: config.to_json() for name, config in configs.items()},
        "active": list(getattr(model, "active_adapters", ())) if configs else [],
    }


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: NaN equals itself, and 0.0 is not -0.0."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _empty_list(value: Any) -> bool:
    return isinstance(value, list) and not value


class Unchanged:
    """`with Unchanged(model): …` fails unless the model is bit for bit what it was, also when the block raises."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.before = picture(self.model)
        self.values = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def __exit__(self, *error: Any) -> None:
        after = picture(self.model)
        for what, value in self.before.items():
            assert after[what] == value, f"{what} changed"
        values = self.model.state_dict()
        assert values.keys() == self.values.keys()
        for name, value in self.values.items():
            assert torch.equal(bits(value), bits(values[name])), f"the values of {name} changed"


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- distributions and processes --------------------------------------------------------------------------------------

PLUGIN = """
from peft_core.plugins import TunerSpec
def peft_tuners():
    yield TunerSpec({peft_type!r}, "{module}:Config", "{module}:Tuner", {prefix!r})
class Config: pass
class Tuner: pass
"""


def distribution(
    folder: Path,
    name: str,
    *,
    tuners: dict[str, str] | None = None,
    plugins: dict[str, str] | None = None,
    requires: tuple[str, ...] = (),
    version: str = "1.0",
    modules: dict[str, str] | None = None,
) -> None:
    """Write what an installed distribution looks like: metadata, entry points and modules.

    Args:
        folder: a folder on `sys.path`.
        name: of the distribution.
        tuners, plugins: entry points, name → module.
        requires: its `Requires-Dist` lines.
        version: of the distribution.
        modules: source by module name; a tuner's module that is not given gets a plugin that offers what its entry point says.
    """
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {text}" for text in requires)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    groups = {"peft_core.tuners": tuners or {}, "peft_core.plugins": plugins or {}}
    text = "".join(f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items()) for group, points in groups.items() if points)
    (info / "entry_points.txt").write_text(text)
    sources = {module: PLUGIN.format(peft_type=key.upper(), module=module, prefix=f"{key}_") for key, module in (tuners or {}).items()}
    for module, source in {**sources, **(modules or {})}.items():
        (folder / f"{module}.py").write_text(textwrap.dedent(source))


def run_python(code: str, *, path: Path | None = None, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it prints; its failure is the test's."""
    search = os.pathsep.join(p for p in [str(path) if path else "", os.environ.get("PYTHONPATH", "")] if p)
    env = {**os.environ, "PYTHONPATH": search, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
