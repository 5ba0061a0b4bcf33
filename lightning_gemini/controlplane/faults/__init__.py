"""Faults that are done for real to a running job of ``lightning-gemini run``: one by one, or as a model plans them."""

from __future__ import annotations

from lightning_gemini.controlplane.faults.driver import FaultDriver
from lightning_gemini.controlplane.faults.injector import FaultInjector
from lightning_gemini.controlplane.faults.observer import Observer, Sighting

__all__ = ["FaultDriver", "FaultInjector", "Observer", "Sighting"]
