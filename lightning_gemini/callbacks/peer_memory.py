"""One rank's view of the cluster's memory: its agent, the version that everybody can restore, and its own slab."""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gemini.callbacks.ranks import RankGroup, RankIdentity, bind_host, together
from lightning_gemini.config import CheckpointConfig
from lightning_gemini.controlplane import standalone
from lightning_gemini.controlplane.agent_client import AgentClient
from lightning_gemini.core.placement import Placement, plan_placement
from lightning_gemini.core.recovery import (
    Inventory,
    RecoveryPlan,
    Tier,
    VersionId,
    inventory_from_json,
    plan_recovery,
)
from lightning_gemini.dataplane import shard
from lightning_gemini.dataplane.link_speed import LinkSpeed, Quantity
from lightning_gemini.dataplane.slab import Slab
from lightning_gemini.errors import GeminiError, IntegrityError

log = logging.getLogger(__name__)

AGENT_VARIABLE = "LIGHTNING_GEMINI_AGENT"
GENERATION_VARIABLE = "LIGHTNING_GEMINI_GENERATION"
DOMAIN_VARIABLE = "LIGHTNING_GEMINI_DOMAIN"


@dataclass(frozen=True, slots=True)
class RestoredShard:
    """A rank's state as it was found.

    Attributes:
        version: The optimizer step whose outcome it is.
        id: Its id in memory; ``None`` from the persistent tier.
        tier: Where it came from.
        stable: Tensors of the ZeRO state.
        volatile: The rest.
        seconds: Time from the first question to the last verified byte.
    """

    version: int
    id: VersionId | None
    tier: Tier
    stable: dict[str, Any]
    volatile: dict[str, Any]
    seconds: float


