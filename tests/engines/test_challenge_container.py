"""The challenge's container without a container: the command line, the tables, the names; the Dockerfile as text."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.scan_folder import read_scan_folder
from vlm3d_ext.data.challenge_classification import read_challenge_predictions, write_challenge_predictions
from vlm3d_ext.data.challenge_localization import read_challenge_localization, write_challenge_localization
from vlm3d_ext.data.challenge_reports import write_challenge_reports
from vlm3d_ext.engines import challenge_container
from vlm3d_ext.engines.challenge_container import OFFLINE, ChallengeRun, bundle_command, main, run_challenge
from vlm3d_ext.engines.challenge_submission import TASKS
from vlm3d_ext.text.disease_set import load_disease_set
from vlm3d_ext.text.label_set import load_label_set

ROOT = Path(__file__).parents[2]
CONTAINER = ROOT / "bundles" / "multitask" / "docs" / "container"
INFERENCE = ROOT / "bundles" / "multitask" / "configs" / "inference.json"
LABELS = load_label_set("ct_rate_18").names
DISEASES = load_disease_set().keys
UUID = "0f1a2b3c-4d5e-6f70-8a90-1b2c3d4e5f60"


@pytest.fixture
def run(tmp_path) -> ChallengeRun:
    for name in ("valid_1_a_1.nii.gz", "valid_2_a_1.nii.gz"):
        put(tmp_path / "input" / name)
    put(tmp_path / "weights" / "model.pt")
    (tmp_path / "weights" / "language_model").mkdir()
    put(tmp_path / "bundle" / "configs" / "inference.json")
    folders = {name: tmp_path / name for name in ("input", "weights", "output", "work")}
    return ChallengeRun(**folders, bundle_root=tmp_path / "bundle")


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def write_tables(work: Path, volume_ids, omit=()):
    """What the bundle writes, by the writers that it writes with."""
    if "classification" not in omit:
        probabilities = np.full((len(volume_ids), len(LABELS)), 0.25)
        write_challenge_predictions(work / TASKS["classification"].path, volume_ids, LABELS, probabilities)
    if "localization" not in omit:
        lesions: dict = {volume_id: {key: [] for key in DISEASES} for volume_id in volume_ids}
        corners = dict.fromkeys(volume_ids, (0.0, 0.0, 0.0))
        write_challenge_localization(work / TASKS["localization"].path, lesions, corners)
    if "report_generation" not in omit:
        texts = [f"Findings: {volume_id}." for volume_id in volume_ids]
        write_challenge_reports(work / TASKS["report_generation"].path, volume_ids, texts)


def fake_bundle(run, volume_ids=None, code=0, omit=(), calls=None):
    """Stands in for the bundle; takes scans in as the bundle does, unless told which."""

    def run_command(command, environment):
        if calls is not None:
            calls.append((list(command), dict(environment)))
        ids = [case.volume_id for case in read_scan_folder(run.input).cases] if volume_ids is None else volume_ids
        write_tables(run.work, ids, omit)
        return code

    return run_command


def outputs(run) -> dict[str, Path]:
    return {path.name: path for path in run.output.iterdir()}


def changed(run: ChallengeRun, **options) -> ChallengeRun:
    return ChallengeRun(**{**vars(run), **options})


def test_all_three_tables_are_written(run, capsys):
    calls: list = []
    assert run_challenge(run, fake_bundle(run, calls=calls)) == 0
    found = outputs(run)
    assert sorted(found) == [
        "challenge_classification.json",
        "challenge_localization.json",
        "challenge_reports.json",
    ]
    for path in found.values():
        (source,) = run.work.glob(f"*/tables/{path.name}")
        assert json.loads(path.read_bytes()) == json.loads(source.read_bytes())
    assert capsys.readouterr().err == "" and len(calls) == 1


def test_the_command_is_that_of_the_bundle(run, monkeypatch):
    monkeypatch.setattr(challenge_container, "_shared_memory_is_small", lambda: False)
    calls: list = []
    run_challenge(run, fake_bundle(run, calls=calls))
    ((command, environment),) = calls
    assert command == [
        *(sys.executable, "-m", "monai.bundle", "run"),
        *("--workflow_type", "infer"),
        *("--config_file", f"['{run.bundle_root}/configs/inference.json']"),
        *("--bundle_root", str(run.bundle_root)),
        *("--scan", str(run.input)),
        *("--output_dir", str(run.work)),
        *("--ckpt_path", f"{run.weights}/model.pt"),
        *("--language_model", f"{run.weights}/language_model"),
    ]
    assert {name: environment[name] for name in OFFLINE} == OFFLINE
    assert OFFLINE["HF_HUB_OFFLINE"] == OFFLINE["TRANSFORMERS_OFFLINE"] == "1"


def test_a_config_beside_the_weights_comes_last(run):
    put(run.weights / "config.json")
    command = bundle_command(run)
    files = f"['{run.bundle_root}/configs/inference.json', '{run.weights}/config.json']"
    assert command[command.index("--config_file") + 1] == files


def test_the_bundle_knows_every_option(run, monkeypatch):
    monkeypatch.setattr(challenge_container, "_shared_memory_is_small", lambda: True)
    options = {part.removeprefix("--") for part in bundle_command(run) if part.startswith("--")}
    assert "num_workers" in options
    # These three are MONAI's own.
    assert options - {"workflow_type", "config_file", "bundle_root"} <= set(json.loads(INFERENCE.read_bytes()))


@pytest.mark.parametrize(("gib", "workers"), [(0.0625, ["0"]), (2, [])])
def test_loader_processes_need_shared_memory(run, tmp_path, monkeypatch, gib, workers):
    usage = type("Usage", (), {"total": int(gib * 2**30)})
    monkeypatch.setattr(challenge_container, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(challenge_container.shutil, "disk_usage", lambda path: usage)
    command = bundle_command(run)
    assert [command[n + 1] for n, part in enumerate(command) if part == "--num_workers"] == workers


def test_missing_scans_are_named_and_the_rest_is_delivered(run, capsys):
    put(run.input / "valid_3_a_1.nii.gz")
    assert run_challenge(run, fake_bundle(run, ["valid_1_a_1", "valid_3_a_1"])) == 3
    error = capsys.readouterr().err
    for task in TASKS:
        assert f"error: {task}: 1 of 3 scans are missing from the table" in error
    assert error.count("valid_2_a_1") == 3 and "valid_1_a_1" not in error
    ids = read_challenge_predictions(outputs(run)["challenge_classification.json"], LABELS).volume_ids
    assert ids == ("valid_1_a_1", "valid_3_a_1"), "no entry is made up"


def test_names_that_the_preparation_changes_are_given_back(run):
    put(run.input / "day 2" / "scan.with+signs__.nii.gz")
    assert run_challenge(run, fake_bundle(run)) == 0
    expected = {"valid_1_a_1", "valid_2_a_1", "scan.with+signs__"}
    found = outputs(run)
    assert set(read_challenge_predictions(found["challenge_classification.json"], LABELS).volume_ids) == expected
    assert set(read_challenge_localization(found["challenge_localization.json"]).volumes) == expected
    reports = json.loads(found["challenge_reports.json"].read_bytes())["generated_reports"]
    assert {entry["input_image_name"] for entry in reports} == {f"{name}.nii.gz" for name in expected}
    assert any(entry["report"] == "Findings: day_2_scan_with_signs." for entry in reports)


def test_an_entry_of_no_scan_is_warned_of(run, capsys):
    assert run_challenge(run, fake_bundle(run, ["valid_1_a_1", "valid_2_a_1", "other"])) == 0
    assert "warning: classification: other is the name of no scan" in capsys.readouterr().err


def test_a_single_track_gets_its_own_file(run):
    assert run_challenge(changed(run, task="classification"), fake_bundle(run, omit=("report_generation",))) == 0
    assert list(outputs(run)) == ["results.json"]
    assert len(read_challenge_predictions(outputs(run)["results.json"], LABELS).volume_ids) == 2


def test_the_report_track_is_wrapped_and_named_by_uuid(run):
    put(run.input / f"7_{UUID.replace('0f', '1f')}_{UUID}.nii.gz")
    assert run_challenge(changed(run, task="report_generation"), fake_bundle(run)) == 0
    assert list(outputs(run)) == ["predictions.json"]
    inner = json.loads(outputs(run)["predictions.json"].read_bytes())[0]["outputs"][0]["value"]
    assert inner["type"] == "Report generation"
    names = {entry["input_image_name"] for entry in inner["generated_reports"]}
    assert names == {"valid_1_a_1", "valid_2_a_1", UUID}


@pytest.mark.parametrize("task", TASKS)
def test_a_bundle_that_fails_delivers_nothing(run, capsys, task):
    assert run_challenge(run, fake_bundle(run, code=9, omit=(task,))) == 1
    error = capsys.readouterr().err
    assert f"{TASKS[task].path}: is not there" in error and "ended with 9" in error
    assert outputs(run) == {}


def test_a_bundle_that_fails_after_its_tables_is_a_failure_too(run, capsys):
    assert run_challenge(run, fake_bundle(run, code=9)) == 1
    assert "the bundle ended with 9, after it had written its tables" in capsys.readouterr().err
    assert len(outputs(run)) == 3


def test_tables_of_an_earlier_run_are_not_delivered(run):
    write_tables(run.work, ["valid_1_a_1", "valid_2_a_1"])
    assert run_challenge(run, lambda command, environment: 0) == 1
    assert outputs(run) == {}


@pytest.mark.parametrize("content", ["{", "[]", '{"predictions": [{"probabilities": {}}]}', '{"predictions": 3}'])
def test_a_table_that_is_none_is_not_delivered(run, capsys, content):
    def run_command(command, environment):
        write_tables(run.work, ["valid_1_a_1", "valid_2_a_1"])
        (run.work / TASKS["classification"].path).write_text(content)
        return 0

    assert run_challenge(run, run_command) == 1
    assert "error:" in capsys.readouterr().err and outputs(run) == {}


@pytest.mark.parametrize("missing", ["weights/model.pt", "weights/language_model", "input", "bundle/configs"])
def test_what_is_not_there_is_said_before_the_run(run, tmp_path, capsys, missing):
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    assert run_challenge(run, unwanted) == 2
    assert f"{tmp_path / missing}" in capsys.readouterr().err


def unwanted(command, environment):
    raise AssertionError("the bundle must not be run")


def test_inputs_that_cannot_be_told_apart_are_refused(run, capsys):
    put(run.input / "a" / "valid_1_a_1.nii.gz")
    assert run_challenge(run, unwanted) == 2
    assert "would both be called valid_1_a_1" in capsys.readouterr().err


def test_an_input_without_scans_is_refused(run, capsys):
    for path in run.input.iterdir():
        path.rename(path.with_suffix(".txt"))
    assert run_challenge(run, unwanted) == 2
    assert "holds no .nii.gz or .nii file" in capsys.readouterr().err


def test_an_output_that_takes_no_file_is_refused_before_the_run(run, tmp_path, capsys):
    put(tmp_path / "file")
    assert run_challenge(changed(run, output=tmp_path / "file" / "x"), unwanted) == 2
    assert "error:" in capsys.readouterr().err


def test_the_command_line_runs_a_process_and_reads_its_environment(run, monkeypatch, capfd):
    script = "import sys; print('offline', __import__('os').environ['HF_HUB_OFFLINE']); sys.exit(5)"
    monkeypatch.setattr(challenge_container, "bundle_command", lambda run: [sys.executable, "-c", script])
    for name in ("input", "weights", "work", "output"):
        monkeypatch.setenv(f"VLM3D_{name.upper()}", str(getattr(run, name)))
    assert main(["--bundle-root", str(run.bundle_root)]) == 1
    captured = capfd.readouterr()
    assert captured.out == "offline 1\n" and "The bundle ended with 5" in captured.err
    monkeypatch.setenv("VLM3D_TASK", "all of them")
    assert main(["--bundle-root", str(run.bundle_root)]) == 2
    assert "--task is 'all of them', expected all or one of" in capfd.readouterr().err


# The Dockerfile


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of each line, continued lines joined, comments left out."""
    lines = [line for line in (CONTAINER / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    parts = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name.upper(), rest) for name, rest in parts]


