"""The command: runs rows, each in a process of its own, and writes the table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import num_cores
from benchmarks.row import Row
from benchmarks.rows import CPU_ROWS, GPU_ROWS, load_row
from benchmarks.table import markdown_table
from vlm3d_ext.data.atomic_files import write_bytes, write_json

_PACKAGES = ("torch", "monai", "transformers", "SimpleITK", "blosc2", "isal")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if a target is missed or a row refused or failed, 2 for a wrong name."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=sys.modules["benchmarks"].__doc__, formatter_class=_formatter()
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="names of rows; all that this machine can run otherwise")
    parser.add_argument("--output", type=Path, default=Path("benchmark_run"), help="folder (default: benchmark_run)")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join([*CPU_ROWS, *GPU_ROWS]))
        return 0
    if options.one:
        return _run_here(options.one, options.output)
    unknown = [name for name in options.rows if name not in CPU_ROWS | GPU_ROWS]
    if unknown:
        print(f"error: no row {unknown[0]!r}; --list prints the names", file=sys.stderr)
        return 2
    # whoever names a row of the GPU wants it, and is told what it lacks
    names = options.rows or [*CPU_ROWS, *(GPU_ROWS if torch.cuda.is_available() else ())]
    rows = []
    for name in names:
        rows.append(_run_apart(name, options.output))
        print(_one_line(rows[-1]), flush=True)
    content = {"machine": _machine(), "rows": rows}
    write_json(options.output / "benchmarks.json", content)
    write_bytes(options.output / "benchmarks.md", markdown_table(content).encode())
    if not options.rows and not torch.cuda.is_available():
        print(f"no CUDA device here, so these rows were left out: {', '.join(GPU_ROWS)}")
    print(f"table: {options.output / 'benchmarks.md'}")
    return int(any(row["verdict"] in ("missed", "refused") for row in rows))


def _formatter() -> type[argparse.HelpFormatter]:
    return argparse.RawDescriptionHelpFormatter


def _run_apart(name: str, output: Path) -> dict[str, Any]:
    """Run a row in a fresh process of one thread; a row that fails becomes a refused one and stops nothing."""
    # read when torch and its kin are loaded, so they must be there before
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLOSC_NTHREADS"), "1")
    command = [sys.executable, "-m", "benchmarks", "--one", name, "--output", os.fspath(output)]
    done = subprocess.run(command, env={**os.environ, **threads}, stdout=subprocess.PIPE, text=True)
    path = output / "rows" / f"{name}.json"
    if done.returncode == 0 and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    reason = f"ended with exit code {done.returncode}; its message is above"
    return Row(name, "", None, None, "", refused=reason).to_dict()


def _run_here(name: str, output: Path) -> int:
    path = output / "rows" / f"{name}.json"
    path.unlink(missing_ok=True)
    write_json(path, load_row(name)().to_dict())
    return 0


def _one_line(row: dict[str, Any]) -> str:
    if row["verdict"] == "refused":
        return f"{row['name']:<34} refused: {row['refused']}"
    target = "" if row["target"] is None else f"  target <= {row['target']:g}: {row['verdict']}"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.4g}"
    return f"{row['name']:<34} {ratio}{target}"


def _machine() -> dict[str, Any]:
    gpu = {"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    packages = {name: version(name) for name in _PACKAGES}
    return {"cores": num_cores(), "processor": _processor(), **gpu, "python": platform.python_version(), **packages}


def _processor() -> str:
    """Return the processor's name and whether it multiplies bfloat16, on which the encoder's row depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    extensions = [name for name in ("avx512_bf16", "amx_bf16") if name in fields.get("flags", "").split()]
    return " with ".join([fields.get("model name", platform.machine()), *extensions])


if __name__ == "__main__":
    sys.exit(main())
