from pathlib import Path

import pytest
from monai.bundle import run

from tests.bundles.bundle_runs import TINY_CLASSIFIER, TINY_TRAINING, config_files
from tests.prepared_release import make_prepared_release
from tests.tiny_text_model import make_tiny_text_model


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
def classification_run(prepared, encoder_run, text_model) -> Path:
    """Run folder of a tiny classifier, beside that of its encoder."""
    run_dir = encoder_run.parent / "classification"
    options = {**TINY_TRAINING, **TINY_CLASSIFIER, "epochs": 6, "text_model": str(text_model)}
    run(config_file=config_files("classification/train"), dataset_dir=str(prepared), run_dir=str(run_dir), **options)
    return run_dir
