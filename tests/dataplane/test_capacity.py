"""How much memory is there, and what is said where it is not enough."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_gemini.dataplane import capacity
from lightning_gemini.dataplane.capacity import available_bytes, require_free, require_memory
from lightning_gemini.errors import CapacityError

MIB = 2**20
MEMINFO = "MemTotal:       16000 kB\nMemFree:         100 kB\nMemAvailable:    8192 kB\n"


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text(MEMINFO)
    return path


def cgroup(directory: Path, limit: str, used: int, stat: str = "anon 0") -> Path:
    for name, text in (("memory.max", limit), ("memory.current", str(used)), ("memory.stat", stat)):
        (directory / name).write_text(text + "\n")
    return directory


def test_this_machine_says_how_much_is_available() -> None:
    assert 0 < available_bytes() < 2**50


def test_without_a_cgroup_the_kernel_says_it(meminfo: Path, tmp_path: Path) -> None:
    assert available_bytes(meminfo, tmp_path / "none") == 8192 * 1024


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", 5, 8 * MIB), (str(3 * MIB), MIB, 2 * MIB), (str(100 * MIB), MIB, 8 * MIB), (str(MIB), 2 * MIB, 0)],
)
def test_a_cgroup_caps_it(meminfo: Path, tmp_path: Path, limit: str, used: int, expected: int) -> None:
    assert available_bytes(meminfo, cgroup(tmp_path, limit, used)) == expected


def test_cached_files_do_not_count_as_used(meminfo: Path, tmp_path: Path) -> None:
    """A data set that was read fills a container's page cache; that is no reason to refuse a job."""
    stat = f"anon {MIB}\nfile {3 * MIB}\nshmem {MIB}\ninactive_file {2 * MIB}\nactive_file {MIB}\nslab 4"
    assert available_bytes(meminfo, cgroup(tmp_path, str(5 * MIB), 5 * MIB, stat)) == 3 * MIB


def test_a_garbled_cgroup_is_no_limit(meminfo: Path, tmp_path: Path) -> None:
    assert available_bytes(meminfo, cgroup(tmp_path, "lots", 1)) == 8 * MIB


@pytest.fixture
def gibibyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "available_bytes", lambda: 1024 * MIB)


@pytest.mark.usefixtures("gibibyte")
def test_what_fits_is_taken() -> None:
    require_memory(96 * MIB, 2, 2)  # 2 buffers x 2 replicas x 2 ranks x 96 = 768, and 256 stay free
    require_memory(200 * MIB, 2, 2, already_bytes=832 * MIB)
    require_free(768 * MIB)


@pytest.mark.usefixtures("gibibyte")
def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(CapacityError) as refusal:
        require_memory(97 * MIB, 2, 2)
    message = str(refusal.value)
    for part in ("2 replicas", "2 ranks", "97 MiB", "= 776 MiB per machine", "1024 MiB available", "256 MiB stay free"):
        assert part in message
    assert "use fewer replicas, more machines" in message
    with pytest.raises(CapacityError, match=r"769 MiB of shared memory: 1024 MiB available \(256 MiB stay free\); use"):
        require_free(769 * MIB)
