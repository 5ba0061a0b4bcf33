"""Process of an agent: what ``lightning-gemini agent`` does on every machine of a job."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lightning_gemini.controlplane.agent_settings import WorkerAgentSettings
from lightning_gemini.controlplane.host_address import address_towards, interface_of
from lightning_gemini.controlplane.job_spec import JobSpec, proof_of, spec_from_json
from lightning_gemini.controlplane.kv.base import StoreUnavailableError
from lightning_gemini.controlplane.kv.etcd import EtcdKeyValueStore
from lightning_gemini.controlplane.logs import setup_logging
from lightning_gemini.controlplane.membership import JobKeys
from lightning_gemini.controlplane.processes import watch_process
from lightning_gemini.controlplane.worker_agent import WorkerAgent
from lightning_gemini.errors import AuthenticationError, ConfigurationError, GeminiError

_log = logging.getLogger("lightning_gemini.agent")
_POLL_S = 0.1
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class Invitation:
    """What an agent was told on its command line, or by its environment.

    Attributes:
        job: The job's id.
        etcd: Comma-separated ``HOST:PORT`` of the key-value store.
        secret: What agents of the job know.
        name: What this machine is called.
        host: Address that others reach it at; None: found out.
        run_dir: The run's directory, where it is not where the job says.
        domain: The machine's failure domain.
        wait_s: Seconds to wait for the job to be there.
        launcher: `identity_of` the launcher; the agent ends with it if they share a host.
    """

    job: str
    etcd: str
    secret: bytes
    name: str
    host: str | None = None
    run_dir: Path | None = None
    domain: str = ""
    wait_s: float = 60.0
    launcher: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigurationError(
                f"a machine's name is up to 63 letters, digits, '.', '_' or '-', got {self.name!r:.80}: give --name"
            )


def serve(invitation: Invitation) -> int:
    """Runs the agent until SIGTERM, SIGINT, a ``stop`` request, or the job's end; returns its exit code.

    Raises:
        ConfigurationError: If the job is not there, or the machine cannot be part of it.
    """
    store = EtcdKeyValueStore(invitation.etcd)
    try:
        settings = _settings(invitation, _wait_for_spec(invitation, store))
        return _serve(settings, store, invitation.launcher)
    finally:
        store.close()


def _serve(settings: WorkerAgentSettings, store: EtcdKeyValueStore, launcher: str | None) -> int:
    handler = setup_logging(settings.run_dir / "logs" / f"{settings.name}-agent.jsonl")
    _log.info("agent %s of %s starts (pid %d)", settings.incarnation, settings.name, os.getpid())
    agent = WorkerAgent(settings, store, handler)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    if launcher is not None:
        watch_process(launcher, agent.stop)
    try:
        agent.run()
    except (GeminiError, OSError) as error:
        _log.exception("the agent failed")
        sys.stderr.write(f"agent of {settings.name}: {error}\n")
        return 1
    return agent.exit_code


def _wait_for_spec(invitation: Invitation, store: EtcdKeyValueStore) -> JobSpec:
    deadline = time.monotonic() + invitation.wait_s
    trouble = "it is not in that store"
    while True:
        try:
            found = store.get(JobKeys(invitation.job).spec)
        except StoreUnavailableError as error:
            found, trouble = None, str(error)
        if found is not None:
            return spec_from_json(found.value)
        if time.monotonic() > deadline:
            raise ConfigurationError(
                f"found no job {invitation.job} at {invitation.etcd} within {invitation.wait_s:.0f} s ({trouble}): "
                "is `lightning-gemini run` still there, and are --job and --etcd its own?"
            )
        time.sleep(_POLL_S)


def _settings(invitation: Invitation, spec: JobSpec) -> WorkerAgentSettings:
    if spec.proof and spec.proof != proof_of(invitation.secret, invitation.job):
        raise AuthenticationError(
            f"the secret that this agent was given is not that of job {invitation.job}: "
            "give it the file `secret` of that run's directory"
        )
    run_dir = invitation.run_dir or spec.run_dir
    try:
        host = invitation.host or address_towards(invitation.etcd)
        interface = interface_of(host)
        for name in ("logs", f"nodes/{invitation.name}"):
            (run_dir / name).mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigurationError(
            f"this machine cannot take part in job {invitation.job} ({error}): give --host and --run-dir"
        ) from error
    return WorkerAgentSettings(
        job=invitation.job,
        name=invitation.name,
        incarnation=secrets.token_hex(4),
        secret=invitation.secret,
        spec=spec,
        run_dir=run_dir.absolute(),
        host=host,
        interface=interface,
        domain=invitation.domain,
    )
