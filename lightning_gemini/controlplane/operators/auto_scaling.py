"""What the `aws` operator asks of EC2 Auto Scaling, in its own words and with its errors translated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_gemini.errors import ConfigurationError, OperatorError

_ATTEMPTS = 3
LEAVING = ("Terminat", "Detach")
"""How the lifecycle states of instances begin that do not count towards the desired capacity any more."""


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance as its group sees it."""

    lifecycle: str
    healthy: bool
    zone: str

    def describe(self) -> str:
        """Returns a phrase for people."""
        return f"{self.lifecycle} in {self.zone}" + ("" if self.healthy else ", unhealthy")


@dataclass(frozen=True, slots=True)
class GroupState:
    """A group at one moment.

    Attributes:
        name: Of the group.
        min_size: The least number of instances that the group would have.
        max_size: The largest.
        desired: How many it tries to have.
        instances: Those that it has, on their way in and out included, by id.
        tags: Of the group.
    """

    name: str
    min_size: int
    max_size: int
    desired: int
    instances: Mapping[str, Instance]
    tags: Mapping[str, str]

    @property
    def staying(self) -> list[str]:
        """Those that count towards the desired capacity."""
        return [name for name, one in self.instances.items() if not one.lifecycle.startswith(LEAVING)]


class AutoScalingGroup:
    """A group, by its name; every method may raise `OperatorError` with what AWS said.

    Args:
        name: Of the group.
        region: None: by the environment and the configuration of the AWS command line.
        profile: The same.
        timeout_s: Seconds that one attempt of a call may take.

    Raises:
        ConfigurationError: If boto3 is not installed, or there is no such profile or no region.
    """

    def __init__(self, name: str, region: str | None, profile: str | None, timeout_s: float) -> None:
        try:
            import boto3
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError, ClientError
        except ImportError as error:
            raise ConfigurationError("operator aws needs boto3: pip install 'lightning-gemini[aws]'") from error
        self.name = name
        self._errors = (BotoCoreError, ClientError)
        config = Config(
            connect_timeout=timeout_s,
            read_timeout=timeout_s,
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        )
        try:
            session = boto3.Session(region_name=region, profile_name=profile)
            self._scaling = session.client("autoscaling", config=config)
        except BotoCoreError as error:
            raise ConfigurationError(f"operator aws: {error}") from error

    def state(self) -> GroupState:
        """Returns what the group is like now."""
        answer = self._call(self._scaling.describe_auto_scaling_groups, AutoScalingGroupNames=[self.name])
        if not answer["AutoScalingGroups"]:
            raise OperatorError(f"AWS has no Auto Scaling group {self.name!r} in region {self._region}: make it first")
        group = answer["AutoScalingGroups"][0]
        instances = {
            one["InstanceId"]: Instance(
                one["LifecycleState"], one["HealthStatus"] != "Unhealthy", one["AvailabilityZone"]
            )
            for one in group["Instances"]
        }
        tags = {tag["Key"]: tag["Value"] for tag in group["Tags"]}
        return GroupState(self.name, group["MinSize"], group["MaxSize"], group["DesiredCapacity"], instances, tags)

    def claim(self, tags: Mapping[str, str]) -> None:
        """Gives new instances these tags, and keeps the group from choosing by itself which ones to end."""
        self._call(
            self._scaling.create_or_update_tags,
            Tags=[{**self._tag(key), "Value": value, "PropagateAtLaunch": True} for key, value in tags.items()],
        )
        self._protect(True)

    def release(self, tags: Sequence[str]) -> None:
        """Undoes `claim`."""
        self._call(self._scaling.delete_tags, Tags=[self._tag(key) for key in tags])
        self._protect(False)

    def set_desired(self, count: int) -> None:
        """Sets how many instances there are to be; returns at once."""
        self._call(
            self._scaling.set_desired_capacity,
            AutoScalingGroupName=self.name,
            DesiredCapacity=count,
            HonorCooldown=False,
        )

    def terminate(self, instance: str) -> None:
        """Ends an instance for good, so that the group does not replace it; unless it is gone already."""
        try:
            self._call(
                self._scaling.terminate_instance_in_auto_scaling_group,
                InstanceId=instance,
                ShouldDecrementDesiredCapacity=True,
            )
        except OperatorError:
            if instance in self.state().staying:
                raise

    def last_trouble(self) -> str:
        """Returns why the group's last activity failed; empty if it did not."""
        answer = self._call(self._scaling.describe_scaling_activities, AutoScalingGroupName=self.name, MaxRecords=1)
        last = next(iter(answer["Activities"]), {"StatusCode": "Successful"})
        return str(last.get("StatusMessage", "")) if last["StatusCode"] in ("Failed", "Cancelled") else ""

    @property
    def _region(self) -> str:
        return str(self._scaling.meta.region_name)

    def _tag(self, key: str) -> dict[str, str]:
        return {"ResourceId": self.name, "ResourceType": "auto-scaling-group", "Key": key}

    def _protect(self, protected: bool) -> None:
        self._call(
            self._scaling.update_auto_scaling_group,
            AutoScalingGroupName=self.name,
            NewInstancesProtectedFromScaleIn=protected,
        )

    def _call(self, method: Callable[..., Any], **arguments: Any) -> Any:
        try:
            return method(**arguments)
        except self._errors as error:
            raise OperatorError(f"AWS, Auto Scaling group {self.name}: {error}") from error
