"""Event and log lines: whole, attributed, and never in the way of the process that writes them."""

from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path

import pytest

from lightning_gemini.controlplane.events import EventLog, read_events
from lightning_gemini.controlplane.logs import PACKAGE_LOGGER, setup_logging, setup_worker_logging

WORKER = {"LIGHTNING_GEMINI_NODE": "0", "RANK": "0", "LIGHTNING_GEMINI_GENERATION": "3"}


@pytest.fixture(autouse=True)
def package_logger():
    yield
    logger = logging.getLogger(PACKAGE_LOGGER)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_events_carry_their_writer_and_their_fields(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", node=2, generation=4)
    log.append("retrieved", bytes=10)
    log.append("failure_detected", time=1.5, node=1, generation=3)
    first, second = read_events(log.path)  # type: ignore[arg-type]
    assert (first["node"], first["rank"], first["generation"], first["event"]) == (2, None, 4, "retrieved")
    assert first["bytes"] == 10
    assert (second["time"], second["node"], second["generation"]) == (1.5, 1, 3)


def test_a_worker_finds_its_log_in_its_environment(tmp_path: Path) -> None:
    log = EventLog.from_environment({**WORKER, "LIGHTNING_GEMINI_RUN_DIR": str(tmp_path)})
    assert (log.path, log.node, log.rank, log.generation) == (tmp_path / "events.jsonl", 0, 0, 3)
    assert EventLog.from_environment({}).append("restored")["event"] == "restored"


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert list(read_events(path)) == []
    path.write_text('{"event": "one"}\n{"event": "tw')
    assert [event["event"] for event in read_events(path)] == ["one"]


def test_a_full_disk_loses_events_and_stops_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = EventLog(Path("/dev/full"))
    for _ in range(3):
        assert full.append("lost")["event"] == "lost"
    assert capsys.readouterr().err.count("/dev/full cannot be written ([Errno 28] No space left on device)") == 1
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "cut sho')  # what the full disk took of the last one
    log = EventLog(path)
    log.append("one")
    log.append("two")
    assert [event["event"] for event in read_events(path)] == ["one", "two"]


def _write_many(path: Path, node: int) -> None:
    log = EventLog(path, node=node)
    for number in range(200):
        log.append("x" * 500, number=number)


def test_lines_of_many_processes_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, node)) for node in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(list(read_events(path))) == 800


def test_log_records_carry_time_node_rank_and_generation(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    handler = setup_worker_logging({**WORKER, "LIGHTNING_GEMINI_RUN_DIR": str(tmp_path)})
    assert handler is not None
    handler.generation = 5
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("lightning_gemini.dataplane.store").exception("lost %d shards", 2)
    record = json.loads((tmp_path / "logs" / "node0-rank0.jsonl").read_text())
    assert (record["node"], record["rank"], record["generation"], record["level"]) == (0, 0, 5, "ERROR")
    assert record["message"] == "lost 2 shards"
    assert record["logger"] == "lightning_gemini.dataplane.store"
    assert "ValueError: no" in record["traceback"]
    assert record["time"] > 0


def test_a_second_setup_replaces_the_first_and_other_processes_have_none(tmp_path: Path) -> None:
    setup_logging(tmp_path / "one.jsonl")
    setup_logging(tmp_path / "two.jsonl", node=1)
    logging.getLogger("lightning_gemini").info("hello")
    assert not (tmp_path / "one.jsonl").exists()
    assert json.loads((tmp_path / "two.jsonl").read_text())["node"] == 1
    assert setup_worker_logging({}) is None
