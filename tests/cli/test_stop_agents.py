"""Agents that plain scripts leave behind can be ended by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_gemini.cli import main
from lightning_gemini.controlplane.processes import start_time
from lightning_gemini.controlplane.standalone import find_or_start, socket_path


def test_stop_ends_the_agents_that_scripts_left(
    short_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(short_directory))
    with find_or_start("job", 0, "127.0.0.1", 60.0) as client:
        pid = int(client.identity["pid"])
    assert main(["stop", "--agents"]) == 0
    assert "1 agents ended" in capsys.readouterr().out
    assert start_time(pid) is None
    assert not socket_path("job", 0).exists()
    assert main(["stop", "--agents"]) == 0
