"""A real etcd for the tests of the control plane."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from lightning_gemini.controlplane.kv.cluster import EtcdCluster
from lightning_gemini.controlplane.kv.etcd import EtcdKeyValueStore, load_etcd3
from tests.controlplane.slurm_cluster import slurm  # noqa: F401 a fixture

load_etcd3()  # before another test brings in protobuf's other implementation


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    server = EtcdCluster(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server
    server.close()


@pytest.fixture
def store(etcd: EtcdCluster) -> Iterator[EtcdKeyValueStore]:
    store = EtcdKeyValueStore(etcd.endpoint)
    yield store
    store.close()


@pytest.fixture
def prefix() -> str:
    """Keys of one test."""
    return f"/gemini/{uuid.uuid4().hex}/"
