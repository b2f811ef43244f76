"""Who loads a quantised directory: what its format asks of a reader, and which tools have that.

Pure: called with the options that were used, before anything is written (`causerie quantize` warns) and for the report.
What the tools take was seen with GPTQModel 7.7, vLLM 0.32 (CPU build), AutoGPTQ 0.7.1 and llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from quant.formats.checkpoint_format import CheckpointFormat

# What `causerie export` can say in a GGUF block without rounding a code again.
GGUF_BLOCK = 32


@dataclass(frozen=True, slots=True)
class WrittenFormat:
    """What a reader must know to load the file.

    bits, group_sizes: every value that occurs in the decoder's layers; -1 is one group over all inputs
    act_order:         "none", "static" (groups stay in order) or "shuffled" (a g_idx that is not trivial)
    head_bits, embedding_bits: None where they are plain; both where they are one quantised table
    checkpoint_format: the version of AutoGPTQ's layout
    """

    bits: frozenset[int]
    group_sizes: frozenset[int]
    symmetric: bool
    act_order: str = "none"
    head_bits: int | None = None
    embedding_bits: int | None = None
    checkpoint_format: CheckpointFormat = CheckpointFormat.V1

    @property
    def is_mixed(self) -> bool:
        """A head or embeddings with other bits than the layers count as well."""
        ends = {bits for bits in (self.head_bits, self.embedding_bits) if bits is not None}
        return len(self.bits | ends) > 1 or len(self.group_sizes) > 1


@dataclass(frozen=True, slots=True)
class Loader:
    """`reason` says what makes it so, or what to do about it; never empty where `loads` is false."""

    tool: str
    loads: bool
    reason: str


def who_loads(written: WrittenFormat) -> tuple[Loader, ...]:
    """One row for each tool, Causerie's own engine first."""
    obstacles = {
        "GPTQModel": _obstacles_gptqmodel(written),
        "vLLM (CPU build)": _obstacles_vllm(written),
        "AutoGPTQ 0.7": _obstacles_auto_gptq(written),
        "llama.cpp, Ollama": _obstacles_gguf(written),
    }
    own = "on the plain path: slow" if written.act_order == "shuffled" else ""
    return (
        Loader("Causerie", True, own),
        *(Loader(tool, not found, "; ".join(found) or _how(tool, written)) for tool, found in obstacles.items()),
    )


def refusing_tools(written: WrittenFormat) -> tuple[str, ...]:
    """The names of those that will not load it."""
    return tuple(loader.tool for loader in who_loads(written) if not loader.loads)


def _how(tool: str, written: WrittenFormat) -> str:
    if tool.startswith("llama.cpp"):
        return "after `causerie export`"
    return "by its `dynamic` overrides" if tool == "GPTQModel" and written.is_mixed else ""


def _obstacles_gptqmodel(written: WrittenFormat) -> list[str]:
    found: list[str] = []
    if written.embedding_bits is not None:
        # Its own have groups of tokens, not of a token's values, and it takes these for such.
        found.append("it lays packed embeddings out in another way")
    if not written.symmetric and written.checkpoint_format is CheckpointFormat.V1:
        found.append("it takes asymmetric groups of its own files only, or in version 2 (--format v2)")
    return found


def _obstacles_vllm(written: WrittenFormat) -> list[str]:
    found = _mixture(written)
    if written.embedding_bits is not None:
        found.append("it reads plain embeddings")
    if not written.symmetric:
        found.append("it takes symmetric groups only (--sym)")
    if 8 in written.bits:
        found.append("its CPU build takes 4 bits only")
    if written.act_order == "shuffled":
        found.append("it takes no g_idx that shuffles (--act-order=static)")
    return found


def _obstacles_auto_gptq(written: WrittenFormat) -> list[str]:
    found = _mixture(written)
    if written.head_bits is not None or written.embedding_bits is not None:
        found.append("it reads a plain head and embeddings")
    if written.checkpoint_format is CheckpointFormat.V2:
        found.append("it takes every file for version 1, so each zero point is one too high (--format v1)")
    return found


def _obstacles_gguf(written: WrittenFormat) -> list[str]:
    found: list[str] = []
    if written.act_order == "shuffled":
        found.append("GGUF blocks are neighbouring inputs (--act-order=static)")
    odd = sorted(size for size in written.group_sizes if size > 0 and size % GGUF_BLOCK)
    if odd:
        found.append(f"GGUF blocks have {GGUF_BLOCK} inputs, which group size {odd[0]} is no multiple of")
    return found


def _mixture(written: WrittenFormat) -> list[str]:
    return ["it takes one width and group size for the whole file"] if written.is_mixed else []
