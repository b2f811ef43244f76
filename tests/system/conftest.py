"""One real server for all system tests of a session, with the default model.

The model lies in the cache that `causerie serve` would use here (CAUSERIE_CACHE, else the user's): a clean machine
prepares it once.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.system.server_process import PREPARE_TIMEOUT_S, ServerProcess, running_server


@pytest.fixture(scope="session")
def server() -> Generator[ServerProcess]:
    """Ready to answer. A test that hurts it leaves it ready again."""
    with running_server() as process:
        process.wait_for_line("ready", PREPARE_TIMEOUT_S)
        yield process
