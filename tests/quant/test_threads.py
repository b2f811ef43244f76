from __future__ import annotations

import subprocess
import sys

import pytest

from quant.threads import wait_without_spinning_long

pytestmark = pytest.mark.unit


def test_what_the_user_has_set_stays() -> None:
    environ = {"GOMP_SPINCOUNT": "7"}
    wait_without_spinning_long(environ)
    assert environ == {"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "1"}


@pytest.mark.parametrize("command", ["quant.commands", "serving.preparation"])
def test_commands_can_call_it_before_torch_is_there(command: str) -> None:
    check = f"import sys, {command}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
