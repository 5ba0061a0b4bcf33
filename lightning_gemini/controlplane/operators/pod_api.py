"""What the `kubernetes` operator asks of an API server, with its errors translated."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from lightning_gemini.errors import ConfigurationError, OperatorError

_NOT_FOUND, _CONFLICT = 404, 409


class PodApi:
    """Pods and Secrets of a namespace; every method may raise `OperatorError` with what the server said.

    Args:
        namespace: Of everything.
        context: Of the kubeconfig file, or None.
        kubeconfig: The file, or None.
        timeout_s: Seconds that a call may take to connect, and again to answer.

    Raises:
        ConfigurationError: If the client is not installed, or does not know where the cluster is.
    """

    def __init__(self, namespace: str, context: str | None, kubeconfig: str | None, timeout_s: float) -> None:
        try:
            from kubernetes import client, config
            from urllib3.exceptions import HTTPError
        except ImportError as error:
            raise ConfigurationError(
                "operator kubernetes needs its client: pip install 'lightning-gemini[kubernetes]'"
            ) from error
        self.namespace, self._timeout_s = namespace, timeout_s
        self._refusal, self._silence = client.ApiException, HTTPError
        settings = client.Configuration()
        try:
            _load(config, settings, kubeconfig, context)
        except (config.ConfigException, OSError) as error:
            raise ConfigurationError(f"operator kubernetes: no cluster is configured here ({error})") from error
        settings.retries = False  # the launcher tries again, and says so
        self._core = client.CoreV1Api(client.ApiClient(settings))

    def pods(self, selector: str) -> list[Any]:
        """Returns the Pods with a label."""
        answer = self._call("list Pods", self._core.list_namespaced_pod, self.namespace, label_selector=selector)
        return list(answer.items)

    def create_pod(self, body: Mapping[str, Any]) -> None:
        """Makes a Pod; one that is there already was made by a call whose answer was lost."""
        name = body["metadata"]["name"]
        with suppress(_AlreadyThereError):
            self._call(f"create Pod {name}", self._core.create_namespaced_pod, self.namespace, body)

    def delete_pod(self, name: str, grace_s: int) -> None:
        """Deletes a Pod, unless it is gone; ``grace_s`` 0 does not even wait for the node to confirm."""
        with suppress(_NotThereError):
            self._call(
                f"delete Pod {name}",
                self._core.delete_namespaced_pod,
                name,
                self.namespace,
                grace_period_seconds=grace_s,
            )

    def put_secret(self, name: str, labels: Mapping[str, str], content: Mapping[str, str]) -> None:
        """Makes a Secret, in place of one of that name."""
        metadata = {"name": name, "labels": dict(labels)}
        body = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": dict(content)}
        try:
            self._call(f"create Secret {name}", self._core.create_namespaced_secret, self.namespace, body)
        except _AlreadyThereError:
            self._call(f"replace Secret {name}", self._core.replace_namespaced_secret, name, self.namespace, body)

    def delete_secret(self, name: str) -> None:
        """Deletes a Secret, unless it is gone."""
        with suppress(_NotThereError):
            self._call(f"delete Secret {name}", self._core.delete_namespaced_secret, name, self.namespace)

    def _call(self, what: str, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return method(*arguments, **options, _request_timeout=(self._timeout_s, self._timeout_s))
        except self._refusal as error:
            kind = {_NOT_FOUND: _NotThereError, _CONFLICT: _AlreadyThereError}.get(error.status, OperatorError)
            raise kind(f"Kubernetes refused to {what} (HTTP {error.status}): {_message(error)}") from error
        except (self._silence, OSError) as error:
            raise OperatorError(f"Kubernetes cannot be reached to {what}: {error}") from error


class _NotThereError(OperatorError):
    """The object is gone already."""


class _AlreadyThereError(OperatorError):
    """An object of that name is there already."""


def _load(config: Any, settings: Any, kubeconfig: str | None, context: str | None) -> None:
    try:
        config.load_kube_config(kubeconfig, context, settings, persist_config=False)
    except config.ConfigException:
        if kubeconfig or context:
            raise
        config.load_incluster_config(client_configuration=settings)


def _message(error: Any) -> str:
    """The server explains itself in a Status object."""
    with suppress(ValueError, TypeError, AttributeError):
        return str(json.loads(error.body)["message"])
    return str(error.reason)