def of(instructions, name: str) -> list[str]:
    return [rest for found, rest in instructions if found == name]


def test_the_image_starts_the_module_as_a_user_without_rights(instructions):
    assert json.loads(*of(instructions, "ENTRYPOINT")) == ["python", "-m", challenge_container.__name__]
    assert of(instructions, "CMD") == []
    users = of(instructions, "USER")
    (created,) = [line for line in of(instructions, "RUN") if line.startswith("useradd")]
    assert len(users) == 1 and users[0] not in ("root", "0") and users[0] in shlex.split(created)
    names = [name for name, _ in instructions]
    assert set(names[names.index("USER") :]) == {"USER", "ENTRYPOINT"}, "nothing is installed as that user"
    assert "ARG UID=1000".split(maxsplit=1)[1] in of(instructions, "ARG")


def test_the_image_is_made_of_the_repository_and_packages_only(instructions):
    assert of(instructions, "ADD") == []
    assert not re.search(r"\b(curl|wget|git)\b", " ".join(of(instructions, "RUN")))
    sources = [source for line in of(instructions, "COPY") for source in shlex.split(line)[:-1]]
    assert sources and all((ROOT / source).exists() for source in sources)
    kept = {line[1:] for line in (CONTAINER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert kept == set(sources), "what is copied, and nothing else, is sent to the builder"


def test_everything_that_the_package_is_built_from_is_copied(instructions):
    sources = {source for line in of(instructions, "COPY") for source in shlex.split(line)[:-1]}
    # setup.cfg reads the long description and the licence, and finds the packages.
    assert sources >= {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "vlm3d_ext", "data_prep", "bundles"}


def test_the_image_is_offline_and_writes_to_tmp(instructions):
    environment = dict(part.split("=", 1) for line in of(instructions, "ENV") for part in shlex.split(line))
    assert {name: environment[name] for name in OFFLINE} == OFFLINE
    assert environment["HF_HOME"].startswith("/tmp/") and environment["MPLCONFIGDIR"].startswith("/tmp/")
    assert environment["VLM3D_TASK"] == "${TASK}" and "TASK=all" in of(instructions, "ARG")


def test_torch_comes_from_the_index_that_is_given(instructions):
    installs = [line for line in of(instructions, "RUN") if line.startswith("pip install")]
    assert "--index-url ${TORCH_INDEX}" in installs[0] and "torch" in installs[0]
    required = re.search(r"^\s+torch (>=\S+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert required and f'"torch{required.group(1)}"' in installs[0]
