"""What the tests of crashes share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.warm import Warm


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Real commands, forked from one process that has imported everything."""
    process = Warm()
    yield process
    process.close()
