"""What the acceptance scripts share: counted checks, tiny models made from configs, one thread, no network.

A script imports this module first (it sets the environment), defines one function per theme, and ends with
`run("accept_x", [theme, …])`. Each `check` is one sentence of what a consumer needs of the module `peft`. The last line is
`accept_x: N checks passed`, and N is the same on the peer and on ours; what only ours does better goes through `better`, which
counts apart and is skipped on the peer. The first failed check ends the script with exit status 1; with `ACCEPT_KEEP_GOING=1` the
rest is run too, so that one run lists everything that is missing.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the same arithmetic everywhere
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import Tensor, nn

torch.set_num_threads(1)

KEEP_GOING = os.environ.get("ACCEPT_KEEP_GOING") == "1"

_passed = 0
_better = 0
_failed: list[str] = []


class CheckFailed(SystemExit):
    """A check did not hold; the exit status is 1. Not an `Exception`, so that a consumer that catches errors cannot hide it."""

    def __init__(self) -> None:
        super().__init__(1)


def check(name: str, condition: object, detail: object = "") -> None:
    """Count one check; `condition` is used as a bool. Where it is false, say `name` (and `detail`) and stop with status 1."""
    global _passed
    if condition:
        _passed += 1
        if os.environ.get("ACCEPT_VERBOSE") == "1":
            print(f"  ok {_passed}: {name}", flush=True)
    else:
        _fail(name, detail)


def better(name: str, condition: Callable[[], object]) -> None:
    """One check of what ours does better than the peer (integrations.md §11); not run, and not counted, on the peer."""
    global _better
    if not ours():
        return
    if condition():
        _better += 1
    else:
        _fail(f"better: {name}")


def raises(name: str, kinds: type[BaseException] | tuple[type[BaseException], ...], call: Callable[[], object], match: str = "") -> None:
    """Check that `call()` raises one of `kinds` with `match` in its message (case does not count)."""
    try:
        call()
    except kinds as error:
        check(name, match.lower() in str(error).lower(), f"message {str(error)!r} does not contain {match!r}")
    except Exception as error:
        _fail(name, f"expected {kinds}, got {type(error).__name__}: {error}")
    else:
        _fail(name, f"expected {kinds}, nothing was raised")


def _fail(name: str, detail: object = "") -> None:
    print(f"FAILED: {name}" + (f" [{detail}]" if str(detail) else ""), flush=True)
    _failed.append(name)
    if not KEEP_GOING:
        raise CheckFailed


def lacking(versions: str, what: str) -> bool:
    """Return whether the installed transformers is among `versions` ("<5", ">=5.0,<5.4"), where `what` does not hold with any `peft`; then say so.

    Checks of `what` are left out there, and not counted.
    """
    import transformers
    from packaging.specifiers import SpecifierSet

    found = SpecifierSet(versions).contains(transformers.__version__, prereleases=True)
    if found:
        print(f"left out under transformers {transformers.__version__}, which lacks it ({versions}): {what}", flush=True)
    return found


def lift_version_gate() -> None:
    """Switch off the version check of transformers' adapter methods where it asks for a newer `peft` than ours and the peer's, and say so.

    transformers 5.24 asks for 0.22, which has not been released: its `add_adapter` and the like raise an error with both packages.
    """
    import transformers
    import transformers.integrations.peft as integration
    from packaging.version import Version

    import peft

    asked = integration.MIN_PEFT_VERSION
    if Version(asked) > Version(peft.__version__):
        print(f"transformers {transformers.__version__} asks for peft>={asked}; run with this version check switched off", flush=True)
        integration.MIN_PEFT_VERSION = peft.__version__


def ours() -> bool:
    """Whether the module `peft` is our drop-in: it then stands on `peft_core`, which upstream never imports."""
    import peft

    return bool(peft.PeftModel) and "peft_core" in sys.modules


def run(script: str, themes: Iterable[Callable[[], None]]) -> None:
    """Run the themes in order, print the final line and leave with status 0, or 1 where a check failed or a theme raised.

    Arguments on the command line name the themes to run; without any, all run.
    """
    wanted = set(sys.argv[1:])
    for theme in themes:
        if wanted and theme.__name__ not in wanted:
            continue
        began = time.perf_counter()
        try:
            theme()
        except Exception as error:
            traceback.print_exc()
            print(f"FAILED: theme {theme.__name__} [{type(error).__name__}: {error}]", flush=True)
            _failed.append(theme.__name__)
            if not KEEP_GOING:
                sys.exit(1)
        if os.environ.get("ACCEPT_VERBOSE") == "1":
            print(f"{theme.__name__}: {time.perf_counter() - began:.1f} s", flush=True)
    if _better:
        print(f"{script}: {_better} checks of what ours does better passed")
    if _failed:
        print(f"{script}: {_passed} checks passed, {len(_failed)} FAILED")
        sys.exit(1)
    print(f"{script}: {_passed} checks passed")


# ---- tensors ----------------------------------------------------------------------------------------------------------------------


def close(left: Tensor, right: Tensor, atol: float = 1e-5) -> bool:
    """Whether both have one shape and differ by at most `atol`, compared in float32."""
    return left.shape == right.shape and bool(torch.allclose(left.detach().float(), right.detach().float(), atol=atol, rtol=0.0))


def differ(left: Tensor, right: Tensor, atol: float = 1e-4) -> bool:
    """Whether both have one shape and some element differs by more than `atol`."""
    return left.shape == right.shape and bool((left.detach().float() - right.detach().float()).abs().max() > atol)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same keys and bit-equal values."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def no_meta(model: nn.Module) -> bool:
    """Whether every parameter and buffer has storage."""
    return not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def randomise(model: nn.Module, adapter: str = "default", scale: float = 0.1, seed: int = 7) -> None:
    """Fill the parameters whose names have `adapter` as a part with noise, so that an adapter has an effect at once."""
    generator = torch.Generator().manual_seed(seed)
    found = [parameter for name, parameter in model.named_parameters() if adapter in name.split(".")]
    if not found:
        raise ValueError(f"no parameter of an adapter {adapter!r} in {type(model).__name__}")
    with torch.no_grad():
        for parameter in found:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def folder() -> Path:
    """Return a new temporary directory, removed when the process ends."""
    kept = tempfile.TemporaryDirectory(prefix="accept_")
    _folders.append(kept)
    return Path(kept.name)


_folders: list[tempfile.TemporaryDirectory[str]] = []


# ---- tiny models ------------------------------------------------------------------------------------------------------------------

VOCAB = 64


def llama(seed: int = 0, *, cls: str = "LlamaForCausalLM", **changes: Any) -> Any:
    """Return a two-layer Llama (hidden 32, vocabulary 64) of transformers class `cls` with weights drawn from `seed`, in eval mode."""
    import transformers

    settings: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": VOCAB, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
    }  # fmt: skip
    torch.manual_seed(seed)
    return getattr(transformers, cls)(transformers.LlamaConfig(**{**settings, **changes})).eval()


def bert(seed: int = 0, *, cls: str = "BertForSequenceClassification", **changes: Any) -> Any:
    """Return a two-layer BERT (hidden 32, vocabulary 64, no dropout) of transformers class `cls`, in eval mode."""
    import transformers

    settings: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB,
        "max_position_embeddings": 128, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(seed)
    return getattr(transformers, cls)(transformers.BertConfig(**{**settings, **changes})).eval()


def t5(seed: int = 0, **changes: Any) -> Any:
    """Return a two-layer T5 for conditional generation (d_model 32, vocabulary 64, no dropout), in eval mode."""
    import transformers

    settings: dict[str, Any] = {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB, "dropout_rate": 0.0,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(seed)
    cls: Any = transformers.T5ForConditionalGeneration
    return cls(transformers.T5Config(**{**settings, **changes})).eval()


def ids(rows: int = 2, length: int = 8, seed: int = 3) -> Tensor:
    """Return token ids (rows, length) without the special ones (0 to 2)."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, tokens: Tensor | None = None, **inputs: Any) -> Tensor:
    """Return the logits of the model in eval mode, without gradients; its mode is put back."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output: Tensor = model(input_ids=ids() if tokens is None else tokens, **inputs).logits
    model.train(was_training)
    return output


def greedy(model: Any, tokens: Tensor, steps: int) -> Tensor:
    """Return tokens (rows, length + steps) by an argmax loop over whole forward calls."""
    for _ in range(steps):
        tokens = torch.cat([tokens, logits(model, tokens)[:, -1:].argmax(-1)], 1)
    return tokens


def gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradients of one step of training on the tokens of `ids()`, by parameter name."""
    model.train()
    model.zero_grad()
    tokens = ids()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def tokenizer() -> Any:
    """Return a word-level fast tokenizer with 64 entries, made in memory: [PAD]=0, [BOS]=1, [EOS]=2, [UNK]=3, then w4 … w63."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(4, VOCAB))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    cls: Any = PreTrainedTokenizerFast
    return cls(
        tokenizer_object=core, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]", model_max_length=64,
        cls_token="[BOS]", sep_token="[EOS]", mask_token="[UNK]",
    )  # fmt: skip
