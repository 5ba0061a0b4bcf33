"""The `aws` operator against moto, and against recorded answers where moto has no such moment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs

import pytest
from botocore.awsrequest import AWSRequest, AWSResponse

from lightning_gemini.controlplane.operators.aws import AwsOperator
from lightning_gemini.controlplane.operators.base import MachineState
from lightning_gemini.errors import ConfigurationError, OperatorError
from tests.controlplane.aws_cloud import AwsCloud, error_response, response
from tests.controlplane.providers import JOB, SECRET, AwsProvider, job_access, states
from tests.dataplane.waiting import wait_until

DOCS = Path(__file__).parents[2] / "docs" / "operators.md"
GROUP_ANSWER = """\
<DescribeAutoScalingGroupsResponse xmlns="http://autoscaling.amazonaws.com/doc/2011-01-01/">
<DescribeAutoScalingGroupsResult><AutoScalingGroups><member>
<AutoScalingGroupName>{group}</AutoScalingGroupName><MinSize>0</MinSize><MaxSize>8</MaxSize>
<DesiredCapacity>{desired}</DesiredCapacity><DefaultCooldown>300</DefaultCooldown>
<AvailabilityZones><member>eu-west-1a</member></AvailabilityZones><HealthCheckType>EC2</HealthCheckType>
<CreatedTime>2026-03-01T12:00:00Z</CreatedTime>
<Tags><member><Key>lightning-gemini:job</Key><Value>{job}</Value><PropagateAtLaunch>true</PropagateAtLaunch></member></Tags>
<Instances>{instances}</Instances>
</member></AutoScalingGroups></DescribeAutoScalingGroupsResult></DescribeAutoScalingGroupsResponse>"""
INSTANCE_ANSWER = """\
<member><InstanceId>{id}</InstanceId><AvailabilityZone>eu-west-1a</AvailabilityZone>
<LifecycleState>{lifecycle}</LifecycleState><HealthStatus>{health}</HealthStatus>
<ProtectedFromScaleIn>true</ProtectedFromScaleIn></member>"""
ACTIVITIES_ANSWER = """\
<DescribeScalingActivitiesResponse xmlns="http://autoscaling.amazonaws.com/doc/2011-01-01/">
<DescribeScalingActivitiesResult><Activities><member><ActivityId>1</ActivityId>
<AutoScalingGroupName>{group}</AutoScalingGroupName><Cause>c</Cause><StartTime>2026-03-01T12:00:00Z</StartTime>
<StatusCode>Failed</StatusCode><StatusMessage>We currently do not have sufficient p4d.24xlarge capacity</StatusMessage>
</member></Activities></DescribeScalingActivitiesResult></DescribeScalingActivitiesResponse>"""


@pytest.fixture
def cloud() -> Iterator[AwsCloud]:
    with AwsCloud(max_size=2) as cloud:
        yield cloud


@pytest.fixture
def provider(cloud: AwsCloud, tmp_path: Path) -> AwsProvider:
    return AwsProvider(cloud, tmp_path)


def test_a_full_group_is_an_error_that_names_both_numbers(cloud: AwsCloud, provider: AwsProvider) -> None:
    operator = provider.operator()
    for _ in range(2):
        operator.start_machine()
    with pytest.raises(OperatorError, match=r"desired capacity is 2 and its MaxSize is 2; raise MaxSize to 3"):
        operator.start_machine()
    assert states(operator) == [MachineState.RUNNING] * 2
    cloud.update(MaxSize=3)
    operator.start_machine()
    assert len(operator.machines()) == 3
    operator.close()
    assert cloud.group()["DesiredCapacity"] == 0


def test_instances_learn_their_job_by_tags_and_never_its_secret(cloud: AwsCloud, provider: AwsProvider) -> None:
    operator = provider.operator(secret_file="/efs/secret")
    operator.start_machine()
    [machine] = operator.machines()
    tags = cloud.tags_of(machine.name)
    assert tags["lightning-gemini:job"] == JOB
    assert tags["lightning-gemini:etcd"] == "10.0.0.1:2379"
    assert tags["lightning-gemini:secret-file"] == "/efs/secret"
    assert SECRET not in json.dumps([tags, cloud.group()], default=str)
    assert cloud.group()["NewInstancesProtectedFromScaleIn"]
    operator.close()
    assert not cloud.group()["Tags"], "the next job finds a group that is nobody's"
    assert not cloud.group()["NewInstancesProtectedFromScaleIn"]


def test_the_groups_own_replacement_counts_so_that_nothing_is_started_twice(
    cloud: AwsCloud, provider: AwsProvider
) -> None:
    operator = provider.operator()
    operator.start_machine()
    [lost] = operator.machines()
    provider.end(lost.name)

    def by_name() -> dict[str, MachineState]:
        return {machine.name: machine.state for machine in operator.machines()}

    # What was asked a moment ago is not asked again.
    wait_until(lambda: by_name()[lost.name] is MachineState.ENDED, "the operator sees it")
    [(replacement, state)] = [(name, state) for name, state in by_name().items() if name != lost.name]
    assert state is MachineState.RUNNING, "Auto Scaling has replaced it by itself"
    operator.destroy_machine(lost.name)
    assert {machine.name for machine in operator.machines()} == {replacement}
    assert cloud.group()["DesiredCapacity"] == 1, "to forget a lost instance does not give up its replacement"
    operator.close()


def test_a_request_without_an_instance_is_a_pending_machine_that_can_be_taken_back(
    cloud: AwsCloud, provider: AwsProvider
) -> None:
    operator = provider.operator()
    operator.start_machine()
    cloud.update(MaxSize=8)
    shown = INSTANCE_ANSWER.format(id="i-1", lifecycle="InService", health="Healthy")
    shown += INSTANCE_ANSWER.format(id="i-2", lifecycle="Pending:Wait", health="Healthy")
    shown += INSTANCE_ANSWER.format(id="i-3", lifecycle="InService", health="Unhealthy")
    shown += INSTANCE_ANSWER.format(id="i-4", lifecycle="Terminating", health="Healthy")
    wishes: list[str] = []

    def recorded(operation: str, request: AWSRequest) -> AWSResponse | None:
        if operation == "DescribeAutoScalingGroups":
            text = GROUP_ANSWER.format(group=cloud.name, job=JOB, desired=4, instances=shown)
            return response(request, 200, text)
        if operation == "DescribeScalingActivities":
            return response(request, 200, ACTIVITIES_ANSWER.format(group=cloud.name))
        if operation == "SetDesiredCapacity":
            wishes.append(parse_qs(request.body)["DesiredCapacity"][0])
            return response(request, 200, "<SetDesiredCapacityResponse/>")
        return None

    with cloud.answering(recorded):
        machines = {machine.name: machine for machine in operator.machines()}
        assert [machine.state for machine in machines.values()] == [
            MachineState.RUNNING,
            MachineState.PENDING,
            MachineState.ENDED,  # about to be replaced by the group
            MachineState.PENDING,  # wanted are 4, and one of those that are there is on its way out
        ]
        assert list(machines)[:3] == ["i-1", "i-2", "i-3"]
        request = list(machines.values())[-1]
        assert "sufficient p4d.24xlarge capacity" in request.detail
        operator.destroy_machine(request.name)
        assert wishes == ["3"]
    operator.close()
    wait_until(lambda: not provider.living(), "all are ended")


def test_throttling_is_retried_and_then_an_error_with_the_words_of_aws(cloud: AwsCloud, provider: AwsProvider) -> None:
    operator = provider.operator()
    operator.start_machine()
    throttled: list[str] = []

    def throttle(operation: str, request: AWSRequest) -> AWSResponse:
        throttled.append(operation)
        return error_response(request, 400, "Throttling", "Rate exceeded")

    with cloud.answering(throttle), pytest.raises(OperatorError, match=r"Throttling.*Rate exceeded"):
        operator.machines()
    assert len(throttled) == 3
    operator.close()
    assert not provider.living()


def test_a_group_that_is_not_ours_is_left_alone_unless_it_may_be_taken(cloud: AwsCloud, provider: AwsProvider) -> None:
    provider.operator(job="yesterday").start_machine()
    [left] = provider.living()
    with pytest.raises(ConfigurationError, match=rf"instances of job yesterday: {left}; end them, or let take_over"):
        provider.operator().start_machine()
    assert provider.living() == {left}
    operator = provider.operator(take_over=True)
    operator.start_machine()
    assert left not in provider.living()
    assert cloud.tags_of(operator.machines()[0].name)["lightning-gemini:job"] == JOB
    operator.close()
    assert not provider.living()


def test_what_cannot_work_is_refused(
    cloud: AwsCloud, provider: AwsProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud.update(MinSize=1, DesiredCapacity=1)
    with pytest.raises(ConfigurationError, match="has MinSize 1: set it to 0"):
        provider.operator().start_machine()
    with pytest.raises(OperatorError, match="no Auto Scaling group 'nothing'"):
        provider.operator(group="nothing").machines()
    with pytest.raises(ConfigurationError, match="name the Auto Scaling group"):
        AwsOperator({}, job_access(tmp_path))
    with pytest.raises(ConfigurationError, match="could not be found"):
        provider.operator(profile="nobody")
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigurationError, match=re.escape("pip install 'lightning-gemini[aws]'")):
        provider.operator()


class _Metadata(BaseHTTPRequestHandler):
    """The instance metadata service, version 2: nothing without a token that was asked for with PUT."""

    content: ClassVar = {
        "instance-id": "i-0abc",
        "local-ipv4": "10.1.2.3",
        "placement/availability-zone": "eu-west-1a",
        "tags/instance/lightning-gemini:job": JOB,
        "tags/instance/lightning-gemini:etcd": "10.0.0.1:2379",
    }

    def do_PUT(self) -> None:
        asked = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer("the-token" if asked else None)

    def do_GET(self) -> None:
        known = self.headers["X-aws-ec2-metadata-token"] == "the-token"
        self._answer(self.content.get(self.path.removeprefix("/latest/meta-data/")) if known else None)

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _answer(self, text: str | None) -> None:
        self.send_response(200 if text is not None else 404)
        self.end_headers()
        self.wfile.write((text or "").encode())


def test_the_documented_user_data_starts_an_agent_that_knows_all(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    snippet = re.search(r"```bash\n(#!/bin/bash\n.*?)```", DOCS.read_text(), re.DOTALL)
    assert snippet is not None
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("lightning-gemini", 'echo "$@"; env | grep ^LIGHTNING_'), ("shutdown", 'echo "shutdown $@"')):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    handler = type("Handler", (_Metadata,), {"content": dict(_Metadata.content)})
    handler.content["tags/instance/lightning-gemini:secret-file"] = str(secret)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    text = snippet[1].replace("http://169.254.169.254", f"http://127.0.0.1:{server.server_address[1]}")
    path = f"{programs}:{os.environ['PATH']}"
    done = subprocess.run(["/bin/bash", "-c", text], env={"PATH": path}, capture_output=True, text=True, timeout=30)
    server.shutdown()
    server.server_close()
    printed = done.stdout.splitlines()
    assert printed[0] == "agent", done.stderr
    assert set(printed[1:-1]) == {
        "LIGHTNING_GEMINI_MACHINE=i-0abc",
        "LIGHTNING_GEMINI_HOST=10.1.2.3",
        "LIGHTNING_GEMINI_DOMAIN=eu-west-1a",
        f"LIGHTNING_GEMINI_JOB={JOB}",
        "LIGHTNING_GEMINI_ETCD=10.0.0.1:2379",
        f"LIGHTNING_GEMINI_SECRET_FILE={secret}",
    }
    assert printed[-1] == "shutdown -h now", "an instance without its agent is of no use"
