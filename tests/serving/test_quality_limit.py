from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from quant.errors import CheckpointError
from quant.report.summary import REPORT_JSON
from serving.quality_limit import check_quality
from tests.quant.report.test_quantization_report import REPORT, VERSION_1

pytestmark = pytest.mark.unit


def write(directory: Path, record: dict[str, object]) -> Path:
    (directory / REPORT_JSON).write_text(json.dumps(record))
    return directory


@pytest.mark.parametrize("record", [REPORT.as_record(), VERSION_1])
def test_a_model_at_the_limit_or_above_is_served_with_its_summary(tmp_path: Path, record: dict[str, object]) -> None:
    directory = write(tmp_path, record)
    for limit in (None, 0.92, 0.5):
        assert "top-1 agreement 92.0%" in str(check_quality(directory, limit))


def test_a_model_below_the_limit_is_refused_with_both_figures_and_what_to_do(tmp_path: Path) -> None:
    directory = write(tmp_path, REPORT.as_record())
    with pytest.raises(CheckpointError, match=r"on 92\.0% of tokens, fewer than min_top1_agreement = 95\.0%; quantise"):
        check_quality(directory, 0.95)


def test_without_a_report_only_a_limit_refuses(tmp_path: Path) -> None:
    assert check_quality(tmp_path, None) is None
    with pytest.raises(CheckpointError, match=r"has no quantization_report\.json.*quantise its source"):
        check_quality(tmp_path, 0.5)


def test_a_report_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a quantisation report"):
        check_quality(write(tmp_path, {"bits": 4}), None)


def test_the_check_needs_no_torch() -> None:
    script = "import sys, serving.quality_limit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
