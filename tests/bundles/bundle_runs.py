"""Running a bundle as its users do, at a size that takes a second."""

from __future__ import annotations

import csv
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from vlm3d_ext.text.label_set import load_label_set

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
TINY_CLASSIFIER = {"projection_dim": 16, "num_soft_tokens": 2, "text_hidden_size": 16}
TINY_LOCALIZER = {
    "text_hidden_size": 16,
    "denoising_layers": 1,
    "denoising_mlp_dim": 16,
    "stem_channels": 4,
    "stem_stride": [1, 2, 2],
    "base_channels": 8,
    "level_strides": [[2, 2, 2]],
    "head_channels": 4,
}
TINY_REPORTS = {
    "dtype": "float32",
    "lora_rank": 4,
    "num_queries": 4,
    "projector_layers": 2,
    "projector_heads": 4,
    "max_prompt_tokens": 640,
    "max_report_tokens": 40,
    "batch_size": 4,
    "num_workers": 0,
}
TINY_REPORT_TRAINING = {
    "global_batch_size": 4,
    "epochs": 12,
    "validation_interval": 3,
    "learning_rate": 1e-2,
    "adapter_learning_rate": 1e-2,
}
TINY_JOINT_TRAINING = {
    "batch_size": 2,
    "global_batch_size": 2,
    "epochs": 2,
    "validation_interval": 1,
    "save_interval": 1,
    "warmup_epochs": 1,
    "crop_size": [4, 8, 8],
    "learning_rate": 1e-3,
    "vision_learning_rate": 1e-3,
    "adapter_learning_rate": 1e-3,
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


def run_command_here(arguments: list[str], cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a bundle's command line in this process, which saves the seconds that importing MONAI takes."""
    assert arguments[:3] == [sys.executable, "-m", "monai.bundle"]
    with monkeypatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", arguments[2:])
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)


def two_processes(port: int) -> tuple[str, ...]:
    """Return the launcher of two ranks on this machine; tests that may run at the same time need ports of their own."""
    return (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}")


def kill_while_training(arguments: list[str], run_dir: Path, seconds: float = 0.3) -> None:
    """Start a training and end it with SIGKILL some time after its first last.pt."""
    process = subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run_dir / "models" / "last.pt").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()


def messages_of(action: Callable[[], Any]) -> list[str]:
    """Return the messages of the error that an action ends with and of its causes, the first cause last."""
    with pytest.raises(Exception) as raised:
        action()
    messages, error = [], raised.value
    while error is not None:
        messages.append(str(error))
        error = error.__cause__
    return messages


def history(run_dir: Path) -> list[dict]:
    """Return the rows of a training's history.json."""
    return json.loads((run_dir / "output" / "history.json").read_text())


def checkpoint_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the model's state dict in a checkpoint."""
    return torch.load(path, weights_only=True)["model"]


def assert_same_weights(first: Path, second: Path) -> None:
    """Check that two checkpoints hold bit-equal models."""
    one, other = checkpoint_weights(first), checkpoint_weights(second)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def assert_same_curve(
    run_dir: Path, other: Path, relative: float = 1e-4, validation: Sequence[str] | None = None
) -> None:
    """Check that two trainings' histories differ by no more than what the order of additions makes.

    `validation` names the validation metrics to compare; None takes all.
    """
    for one, two in zip(history(run_dir), history(other), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=relative / 10)
        assert two["losses"] == pytest.approx(one["losses"], rel=relative)
        metrics = list(one["validation"]) if validation is None else validation
        expected = {name: one["validation"][name] for name in metrics}
        assert {name: two["validation"][name] for name in metrics} == pytest.approx(expected, rel=relative)


def write_labels_csv(
    path: Path,
    cases: Sequence[Mapping[str, Any]],
    label_set: str = "ct_rate_18",
    renamed: Mapping[str, str] | None = None,
) -> Path:
    """Write the labels of cases as CT-RATE does, unknown as an empty cell; returns the path.

    `renamed` gives another name to some columns.
    """
    names = load_label_set(label_set).names
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["VolumeName", *((renamed or {}).get(name, name) for name in names)])
        for case in cases:
            labels = ["" if math.isnan(label) else int(label) for label in case["labels"]]
            writer.writerow([f"{case['volume_id']}.nii.gz", *labels])
    return path


def write_export_configs(folder: Path, bundle: str, sizes: Mapping[str, Any], image_size: Sequence[int]) -> Path:
    """Write a bundle's inference.json and metadata.json with tiny sizes in them: MONAI's export verbs take few
    overrides."""
    config = ConfigParser.load_config_file(config_files(f"{bundle}/inference")[0])
    (folder / "inference.json").write_text(json.dumps({**config, **sizes}))
    metadata = json.loads((BUNDLES / bundle / "configs" / "metadata.json").read_text())
    metadata["network_data_format"]["inputs"]["image"]["spatial_shape"] = list(image_size)
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


def eager_export_network(configs: Path, checkpoint: Path) -> torch.nn.Module:
    """Return the config's `export_network` with a checkpoint's weights, in evaluation mode."""
    parser = ConfigParser()
    parser.read_config(str(configs / "inference.json"))
    network = parser.get_parsed_content("export_network").eval()
    network.load_state_dict(checkpoint_weights(checkpoint))
    return network
