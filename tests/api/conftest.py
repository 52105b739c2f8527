"""The releases that files are held against, fetched once a session and only where a test asks for them."""

from __future__ import annotations

import pytest

from tests.api.bindings import Api, enterprise, installed_rtx

# The newest release of the version that is built for, and the oldest that the scripts of a package run with.
NEWEST, OLDEST = "tensorrt-cu13-bindings>=11,<12", "tensorrt-cu12-bindings==10.12.0.36"


@pytest.fixture(scope="session")
def newest(tmp_path_factory: pytest.TempPathFactory) -> Api:
    return enterprise(NEWEST, tmp_path_factory.mktemp("newest"))


@pytest.fixture(scope="session")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Api:
    return enterprise(OLDEST, tmp_path_factory.mktemp("oldest"))


@pytest.fixture(scope="session")
def rtx() -> Api:
    found = installed_rtx()
    if found is None:
        pytest.skip("tensorrt-rtx is not installed: pip install tensorrt-rtx")
    return found
