"""Makes the strategies known to Lightning's Trainer, whichever of the two packages is imported first.

Lightning has no entry point for strategies, and importing it here would cost seconds, also in processes that must stay
without torch. So an import hook waits until ``lightning.pytorch`` is there. It acts only when no watched module is
still being imported: while one is, ``from lightning import …`` and our own strategy's ``from … import …`` could find a
module that is half there, such as when ``from lightning_gemini import GeminiStrategy`` is what imports lightning.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["install"]

LIGHTNING = "lightning.pytorch"
WATCHED = ("lightning", LIGHTNING)
OURS = "lightning_gemini."


def install() -> None:
    """Registers the strategies now if lightning is imported, else as soon as it is."""
    if any(isinstance(finder, RegistrationFinder) for finder in sys.meta_path):
        return
    if LIGHTNING in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, RegistrationFinder())


class RegistrationFinder(MetaPathFinder):
    """Lets the other finders do their work, and hears when the modules that it watches were executed."""

    def __init__(self) -> None:
        self._executing: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds a watched module as anybody else would, and wraps its loader."""
        if fullname not in WATCHED and not fullname.startswith(OURS):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ObservedLoader(spec.loader, self)
                return spec
        return None

    def begin(self, name: str) -> None:
        """Notes that module ``name`` is being executed."""
        self._executing.add(name)

    def end(self, name: str) -> None:
        """Notes that module ``name`` was executed, or failed; registers the strategies if all is there."""
        self._executing.discard(name)
        if self._executing or LIGHTNING not in sys.modules:
            return
        try:
            sys.meta_path.remove(self)
        except ValueError:  # another thread was faster
            return
        _register()


class _ObservedLoader(Loader):
    """Another loader, whose end is heard of."""

    def __init__(self, loader: Loader, finder: RegistrationFinder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module shall look as if nobody had watched.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._finder.begin(module.__name__)
        try:
            self._loader.exec_module(module)
        finally:
            self._finder.end(module.__name__)

    def __getattr__(self, name: str) -> Any:
        # What else loaders offer: get_code for `python -m`, get_source for tracebacks, resource readers.
        return getattr(self._loader, name)


def _register() -> None:
    try:
        strategies = importlib.import_module("lightning.pytorch.strategies")
        gemini = importlib.import_module("lightning_gemini.strategies.gemini")
    except ImportError as error:
        # `import lightning` must not fail because of us; Trainer(strategy="gemini") will, and this says why.
        warnings.warn(
            f"lightning_gemini could not register its strategies: {error}. Trainer(strategy='gemini') will not be "
            "known; reinstall lightning-gemini and its requirements.",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    if "gemini" not in strategies.StrategyRegistry:
        gemini.GeminiStrategy.register_strategies(strategies.StrategyRegistry)
