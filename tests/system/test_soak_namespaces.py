"""The soak of ``recipes/soak.py`` on machines in network namespaces, whose cables are cut and restored."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import Namespaces, why_not

NODES, POOL, MINUTES = 4, 8, 0.75
FAILURE = "soak,link=8,software=1,hardware=1,root=1,group=0,pause=1,etcd=1,corrupt=1"


@pytest.fixture
def net() -> Iterator[Namespaces]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Namespaces(POOL, "500mbit") as net:
        yield net


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short path: agents' sockets must fit in 100 bytes."""
    path = Path(tempfile.mkdtemp(prefix="gemini-", dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(path))
    yield path / "soak"
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.timeout(600)
def test_everything_happens_to_machines_on_a_network(net: Namespaces, folder: Path, seed: int) -> None:
    from soak import Soak
    from soak_summary import text

    agent = f"exec ip netns exec {net.names[0][:-1]}{{index}} {{agent}}"
    operator = f"command,command='{agent}',pool={POOL},shared_imports=true"
    options = ["--operator", operator, "--host", net.host]
    summary = Soak(folder, MINUTES, FAILURE, seed, 0.05, nodes=NODES, options=options).run()
    print(text(summary))
    assert summary["violations"] == []
    run_dir = folder / "interrupted" / "run"
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    faults = Counter(event["kind"] for event in events if event["event"] == "fault_injected")
    assert faults["link"] > 0, "at least one cable was cut"
    assert faults.total() >= 5
    assert json.loads((run_dir / "job.json").read_text())["etcd"].count(net.host) == 3
