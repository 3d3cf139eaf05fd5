from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.bundle import run

from tests.bundles.bundle_runs import (
    TINY_CLASSIFIER,
    TINY_JOINT_TRAINING,
    TINY_LOCALIZER,
    TINY_NETWORK,
    TINY_REPORT_TRAINING,
    TINY_REPORTS,
    TINY_TRAINING,
    config_files,
)
from tests.bundles.handed_in_scans import drawing_checkpoint
from tests.prepared_release import SIZE, make_prepared_release
from tests.tiny_language_model import make_tiny_language_model
from tests.tiny_text_model import make_tiny_text_model
from vlm3d_ext.text.disease_set import load_disease_set
from vlm3d_ext.text.label_set import load_label_set


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Folder with a tiny prepared data set."""
    folder = tmp_path_factory.mktemp("prepared")
    make_prepared_release(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_run(prepared, tmp_path_factory) -> Path:
    """Run folder of a tiny trained encoder."""
    run_dir = tmp_path_factory.mktemp("runs") / "encoder"
    options = {**TINY_TRAINING, "epochs": 6, "dataset_dir": str(prepared), "run_dir": str(run_dir)}
    run(config_file=config_files("encoder/train"), **options)
    return run_dir


@pytest.fixture(scope="session")
def text_model(tmp_path_factory) -> Path:
    """Folder of a tiny text encoder."""
    return make_tiny_text_model(tmp_path_factory.mktemp("text") / "model")


@pytest.fixture(scope="session")
def training_options(prepared, encoder_run, text_model) -> Callable[..., dict]:
    """Options of a tiny training of the classifier, and of its evaluation, in a run folder."""

    def options(run_dir: Path, **further) -> dict:
        return {
            **TINY_TRAINING,
            **TINY_CLASSIFIER,
            "dataset_dir": str(prepared),
            "run_dir": str(run_dir),
            "encoder_ckpt": str(encoder_run / "models" / "model.pt"),
            "text_model": str(text_model),
            **further,
        }

    return options


@pytest.fixture(scope="session")
def classification_run(encoder_run, training_options) -> Path:
    """Run folder of a tiny classifier, beside that of its encoder, where its config looks for it."""
    run_dir = encoder_run.parent / "classification"
    options = training_options(run_dir, epochs=6)
    del options["encoder_ckpt"]
    run(config_file=config_files("classification/train"), **options)
    return run_dir


@pytest.fixture(scope="session")
def inference_options(prepared, classification_run) -> Callable[..., dict]:
    """Options of inference with that classifier, without any text encoder, into a folder."""

    def options(output_dir: Path, **further) -> dict:
        return {
            **TINY_NETWORK,
            **TINY_CLASSIFIER,
            "dataset_dir": str(prepared),
            "run_dir": str(classification_run),
            "output_dir": str(output_dir),
            "text_model": "no/such/folder",
            "num_workers": 0,
            **further,
        }

    return options


@pytest.fixture(scope="session")
def prepared_lesions(tmp_path_factory) -> Path:
    """Folder with a tiny prepared data set that has lesion masks."""
    folder = tmp_path_factory.mktemp("prepared_lesions")
    make_prepared_release(folder, with_lesions=True)
    return folder


@pytest.fixture(scope="session")
def lesion_encoder_run(prepared_lesions, tmp_path_factory) -> Path:
    """Run folder of a tiny encoder trained on that data set."""
    run_dir = tmp_path_factory.mktemp("lesion_runs") / "encoder"
    options = {**TINY_TRAINING, "dataset_dir": str(prepared_lesions), "run_dir": str(run_dir)}
    run(config_file=config_files("encoder/train"), **options)
    return run_dir


@pytest.fixture(scope="session")
def disease_text_model(tmp_path_factory) -> Path:
    """Folder of a tiny text encoder that takes the descriptions of the diseases."""
    texts = [disease.description for disease in load_disease_set().diseases]
    return make_tiny_text_model(tmp_path_factory.mktemp("disease_text") / "model", max_positions=96, texts=texts)


@pytest.fixture(scope="session")
def localizer_options(prepared_lesions, lesion_encoder_run, disease_text_model) -> Callable[..., dict]:
    """Options of a tiny training of the localizer, and of its evaluation, in a run folder."""

    def options(run_dir: Path, **further) -> dict:
        return {
            **TINY_TRAINING,
            **TINY_LOCALIZER,
            "learning_rate": 1e-2,
            "crop_size": [4, 8, 8],
            "dataset_dir": str(prepared_lesions),
            "run_dir": str(run_dir),
            "encoder_ckpt": str(lesion_encoder_run / "models" / "model.pt"),
            "text_model": str(disease_text_model),
            **further,
        }

    return options


@pytest.fixture(scope="session")
def localization_run(lesion_encoder_run, localizer_options) -> Path:
    """Run folder of a tiny localizer, beside that of its encoder, where its config looks for it."""
    run_dir = lesion_encoder_run.parent / "localization"
    options = localizer_options(run_dir, epochs=10)
    del options["encoder_ckpt"]
    run(config_file=config_files("localization/train"), **options)
    return run_dir


@pytest.fixture(scope="session")
def drawing_options(prepared_lesions, localization_run) -> Callable[..., dict]:
    """Options of inference with that localizer into a folder."""

    def options(output_dir: Path, **further) -> dict:
        return {
            **TINY_NETWORK,
            **TINY_LOCALIZER,
            "dataset_dir": str(prepared_lesions),
            "run_dir": str(localization_run),
            "output_dir": str(output_dir),
            "num_workers": 0,
            **further,
        }

    return options


@pytest.fixture(scope="session")
def example() -> torch.Tensor:
    """Two images, to compare exported networks on."""
    return torch.rand(2, 1, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def lesion_classification_run(prepared_lesions, lesion_encoder_run, disease_text_model) -> Path:
    """Run folder of a tiny classifier on the data with lesions, beside that of its encoder."""
    run_dir = lesion_encoder_run.parent / "classification"
    options = {**TINY_TRAINING, **TINY_CLASSIFIER, "epochs": 4, "learning_rate": 1e-2}
    folders = {"dataset_dir": str(prepared_lesions), "run_dir": str(run_dir), "text_model": str(disease_text_model)}
    run(config_file=config_files("classification/train"), **options, **folders)
    return run_dir


@pytest.fixture(scope="session")
def language_model(tmp_path_factory) -> Path:
    """Folder of a random tiny language model that knows the words of the tiny release's reports and prompts."""
    words = (
        "Findings : Pleural effusion is observed on the right . was not detected The heart enlarged Heart size normal"
    )
    more = "Classified findings none [FINDING] in region small Generate a clinical radiology report based CT scan"
    folder = tmp_path_factory.mktemp("language_model") / "tiny"
    names = " ".join(load_label_set("ct_rate_18").names)
    return make_tiny_language_model(folder, max_positions=1024, words=f"{words} {more} {names}".split())


