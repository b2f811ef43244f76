"""Settles parts of a matrix's outputs at once, one thread each: outputs do not influence each other.

GPTQ's steps are too small for torch to share one of them between threads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from quant.method.refine import CodedColumns

# With fewer outputs to a thread, a step costs more to start than to compute.
FEWEST_OUTPUTS = 256
# Weights of a part at most: settling takes about six times its float32 size, for each thread.
MOST_WEIGHTS = 2**22


def settle_in_parts(settle: Callable[[Tensor], CodedColumns], weight: Tensor) -> CodedColumns:
    """What `settle(weight)` gives, computed on as many threads as torch has. weight: (out, in); its columns come back.

    Meanwhile torch runs single-threaded; its setting is restored at the end.
    """
    threads = torch.get_num_threads()
    workers = min(threads, max(1, weight.shape[0] // FEWEST_OUTPUTS))
    parts = weight.chunk(max(workers, -(-weight.numel() // MOST_WEIGHTS)))
    is_inference = torch.is_inference_mode_enabled()  # of this thread; each has its own

    def settle_part(part: Tensor) -> CodedColumns:
        with torch.inference_mode(is_inference):
            return settle(part)

    torch.set_num_threads(1)
    try:
        if workers == 1:
            coded = [settle_part(part) for part in parts]
        else:
            with ThreadPoolExecutor(workers) as pool:
                coded = list(pool.map(settle_part, parts))
    finally:
        torch.set_num_threads(threads)
    return CodedColumns(
        torch.cat([part.codes for part in coded], dim=1),
        torch.cat([part.scales for part in coded], dim=1),
        torch.cat([part.zeros for part in coded], dim=1),
    )
