import json
import re

import pytest

from vlm3d_ext.run_summary import main, summarise_run


def _row(epoch, loss, validation=None):
    return {
        "epoch": epoch,
        "iteration": epoch,
        "loss": loss,
        "losses": {},
        "learning_rates": [0.1],
        "validation": validation,
    }


@pytest.fixture
def run(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))

    manifest = {"label_set": "ct_rate_18", "training": [{}] * 5, "validation": [{}] * 2, "test": [{}] * 3}
    write("prepared/manifest.json", manifest)
    write("prepared/preparation_log.json", {"summary": {"refused": 4}})
    rows = [_row(1, 3.0), _row(2, 2.0, {"loss": 2.5}), _row(3, 1.25, {"loss": 1.5}), _row(4, 1.5, {"loss": 1.75})]
    write("encoder/output/history.json", rows)
    write("encoder/models/model.pt", "")
    for number in range(7):
        write(f"encoder/features/train_{number}_a_1.npz", "")
    write("encoder/eval/representation.png", "")
    figures = {
        "linear_probe_macro_auroc_trained_unguided": 0.625,
        "effective_rank_trained": 9.5,
        "effective_rank_untrained": None,
        "region_share_error_trained": 0.125,
    }
    write("encoder/eval/representation.json", {"figures": figures, "per_label": []})
    baseline = {"auroc": 0.5, "average_precision": 0.25, "f1": 0.0, "crg": 1 / 3}
    macro = {name: 0.75 for name in baseline}
    macro |= {f"{name}_{end}": value for name in baseline for end, value in (("low", 0.7), ("high", 0.8))}
    baselines = {name: baseline for name in ("random", "all_negative", "all_positive", "prevalence")}
    undefined = {**macro, "crg": None, "crg_low": None, "crg_high": None}
    write("classification/eval/classification_unguided.json", {"macro": macro, "baselines": baselines})
    write("classification/eval/classification_guided.json", {"macro": undefined, "baselines": baselines})
    write("localization/eval/localization.json", _localization_report(nodule_dice=0.5, effusion_dice=0.75))
    write("localization/eval/froc.png", "")
    write("localization/eval/montages/best_1_valid_1_a_1.png", "")
    for name in ("localization", "valid_1_a_1", "valid_2_a_1"):
        write(f"localization/predictions/{name}.json", {})
    write("mlruns.db", "")
    return tmp_path


def _localization_report(nodule_dice, effusion_dice):
    """A report of two diseases; no large nodule, and effusions without annotated negative scan."""
    rows = []
    for disease, dice in (("lung_nodule", nodule_dice), ("pleural_effusion", effusion_dice)):
        row = {"disease": disease, "positive_scans": 6, "dice": dice, "dice_low": dice - 0.1, "dice_high": dice + 0.1}
        row |= {"baseline_dice": 0.125, "ceiling_dice": 0.9375, "sensitivity": 0.625, "precision": 0.375}
        row |= {"false_positives_per_negative_scan": 1.5, "froc_1": 0.5625}
        for number, size in enumerate(("small", "medium", "large")):
            row |= {f"lesions_{size}": number, f"lesion_dice_{size}": 0.25 * number, f"sensitivity_{size}": 0.5}
            row |= {f"ceiling_{size}": 0.875}
        rows.append(row)
    rows[0] |= {"lesions_large": 0, "lesion_dice_large": None, "sensitivity_large": None, "ceiling_large": None}
    rows[1] |= {"false_positives_per_negative_scan": None}
    mean = {**rows[1], "dice": (nodule_dice + effusion_dice) / 2}
    del mean["disease"]
    return {"num_scans": 12, "per_disease": rows, "mean": mean}


def test_every_figure_comes_from_the_run(run):
    text = summarise_run(run)
    assert "5 training, 2 validation, 3 test volumes, 4 refused; label set ct_rate_18" in text
    assert "4 epochs, training loss 3.000 to 1.500, best validation loss 1.500" in text
    assert re.search(r"features +7 volumes", text)
    assert re.search(r"effective rank +9\.5000 +- +-", text) and "0.1250" in text


def test_classification_stands_beside_its_baselines(run):
    text = summarise_run(run)
    assert re.search(r"AUROC, unguided +0\.750 +\[0\.700, 0\.800\] +0\.625 +0\.500 +0\.500 +0\.500", text)
    assert re.search(r"F1, unguided +0\.750 +\[0\.700, 0\.800\] +- +0\.000", text)
    assert re.search(r"CRG \(pooled\), guided +- +\[-, -\] +- +0\.333", text)


