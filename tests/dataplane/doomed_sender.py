"""A machine that pushes half a version and waits to be killed."""

from __future__ import annotations

import sys

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.slab import Buffer
from tests.dataplane.machines import write_version
from tests.dataplane.rigs import transport_to


def main() -> None:
    kind, way, owner, number, size, sealed = sys.argv[1:]
    version = VersionId(1, int(number))
    buffer = Buffer.create(int(owner), int(size))
    write_version(buffer, version, int(size), until_byte=int(sealed))
    transport_to(kind, way).push(buffer, version, lambda: True)


if __name__ == "__main__":
    main()
