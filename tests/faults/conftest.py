"""What the tests of crashes share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Toy
from tests.faults.small_runs import start
from tests.faults.warm import Warm


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Real commands, forked from one process that has imported everything."""
    process = Warm()
    yield process
    process.close()


@pytest.fixture(scope="session")
def undisturbed(warm: Warm, toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run that nothing happened to: the run itself, and the points it passed."""
    cwd = tmp_path_factory.mktemp("faults") / "undisturbed"
    result = start(warm, toy, cwd)
    assert result.returncode == 0, result.stdout
    return cwd
