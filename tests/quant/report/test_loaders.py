"""Who loads what: each format feature names the tools that lack it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quant.formats.checkpoint_format import CheckpointFormat
from quant.report.loaders import WrittenFormat, refusing_tools, who_loads

pytestmark = pytest.mark.unit

COMMON = WrittenFormat(bits=frozenset({4}), group_sizes=frozenset({32}), symmetric=True)


def test_the_common_format_is_loaded_by_every_tool() -> None:
    assert refusing_tools(COMMON) == ()
    assert {loader.tool for loader in who_loads(COMMON)} == {
        *("Causerie", "GPTQModel", "vLLM (CPU build)", "AutoGPTQ 0.7", "llama.cpp, Ollama")
    }


@pytest.mark.parametrize(
    ("changes", "refusing"),
    [
        ({"symmetric": False}, {"GPTQModel", "vLLM (CPU build)"}),
        ({"symmetric": False, "checkpoint_format": CheckpointFormat.V2}, {"vLLM (CPU build)", "AutoGPTQ 0.7"}),
        ({"checkpoint_format": CheckpointFormat.V2}, {"AutoGPTQ 0.7"}),
        ({"act_order": "static"}, set()),
        ({"act_order": "shuffled"}, {"vLLM (CPU build)", "llama.cpp, Ollama"}),
        ({"bits": frozenset({4, 8})}, {"vLLM (CPU build)", "AutoGPTQ 0.7"}),
        ({"group_sizes": frozenset({128, 32})}, {"vLLM (CPU build)", "AutoGPTQ 0.7"}),
        ({"group_sizes": frozenset({-1})}, set()),
        ({"bits": frozenset({8})}, {"vLLM (CPU build)"}),
        ({"group_sizes": frozenset({48})}, {"llama.cpp, Ollama"}),
        ({"head_bits": 4}, {"AutoGPTQ 0.7"}),
        ({"head_bits": 8}, {"vLLM (CPU build)", "AutoGPTQ 0.7"}),
        ({"embedding_bits": 4}, {"GPTQModel", "vLLM (CPU build)", "AutoGPTQ 0.7"}),
    ],
)
def test_a_feature_that_a_tool_lacks_is_said_with_a_reason(changes: dict[str, object], refusing: set[str]) -> None:
    written = replace(COMMON, **changes)  # type: ignore[arg-type]
    assert set(refusing_tools(written)) == refusing
    assert all(loader.reason for loader in who_loads(written) if not loader.loads)


def test_mixed_widths_load_in_gptqmodel_by_its_overrides() -> None:
    loaders = {loader.tool: loader for loader in who_loads(replace(COMMON, bits=frozenset({4, 8})))}
    assert loaders["GPTQModel"].loads
    assert "dynamic" in loaders["GPTQModel"].reason
