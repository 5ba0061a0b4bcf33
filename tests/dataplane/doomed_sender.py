"""A machine that pushes half a version and waits to be killed."""

from __future__ import annotations

import sys

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.slab import Buffer
from lightning_gemini.dataplane.transport import Peer
from tests.dataplane.machines import write_version
from tests.dataplane.test_transport_contract import TRANSPORTS


def main() -> None:
    transport, host, port, owner, number, size, sealed = sys.argv[1:]
    version = VersionId(1, int(number))
    buffer = Buffer.create(int(owner), int(size))
    write_version(buffer, version, int(size), until_byte=int(sealed))
    TRANSPORTS[transport](Peer(1, (host, int(port))), 0, 1).push(buffer, version, lambda: True)


if __name__ == "__main__":
    main()
