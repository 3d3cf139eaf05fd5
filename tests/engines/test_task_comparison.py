"""The joint network beside the single-task ones, by figures written by hand."""

import json
import logging

import pytest
from ignite.engine import Engine, Events

from vlm3d_ext.engines.task_comparison import compare_tasks, format_task_comparison, write_task_comparison
from vlm3d_ext.handlers import TaskComparison

TASKS = ("classification", "localization", "report_generation")


def interval(key, value, low, high):
    return {key: value, f"{key}_low": low, f"{key}_high": high}


def figures_of(value, keys):
    return {name: part for key in keys for name, part in interval(key, value, value - 0.05, value + 0.05).items()}


def classification(value, num_cases=4):
    keys = ("auroc", "average_precision", "f1", "crg")
    baselines = {"random": dict.fromkeys(keys, 0.5), "prevalence": {**dict.fromkeys(keys, 0.4), "crg": 0.6}}
    return {"num_cases": num_cases, "macro": figures_of(value, keys), "baselines": baselines}


def localization(value, num_scans=4):
    known = {**figures_of(value, ["dice"]), "baseline_dice": 0.3}
    unknown = {"dice": None, "dice_low": None, "dice_high": None, "baseline_dice": None}
    rows = [{"disease": "lung_nodule", **known}, {"disease": "consolidation", **unknown}]
    return {"num_scans": num_scans, "mean": known, "per_disease": rows}


def reports(value, num_cases=3):
    keys = ("clinical_f1", "crg", "laterality")
    blind = {"nearest neighbour": 0.35, "random report": 0.2, "other patients' scans": 0.9, "reference": 1.0}
    systems = {name: dict.fromkeys(keys, figure) for name, figure in blind.items()}
    return {"num_cases": num_cases, "systems": {"generated": figures_of(value, keys), **systems}}


def write(folder, value, **changes):
    contents = {
        "classification_unguided": classification(value),
        "localization": localization(value),
        "reports": reports(value),
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def single(tmp_path):
    return dict.fromkeys(TASKS, write(tmp_path / "single", 0.7))


def test_each_figure_stands_beside_its_own_and_the_best_blind_baseline(tmp_path, single):
    rows = {(row.task, row.figure): row for row in compare_tasks(write(tmp_path / "joint", 0.8), single)}
    auroc = rows["classification", "AUROC, unguided"]
    assert (auroc.single, auroc.single_low, auroc.single_high) == pytest.approx((0.7, 0.65, 0.75))
    assert (auroc.joint, auroc.joint_low, auroc.joint_high) == pytest.approx((0.8, 0.75, 0.85))
    assert (auroc.baseline, auroc.baseline_name, auroc.num_cases) == (0.5, "random", 4)
    assert rows["classification", "CRG, unguided"].baseline_name == "prevalence"
    assert not any("guided" in figure and "unguided" not in figure for _, figure in rows)  # nothing had a mask
    assert rows["localization", "Dice, lung_nodule"].baseline == 0.3
    undefined = rows["localization", "Dice, consolidation"]
    assert undefined.joint is undefined.single is undefined.baseline is None and undefined.verdict == ""
    report = rows["report_generation", "clinical F1"]
    # other patients' scans are no baseline that goes without a scan, and the reference is no rival
    assert (report.baseline, report.baseline_name, report.num_cases) == (0.35, "nearest neighbour", 3)
    assert len(rows) == 4 + 3 + 3


@pytest.mark.parametrize(("value", "verdict"), [(0.64, "worse"), (0.66, "equal"), (0.74, "equal"), (0.76, "better")])
def test_the_verdict_is_by_the_single_task_interval(tmp_path, single, value, verdict):
    rows = compare_tasks(write(tmp_path / "joint", value), single)
    assert {row.verdict for row in rows if row.joint is not None} == {verdict}


def test_what_was_not_evaluated_alone_is_said_and_left_empty(tmp_path, single, caplog):
    single["localization"] = tmp_path / "nowhere"
    with caplog.at_level(logging.WARNING):
        rows = compare_tasks(write(tmp_path / "joint", 0.8), single)
    assert str(tmp_path / "nowhere" / "localization.json") in caplog.text
    assert "bundles/localization/configs/evaluate.json" in caplog.text and len(caplog.records) == 1
    for row in rows:
        assert (row.single is None) == (row.task == "localization" or row.joint is None)
    drawn = [row for row in rows if row.task == "localization"]
    assert drawn[0].joint == 0.8 and drawn[0].verdict == "" and drawn[0].single_low is None


def test_what_the_joint_network_was_not_evaluated_on_is_left_out(tmp_path, single):
    joint = write(tmp_path / "joint", 0.8, reports=None)
    assert {row.task for row in compare_tasks(joint, single)} == {"classification", "localization"}
    with pytest.raises(FileNotFoundError, match="no evaluation of the joint network; run the multitask bundle"):
        compare_tasks(tmp_path / "empty", single)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"classification_unguided": classification(0.8, num_cases=3)}, "classification_unguided"),
        ({"localization": localization(0.8, num_scans=3)}, "localization"),
        ({"reports": reports(0.8, num_cases=2)}, "reports"),
    ],
)
def test_evaluations_of_other_numbers_of_scans_are_refused(tmp_path, single, changes, name):
    with pytest.raises(ValueError, match=rf"single.{name}\.json: is of (4|3) scans, the joint evaluation of (3|2)"):
        compare_tasks(write(tmp_path / "joint", 0.8, **changes), single)


def test_the_table_shows_a_dash_for_what_is_not_known(tmp_path, single):
    table = format_task_comparison(compare_tasks(write(tmp_path / "joint", 0.8), single)).splitlines()
    (nodule,) = [line for line in table if line.startswith("localization: Dice, lung nodule ")]
    assert nodule.split()[4:] == ["0.700", "[0.650,", "0.750]", "0.800", "[0.750,", "0.850]", "better",
                                  "0.300", "lesion", "frequency"]  # fmt: skip
    (unknown,) = [line for line in table if line.startswith("localization: Dice, consolidation ")]
    assert unknown.split()[3:] == ["-", "-", "-"]


def test_the_handler_writes_when_the_others_have_written(tmp_path, single):
    """Files that a handler before it leaves at the end of the epoch are compared, and so are in time for one after."""
    joint, seen = tmp_path / "joint", []
    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: write(joint, 0.8))
    TaskComparison(joint, single).attach(engine)
    engine.add_event_handler(Events.COMPLETED, lambda: seen.extend(sorted(p.name for p in joint.glob("comparison*"))))
    engine.run([0])
    assert seen == ["comparison.json", "comparison.txt"]
    rows = json.loads((joint / "comparison.json").read_text())
    assert rows[0]["joint"] == 0.8 and rows[0]["verdict"] == "better"
    table = format_task_comparison(write_task_comparison(joint, single))
    assert (joint / "comparison.txt").read_text() == table + "\n"
