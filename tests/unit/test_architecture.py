"""What the import contracts of pyproject.toml say of the source, asked of a running process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("numpy", "ai_edge_litert", "tflite_runtime", "tensorflow", "keras", "tuf", "cryptography", "securesystemslib")


def loaded_by(module: str) -> set[str]:
    """Which heavy packages a fresh process has after importing `module`."""
    code = f"import json, sys, {module}; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(json.loads(ended.stdout))


def test_the_supervisors_process_is_light() -> None:
    assert loaded_by("edge_agent.supervisor") == set()


def test_the_command_line_is_light() -> None:
    assert loaded_by("edge_agent.__main__") == set()


@pytest.mark.parametrize("module", ["edge_agent.worker", "edge_agent.trial"])
def test_who_serves_does_not_verify(module: str) -> None:
    assert not loaded_by(module) & {"tuf", "cryptography", "securesystemslib", "tensorflow", "keras"}


@pytest.mark.parametrize("module", ["trainer_host.__main__", "trainer_host.daemon"])
def test_the_hosts_daemon_does_not_load_tensorflow(module: str) -> None:
    assert not loaded_by(module) & {"tensorflow", "keras"}
