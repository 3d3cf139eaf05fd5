"""Running a bundle as its users do, at a size that takes a second."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BUNDLES = REPOSITORY / "bundles"
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
TINY_NETWORK = {
    "patch_size": [2, 4, 4],
    "hidden_size": 24,
    "num_layers": 1,
    "num_heads": 4,
    "num_depth_heads": 1,
    "mlp_dim": 32,
}
TINY_TRAINING = {
    **TINY_NETWORK,
    "batch_size": 4,
    "global_batch_size": 4,
    "epochs": 2,
    "validation_interval": 1,
    "warmup_epochs": 1,
    "num_workers": 0,
    "learning_rate": 1e-3,
    "vision_learning_rate": 1e-3,
}


def config_files(*names: str, root: Path = BUNDLES) -> list[str]:
    """Return paths of configs, named "encoder/train" or "_overlays/ddp"."""
    paths = []
    for name in names:
        folder, stem = name.split("/")
        paths.append(str(root / folder / ("" if folder.startswith("_") else "configs") / f"{stem}.json"))
    return paths


def command(files: list[str], options: dict, verb: str = "run", launcher: tuple[str, ...] = ()) -> list[str]:
    """Return the command line of a MONAI bundle verb."""
    listed = files[0] if len(files) == 1 else "[" + ",".join(f"'{name}'" for name in files) + "]"
    start = [*launcher] if launcher else [sys.executable]
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value).replace(" ", ""))]
    return [*start, "-m", "monai.bundle", verb, "--config_file", listed, *flags]


def run_command(arguments: list[str], cwd: Path = REPOSITORY, check: bool = True) -> subprocess.CompletedProcess:
    """Run a command with one thread per process; fails with its output if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    result = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    if check and result.returncode:
        raise AssertionError(
            f"{' '.join(arguments)} ended with {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
        )
    return result