def test_localization_stands_beside_what_is_trivial_and_what_is_possible(run):
    text = summarise_run(run)
    assert "localization on the 12 scans" in text and re.search(r"lesions +2 volumes", text)
    figures = r" +6 +0\.500 +\[0\.400, 0\.600\] +0\.125 +- +0\.938 +0\.625 +0\.375 +1\.500 +0\.562\n"
    assert re.search("lung_nodule" + figures, text)
    assert re.search(r"pleural_effusion +6 +0\.750 +\[0\.650, 0\.850\] .* 0\.375 +- +0\.562\n", text)
    assert re.search(r"mean +0\.625 ", text)
    by_size = text.split("lesions by size")[1]
    assert re.search(r"lung_nodule +0 +0\.000 +0\.500 +0\.875 +1 +0\.250 +0\.500 +0\.875 +0 +- +- +-\n", by_size)
    assert all(len(line) <= 120 for line in text.split("localization on")[1].split("\n\n")[0].splitlines())


def test_a_segresnet_stands_beside_the_localizer_where_one_was_trained(run):
    path = run / "localization_segresnet" / "eval" / "localization.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(_localization_report(nodule_dice=0.3125, effusion_dice=0.4375)))
    text = summarise_run(run)
    assert re.search(r"lung_nodule +6 +0\.500 +\[0\.400, 0\.600\] +0\.125 +0\.312 +0\.938", text)
    assert re.search(r"mean +0\.625 .* 0\.375 +0\.938", text)


def test_the_commands_name_files_that_are_there(run):
    text = summarise_run(run)
    assert f"mlflow ui --backend-store-uri sqlite:///{run / 'mlruns.db'}" in text
    assert f"python -m vlm3d_ext.lineage {run / 'encoder' / 'models' / 'model.pt'}" in text
    assert str(run / "encoder" / "eval" / "representation.png") in text
    assert str(run / "localization" / "eval" / "montages") in text and "best_1_valid_1_a_1.png" not in text


def test_a_folder_where_little_has_happened_yet(tmp_path):
    text = summarise_run(tmp_path)
    assert f"data              none prepared in {tmp_path / 'prepared'}" in text
    assert all(word not in text for word in ("epochs", "mlflow", "features", "localization", "SegResNet"))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], r"encoder +0 epochs; "),
        ([_row(1, None), _row(2, 2.0)], r"encoder +2 epochs, training loss 2\.000 to 2\.000; "),
        ([_row(1, 1.0, {"auroc": 0.8})], r"encoder +1 epochs, training loss 1\.000 to 1\.000; "),
        ([_row(1, 1.0, {"loss": None}), _row(2, 1.0, {"loss": 0.5})], r"best validation loss 0\.500"),
    ],
)
def test_histories_with_gaps(run, rows, expected):
    """No epoch yet, a loss that was not finite, a validation with other metrics."""
    (run / "encoder" / "output" / "history.json").write_text(json.dumps(rows))
    assert re.search(expected, summarise_run(run))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing: no such folder; `make demo` makes demo_run"):
        summarise_run(tmp_path / "nothing")


def test_command_line(run, capsys):
    main([str(run)])
    assert capsys.readouterr().out == summarise_run(run) + "\n"


def test_it_opens_with_the_joint_network_and_the_pages(run):
    row = {
        "task": "classification", "figure": "AUROC, unguided", "num_cases": 12, "single": 0.75, "single_low": 0.7,
        "single_high": 0.8, "joint": 0.85, "joint_low": 0.8, "joint_high": 0.9, "baseline": 0.5,
        "baseline_name": "random", "verdict": "better",
    }  # fmt: skip
    (run / "multitask" / "eval").mkdir(parents=True)
    (run / "multitask" / "eval" / "comparison.json").write_text(json.dumps([row]))
    pages = run / "multitask" / "inference" / "pages"
    pages.mkdir(parents=True)
    (pages / "valid_1_a_1.html").write_text("")
    lines = summarise_run(run).splitlines()
    assert lines[0] == "single-task bundles and the joint network on the 12 scans of the test split"
    figures = r"0\.750 +\[0\.700, 0\.800\] +0\.850 +\[0\.800, 0\.900\] +better +0\.500 random"
    assert re.fullmatch("classification: AUROC, unguided +" + figures, lines[2])
    (page,) = [line for line in lines[:8] if line.startswith("page of valid_1_a_1")]
    assert page.endswith((pages / "valid_1_a_1.html").as_uri())
