"""What the challenge's container runs: the multitask bundle over a folder of NIfTI files, its tables to another folder.

    python -m vlm3d_ext.engines.challenge_container --input /input --weights /weights --output /output

`weights` holds ``model.pt``, ``language_model/`` and, for a network of other than the shipped sizes, ``config.json``,
which is laid over the bundle's inference.json. The scans may lie at any depth. With ``--task all`` the three tables
keep the names that the bundle gives them; with one task, its table is written under the name and in the form that the
challenge's track takes: ``results.json``, or for reports ``predictions.json``, wrapped, and named by the UUID in the
scan's file name where it has one. The variables VLM3D_INPUT, VLM3D_WEIGHTS, VLM3D_OUTPUT, VLM3D_WORK and VLM3D_TASK
stand for the options of the same name.

Ends with 0 if every scan is in every table; 1 if the bundle failed; 2 if something it needs is not there, and nothing
was run; 3 if scans are missing from a table. Tables are written whole or not at all, and in the last case all the same.
No entry is made up for a scan that is missing: the report track scores it as negative in all labels, and the
classification track's evaluation does not allow for one.

Source: github.com/forithmus/VLM3D-Dockers at commit a945908, README sections 3, 6 and 9.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.csv_table import volume_name
from .challenge_submission import TASKS, ChallengeTable, name_as_input, read_challenge_table, write_submission

__all__ = ["OFFLINE", "ChallengeRun", "bundle_command", "main", "run_challenge"]

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
}
"""Set for the bundle: the container has no network, and what looks for one waits in vain."""

EXIT_BUNDLE_FAILED, EXIT_NOTHING_RUN, EXIT_INCOMPLETE = 1, 2, 3

_BUNDLE_ROOT = Path(__file__).parents[2] / "bundles" / "multitask"
_SHOWN = 20
_SHARED_MEMORY = Path("/dev/shm")
_ENOUGH_SHARED_MEMORY = 2**30
_NOT_IN_AN_ID = re.compile(r"[^A-Za-z0-9-]+")


@dataclass(frozen=True)
class ChallengeRun:
    """The folders of one run.

    Args:
        input: NIfTI files, at any depth.
        weights: model.pt, language_model/ and perhaps config.json.
        output: where the tables go.
        work: where the bundle writes; kept.
        task: "all" or one of `TASKS`.
        bundle_root: the multitask bundle.
    """

    input: Path
    weights: Path
    output: Path
    work: Path
    task: str = "all"
    bundle_root: Path = _BUNDLE_ROOT

    @property
    def tables(self) -> dict[str, ChallengeTable]:
        """The tables that are wanted."""
        return TASKS if self.task == "all" else {self.task: TASKS[self.task]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, see the module."""
    options = _parser().parse_args(arguments)
    run = ChallengeRun(options.input, options.weights, options.output, options.work, options.task, options.bundle_root)
    return run_challenge(run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vlm3d_ext.engines.challenge_container",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add_folder(name: str, default: str, text: str) -> None:
        value = Path(os.environ.get(f"VLM3D_{name.upper()}", default))
        parser.add_argument(f"--{name}", type=Path, default=value, help=f"{text} (default: {value})")

    add_folder("input", "/input", "folder of NIfTI files")
    add_folder("weights", "/weights", "folder with model.pt and language_model/")
    add_folder("output", "/output", "folder for the tables")
    add_folder("work", str(Path(tempfile.gettempdir()) / "vlm3d"), "folder in which the bundle may write")
    task = os.environ.get("VLM3D_TASK", "all")
    # Checked below, because argparse does not check defaults.
    parser.add_argument("--task", default=task, help=f"all, {', '.join(TASKS)} (default: {task})")
    parser.add_argument("--bundle-root", type=Path, default=_BUNDLE_ROOT, help="the multitask bundle")
    return parser


def run_challenge(
    run: ChallengeRun, run_command: Callable[[Sequence[str], Mapping[str, str]], int] | None = None
) -> int:
    """Run the bundle and write the tables.

    Args:
        run: the folders.
        run_command: takes a command line and the environment, returns the exit code; starts a process by default.

    Returns:
        The exit code, see the module.
    """
    try:
        scans = _checked_scans(run)
        for table in TASKS.values():
            # What is there afterwards must be of this run, whatever becomes of it.
            (run.work / table.path).unlink(missing_ok=True)
    except (ValueError, OSError) as error:
        return _failed(str(error), EXIT_NOTHING_RUN)
    code = (run_command or _run)(bundle_command(run), {**os.environ, **OFFLINE})
    try:
        tables = {task: read_challenge_table(run.work / table.path, table.key) for task, table in run.tables.items()}
    except (ValueError, OSError) as error:
        return _failed(f"{error} The bundle ended with {code}; its own messages are above.", EXIT_BUNDLE_FAILED)
    incomplete = False
    try:
        for task, (content, entries) in tables.items():
            absent = name_as_input(entries, scans, task, bare_uuid=run.task == "report_generation")
            incomplete = incomplete or bool(absent)
            _report_absent(task, absent, len(scans))
            write_submission(run.output, task, content, single=run.task != "all")
    except OSError as error:
        return _failed(
            f"{run.output}: cannot be written ({error}); free space or mount it writable.", EXIT_BUNDLE_FAILED
        )
    if code:
        return _failed(f"the bundle ended with {code}, after it had written its tables.", EXIT_BUNDLE_FAILED)
    return EXIT_INCOMPLETE if incomplete else 0


def bundle_command(run: ChallengeRun) -> list[str]:
    """Return the command line of the bundle's inference."""
    configs = [str(run.bundle_root / "configs" / "inference.json")]
    if (run.weights / "config.json").is_file():
        configs.append(str(run.weights / "config.json"))
    options = {
        "workflow_type": "infer",
        "config_file": str(configs),
        "bundle_root": str(run.bundle_root),
        "scan": str(run.input),
        "output_dir": str(run.work),
        "ckpt_path": str(run.weights / "model.pt"),
        "language_model": str(run.weights / "language_model"),
    }
    if _shared_memory_is_small():
        # Loader processes pass volumes through shared memory, of which a container has 64 MiB unless told otherwise.
        options["num_workers"] = "0"
    return [
        *(sys.executable, "-m", "monai.bundle", "run"),
        *(part for name, value in options.items() for part in (f"--{name}", value)),
    ]


def _shared_memory_is_small() -> bool:
    return _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).total < _ENOUGH_SHARED_MEMORY


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    return subprocess.run(command, env=dict(environment), check=False).returncode


