"""Machines that are instances of an EC2 Auto Scaling group, which belongs to one job at a time."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_gemini.controlplane.operators.auto_scaling import LEAVING, AutoScalingGroup, GroupState
from lightning_gemini.controlplane.operators.base import JobAccess, Machine, MachineState
from lightning_gemini.controlplane.operators.listing import Listing
from lightning_gemini.controlplane.operators.settings import check_positive, read_settings
from lightning_gemini.errors import ConfigurationError, OperatorError

_log = logging.getLogger(__name__)

_COMING = ("Pending", "Quarantined", "Warmed")  # as lifecycle states begin

JOB_TAG = "lightning-gemini:job"
ETCD_TAG = "lightning-gemini:etcd"
SECRET_FILE_TAG = "lightning-gemini:secret-file"  # noqa: S105 the path of it


@dataclass(frozen=True, slots=True)
class AwsSettings:
    """What ``conf/gemini/operator/aws.yaml`` holds; see there.

    Attributes:
        group: Name of the Auto Scaling group.
        region: As the AWS command line takes it; None: by its environment and configuration.
        profile: The same.
        secret_file: Where the instances find the job's secret; None: where the launcher has it.
        take_over: Whether instances that another job left in the group are ended; else they are an error.
        poll_s: Seconds between two questions to AWS.
        timeout_s: Seconds that one call may take, without its retries.
    """

    group: str | None = None
    region: str | None = None
    profile: str | None = None
    secret_file: str | None = None
    take_over: bool = False
    poll_s: float = 5.0
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.group:
            raise ConfigurationError('operator aws: name the Auto Scaling group: --operator "aws,group=NAME"')
        check_positive("aws", poll_s=self.poll_s, timeout_s=self.timeout_s)


class AwsOperator:
    """Raises the group's desired capacity by one for each machine; a machine's name is its instance id.

    A request that has no instance yet is a pending machine with a name of its own. The group's own replacement of a
    lost instance counts like a request, so the two loops never start two machines for one.

    Args:
        settings: See `AwsSettings`.
        access: The job. The group's tags carry its id, its etcd and the secret's path, never the secret.

    Raises:
        ConfigurationError: If a setting is impossible, or boto3 is not installed.
    """

    def __init__(self, settings: Mapping[str, Any], access: JobAccess) -> None:
        self._settings, self._access = read_settings(AwsSettings, "aws", settings), access
        assert self._settings.group
        chosen = self._settings
        self._group = AutoScalingGroup(self._settings.group, chosen.region, chosen.profile, chosen.timeout_s)
        self._claimed = False
        self._instances: dict[str, None] = {}  # seen and not destroyed, oldest first
        self._destroyed: set[str] = set()
        self._requests: list[str] = []  # names of those that have no instance yet
        self._requested = 0
        self._listing = Listing(self._ask, self._settings.poll_s)

    def start_machine(self) -> None:
        """See `Operator.start_machine`."""
        self._claim()
        state = self._group.state()
        wanted = max(state.desired, len(state.staying)) + 1
        if wanted > state.max_size:
            raise OperatorError(
                f"Auto Scaling group {self._group.name} is full: its desired capacity is {wanted - 1} and its MaxSize "
                f"is {state.max_size}; raise MaxSize to {wanted} or more"
            )
        self._group.set_desired(wanted)
        self._listing.forget()

    def machines(self) -> list[Machine]:
        """See `Operator.machines`."""
        return self._listing.get()

    def destroy_machine(self, name: str) -> None:
        """See `Operator.destroy_machine`."""
        if name not in self._requests and name not in self._instances:
            return
        state = self._group.state()
        if name in self._requests:
            # Instances are protected from scale-in, so this can only take back a request.
            if state.desired > len(state.staying):
                self._group.set_desired(state.desired - 1)
            self._requests.remove(name)
        else:
            if name in state.staying:
                self._group.terminate(name)
            self._instances.pop(name)
            self._destroyed.add(name)
        self._listing.forget()

    def close(self) -> None:
        """See `Operator.close`; ending an instance shuts its system down, which ends the agent gently."""
        try:
            self._claim()
            self._listing.wait(self._destroy_all, self._access.stop_timeout_s)
            self._group.release([JOB_TAG, ETCD_TAG, SECRET_FILE_TAG])
            self._claimed = False
        except (OperatorError, ConfigurationError) as error:
            _log.error(
                "instances of job %s may be left in Auto Scaling group %s (%s); set its desired capacity to 0",
                self._access.job,
                self._group.name,
                error,
            )

    def _destroy_all(self, machines: list[Machine]) -> bool:
        for machine in machines:
            self.destroy_machine(machine.name)
        return not machines

    def _claim(self) -> None:
        """Makes the group this job's own, once.

        Raises:
            ConfigurationError: If it is another job's, or never gets empty.
        """
        if self._claimed:
            return
        state = self._group.state()
        if state.min_size:
            raise ConfigurationError(
                f"Auto Scaling group {self._group.name} has MinSize {state.min_size}: set it to 0, so that machines of "
                "a job that has ended are not started again"
            )
        owner = state.tags.get(JOB_TAG)
        strangers = [] if owner == self._access.job else state.staying
        if strangers and not self._settings.take_over:
            raise ConfigurationError(_not_ours(self._group.name, owner, strangers))
        for instance in strangers:
            self._group.terminate(instance)
        self._destroyed |= set(strangers)
        secret_file = self._settings.secret_file or str(self._access.secret_file)
        self._group.claim({JOB_TAG: self._access.job, ETCD_TAG: self._access.etcd, SECRET_FILE_TAG: secret_file})
        self._claimed = True

    def _ask(self) -> list[Machine]:
        self._claim()
        state = self._group.state()
        self._instances.update(dict.fromkeys(sorted(set(state.staying) - set(self._instances) - self._destroyed)))
        missing = max(0, state.desired - len(state.staying))
        while len(self._requests) < missing:
            self._requests.append(f"requested-{self._requested}")
            self._requested += 1
        del self._requests[: len(self._requests) - missing]
        why = self._group.last_trouble() if missing else ""
        waiting = [Machine(name, MachineState.PENDING, detail=why) for name in self._requests]
        return [_machine(instance, state) for instance in self._instances] + waiting


def _machine(instance: str, state: GroupState) -> Machine:
    found = state.instances.get(instance)
    if found is None:
        return Machine(instance, MachineState.ENDED, detail=f"it is no longer in {state.name}: terminated or detached")
    return Machine(instance, _state(found.lifecycle, found.healthy), detail=found.describe())


def _state(lifecycle: str, healthy: bool) -> MachineState:
    if not healthy or lifecycle.startswith(LEAVING):
        return MachineState.ENDED
    return MachineState.PENDING if lifecycle.startswith(_COMING) else MachineState.RUNNING


def _not_ours(group: str, owner: str | None, strangers: Sequence[str]) -> str:
    return (
        f"Auto Scaling group {group} has instances of {f'job {owner}' if owner else 'no job'}: "
        f"{', '.join(sorted(strangers))}; end them, or let take_over=true do so, or use another group"
    )
