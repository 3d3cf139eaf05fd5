"""What the localization bundle says about input that it cannot use, or only in part."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import run

from tests.bundles.bundle_runs import checkpoint_weights, config_files, history, messages_of
from tests.prepared_release import make_prepared_release
from tests.tiny_text_model import make_tiny_text_model
from vlm3d_ext.data.localization_store import LocalizationStore
from vlm3d_ext.text.disease_set import load_disease_set

TRAIN = "localization/train"
# thinner than the patch of 2 x 4 x 4 voxels, smaller than the crop of 4 x 8 x 8, no multiple of the patch, and larger
SIZES = {1: (2, 16, 3), 3: (7, 9, 5), 6: (3, 6, 20), 9: (2, 3, 14), 13: (10, 17, 16), 15: (2, 9, 3), 18: (7, 15, 13)}


def reason_of_training(options: dict, *deltas: str) -> str:
    """Return the first cause of the error that train.json ends with, which must be one line."""
    *_, reason = messages_of(lambda: run(config_file=config_files(TRAIN, *deltas), **options))
    assert "\n" not in reason
    assert not (Path(options["run_dir"]) / "models").exists()  # nothing half-made is left
    return reason


def reason_of_evaluation(options: dict) -> str:
    *_, reason = messages_of(lambda: run(config_file=config_files(TRAIN, "localization/evaluate"), **options))
    assert "\n" not in reason
    return reason


def draw(options: dict) -> LocalizationStore:
    run(config_file=config_files("localization/inference"), workflow_type="infer", **options)
    return LocalizationStore(options["output_dir"])


def reason_of_inference(options: dict) -> str:
    *_, reason = messages_of(lambda: draw(options))
    assert "\n" not in reason
    assert not list(Path(options["output_dir"]).rglob("valid_*"))
    return reason


def evaluate(options: dict, output_dir: Path) -> dict:
    options = {**options, "output_dir": str(output_dir), "num_resamples": 5, "num_montages": 1}
    run(config_file=config_files(TRAIN, "localization/evaluate"), **options)
    return json.loads((output_dir / "localization.json").read_text())


def write_disease_set(path: Path, change) -> str:
    """Write chest_ct_5 with its diseases changed by a function of their list; returns the path."""
    content = json.loads((files("vlm3d_ext.text.disease_sets") / "chest_ct_5.json").read_text())
    change(content["diseases"])
    path.write_text(json.dumps({**content, "name": "changed"}))
    return str(path)


def without_masks(case: dict) -> None:
    """Turn a case of a manifest into one that is known to be free of lesions."""
    case["lesion_masks"], case["lesion_masks_original_grid"], case["lesion_masks_partial"] = {}, {}, []
    case["labels"] = [0] * len(case["labels"])


@pytest.fixture
def copied_release(prepared_lesions, tmp_path):
    """A copy of the prepared data set, and a function that writes its manifest back."""
    folder = tmp_path / "copied_release"
    shutil.copytree(prepared_lesions, folder)
    path = folder / "manifest.json"
    return folder, json.loads(path.read_text()), lambda content: path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def mixed_release(tmp_path_factory) -> Path:
    """Prepared folder of scans of several sizes with slices of 10 mm."""
    folder = tmp_path_factory.mktemp("mixed")
    make_prepared_release(folder, with_lesions=True, sizes=SIZES, slice_mm=10.0)
    return folder


def test_unknown_disease_set(localizer_options, drawing_options, tmp_path):
    for reason in (
        reason_of_training(localizer_options(tmp_path / "run", disease_set="chest_ct_6")),
        reason_of_inference(drawing_options(tmp_path / "predictions", disease_set="chest_ct_6")),
    ):
        assert "'chest_ct_6'" in reason and "chest_ct_5" in reason and "no such file" in reason


def test_disease_whose_name_no_label_has(localizer_options, tmp_path):
    path = write_disease_set(tmp_path / "set.json", lambda diseases: diseases[4].update(name="Lung nodules"))
    reason = reason_of_training(localizer_options(tmp_path / "run", disease_set=path))
    assert "'Lung nodules'" in reason and "vlm3d_18" in reason


def test_missing_encoder_checkpoint(localizer_options, tmp_path):
    reason = reason_of_training(localizer_options(tmp_path / "run", encoder_ckpt=str(tmp_path / "nowhere.pt")))
    assert "nowhere.pt does not exist" in reason and "--encoder_ckpt" in reason
    assert "python -m monai.bundle run --config_file bundles/encoder/configs/train.json" in reason


def test_encoder_of_other_data_is_refused_unless_allowed(localizer_options, encoder_run, tmp_path):
    foreign = str(encoder_run / "models" / "model.pt")
    options = localizer_options(tmp_path / "run", encoder_ckpt=foreign, epochs=1, max_cases=4)
    reason = reason_of_training(options)
    assert "the data differ" in reason and "encoder" in reason and "localization" in reason
    run(config_file=config_files(TRAIN), **options, allow_lineage_mismatch=True)
    assert len(history(tmp_path / "run")) == 1


def test_encoder_checkpoint_of_another_width(localizer_options, lesion_encoder_run, tmp_path):
    reason = reason_of_training(localizer_options(tmp_path / "run", hidden_size=48))
    assert str(lesion_encoder_run / "models" / "model.pt") in reason and "ThreeDVisionEncoder" in reason
    assert "(24," in reason and "(48," in reason and "--encoder_ckpt" in reason


def test_missing_localization_checkpoint(localizer_options, drawing_options, tmp_path):
    missing = {"ckpt_path": str(tmp_path / "nowhere.pt")}
    for reason in (
        reason_of_inference(drawing_options(tmp_path / "predictions", **missing)),
        reason_of_evaluation(localizer_options(tmp_path / "run", **missing)),
    ):
        assert "nowhere.pt does not exist" in reason and "--ckpt_path" in reason
        assert "bundles/localization/configs/train.json" in reason
    assert not (tmp_path / "predictions").exists()


def test_checkpoint_of_the_same_diseases_in_another_order(
    localizer_options, drawing_options, localization_run, tmp_path
):
    """As many, so shapes alone would let it pass, and effusions would be called nodules."""
    path = write_disease_set(tmp_path / "set.json", lambda diseases: diseases.reverse())
    for reason in (
        reason_of_inference(drawing_options(tmp_path / "predictions", disease_set=path)),
        reason_of_evaluation(localizer_options(localization_run, output_dir=str(tmp_path / "eval"), disease_set=path)),
    ):
        assert str(localization_run / "models" / "model.pt") in reason
        assert "(disease set chest_ct_5)" in reason and "--disease_set chest_ct_5" in reason
    assert not (tmp_path / "eval").exists()


def test_other_checkpoints_in_place_of_the_localizer_s(drawing_options, lesion_encoder_run, localization_run, tmp_path):
    path = str(lesion_encoder_run / "models" / "model.pt")
    reason = reason_of_inference(drawing_options(tmp_path / "encoder", ckpt_path=path))
    assert path in reason and "'diseases'" in reason and "--ckpt_path" in reason
    reason = reason_of_inference(drawing_options(tmp_path / "other", base_channels=16))
    assert str(localization_run / "models" / "model.pt") in reason and "LesionLocalizationModule" in reason

    content = (localization_run / "models" / "model.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    *messages, _ = messages_of(lambda: draw(drawing_options(tmp_path / "half", ckpt_path=str(tmp_path / "half.pt"))))
    assert any(f"{tmp_path / 'half.pt'} is no" in message and "checkpoint" in message for message in messages)


def test_text_encoders_that_do_not_fit(localizer_options, text_model, tmp_path):
    reason = reason_of_training(localizer_options(tmp_path / "run", text_model=str(tmp_path / "nowhere")))
    assert str(tmp_path / "nowhere") in reason and "does not exist" in reason and "--text_model" in reason
    reason = reason_of_training(localizer_options(tmp_path / "run", text_model=str(text_model)))
    assert "48 positions" in reason and "another text encoder" in reason and "'Pericardial effusion'" in reason
    texts = [disease.description for disease in load_disease_set().diseases]
    other = make_tiny_text_model(tmp_path / "wide", hidden_size=32, max_positions=96, texts=texts)
    reason = reason_of_training(localizer_options(tmp_path / "run", text_model=str(other)))
    assert str(other) in reason and "32" in reason and "16" in reason and "--text_hidden_size 32" in reason


@pytest.mark.parametrize(
    ("further", "expected"),
    [
        ({"crop_size": [4, 10, 8]}, "crop_size must be multiples of the patch (2, 4, 4), got (4, 10, 8)"),
        ({"window_size": [4, 10, 8]}, "window_size must be multiples of the patch (2, 4, 4), got (4, 10, 8)"),
        ({"passes": "each"}, "passes must be one of ('shared', 'per_disease'), got 'each'"),
        ({"level_strides": [[1, 2, 2]]}, "patch"),
        ({"negative_share": 1.0}, "negative_share must be at least 0 and below 1, got 1.0"),
    ],
)
def test_sizes_that_do_not_fit(localizer_options, tmp_path, further, expected):
    assert expected in reason_of_training(localizer_options(tmp_path / "run", **further))


def test_training_without_any_lesion_mask(prepared, encoder_run, localizer_options, tmp_path):
    encoder = {"dataset_dir": str(prepared), "encoder_ckpt": str(encoder_run / "models" / "model.pt")}
    reason = reason_of_training(localizer_options(tmp_path / "run", **encoder))
    assert str(prepared / "manifest.json") in reason and "no training case has a mask" in reason
    assert "'lung_nodule'" in reason and "--lesion-masks" in reason


def test_mask_that_does_not_fit_its_scan(localizer_options, copied_release, tmp_path):
    folder, manifest, _ = copied_release
    path = folder / manifest["training"][1]["lesion_masks"]["pericardial_effusion"]
    image = nib.load(path)
    mask = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(mask[:, :, 1:], image.affine), path)
    # one scan a batch, so that none is left out of the first epoch
    options = localizer_options(tmp_path / "run", dataset_dir=str(folder), batch_size=1, global_batch_size=1)
    reason = reason_of_training(options)
    assert str(path) in reason and "(7, 16, 16)" in reason and "(8, 16, 16)" in reason
    nib.save(nib.Nifti1Image(mask * 2, image.affine), path)
    reason = reason_of_training(options)
    assert str(path) in reason and "up to 2" in reason and "prepare the scan again" in reason


def test_mask_without_its_original(localizer_options, localization_run, copied_release, tmp_path):
    """Data prepared before masks were kept on the scan's own grid cannot be evaluated there."""
    folder, manifest, write = copied_release
    for case in manifest["test"]:
        del case["lesion_masks_original_grid"]
    write(manifest)
    options = localizer_options(localization_run, dataset_dir=str(folder), output_dir=str(tmp_path / "eval"))
    reason = reason_of_evaluation(options)
    assert "lesion_masks_original_grid" in reason and "prepare it again" in reason
    assert not (tmp_path / "eval" / "localization.json").exists()


