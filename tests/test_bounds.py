"""`.ci/bounds` installs the lowest version of everything that pyproject.toml names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PROJECT = """
[project]
dependencies = ["torch>=2.9", "timm{}1.0.27"]
[project.optional-dependencies]
test = ["pytest-xdist>=3.6.1", "onnx>=1.19"]
onnx = ["onnx>=1.19"]
"""


def lowest_versions(pyproject: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / ".ci" / "lowest_versions.py", pyproject]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_lowest_version_of_each(tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(PROJECT.format(">="))
    assert lowest_versions(pyproject).stdout.split() == [
        "torch==2.9", "timm==1.0.27", "pytest-xdist==3.6.1", "onnx==1.19"
    ]  # fmt: skip
    pyproject.write_text(PROJECT.format("~="))
    result = lowest_versions(pyproject)
    assert result.returncode
    assert result.stderr.endswith("name>=version, got timm~=1.0.27\n")


def test_the_projects_own_requirements_have_one() -> None:
    result = lowest_versions(ROOT / "pyproject.toml")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) > 20
