"""Fixtures of the conformance suites: each directory, and each KV transport, in turn."""

from collections.abc import AsyncIterator, Iterator

import pytest

from kvstore.directory import (
    Directory,
)
from kvstore.transfer.transports import TRANSPORTS
from tests.directory_stores import (
    MemoryStore,
    Store,
    ValkeyStore,
)
from tests.valkey import ValkeyServer


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


@pytest.fixture(params=["memory", "valkey"])
def store(request: pytest.FixtureRequest) -> Store:
    return MemoryStore() if request.param == "memory" else ValkeyStore(request.getfixturevalue("valkey"))


@pytest.fixture
async def directory(store: Store) -> AsyncIterator[Directory]:
    directory = store.directory()
    yield directory
    await directory.aclose()


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)