def test_splits_without_positives(localizer_options, copied_release, tmp_path):
    """What cannot be measured is undefined, on validation and on test; training and evaluation go on."""
    folder, manifest, write = copied_release
    for case in (*manifest["validation"], *manifest["test"]):
        without_masks(case)
    write(manifest)
    run_dir = tmp_path / "run"
    options = localizer_options(run_dir, dataset_dir=str(folder))
    run(config_file=config_files(TRAIN), **options)
    assert [row["validation"]["mean_dice"] for row in history(run_dir)] == [None, None]
    assert all(row["validation"]["loss"] > 0 for row in history(run_dir))
    last = run_dir / "models" / "last.pt"
    weights = checkpoint_weights(last)
    assert (weights["thresholds"] == 0.5).all()
    assert all(value.isfinite().all() for value in weights.values())

    content = evaluate(options, tmp_path / "eval")
    for row in (*content["per_disease"], content["mean"]):
        undefined = ("dice", "dice_low", "surface_dice", "hausdorff_95_mm", "sensitivity", "froc_1", "ceiling_dice")
        assert [row[name] for name in undefined] == [None] * len(undefined)
        assert row["false_positives_per_negative_scan"] is not None
    assert [row["negative_scans"] for row in content["per_disease"]] == [6] * 5


