"""What a Pi gets installed, as pip itself resolves it. Needs the package index."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OF_THE_HOST = {"alembic", "gymnasium", "keras", "sqlalchemy", "tensorboard", "tensorflow"}


def resolved(extra: str, tmp_path: Path) -> dict[str, str]:
    """Names and versions that `pip install .[extra]` would bring into an empty environment."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for package in ("protocol", "edge_agent", "trainer_host"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    ended = subprocess.run([*command, f"{source}[{extra}]"], capture_output=True, text=True, timeout=280, check=False)
    if ended.returncode and "Failed to establish a new connection" in ended.stderr:
        pytest.skip("the package index cannot be reached")
    assert ended.returncode == 0, ended.stderr
    found = [item["metadata"] for item in json.loads(ended.stdout)["install"]]
    return {item["name"].lower(): item["version"] for item in found}


@pytest.mark.timeout(300)
def test_the_agent_brings_nothing_of_the_host(tmp_path: Path) -> None:
    found = resolved("edge", tmp_path)
    assert {"edgeswap", "paho-mqtt", "msgspec", "tuf", "psutil", "numpy", "ai-edge-litert"} <= found.keys()
    assert not OF_THE_HOST & found.keys()


@pytest.mark.timeout(300)
@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11) or sys.platform != "linux", reason="tflite-runtime exists for no other"
)
def test_the_agent_with_the_lighter_runtime(tmp_path: Path) -> None:
    found = resolved("edge-tflite", tmp_path)
    assert {"tflite-runtime", "numpy"} <= found.keys()
    assert not (OF_THE_HOST | {"ai-edge-litert"}) & found.keys()