class PeerMemory:
    """The in-memory tiers, as one rank uses them.

    Args:
        config: The strategy's settings.
        identity: This rank's place.
        group: All ranks.
    """

    def __init__(self, config: CheckpointConfig, identity: RankIdentity, group: RankGroup) -> None:
        self._config, self.identity, self._group = config, identity, group
        self.replicas = config.replicas_for(identity.machines)
        self._domains = config.domains
        if config.placement == "rack" and self._domains is None:
            named = group.gather(os.environ.get(DOMAIN_VARIABLE, ""))
            self._domains = tuple(named[:: identity.nproc_per_machine])
        self.placement: Placement = plan_placement(identity.machines, self.replicas, config.placement, self._domains)
        self.generation = 0
        self.launched = AGENT_VARIABLE in os.environ  # by `lightning-gemini run`, which also ends the agent
        self._client: AgentClient | None = None
        self._corrupt: set[tuple[int, int, VersionId]] = set()  # (owner, machine, version)
        self._discarded: set[VersionId] = set()  # of this rank, on its own machine
        self._unusable: list[tuple[int, VersionId, Exception]] = []  # (machine, version, why): since the last plan

    @property
    def client(self) -> AgentClient:
        """The connection to this machine's agent."""
        assert self._client is not None
        return self._client

    # -- coming together -----------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Find this machine's agent, or start it, and make all agents know each other.

        Raises:
            AgentError: The agent is missing, of another job or of another version.
            LayoutMismatchError: Memory holds a job of another shape.
        """
        if self.launched:  # the root has introduced the agents to each other
            together(self._group, self._connect_launched)
        else:
            self._connect_standalone()
        together(self._group, self._join)

    def _connect_launched(self) -> None:
        self._client = AgentClient(Path(os.environ[AGENT_VARIABLE]), os.environ["LIGHTNING_GEMINI_JOB"])
        self.generation = int(os.environ[GENERATION_VARIABLE])

    def _connect_standalone(self) -> None:
        job = self._group.from_first(standalone.job_id(sys.argv, os.getcwd()))
        first = self.identity.local_rank == 0
        together(self._group, lambda: self._start_agent(job) if first else None)
        together(self._group, lambda: None if first else self._find_agent(job))
        agents = self._group.gather(self.client.identity)
        self.generation = 1 + max(agent["generation"] for agent in agents)
        together(self._group, lambda: self._introduce(agents) if first else None)

    def _start_agent(self, job: str) -> None:
        host = bind_host(self.identity.machines)
        self._client = standalone.find_or_start(job, self.identity.machine, host, self._config.idle_timeout_s)

    def _find_agent(self, job: str) -> None:
        self._client = AgentClient(standalone.socket_path(job, self.identity.machine), job)

    def _introduce(self, agents: list[dict[str, Any]]) -> None:
        self.client.share_secret(agents[0]["secret"])
        addresses = [tuple(agent["address"]) for agent in agents[:: self.identity.nproc_per_machine]]
        self.client.set_peers(self.generation, self.identity.nproc_per_machine, addresses)

    def _join(self) -> None:
        self.client.join(self.identity.global_rank, self.replicas, self._config.placement, self._domains)

    # -- going back ------------------------------------------------------------------------------------------------

    def find(self) -> RestoredShard | None:
        """Retrieve, verify and read the newest version that every rank can have from memory.

        Collective. Corrupt copies are skipped: the next holder, then the next older version. Memory is not changed yet,
        see :meth:`resume_from`.

        Returns:
            This rank's shard, or ``None`` where memory cannot serve.

        Raises:
            RestoreError: Some rank's shard is whole, but this script cannot read it; raised on every rank.
        """
        began = time.monotonic()
        while True:
            inventories = self._inventories()
            plan = plan_recovery(self.placement, self.identity.nproc_per_machine, inventories)
            self._say_what_instead(plan)
            if plan.id is None:
                self._explain(inventories, plan)
                return None
            states: list[tuple[dict[str, Any], dict[str, Any]] | None] = []
            together(self._group, lambda plan=plan, states=states: states.append(self._try(plan)))
            (state,) = states
            if all(self._group.gather(state is not None)):
                assert state is not None
                tier = plan.tiers[self.identity.global_rank]
                return RestoredShard(plan.id.version, plan.id, tier, *state, time.monotonic() - began)

    def _inventories(self) -> list[Inventory]:
        reports = self._group.gather((self.client.report(), self._corrupt))
        self._corrupt = set().union(*(corrupt for _, corrupt in reports))
        inventories = [inventory_from_json(report) for report, _ in reports[:: self.identity.nproc_per_machine]]
        return [self._without_corrupt(inventory) for inventory in inventories]

    def _without_corrupt(self, inventory: Inventory) -> Inventory:
        sound = (h for h in inventory.holdings if (h.owner, inventory.machine, h.id) not in self._corrupt)
        return Inventory(inventory.machine, tuple(sound))

    def _try(self, plan: RecoveryPlan) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Bring this rank's shard here, verify and decode it; ``None`` (and remembered) where a copy proves bad."""
        rank, version = self.identity.global_rank, plan.id
        assert version is not None
        source = self.identity.machine
        try:
            for fetch in (fetch for fetch in plan.fetches if fetch.owner == rank):
                source = fetch.source
                self.client.retrieve([fetch])
            source = self.identity.machine
            slab = self.client.attach_existing()
            buffer = slab.holding(version) if slab else None
            if buffer is None:
                raise IntegrityError(f"version {version.version} is not in memory any more")
            buffer.verify()
            return shard.read(buffer.data[: buffer.data_bytes])
        except (IntegrityError, OSError) as error:
            self._unusable.append((source, version, error))
            self._exclude(source, version)
            return None

    def _exclude(self, source: int, version: VersionId) -> None:
        """A bad copy here gives way to a fresh one; if that is bad as well, it is not the other machines' fault."""
        rank, machine = self.identity.global_rank, self.identity.machine
        if source != machine:
            self._corrupt.add((rank, source, version))
            return
        self.client.discard(version)
        if version in self._discarded:
            self._corrupt |= {(rank, holder, version) for holder in range(self.identity.machines)}
        self._discarded.add(version)

    def _say_what_instead(self, plan: RecoveryPlan) -> None:
        """Copies that could not be used must not be forgotten: a machine whose memory rots is to be replaced."""
        rank = self.identity.global_rank
        for machine, version, error in self._unusable:
            message = "rank %d: the copy of version %d on machine %d cannot be used (%s); %s"
            log.warning(message, rank, version.version, machine, error, self._instead_of(version, plan))
        self._unusable.clear()

    def _instead_of(self, version: VersionId, plan: RecoveryPlan) -> str:
        if plan.id is None:
            return "memory holds no other version of all ranks: the persistent tier is next"
        if plan.id != version:
            return f"all ranks load version {plan.id.version} instead"
        mine = (fetch.source for fetch in plan.fetches if fetch.owner == self.identity.global_rank)
        return f"using the copy on machine {next(mine, self.identity.machine)} instead"

    def _explain(self, inventories: list[Inventory], plan: RecoveryPlan) -> None:
        seen = {holding.id for inventory in inventories for holding in inventory.holdings}
        if seen and self.identity.global_rank == 0:
            lost = ", ".join(map(str, plan.missing[:8]))
            log.warning(
                "no complete version in memory: version %d lacks the shards of ranks %s; trying the persistent tier",
                max(seen).version,
                lost,
            )

    def resume_from(self, version: VersionId | None) -> None:
        """Collective: every rank goes on from ``version``; memory forgets what is newer."""
        if self.identity.local_rank == 0:
            self.client.resume_from(version)
        self._group.barrier()

    # -- going on --------------------------------------------------------------------------------------------------

    def attach(self, shard_bytes: int) -> Slab:
        """Map this rank's slab for shards of about ``shard_bytes``.

        Raises:
            CapacityError: The machine has not enough memory; raised on every rank.
        """
        slabs: list[Slab] = []
        of_machine = self.identity.nproc_per_machine * self.replicas
        together(self._group, lambda: slabs.append(self.client.attach(shard_bytes, of_machine)))
        return slabs[0]

    def measure_link(self) -> LinkSpeed | None:
        """How fast this rank reaches its holders, all of them together, while all others reach theirs. Collective.

        Returns:
            Its share of its machine's link; ``None`` if that cannot be measured now.
        """
        self._group.barrier()
        startups_s, rates = self._measured(Quantity.STARTUP), self._measured(Quantity.BANDWIDTH)
        if not startups_s or not rates:
            return None
        whole = min(rates) * len(rates)  # the links shared the machine's own
        return LinkSpeed(whole / self.identity.nproc_per_machine, max(startups_s))

    def _measured(self, quantity: Quantity) -> list[float]:
        """Of every link to this machine's holders, at the same time on all machines. Collective."""
        found = self._group.gather(self._measure(quantity) if self.identity.local_rank == 0 else [])
        mine: list[float] = found[self.identity.machine * self.identity.nproc_per_machine]
        return mine

    def _measure(self, quantity: Quantity) -> list[float]:
        try:
            return list(self.client.measure_links(quantity).values())
        except GeminiError as error:
            log.warning("cannot measure the link to the machines that hold this machine's shards: %s", error)
            return []

    def close(self, *, finished: bool) -> None:
        """Hang up. When the job is finished and nobody else ends the agent, end it and free the memory."""
        client, self._client = self._client, None
        if client is None:
            return
        if finished and not self.launched:
            self._group.barrier()
            if self.identity.local_rank == 0:
                client.stop()
                standalone.wait_gone(client.identity["pid"])
            self._group.barrier()  # whoever fits again must not meet the agent that is leaving
        client.close()