def _failed(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _checked_scans(run: ChallengeRun) -> dict[str, str]:
    """Return the scans' ids and file names without extension, after checking all that is known before the run."""
    if run.task not in ("all", *TASKS):
        raise ValueError(f"--task is {run.task!r}, expected all or one of {', '.join(TASKS)}; correct it.")
    for path, what in (
        (run.bundle_root / "configs" / "inference.json", "the multitask bundle; pass --bundle-root."),
        (run.weights / "model.pt", "the checkpoint; put it there or pass --weights."),
        (run.weights / "language_model", "the folder of the language model; put it there or pass --weights."),
        (run.input, "a folder of NIfTI files; mount it or pass --input."),
    ):
        if not path.exists():
            raise ValueError(f"{path}: is not there, expected {what}")
    for folder in (run.output, run.work):
        folder.mkdir(parents=True, exist_ok=True)
        # Hours of computing must not end in a folder that takes no file.
        with tempfile.TemporaryFile(dir=folder):
            pass
    scans: dict[str, str] = {}
    names: dict[str, Path] = {}
    for path in sorted(run.input.rglob("*")):
        if not path.is_file() or not path.name.lower().endswith((".nii.gz", ".nii")):
            continue
        name, place = volume_name(path.name), path.relative_to(run.input)
        scan_id = _scan_id([*place.parts[:-1], name])
        for taken in (name, scan_id):
            if names.setdefault(taken, place) != place:
                raise ValueError(
                    f"{run.input}: {names[taken]} and {place} would both be called {taken}, expected names of their "
                    "own; rename one."
                )
        scans[scan_id] = name
    if not scans:
        raise ValueError(
            f"{run.input}: holds no .nii.gz or .nii file, expected at least one scan; mount the right one."
        )
    return scans


def _scan_id(parts: Sequence[str]) -> str:
    """Return the id that the preparation gives to a scan whose path has these parts."""
    return "_".join(_NOT_IN_AN_ID.sub("_", part).strip("_-") or "scan" for part in parts)


def _report_absent(task: str, absent: Sequence[str], num_scans: int) -> None:
    if absent:
        more = f", and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
        print(
            f"error: {task}: {len(absent)} of {num_scans} scans are missing from the table: "
            f"{', '.join(absent[:_SHOWN])}{more}; the bundle's messages say why each was refused.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
