"""The worker's side of a buffer, in a process of its own: obeys one word a line and answers with one line."""

from __future__ import annotations

import sys

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.slab import Buffer
from tests.dataplane.machines import shard_bytes


def main() -> None:
    buffer = Buffer(int(sys.argv[1]))
    print("attached", buffer.owner, len(buffer.data), flush=True)
    for line in sys.stdin:
        word, *numbers = line.split()
        obey(buffer, word, [int(number) for number in numbers])
        print("done", flush=True)


def obey(buffer: Buffer, word: str, numbers: list[int]) -> None:
    if word == "begin":
        generation, version, size = numbers
        buffer.begin(VersionId(generation, version), size)
        buffer.data[:size] = shard_bytes(buffer.owner, VersionId(generation, version), size)
    elif word == "seal":
        buffer.seal(numbers[0])
    elif word == "progress":
        buffer.report_progress(numbers[0])
    elif word == "complete":
        buffer.complete()


if __name__ == "__main__":
    main()
