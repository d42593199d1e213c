"""What `inspect --engines` shows."""

import json
from pathlib import Path

import pytest

from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.document import as_type
from ilf_trt.contract.ports import GRAPHS
from ilf_trt.engines.report import EngineReport
from ilf_trt.engines.report_view import show_engines
from ilf_trt.errors import BundleError, InvalidRequest
from tests.engines.conftest import Built


def test_every_engine_and_its_layers_are_shown(
    dit_fp16: Built, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    show_engines(Bundle.open(dit_fp16.path), as_json=False)
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("tensorrt-rtx 1.")
    assert out.splitlines()[0].endswith(" for sm89, sm120")
    for word in (*GRAPHS, "transformer_blocks.1.ff.net.2", "feedback.attn1.to_q"):
        assert word in out


def test_as_json_the_reports_can_be_read_back(dit_fp16: Built, capsys: pytest.CaptureFixture[str]) -> None:
    show_engines(Bundle.open(dit_fp16.path), as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert {row["target"] for row in rows} == {"tensorrt-rtx"}
    assert (
        tuple(as_type({k: v for k, v in row.items() if k != "target"}, EngineReport) for row in rows)
        == dit_fp16.result.reports
    )


def test_a_bundle_without_engines_says_how_to_add_them(dit_bundle: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"has no engines; add them with ilf-trt compile .* --target"):
        show_engines(Bundle.open(dit_bundle), as_json=False)


def test_a_report_that_is_damaged_is_a_bundle_error(dit_fp16: Built, tmp_path: Path) -> None:
    opened = Bundle.open(dit_fp16.path)
    opened.copy(tmp_path)
    report = tmp_path / opened.manifest.engines[0].report
    report.unlink()
    report.write_text("{}")
    with pytest.raises(BundleError, match="has a field missing or wrong"):
        show_engines(Bundle(tmp_path, opened.manifest), as_json=False)
