"""``python -m lightning_gemini.cli``: the console script where it is not installed."""

from __future__ import annotations

import sys

from lightning_gemini.cli import main

if __name__ == "__main__":
    sys.exit(main())
