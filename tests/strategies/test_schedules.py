"""Whatever the scheme and the transport: every byte of every version arrives, and it is the right one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_gemini.config import TRANSPORTS
from tests.strategies.jobs import Job
from tests.strategies.scheme_rounds import SCHEMES, STEPS

MakeJob = Callable[..., Job]
ROUNDS = Path(__file__).with_name("scheme_rounds.py")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_version_is_whole_on_the_peer_under_every_scheme(make_job: MakeJob, transport: str) -> None:
    strategy = {"transport": transport, "profile_iterations": 3, "buffer_bytes": 64 << 10, "commit_wait_s": 10.0}
    job = make_job(machines=2, nproc=1, strategy=strategy, batches=40, pace_s=0.02, width=64)
    outcome = job.run_script(ROUNDS)
    assert outcome.ended, outcome.output
    for rank in range(2):
        seen = outcome.of("replica", rank)
        assert all(record["equal"] and record["of"] == 1 for record in seen), seen
        planned = [record for record in seen if record["planned"]]
        assert len([record for record in seen if not record["planned"]]) >= 3, "profiling went on with versions"
        for scheme in SCHEMES[:-1]:
            versions = [record["version"] for record in planned if record["scheme"] == scheme]
            # On a busy machine iterations may change so much that a new profile is taken: every other one then.
            assert len(versions) >= (STEPS - 1 if scheme in ("eager", "blocking") else STEPS // 2 - 1), (scheme, seen)
        assert sum(record["scheme"] == "none" for record in planned) <= 1, "the last one of the scheme before"
