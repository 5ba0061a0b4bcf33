"""Checks a built wheel: every module and every YAML file of the tree is in it, and it can be imported as it is."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Runs against the unpacked wheel alone: without the current directory, and before anything that .venv has installed.
PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
import lightning_gemini
from importlib.metadata import distributions
from importlib.resources import files
assert lightning_gemini.__file__.startswith(sys.argv[1]), lightning_gemini.__file__
assert files("lightning_gemini.conf").joinpath("__init__.py").is_file()
(wheel,) = distributions(name="lightning-gemini", path=[sys.argv[1]])
assert wheel.version == lightning_gemini.__version__, wheel.version
scripts = {entry.name: entry.value for entry in wheel.entry_points if entry.group == "console_scripts"}
assert scripts == {"lightning-gemini": "lightning_gemini.cli:main"}, scripts
"""


def expected() -> set[str]:
    """Names, inside the wheel, of what the tree holds."""
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_gemini").rglob("*.py")}
    configuration = [ROOT / "conf" / "__init__.py", *(ROOT / "conf").rglob("*.yaml")]
    conf = {f"lightning_gemini/conf/{path.relative_to(ROOT / 'conf').as_posix()}" for path in configuration}
    return {*package, *conf, "lightning_gemini/py.typed"}


def main(wheel: Path) -> None:
    """Fails with a message if ``wheel`` lacks something or cannot be imported."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as unpacked:
        names = set(archive.namelist())
        if missing := sorted(expected() - names):
            sys.exit(f"{wheel.name} lacks {missing}")
        if not any(name.startswith("lightning_gemini/conf/") and name.endswith(".yaml") for name in names):
            sys.exit(f"{wheel.name} has no YAML file in lightning_gemini/conf")
        if foreign := sorted(name for name in names if not name.startswith(("lightning_gemini/", "lightning_gemini-"))):
            sys.exit(f"{wheel.name} should hold lightning_gemini alone, but has {foreign}")
        archive.extractall(unpacked)
        subprocess.run([sys.executable, "-I", "-c", PROBE, unpacked], check=True)
    print(f"{wheel.name}: {len(names)} files, complete")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
