"""The configs of all our packages work where torch is not installed."""

from __future__ import annotations

import pytest

import support

BLOCKED = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"


@pytest.mark.parametrize("peft_type", ["LORA", "LOHA", "PROMPT_TUNING", "PREFIX_TUNING", "TRAINABLE_TOKENS"])
def test_a_config_needs_no_torch(peft_type: str) -> None:
    code = f"import peft_core; print(peft_core.get_peft_config({{'peft_type': {peft_type!r}}}).peft_type)"
    assert support.run_python(BLOCKED + code) == peft_type


@pytest.mark.parametrize("package", ["peft_lora", "peft_loha", "peft_prompt", "peft_tokens"])
def test_importing_a_package_loads_no_torch(package: str) -> None:
    assert support.run_python(f"import sys, {package}, {package}.config, {package}.plugin; print('torch' in sys.modules)") == "False"


def test_listing_tuners_imports_none_of_them() -> None:
    code = "import sys, peft_core; peft_core.list_tuners(); print([name for name in sys.modules if name.startswith(('peft_l', 'peft_p', 'peft_t'))])"
    assert support.run_python(code) == "[]"


def test_all_our_tuners_are_found_by_their_distributions() -> None:
    code = "import peft_core; print(sorted((t.peft_type, t.distribution, t.state) for t in peft_core.list_tuners()))"
    prompts = [(name, "peft-prompt") for name in ("CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")]
    expected = sorted([("LOHA", "peft-loha"), ("LORA", "peft-lora"), *prompts, ("TRAINABLE_TOKENS", "peft-tokens")])
    assert support.run_python(code) == str([(*pair, "available") for pair in expected])
