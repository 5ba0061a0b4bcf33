"""A small Kubernetes API server over HTTP: Pods and Secrets of one namespace, in the shapes of the real one.

Shapes are those of the Kubernetes API reference, v1: ``PodList``, ``Pod`` with ``status.phase`` and
``containerStatuses``, and ``Status`` for every refusal.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

NAMESPACE = "training"
TOKEN = "a-token"
_REASONS = {401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "AlreadyExists", 410: "Expired"}
_KINDS = {"pods": "Pod", "secrets": "Secret"}


class KubeApi:
    """Serves from a thread; what it holds can be read and changed from the test, as a kubelet or a person would."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in _KINDS}
        self.refusals: list[tuple[str, str, int, str]] = []  # method, kind, HTTP status, message: for one request each
        self.deletions: list[tuple[str, int | None]] = []  # name and grace period
        self.schedules = True  # whether Pods are given a node and start
        self.obeys = True  # whether containers end when they are told to
        self.lock = threading.RLock()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    def start(self) -> None:
        api = self

        class Handler(_Handler):
            held = api

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Connections are refused from now on, until it is started again."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def write_kubeconfig(self, path: Path) -> Path:
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{self._port}"}}
        user = {"name": "u", "user": {"token": TOKEN}}
        context = {"name": "here", "context": {"cluster": "c", "user": "u"}}
        content = {"apiVersion": "v1", "kind": "Config", "current-context": "here"}
        path.write_text(json.dumps({**content, "clusters": [cluster], "users": [user], "contexts": [context]}))
        return path

    def set_status(self, name: str, phase: str, **fields: Any) -> None:
        with self.lock:
            self.objects["pods"][name]["status"] = {"phase": phase, **fields}

    def remove(self, name: str) -> None:
        """As ``kubectl delete --force`` does."""
        with self.lock:
            del self.objects["pods"][name]

    def living(self) -> set[str]:
        with self.lock:
            return {
                name
                for name, pod in self.objects["pods"].items()
                if pod["status"]["phase"] in ("Pending", "Running") and "deletionTimestamp" not in pod["metadata"]
            }

    def refusal_of(self, method: str, kind: str) -> tuple[int, str] | None:
        with self.lock:
            for entry in self.refusals:
                if entry[:2] == (method, kind):
                    self.refusals.remove(entry)
                    return entry[2:]
        return None

    def step(self) -> None:
        """What scheduler and kubelet do between two lists."""
        for name, pod in list(self.objects["pods"].items()):
            if self.obeys and "deletionTimestamp" in pod["metadata"]:
                del self.objects["pods"][name]
            if self.schedules and pod["status"] == {"phase": "Pending"}:
                pod["spec"]["nodeName"] = "node-1"
                running = {"name": pod["spec"]["containers"][0]["name"], "state": {"running": {}}}
                shape = {"ready": True, "restartCount": 0, "image": "i", "imageID": "i"}
                pod["status"] = {"phase": "Running", "containerStatuses": [{**running, **shape}]}


class _Handler(BaseHTTPRequestHandler):
    held: KubeApi

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _serve(self, method: str) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        where = urlsplit(self.path)
        *root, kind, name = (where.path.strip("/").split("/") + [""] * 6)[:6]
        query = {key: values[0] for key, values in parse_qs(where.query).items()}
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "Unauthorized")
        if root != ["api", "v1", "namespaces", NAMESPACE] or kind not in _KINDS:
            return self._refuse(404, "the server could not find the requested resource")
        with self.held.lock:
            if (refusal := self.held.refusal_of(method, kind)) is not None:
                return self._refuse(*refusal)
            return getattr(self, f"_{method.lower()}")(kind, name, query, body)

    def _get(self, kind: str, name: str, query: Mapping[str, str], _: Any) -> None:
        assert not name, "the operator lists"
        key, _, value = query["labelSelector"].partition("=")
        items = [one for one in self.held.objects[kind].values() if one["metadata"].get("labels", {}).get(key) == value]
        self._answer(200, {"kind": f"{_KINDS[kind]}List", "apiVersion": "v1", "metadata": {}, "items": items})
        self.held.step()  # so that a new Pod is seen pending once

    def _post(self, kind: str, _: str, __: Mapping[str, str], body: dict[str, Any]) -> None:
        name = body["metadata"]["name"]
        if name in self.held.objects[kind]:
            return self._refuse(409, f'{kind} "{name}" already exists')
        if kind == "pods":
            body["status"] = {"phase": "Pending"}
        self.held.objects[kind][name] = body
        return self._answer(201, body)

    def _put(self, kind: str, name: str, _: Mapping[str, str], body: dict[str, Any]) -> None:
        self.held.objects[kind][name] = body
        self._answer(200, body)

    def _delete(self, kind: str, name: str, query: Mapping[str, str], body: dict[str, Any]) -> None:
        if name not in self.held.objects[kind]:
            return self._refuse(404, f'{kind} "{name}" not found')
        grace = query.get("gracePeriodSeconds", body.get("gracePeriodSeconds"))
        if kind == "pods":
            self.held.deletions.append((name, None if grace is None else int(grace)))
        if kind == "pods" and grace is not None and int(grace) > 0:
            now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
            self.held.objects[kind][name]["metadata"]["deletionTimestamp"] = now
            return self._answer(200, self.held.objects[kind][name])
        return self._answer(200, self.held.objects[kind].pop(name))

    def _refuse(self, status: int, message: str) -> None:
        shape = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
        self._answer(status, {**shape, "message": message, "reason": _REASONS.get(status, ""), "code": status})

    def _answer(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
