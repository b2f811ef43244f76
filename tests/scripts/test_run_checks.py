from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bootstrap import browser, run_checks
from bootstrap.environment import Environment
from bootstrap.run_checks import Counts, Outcome, commands_of, read_counts, summarise

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="one"/>
<testcase classname="tests.a" name="two"><failure message="no"/></testcase>
<testcase classname="tests.a" name="three"><error message="no"/></testcase>
<testcase classname="tests.b" name="four"><skipped message="no browser"/></testcase>
<testcase classname="tests.b" name="five"><skipped message="no browser"/></testcase>
</testsuite></testsuites>"""


def test_counts_come_from_pytests_report(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    counts = read_counts(tmp_path / "report.xml")
    assert counts == Counts(1, 2, ("tests.b: no browser", "tests.b: no browser"))


def test_summary_closes_with_what_was_skipped_and_the_totals() -> None:
    outcomes = [
        Outcome("lint", is_passed=True, seconds=1),
        Outcome("unit", is_passed=True, seconds=20, counts=Counts(10)),
        Outcome("system", is_passed=False, seconds=90, counts=Counts(5, 1, ("tests.b: no browser",) * 2)),
    ]
    lines = summarise(outcomes, ["tests of the page: no Chromium"]).splitlines()
    assert "system   FAILED" in lines[4]
    assert lines[6:] == [
        "  tests of the page: no Chromium",
        "  tests.b: no browser (2 tests)",
        "15 passed, 1 failed, 2 skipped",
    ]


def test_each_check_runs_from_the_environment_by_full_path(tmp_path: Path) -> None:
    environment = Environment(tmp_path, tmp_path / ".venv")
    for check in run_checks.CHECKS:
        for command in commands_of(environment, check, (), tmp_path / "report.xml"):
            assert Path(command[0]).parent == environment.directory / "bin"


def test_each_tier_runs_the_tests_of_its_marker(tmp_path: Path) -> None:
    for tier in ("unit", "system"):
        (command,) = commands_of(Environment(ROOT, ROOT / ".venv"), tier, ("-x",), tmp_path / "report.xml")
        assert command[1:5] == ["-m", "pytest", "-m", tier]
        assert command[-1] == "-x"


def test_unknown_check_is_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_checks.main(["units"]) == 2
    assert "no check is called 'units'" in capsys.readouterr().err


def test_named_browser_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(browser, "MAC_PATHS", ())
    assert browser.find_browser({}) is None
    (tmp_path / "google-chrome").touch(mode=0o755)
    assert browser.find_browser({}) == str(tmp_path / "google-chrome")
    assert browser.find_browser({"CAUSERIE_CHROMIUM": "/opt/chrome"}) == "/opt/chrome"


@pytest.mark.parametrize(("system", "expected"), [("ID=debian\n", True), ("ID=ubuntu\nID_LIKE=debian\n", False)])
def test_browser_is_installed_only_by_root_on_debian(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, expected: bool
) -> None:
    (tmp_path / "os-release").write_text(system)
    (tmp_path / "apt-get").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert browser.can_install(tmp_path / "os-release") is expected
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert not browser.can_install(tmp_path / "os-release")


def test_ci_calls_the_one_script_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == 1
    assert lines[0].endswith('/../scripts/test"')


@pytest.mark.parametrize("script", ["scripts/serve", "scripts/test", "scripts/launch.sh", ".ci/run"])
def test_shell_scripts_parse_for_a_plain_shell(script: str) -> None:
    shell = shutil.which("dash") or shutil.which("sh")
    assert shell is not None
    subprocess.run([shell, "-n", ROOT / script], check=True)


@pytest.mark.parametrize("script", ["scripts/serve", "scripts/test", ".ci/run"])
def test_scripts_may_be_executed(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111
