"""`pl-attnedit report --once` and `--watch` as a user runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from fixtures_stages import make_trainer
from mlflow.tracking import MlflowClient
from mlflow_reads import find_runs

from pl_attnedit.callbacks import ResumableCheckpoint
from pl_attnedit.cli import main
from pl_attnedit.tracking import TrackingLogger, start_conversion
from pl_attnedit.tracking.client import CHECKPOINTS_TAG, STUDENT_TAG


def test_a_checkpoint_is_found_evaluated_and_reported_once(
    make_stage2: Any,
    make_data: Any,
    tiny_corpus: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    trainer = make_trainer(
        ResumableCheckpoint(tmp_path / "ckpt"),
        steps=2,
        logger=TrackingLogger(run_name="fit"),
        enable_checkpointing=True,
    )
    trainer.fit(make_stage2(), make_data())
    fit = trainer.logger.run_id
    assert client.get_run(fit).data.tags[CHECKPOINTS_TAG] == str(tmp_path / "ckpt")
    gone = start_conversion("gone", {STUDENT_TAG: tmp_path / "nothing", "teacher": "t"}, client=client)
    suite = {"name": "tiny", "max_length": 32, "text": {"documents": 2, "document_chars": 80, "cloze": 2}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(suite))
    command = ["report", "--once", "--suite", "tiny.yaml", "--text", tiny_corpus]
    (tmp_path / "file").touch()
    assert main([*command, "--out", "file/report.html"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(command) == 1
    errors = capsys.readouterr().err
    assert "2 of 2 to evaluate with" in errors
    assert "fit fit/last-00000002: evaluated in" in errors
    assert f"gone: failed: there is no {tmp_path}/nothing; tried again after 60 min" in errors
    assert main(command) == 0
    assert "0 of 2 to evaluate with" in capsys.readouterr().err
    [run] = find_runs("evaluation", fit, tracking_uri=uri)
    assert run.info.status == "FINISHED"
    assert run.data.tags["suite"] == "tiny"
    assert any(name.startswith("eval/heldout_cloze/acc/") for name in run.data.metrics)
    assert [run.info.status for run in find_runs("evaluation", gone, tracking_uri=uri)] == ["FAILED"]
    report = (tmp_path / "report.html").read_text()
    assert "gone" in report
    assert fit in report
    assert "fit/last-00000002" in report
    assert report.rstrip().endswith("</html>")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--watch", "--every", "6"], "--every = '6': must be a number above 0 with a unit s, m, h or d"),
        (["--watch", "--every", "6 weeks"], "--every = '6 weeks': must be"),
        (["--watch", "--every", "0h"], "--every = '0h': must be"),
        (["--once", "--retry", "-1h"], "--retry"),
        (["--once", "--every", "6h"], "--every: needs --watch"),
        (["--suite", "quick"], "--suite: needs --watch or --once"),
        (["--once", "--suite", "none"], "suite = 'none': must be one of fidelity"),
        (["--once", "--text", "lookups:x.txt"], "--text = 'lookups:x.txt': must be text as it is, lookups: is for"),
        (["--once"], "mlflow.db here; nothing has been tracked in it yet"),
        (["--once", "--watch"], "not allowed with"),
        (["abc", "--filter", "tags.x = 'y'"], "--filter = \"tags.x = 'y'\": goes without run ids"),
    ],
)
def test_mistakes(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *arguments]) == 2
    assert expected in capsys.readouterr().err
