from __future__ import annotations

from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from PIL import Image

from moderation import plots
from moderation.errors import ModerationError
from moderation.metrics import CurvePoint, ReliabilityBin
from moderation.plots import check_plots_possible, write_plots
from moderation.report import FileReport, Report
from tests.moderation.test_gate import MEASURES, file_report

pytestmark = pytest.mark.unit


def drawn_report(name: str) -> FileReport:
    return replace(
        file_report(name),
        curve=[CurvePoint(0.9, 1.0, 0.1), CurvePoint(0.5, 0.8, 0.6), CurvePoint(0.1, 0.5, 1.0)],
        reliability=[ReliabilityBin(0.0, 0.07, 30, 0.03, 0.1), ReliabilityBin(0.93, 1.0, 10, 0.98, 0.9)],
        by_category={"hate": MEASURES, "none": replace(MEASURES, harmful=0, recall=None)},
        by_length={"under 50": MEASURES, "1000 and more": replace(MEASURES, false_positive_rate=None)},
    )


def test_plots_are_small_images_and_the_same_again(tmp_path: Path) -> None:
    report = Report("m", [drawn_report("test_openai_moderation")], [], 0.4)
    (tmp_path / "again").mkdir()

    names = write_plots(report, tmp_path)
    write_plots(report, tmp_path / "again")

    assert names == ["pr_curves.png", "calibration.png", "by_category.png", "by_length.png"]
    for name in names:
        content = (tmp_path / name).read_bytes()
        assert content == (tmp_path / "again" / name).read_bytes()
        assert len(content) < 60_000
        with Image.open(tmp_path / name) as image:
            assert image.width == 800
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 2


def test_what_the_report_has_nothing_for_is_not_drawn(tmp_path: Path) -> None:
    assert write_plots(Report("m", [file_report("test_xstest")], [], 0.4), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_is_said_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(plots, "find_spec", nothing)

    with pytest.raises(ModerationError, match=r"pip install 'causerie\[train\]'"):
        check_plots_possible()
