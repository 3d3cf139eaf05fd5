"""Inference of every bundle shared by two processes: what one would write, each case by one of them, tables once."""

import json
from pathlib import Path

from monai.bundle import run

from tests.bundles.bundle_runs import TINY_NETWORK, command, config_files, run_command, two_processes
from tests.bundles.handed_in_scans import result_files
from tests.data_prep.chest_scans import GEOMETRY, chest
from tests.data_prep.tiny_release import write_volume

OVERLAY = "_overlays/ddp_inference"


def _shared(bundle: str, options: dict, port: int) -> str:
    """Run a bundle's inference in two processes; returns what they said."""
    files = config_files(f"{bundle}/inference", OVERLAY)
    result = run_command(command(files, options, launcher=two_processes(port)))
    return result.stdout + result.stderr


def _contents(folder: Path, leave_out: tuple[str, ...] = ()) -> dict[str, bytes]:
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in paths.items() if not name.startswith(leave_out)}


def _check(bundle: str, options: dict, tmp_path: Path, port: int, num_of_first_rank: int) -> None:
    """Compare two processes with one, and see that there is nothing left to do."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    run(config_file=config_files(f"{bundle}/inference"), workflow_type="infer", **options, output_dir=str(alone))
    said = _shared(bundle, {**options, "output_dir": str(shared)}, port)
    assert f"{num_of_first_rank} iterations" in said
    one, two = _contents(alone), _contents(shared)
    assert one.keys() == two.keys()
    for name, content in one.items():
        assert two[name] == content, name

    written = {name: path.stat().st_mtime_ns for name, path in result_files(shared).items() if "tables" not in name}
    run(config_file=config_files(f"{bundle}/inference"), workflow_type="infer", **options, output_dir=str(shared))
    assert {name: (shared / name).stat().st_mtime_ns for name in written} == written
    assert _contents(shared) == two


def test_features_of_the_encoder(prepared, encoder_run, tmp_path):
    options = {**TINY_NETWORK, "dataset_dir": str(prepared), "run_dir": str(encoder_run), "num_workers": 1}
    _check("encoder", options, tmp_path, 29781, 9)


def test_findings(inference_options, tmp_path):
    options = {**inference_options(tmp_path), "num_workers": 1}
    del options["output_dir"]
    _check("classification", options, tmp_path, 29782, 3)


def test_lesions(drawing_options, tmp_path):
    options = {**drawing_options(tmp_path), "num_workers": 1}
    del options["output_dir"]
    _check("localization", options, tmp_path, 29783, 3)


def test_reports_and_the_evidence_for_them(report_options, report_run, tmp_path):
    evidence = {name: str(tmp_path / f"evidence_{name}") for name in ("alone", "shared")}
    options = report_options(report_run, batch_size=1)
    outputs = {name: str(tmp_path / name) for name in evidence}
    one = {**options, "output_dir": outputs["alone"], "evidence_dir": evidence["alone"]}
    run(config_file=config_files("report_generation/inference"), workflow_type="infer", **one)
    two = {**options, "output_dir": outputs["shared"], "evidence_dir": evidence["shared"]}
    said = _shared("report_generation", two, 29784)
    assert said.count("3 of 3 cases to extract") == 2
    for folders in (evidence, outputs):
        assert _contents(Path(folders["alone"])) == _contents(Path(folders["shared"]))
    said = _shared("report_generation", two, 29784)
    assert "to extract" not in said and said.count("Nothing to do") == 2


def test_scans_as_users_have_them(scan_options, tmp_path):
    scans = tmp_path / "scans"
    for seed in range(3):
        write_volume(scans / f"chest_{seed}.nii.gz", chest(seed), GEOMETRY)
    options = scan_options(scans, tmp_path / "any")
    del options["output_dir"]
    _check("multitask", options, tmp_path, 29785, 2)
    log = json.loads((tmp_path / "shared" / "intake_log.json").read_text())
    assert log == json.loads((tmp_path / "alone" / "intake_log.json").read_text())
