import json

import pytest

from benchmarks import __main__ as command
from benchmarks.measuring import PairedTimes
from benchmarks.row import ResultsDiffer, Row
from benchmarks.table import markdown_table


def _row(ratios, target=1.0, load=0.0):
    return Row.of_times("a", "this against that", PairedTimes(ratios, [1.0] * len(ratios), load), target, "equal")


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.9] * 5, "met"),
        ([1.1] * 5, "missed"),
        ([0.7, 0.8, 0.9, 1.2, 1.3], "varies"),
        ([0.1, 0.2, 0.3, 0.3, 0.4], "met"),
        ([3.0, 4.0, 5.0, 5.0, 6.0], "missed"),
    ],
)
def test_verdicts(ratios, verdict):
    assert _row(ratios).verdict == verdict


def test_a_busy_machine_gets_no_ratio():
    row = _row([0.5] * 5, load=0.8)
    assert row.verdict == "refused" and row.ratio is None
    table = markdown_table({"machine": {"cores": 2}, "rows": [row.to_dict()]})
    assert "0.5" not in table.split("\n- ")[0].replace("0.80", "")
    assert "other processes used 0.80 cores" in table


def test_the_table_has_ratio_target_and_verdict():
    table = markdown_table({"machine": {"cores": 2}, "rows": [_row([0.25] * 5).to_dict()]})
    assert "| `a` | this against that | 0.25 | ≤ 1 | met | 0.0% | 0.00 |" in table
    assert "- `a`: equal." in table


def _same():
    return Row("encoder_flops", "what", 0.5, 0.6, "same")


def _different():
    raise ResultsDiffer("masks have shapes (1,) and (2,)")


def test_a_row_that_differs_has_no_ratio_and_stops_no_other(tmp_path, monkeypatch, capfd):
    """The rows run in processes of their own; here their functions are replaced in this one."""
    rows = {"encoder_flops": _same, "localizer_diseases": _different}
    monkeypatch.setattr(command, "load_row", rows.__getitem__)
    for name in rows:
        path = tmp_path / "rows" / f"{name}.json"
        if name == "localizer_diseases":
            with pytest.raises(ResultsDiffer):
                command.main(["--one", name, "--output", str(tmp_path)])
            assert not path.exists()
        else:
            assert command.main(["--one", name, "--output", str(tmp_path)]) == 0
            assert json.loads(path.read_text())["verdict"] == "met"


def test_a_whole_run(tmp_path, capfd):
    assert command.main(["encoder_flops", "localizer_diseases", "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "benchmarks.json").read_text())
    assert [row["verdict"] for row in content["rows"]] == ["met", "met"]
    assert content["rows"][0]["ratio"] <= 0.27 and content["rows"][1]["ratio"] <= 1.1
    assert "TFLOP" in (tmp_path / "benchmarks.md").read_text()
    assert content["machine"]["cores"] >= 1


def test_a_row_whose_process_fails_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(command.sys, "executable", "/bin/false")
    assert command.main(["encoder_flops", "--output", str(tmp_path)]) == 1
    row = json.loads((tmp_path / "benchmarks.json").read_text())["rows"][0]
    assert row["ratio"] is None and "exit code 1" in row["refused"]


def test_names(capsys):
    assert command.main(["no_such_row"]) == 2
    assert "--list" in capsys.readouterr().err
    assert command.main(["--list"]) == 0
    names = capsys.readouterr().out.split()
    assert "encoder_flops" in names and len(names) == len(set(names))
    assert all(callable(command.load_row(name)) for name in names)
