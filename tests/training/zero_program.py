"""What `test_zero` runs on two ranks: the command line with DeepSpeed allowed on a CPU. Run by torchrun."""

from __future__ import annotations

import sys

from serving import cli
from training import zero

if __name__ == "__main__":
    zero.DEVICES = ("cuda", "cpu")
    zero.KEPT_WHOLE = 0  # else stage 3 would leave a tiny model whole
    cli.end_process(cli.main(sys.argv[1:]))
