"""A run's store, as its agents see it: for tests that must not miss the moment."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from lightning_gemini.controlplane.kv.base import StoreUnavailableError
from lightning_gemini.controlplane.kv.etcd import EtcdKeyValueStore
from lightning_gemini.controlplane.membership import JobKeys, Spare, spare_from_json
from tests.cli.conftest import Run


class Watched:
    """A run, and its store as its agents see it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        run.until((run.path / "job.json").exists)
        self.keys = JobKeys(run.job()["job"])
        self.store = EtcdKeyValueStore(run.job()["etcd"])

    def read(self, key: str) -> Any:
        with suppress(StoreUnavailableError):
            found = self.store.get(key)
            return json.loads(found.value) if found is not None else None

    def root(self) -> dict[str, Any]:
        return self.run.until(lambda: self.read(self.keys.root))

    def members(self) -> list[int]:
        with suppress(StoreUnavailableError):
            return [int(each.key.rpartition("/")[2]) for each in self.store.get_prefix(f"{self.keys.prefix}members/")]
        return []

    def standbys(self, count: int) -> list[Spare]:
        def there() -> tuple[list[Spare]] | None:
            found = [spare_from_json(each.value) for each in self.store.get_prefix(f"{self.keys.prefix}spares/")]
            return (found,) if len(found) == count else None

        return list(self.run.until(there)[0])

    def close(self) -> None:
        self.store.close()
