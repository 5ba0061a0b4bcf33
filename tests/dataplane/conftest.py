"""Threads that die of an exception fail the test that started them; leaked buffers fail the session."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_gemini.dataplane import slab

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of 64 KiB, the smallest step there is, so that a small shard has many."""
    monkeypatch.setattr(slab, "MIN_CHUNK_BYTES", 1)
    return slab.chunk_bytes_for(1)
