"""EC2 and Auto Scaling by moto, reached through the real boto3; its answers can be replaced before they are given."""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore import handlers
from botocore.awsrequest import AWSRequest, AWSResponse
from botocore.exceptions import EndpointConnectionError
from moto import mock_aws

REGION = "eu-west-1"
Answer = Callable[[str, AWSRequest], "AWSResponse | None"]


class _Body:
    """What `AWSResponse` reads its content from."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def stream(self, *_: Any, **__: Any) -> Iterator[bytes]:
        yield self._content


def response(request: AWSRequest, status: int, content: str) -> AWSResponse:
    return AWSResponse(request.url, status, {"Content-Type": "text/xml"}, _Body(content.encode()))


def error_response(request: AWSRequest, status: int, code: str, message: str) -> AWSResponse:
    """The shape of an error of the query protocol."""
    error = f"<Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>"
    return response(request, status, f"<ErrorResponse>{error}<RequestId>0</RequestId></ErrorResponse>")


@functools.cache
def _clients() -> tuple[Any, Any]:
    """The tests' own; they cost seconds to make."""
    session = boto3.Session(region_name=REGION)
    return session.client("ec2"), session.client("autoscaling")


class AwsCloud:
    """An Auto Scaling group of its own in the account that moto keeps for the whole session; use as a context."""

    _begun = False

    def __init__(self, max_size: int = 8) -> None:
        self._max_size = max_size
        self.name = f"trainers-{uuid.uuid4().hex[:8]}"
        self.answers: list[Answer] = []
        self.calls: list[str] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> AwsCloud:
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")
        patch.setenv("AWS_CONFIG_FILE", "/nonexistent")
        mock = mock_aws()
        mock.start(reset=not AwsCloud._begun)  # to fill an account anew takes seconds
        AwsCloud._begun = True
        self._stack.callback(mock.stop, remove_data=False)
        self.ec2, self.scaling = _clients()
        # Ahead of moto's own, in every session made from now on: the first answer counts.
        patch.setattr(handlers, "BUILTIN_HANDLERS", [("before-send", self._before_send), *handlers.BUILTIN_HANDLERS])
        template = {"ImageId": "ami-0123456789abcdef0", "InstanceType": "p4d.24xlarge"}
        self.ec2.create_launch_template(LaunchTemplateName=self.name, LaunchTemplateData=template)
        self.scaling.create_auto_scaling_group(
            AutoScalingGroupName=self.name,
            LaunchTemplate={"LaunchTemplateName": self.name, "Version": "$Latest"},
            MinSize=0,
            MaxSize=self._max_size,
            DesiredCapacity=0,
            AvailabilityZones=[f"{REGION}a"],
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def update(self, **fields: Any) -> None:
        self.scaling.update_auto_scaling_group(AutoScalingGroupName=self.name, **fields)

    def group(self) -> dict[str, Any]:
        return self.scaling.describe_auto_scaling_groups(AutoScalingGroupNames=[self.name])["AutoScalingGroups"][0]

    def living(self) -> set[str]:
        ours = {"Name": "tag:aws:autoscaling:groupName", "Values": [self.name]}
        states = {"Name": "instance-state-name", "Values": ["pending", "running"]}
        reservations = self.ec2.describe_instances(Filters=[ours, states])["Reservations"]
        return {one["InstanceId"] for reservation in reservations for one in reservation["Instances"]}

    def tags_of(self, instance: str) -> dict[str, str]:
        one = self.ec2.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]
        return {tag["Key"]: tag["Value"] for tag in one["Tags"]}

    @contextlib.contextmanager
    def answering(self, answer: Answer) -> Iterator[None]:
        self.answers.append(answer)
        try:
            yield
        finally:
            self.answers.remove(answer)

    def away(self) -> contextlib.AbstractContextManager[None]:
        def refuse(operation: str, request: AWSRequest) -> None:
            raise EndpointConnectionError(endpoint_url=request.url)

        return self.answering(refuse)

    def _before_send(self, request: AWSRequest, event_name: str = "", **_: Any) -> AWSResponse | None:
        operation = event_name.rpartition(".")[2]
        self.calls.append(operation)
        return next((found for answer in self.answers if (found := answer(operation, request)) is not None), None)
