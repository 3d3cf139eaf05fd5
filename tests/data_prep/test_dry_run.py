"""What a dry run foretells."""

import re
import shutil
from collections import namedtuple

import numpy as np
import pytest

from data_prep.dry_run import Forecast, forecast
from data_prep.prepare import main
from tests.data_prep.tiny_release import chest_hu, write_volume
from vlm3d_ext.data.volume_geometry import VolumeGeometry

SIZE = ["--spatial-size", "16", "32", "32"]


@pytest.fixture
def scans(tmp_path):
    for number, depth in enumerate((10, 20, 30, 40, 50, 60, 70)):
        geometry = VolumeGeometry.from_spacing((depth, 40, 40), (100 / depth, 8.0, 8.0))
        write_volume(tmp_path / "raw" / f"scan_{number}.nii.gz", chest_hu(number, geometry), geometry)
    return tmp_path / "raw"


def dry_run(source, output, *more):
    return main(["--source", str(source), "--output", str(output), *SIZE, "--workers", "2", "--dry-run", *more])


def test_forecast_by_hand():
    # 10 and 20 were measured; 15 lies between, 5 and 40 outside.
    assert forecast([5, 10, 15, 20, 40], [10, 20], [1.0, 3.0]) == Forecast(1 + 1 + 2 + 3 + 3, 9.0, 11.0)
    assert forecast([1, 2, 3], [2], [4.0]) == Forecast(12.0, 12.0, 12.0)
    rising = forecast(range(1, 101), [1, 50, 100], [1.0, 50.0, 100.0])
    assert rising.total == pytest.approx(5050) and rising.lowest < 5050 < rising.highest


def test_the_foretold_disk_is_what_a_run_takes(scans, tmp_path, capsys):
    assert dry_run(scans, tmp_path / "out") == 0

    printed = capsys.readouterr().out
    assert len(re.findall(r"^scan_\d: .* MB in .* s, with at most .* GiB of memory$", printed, re.M)) == 5
    assert {"scan_0", "scan_6"} <= set(re.findall(r"^(scan_\d):", printed, re.M))
    assert not (tmp_path / "out").exists() and f"Nothing was written to {tmp_path / 'out'}" in printed
    found = re.search(
        r"all 7 with 2 worker\(s\): about (\S+) \((\S+) to (\S+)\) MB and \S+ \(\S+ to \S+\) min", printed
    )
    total, lowest, highest = map(float, found.groups())
    assert lowest <= total <= highest

    assert main(["--source", str(scans), "--output", str(tmp_path / "out"), *SIZE, "--workers", "0"]) == 0
    files = [path for path in (tmp_path / "out" / "volumes").iterdir()]
    assert sum(path.stat().st_size for path in files) / 1e6 == pytest.approx(total, abs=0.051)


def test_little_space_is_warned_of(scans, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5000, 5000))

    assert dry_run(scans, tmp_path / "out") == 0

    assert "free, up to" in capsys.readouterr().err


def test_refused_cases_give_way_and_memory_is_counted(scans, tmp_path, capsys):
    write_volume(tmp_path / "raw" / "bad.nii.gz", np.zeros((10, 40, 40), dtype=np.int16))

    assert dry_run(scans, tmp_path / "out", "--max-memory-gib", "0.17") == 0

    captured = capsys.readouterr().out
    assert "refused bad:" in captured
    assert re.search(r"refused scan_6: .*would need about", captured) is None
    assert "memory: 0 would be refused" in captured

    assert dry_run(scans, tmp_path / "out", "--max-memory-gib", "0.1") == 2
    assert "would need about" in capsys.readouterr().out


def test_memory_bound_refuses_in_a_run_too(scans, tmp_path, capsys):
    arguments = ["--source", str(scans), "--output", str(tmp_path / "out"), *SIZE, "--workers", "0"]

    assert main([*arguments, "--max-memory-gib", "0.1"]) == 3
    assert "--max-memory-gib allows 0.10" in (tmp_path / "out" / "preparation_log.json").read_text()
    capsys.readouterr()
    assert main([*arguments, "--max-memory-gib", "0.2"]) == 0
    assert main([*arguments, "--max-memory-gib", "0"]) == 2
    assert main([*arguments, "--retries", "-1"]) == 2
    assert "--retries must be at least 0" in capsys.readouterr().err
