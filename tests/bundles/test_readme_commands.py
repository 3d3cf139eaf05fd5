"""The joint bundle's commands as its pages have them: only paths and sizes are replaced."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bundles.bundle_runs import BUNDLES, REPOSITORY, run_command, run_command_here, two_processes
from tests.bundles.handed_in_scans import KINDS, records_of
from tests.data_prep.chest_scans import GEOMETRY, chest
from tests.data_prep.tiny_release import write_volume

PAGES = [REPOSITORY / "README.md", *sorted(BUNDLES.glob("*/docs/README.md"))]
OF_THE_BUNDLE = re.compile(r"bundles/multitask/|challenge_container")


def kind_of(line: str) -> str:
    """Return what a command does."""
    for word, kind in (
        ("challenge_container", "container"),
        ("vlm3d_ext.lineage", "lineage"),
        ("monai.bundle run", "inference" if "/inference.json" in line else "train"),
        ("monai.bundle", "check or export"),
    ):
        if word in line:
            return "evaluate" if kind == "train" and "/evaluate.json" in line else kind
    return "other"


def commands_of(path: Path) -> list[str]:
    """Return the commands about the joint bundle in a page's shell blocks, each once and on one line."""
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line.split("  #")[0].strip() for line in lines if line.startswith(("python ", "torchrun "))]
    return [line for line in commands if OF_THE_BUNDLE.search(line)]


COMMANDS = list(dict.fromkeys(line for page in PAGES for line in commands_of(page)))
# Exports are run, and compared with the network, by test_multitask_exports.py.
RUN_HERE = [line for line in COMMANDS if kind_of(line) != "check or export"]


def test_the_pages_say_how_to_train_evaluate_and_use():
    kinds = {kind_of(line) for line in commands_of(BUNDLES / "multitask" / "docs" / "README.md")}
    assert kinds >= {"train", "evaluate", "inference", "lineage", "container"}
    assert not {line for line in COMMANDS if kind_of(line) == "other"}


def replaced(line: str, options: dict) -> list[str]:
    """Return a page's command line with these options in place of its own, and after them."""
    words = shlex.split(line)
    for name in [name for name in options if f"--{name}" in words]:
        words[words.index(f"--{name}") + 1] = as_written(options[name])
    further = {name: value for name, value in options.items() if f"--{name}" not in words}
    return [*words, *(part for name, value in further.items() for part in (f"--{name}", as_written(value)))]


def as_written(value: object) -> str:
    return str(value).replace(" ", "")


@pytest.fixture
def execute(tmp_path, monkeypatch) -> Callable[[list[str]], None]:
    """Run a page's command in the repository's root, in this process where it starts no others."""

    def run(words: list[str]) -> None:
        if words[0] == "torchrun":
            start = words.index("-m")
            assert words[1:start] == ["--nproc_per_node=2"]
            run_command([*two_processes(29567), *words[start:]])
            return
        assert words[:2] == ["python", "-m"]
        arguments = [sys.executable, *words[1:]]
        if words[2] == "monai.bundle":
            run_command_here(arguments, REPOSITORY, monkeypatch)
            return
        with monkeypatch.context() as patch:
            patch.chdir(REPOSITORY)
            patch.setattr(sys, "argv", arguments[2:])
            with pytest.raises(SystemExit) as ended:
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        assert not ended.value.code

    return run


def of_kind(kind: str) -> list[str]:
    return [line for line in RUN_HERE if kind_of(line) == kind]


@pytest.mark.parametrize("line", of_kind("train"))
def test_training(line, multitask_options, multitask_run, report_run, tmp_path, execute):
    run_dir = tmp_path / "multitask"
    if "--resume" in line:
        shutil.copytree(multitask_run, run_dir)
        (run_dir / "models" / "model.pt").unlink()
    options = multitask_options(run_dir, epochs=3 if "--resume" in line else 1)
    if "--nproc_per_node=2" in line:
        options["batch_size"] = 1
    options["run_dir"] = str(run_dir)
    if "--report_generation_ckpt" in line:
        options["report_generation_ckpt"] = str(report_run / "models" / "model.pt")
    execute(replaced(line, options))
    rows = json.loads((run_dir / "output" / "history.json").read_text())
    assert len(rows) == options["epochs"] and (run_dir / "models" / "last.pt").is_file()


@pytest.mark.parametrize("line", of_kind("evaluate"))
def test_evaluation(line, multitask_options, multitask_run, tmp_path, execute):
    options = multitask_options(tmp_path / "multitask", ckpt_dir=str(multitask_run / "models"), num_resamples=2)
    execute(replaced(line, options))
    assert (tmp_path / "multitask" / "eval" / "comparison.txt").stat().st_size > 0


@pytest.mark.parametrize("line", of_kind("inference"))
def test_inference(line, scan_options, tmp_path, execute):
    scan = write_volume(tmp_path / "my_scan.nii.gz", chest(1), GEOMETRY)
    execute(replaced(line, scan_options(scan, tmp_path / "results")))
    record = records_of(tmp_path / "results")["my_scan"]
    assert set(record["files"]) == KINDS
    page = (BUNDLES / "multitask" / "docs" / "README.md").read_text(encoding="utf-8")
    for name in [*record["files"].values(), "scans/my_scan.json", "intake_log.json"]:
        assert (tmp_path / "results" / name).is_file()
        assert f"`{name.split('/')[0]}" in page, "the page lists where results are"


@pytest.mark.parametrize("line", of_kind("lineage"))
def test_lineage(line, multitask_run, execute, capsys):
    words = shlex.split(line)
    execute([*words[:3], str(multitask_run / "models" / "model.pt")])
    said = capsys.readouterr().out
    assert "multitask" in said and said.count("upstream encoder") >= 4


@pytest.mark.parametrize("line", of_kind("container"))
def test_container(line, scan_options, tmp_path, execute, monkeypatch):
    write_volume(tmp_path / "scans" / "valid_1_a_1.nii.gz", chest(1), GEOMETRY)
    options = scan_options(tmp_path / "scans", tmp_path / "unused")
    weights = tmp_path / "weights"
    shutil.copytree(options["language_model"], weights / "language_model")
    shutil.copy(options["ckpt_path"], weights / "model.pt")
    given = ("language_model", "ckpt_path", "scan", "output_dir")
    sizes = {name: value for name, value in options.items() if name not in given}
    (weights / "config.json").write_text(json.dumps(sizes))
    monkeypatch.setenv("VLM3D_WORK", str(tmp_path / "work"))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    folders = {"input": tmp_path / "scans", "weights": weights, "output": tmp_path / "results"}
    execute(replaced(line, folders))
    written = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert written == [f"challenge_{name}.json" for name in ("classification", "localization", "reports")]
    assert all("valid_1_a_1" in path.read_text() for path in (tmp_path / "results").iterdir())
