"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reference() -> Path:
    """Inputs and outputs of the original OpenVLA code; the tests that need them are skipped where they aren't."""
    beside = Path(__file__).resolve().parents[1] / "../shared/reference"
    folder = Path(os.environ.get("OPENVLA_REFERENCE", beside))
    if not folder.is_dir():
        pytest.skip("set OPENVLA_REFERENCE to the folder of reference arrays")
    return folder.resolve()
