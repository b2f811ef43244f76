"""Finds a Chromium for the page's tests, and installs one where that is a matter of one command: root on Debian."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

BROWSER_VARIABLE = "CAUSERIE_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC_PATHS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
PACKAGES = ("chromium", "fonts-dejavu-core")
NO_BROWSER = f"no Chromium or Chrome on the PATH (install one, or set {BROWSER_VARIABLE}=/path/to/it)"


def find_browser(variables: Mapping[str, str]) -> str | None:
    if variables.get(BROWSER_VARIABLE):
        return variables[BROWSER_VARIABLE]
    on_path = next((found for name in NAMES if (found := shutil.which(name))), None)
    return on_path or next((path for path in MAC_PATHS if Path(path).exists()), None)


def ensure_browser(variables: Mapping[str, str], say: Callable[[str], None]) -> str | None:
    found = find_browser(variables)
    if found is None and can_install():
        say(f"installing {' and '.join(PACKAGES)} with apt-get, for the tests of the page")
        install(variables)
        found = find_browser(variables)
    return found


def can_install(os_release: Path = Path("/etc/os-release")) -> bool:
    """Debian itself only: Ubuntu's package of this name is a stub for another installer."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None or not os_release.exists():
        return False
    return "ID=debian" in os_release.read_text(encoding="utf-8").splitlines()


def install(variables: Mapping[str, str]) -> None:
    """Failing is no error: the tests that need a browser are then skipped, and listed."""
    quiet = {**variables, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        command = ["apt-get", "-qq", *arguments]
        if subprocess.run(command, env=quiet, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False).returncode:
            return
