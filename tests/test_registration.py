from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

# A dozen interpreters import lightning one after another; a loaded machine needs minutes for that.
pytestmark = pytest.mark.timeout(300)

NAMES = ["gemini", "gemini_stage_1", "gemini_stage_2", "gemini_stage_3", "gemini_stage_3_offload"]

ORDERS = [
    "import lightning_gemini; import lightning.pytorch",
    "import lightning.pytorch; import lightning_gemini",
    "import lightning_gemini; import lightning",
    "import lightning_gemini.config; from lightning.pytorch import Trainer",
    "import importlib, lightning_gemini, lightning.pytorch; importlib.reload(lightning_gemini)",
    "from lightning_gemini import GeminiStrategy",
    "from lightning_gemini import GeminiCheckpoint",
    "from lightning_gemini.strategies.gemini import GeminiStrategy",
    "from lightning_gemini.callbacks.gemini_checkpoint import GeminiCheckpoint",
]

REGISTERED = """
from lightning.pytorch.strategies import StrategyRegistry
answer = sorted(name for name in StrategyRegistry.available_strategies() if name.startswith("gemini"))
"""

TRAINER = """
import lightning_gemini
from lightning.pytorch import Trainer
trainer = Trainer(strategy="gemini", accelerator="cpu", devices=1, logger=False)
answer = type(trainer.strategy) is lightning_gemini.GeminiStrategy
"""

NO_TRACE = """
import lightning_gemini, lightning.pytorch, lightning_gemini.errors, sys
modules = (lightning, lightning.pytorch, lightning_gemini.errors)
loaders = sorted({type(module.__spec__.loader).__name__ for module in modules})
hooks = [finder for finder in sys.meta_path if type(finder).__module__.startswith("lightning_gemini")]
answer = [loaders, hooks]
"""

BROKEN = """
import sys, warnings
import lightning_gemini
sys.modules["lightning_gemini.strategies.gemini"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lightning.pytorch
answer = any("could not register" in str(warning.message) for warning in caught)
"""

CASES = {
    **{imports: imports + REGISTERED for imports in ORDERS},
    "trainer": TRAINER,
    "trace": NO_TRACE,
    "broken": BROKEN,
}

# One interpreter pays for torch once, and then forks: each case still sees an interpreter that never saw lightning.
SERVER = """
import json, os, sys, traceback, warnings
import torch, torchmetrics
assert not {"lightning", "lightning_gemini"} & set(sys.modules)
warnings.filterwarnings("error", message="lightning_gemini could not")
for name, code in json.load(sys.stdin).items():
    if os.fork() == 0:
        scope = {}
        try:
            exec(code, scope)
        except BaseException:
            scope["answer"] = traceback.format_exc()
        print(json.dumps([name, scope["answer"]]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, object]:
    """What each case answered, in an interpreter of its own."""
    result = subprocess.run(
        [sys.executable, "-c", SERVER], input=json.dumps(CASES), capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    return dict(json.loads(line) for line in result.stdout.splitlines() if line.startswith('["'))


@pytest.mark.parametrize("imports", ORDERS)
def test_strategies_are_known_in_every_order_of_imports(imports: str, answers: dict[str, object]) -> None:
    assert answers[imports] == NAMES


def test_trainer_takes_the_name(answers: dict[str, object]) -> None:
    assert answers["trainer"] is True


def test_the_hook_leaves_no_trace(answers: dict[str, object]) -> None:
    assert answers["trace"] == [["SourceFileLoader"], []]


def test_a_broken_installation_breaks_no_import_of_lightning(answers: dict[str, object]) -> None:
    assert answers["broken"] is True


@pytest.mark.parametrize(
    "module",
    [
        "lightning_gemini",
        "lightning_gemini.cli",
        "lightning_gemini.config",
        "lightning_gemini.core.recovery",
        "lightning_gemini.controlplane.agent_main",
        "lightning_gemini.controlplane.agent_client",
    ],
)
def test_what_must_start_fast_leaves_torch_alone(module: str) -> None:
    code = f"""
    import {module}, sys
    print([name for name in ("torch", "lightning", "pytorch_lightning", "deepspeed") if name in sys.modules])
    """
    # The setting that etcd3 needs, as the launcher gives it to agents.
    env = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert result.stdout.strip() == "[]", result.stderr


def test_unknown_names_are_refused() -> None:
    import lightning_gemini

    assert set(lightning_gemini.__all__) <= set(dir(lightning_gemini))
    with pytest.raises(AttributeError, match="has no attribute 'GeminiStratgy'"):
        lightning_gemini.GeminiStratgy  # noqa: B018
