"""Election of the one agent that runs the root: whoever creates the key, for as long as its session lasts."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from lightning_gemini.controlplane.kv.base import KeyValueStore
from lightning_gemini.controlplane.session import Session


@dataclass(frozen=True, slots=True)
class Election:
    """One candidate.

    Leadership is the create revision of the key: every write of a root is guarded by it, so that a root that lost its
    lease without noticing can change nothing.

    Attributes:
        store: Where the key is.
        key: The key that the root holds.
        session: The candidate's session; its end is the end of its leadership.
        name: The candidate's machine; it may be one without a slot.
        incarnation: Name of this very agent process.
    """

    store: KeyValueStore
    key: str
    session: Session
    name: str
    incarnation: str

    def campaign(self) -> int | None:
        """Tries once to become root; returns the revision that guards its writes, or None while another one leads."""
        who = {"name": self.name, "incarnation": self.incarnation, "pid": os.getpid()}
        value = json.dumps({**who, "lease": self.session.lease})
        revision = self.store.put_if_absent(self.key, value, self.session.lease)
        if revision is not None:
            return revision
        # An earlier attempt may have been stored although its answer was lost.
        held = self.store.get(self.key)
        return held.create_revision if held is not None and held.value == value else None

    def put(self, key: str, value: str, revision: int) -> bool:
        """Writes as root; returns False, and writes nothing, when the leadership ``revision`` is over."""
        return self.store.put_guarded(key, value, self.key, revision)