def test_evaluation_where_nothing_is_annotated(localizer_options, localization_run, prepared, tmp_path):
    """Neither masks nor absent diseases: labels say 1, or nothing."""
    folder = tmp_path / "unlabelled"
    shutil.copytree(prepared, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for split in ("training", "validation", "test"):
        for case in manifest[split]:
            case["labels"] = [None] * len(case["labels"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    options = localizer_options(localization_run, dataset_dir=str(folder), allow_lineage_mismatch=True)
    content = evaluate(options, tmp_path / "eval")
    assert [row["unknown_scans"] for row in content["per_disease"]] == [6] * 5
    figures = {value for row in content["per_disease"] for name, value in row.items() if name.startswith("froc")}
    assert figures == {None}


def test_scans_of_several_sizes_with_thick_slices(mixed_release, localizer_options, lesion_encoder_run, tmp_path):
    """Trained in batches of two, one scan thinner than a patch; measured without a baseline, which needs one size."""
    run_dir = tmp_path / "run"
    options = localizer_options(run_dir, dataset_dir=str(mixed_release), allow_lineage_mismatch=True)
    run(config_file=config_files(TRAIN), **{**options, "batch_size": 2, "global_batch_size": 2})
    rows = history(run_dir)
    assert rows[-1]["validation"]["loss"] < rows[0]["validation"]["loss"]
    assert all(value.isfinite().all() for value in checkpoint_weights(run_dir / "models" / "model.pt").values())
    content = evaluate(options, tmp_path / "eval")
    effusion = next(row for row in content["per_disease"] if row["disease"] == "pleural_effusion")
    assert effusion["positive_scans"] == 3 and effusion["ceiling_dice"] == 1.0
    assert 0 <= effusion["dice"] <= 1 and effusion["baseline_dice"] is None


def test_a_mask_does_not_depend_on_the_other_scans_of_its_batch(mixed_release, drawing_options, tmp_path):
    data = {"dataset_dir": str(mixed_release)}
    alone = draw(drawing_options(tmp_path / "alone", **data))
    together = draw(drawing_options(tmp_path / "together", batch_size=4, **data))
    assert alone.volume_ids() == together.volume_ids() and len(alone.volume_ids()) == 6
    for volume_id in alone.volume_ids():
        for name, found in alone.read(volume_id).items():
            images = [nib.load(store.mask_path(name, volume_id)) for store in (alone, together)]
            np.testing.assert_array_equal(images[0].affine, images[1].affine)
            one, other = (np.asarray(image.dataobj) for image in images)
            # a voxel at the very threshold may turn
            assert np.count_nonzero(one != other) <= 0.001 * one.size, (volume_id, name)
            peaks = [[lesion["probability"] for lesion in of["lesions"][:1]]
                     for of in (found, together.read(volume_id)[name])]  # fmt: skip
            assert peaks[0] == pytest.approx(peaks[1], abs=1e-4)


def test_batches_of_one(localizer_options, tmp_path):
    options = localizer_options(tmp_path / "run", epochs=1, max_cases=4, batch_size=1, global_batch_size=1)
    run(config_file=config_files(TRAIN), **options)
    (row,) = history(tmp_path / "run")
    assert row["loss"] > 0 and row["iteration"] > 4
