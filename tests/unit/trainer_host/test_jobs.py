from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from protocol.errors import Misconfigured, Rejected, Unavailable
from trainer_host import jobs
from trainer_host.gate import GateSettings
from trainer_host.jobs import Exported, GateRequest, InspectionRequest, Progress, run_job

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[InspectionRequest]:
    """A job that cannot end: its model is a pipe into which nobody writes."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    yield InspectionRequest(model=str(pipe), output=str(tmp_path / "out"))
    assert not children(), "the child was left behind"


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "trainer_host.checking_job" in child.cmdline()]


def test_a_file_is_described(tmp_path: Path) -> None:
    request = InspectionRequest(model=str(MODELS / "echo.tflite"), output=str(tmp_path / "deep" / "out"))
    file = run_job(request).released
    assert file.length == (MODELS / "echo.tflite").stat().st_size
    assert file.operators == {"FULLY_CONNECTED": 1}
    for given, answered in zip(file.golden.inputs, file.golden.outputs, strict=True):
        assert answered == pytest.approx(given[:4], abs=1e-6)


@pytest.mark.parametrize(("name", "code"), [("nan.tflite", "not_finite"), ("make.py", "bad_model")])
def test_a_failure_carries_its_reason_and_leaves_a_log(tmp_path: Path, name: str, code: str) -> None:
    with pytest.raises(Rejected) as refused:
        run_job(InspectionRequest(model=str(MODELS / name), output=str(tmp_path)))
    assert refused.value.code == code
    assert "Traceback" in (tmp_path / jobs.LOG).read_text()


def test_a_surprise_is_reported_and_not_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Rejected, match="FileNotFoundError") as refused:
        run_job(InspectionRequest(model=str(tmp_path / "absent"), output=str(tmp_path)))
    assert refused.value.code == "internal"
    assert capfd.readouterr() == ("", "")


def test_the_gate(tmp_path: Path) -> None:
    candidate = str(MODELS / "echo.tflite")
    settings = GateSettings(max_bytes=1)
    gated = run_job(GateRequest(slot="movement", candidate=candidate, settings=settings, output=str(tmp_path)))
    assert not gated.report.passed
    played = run_job(GateRequest(slot="movement", candidate=candidate, current=candidate, output=str(tmp_path)))
    assert played.report.reasons == ("no validation battles for this slot",)


def test_a_job_that_takes_too_long_is_ended(endless: InspectionRequest) -> None:
    with pytest.raises(Unavailable, match="deadline"):
        run_job(endless, deadline_s=0.5)


def test_a_job_can_be_stopped(endless: InspectionRequest) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Unavailable, match="stopped"):
        run_job(endless, stop=stop)


def test_a_child_that_is_killed_is_reported(endless: InspectionRequest) -> None:
    def kill() -> None:
        # Opening waits until the child has opened the other end.
        with Path(endless.model).open("wb"):
            children()[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(Unavailable, match=r"killed by SIGKILL.*job\.log"):
        run_job(endless)
    killer.join()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Misconfigured, match="cannot write to"):
        run_job(InspectionRequest(model="x", output=str(tmp_path / "file" / "out")))


def test_what_the_daemon_imports_is_light() -> None:
    heavy = "{'tensorflow', 'keras', 'ai_edge_litert', 'tflite_runtime'}"
    program = f"import sys, trainer_host.jobs, trainer_host.recipes.table; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "set()"


CHILD = """
import os, sys
from protocol.errors import Unavailable
from trainer_host.jobs import Exported, Progress, answer_job
def work(request, say):
    print("a library speaks"); os.write(1, b"in C\\n")
    say(Progress(epoch=1, epochs=2, loss=1, accuracy=0, val_loss=1, val_accuracy=0, seconds=0))
    if request.seed: raise Unavailable("the disk is full")
    return Exported(files={}, release="x")
sys.exit(answer_job(sys.argv[1:], work))
"""


@pytest.mark.parametrize(("seed", "last", "status"), [(0, "Exported", 0), (1, "Failed", 1)])
def test_standard_output_carries_answers_and_nothing_else(tmp_path: Path, seed: int, last: str, status: int) -> None:
    (tmp_path / "r.json").write_text(
        json.dumps({"type": "InspectionRequest", "model": "m", "output": "o", "seed": seed})
    )
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "r.json")], capture_output=True, text=True, timeout=60, check=False
    )
    assert [json.loads(line)["type"] for line in child.stdout.splitlines()] == ["Progress", last]
    assert "a library speaks" in child.stderr
    assert "in C" in child.stderr
    assert child.returncode == status


def test_progress_comes_before_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "speaking_job.py"
    script.write_text(CHILD)
    monkeypatch.setattr(jobs, "_command", lambda _, path: [sys.executable, str(script), str(path)])
    monkeypatch.setenv("PYTHONPATH", str(Path(jobs.__file__).parents[1]))
    seen: list[Progress] = []
    result = run_job(InspectionRequest(model="m", output=str(tmp_path)), seen.append)
    assert [each.epoch for each in seen] == [1]
    assert result == Exported(files={}, release="x")
    with pytest.raises(Rejected) as refused:
        run_job(InspectionRequest(model="m", output=str(tmp_path), seed=1))
    assert refused.value.code == "unavailable"