@pytest.fixture(scope="session")
def report_options(
    prepared_lesions, lesion_encoder_run, lesion_classification_run, localization_run, language_model
) -> Callable[..., dict]:
    """Options of a tiny training of the report generator, its evaluation and its inference, in a run folder."""

    def options(run_dir: Path, **further) -> dict:
        return {
            **TINY_NETWORK,
            **TINY_CLASSIFIER,
            **TINY_LOCALIZER,
            **TINY_REPORTS,
            "dataset_dir": str(prepared_lesions),
            "run_dir": str(run_dir),
            "bundles_dir": str(lesion_encoder_run.parent),
            "language_model": str(language_model),
            **further,
        }

    return options


@pytest.fixture(scope="session")
def report_run(lesion_encoder_run, report_options) -> Path:
    """Run folder of a tiny aligned report generator, beside those of its upstream bundles."""
    run_dir = lesion_encoder_run.parent / "report_generation"
    options = {**report_options(run_dir), **TINY_REPORT_TRAINING}
    del options["bundles_dir"]
    run(config_file=config_files("report_generation/train"), **options)
    return run_dir


@pytest.fixture(scope="session")
def multitask_options(report_options, report_run, disease_text_model) -> Callable[..., dict]:
    """Options of a tiny joint training, its evaluation and its inference, in a run folder."""

    def options(run_dir: Path, **further) -> dict:
        return {
            **report_options(run_dir),
            **TINY_JOINT_TRAINING,
            "text_model": str(disease_text_model),
            **further,
        }

    return options


@pytest.fixture(scope="session")
def multitask_run(lesion_encoder_run, multitask_options) -> Path:
    """Run folder of a tiny joint network, beside those of the four bundles that it begins from."""
    run_dir = lesion_encoder_run.parent / "multitask"
    options = multitask_options(run_dir)
    del options["bundles_dir"]
    run(config_file=config_files("multitask/train"), **options)
    return run_dir


@pytest.fixture(scope="session")
def single_task_evaluations(
    report_options,
    report_run,
    localizer_options,
    localization_run,
    lesion_classification_run,
    disease_text_model,
    prepared_lesions,
    tmp_path_factory,
) -> dict[str, str]:
    """Folders of short evaluations of the three bundles that the joint network is compared with."""
    folder = tmp_path_factory.mktemp("single_task_evaluations")
    folders = {name: str(folder / name) for name in ("classification", "localization", "report_generation")}
    classifier = {**TINY_TRAINING, **TINY_CLASSIFIER, "run_dir": str(lesion_classification_run)}
    data = {"dataset_dir": str(prepared_lesions), "text_model": str(disease_text_model)}
    options = {
        "classification": {**classifier, **data},
        "localization": {**localizer_options(localization_run), "num_montages": 0},
        "report_generation": report_options(report_run),
    }
    for name, output_dir in folders.items():
        files = config_files(f"{name}/train", f"{name}/evaluate")
        run(config_file=files, **options[name], output_dir=output_dir, num_resamples=5)
    return folders


@pytest.fixture(scope="session")
def scan_options(multitask_run, language_model, tmp_path_factory) -> Callable[..., dict]:
    """Options of that network's inference on scans as users have them, into a folder."""
    network = {
        **TINY_NETWORK,
        **TINY_CLASSIFIER,
        **TINY_LOCALIZER,
        **TINY_REPORTS,
        "batch_size": 1,
        "language_model": str(language_model),
    }
    folder = tmp_path_factory.mktemp("scan_checkpoint")
    checkpoint = drawing_checkpoint(multitask_run / "models" / "model.pt", folder / "model.pt", network)

    def options(scan: Path, output_dir: Path, **further) -> dict:
        return {**network, "ckpt_path": str(checkpoint), "scan": str(scan), "output_dir": str(output_dir), **further}

    return options
