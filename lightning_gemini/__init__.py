"""Every-iteration in-memory checkpoints for Lightning + DeepSpeed.

``import lightning_gemini``, before or after lightning, makes ``Trainer(strategy="gemini")`` known. The import is cheap:
it brings in neither torch nor lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_gemini import _registration
from lightning_gemini.version import __version__

if TYPE_CHECKING:
    from lightning_gemini.callbacks.gemini_checkpoint import GeminiCheckpoint
    from lightning_gemini.strategies.gemini import GeminiStrategy

__all__ = ["GeminiCheckpoint", "GeminiStrategy", "__version__"]


def __getattr__(name: str) -> object:
    """Imports the Lightning face on first use, and torch and lightning with it."""
    if name == "GeminiStrategy":
        from lightning_gemini.strategies.gemini import GeminiStrategy

        return GeminiStrategy
    if name == "GeminiCheckpoint":
        from lightning_gemini.callbacks.gemini_checkpoint import GeminiCheckpoint

        return GeminiCheckpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_registration.install()
