"""Recipes are scripts: they import each other as neighbours."""

from __future__ import annotations

import sys
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path[:0] = [str(RECIPES), str(RECIPES / "experiments")]
