from pathlib import Path

import pytest
from monai.bundle import run

from tests.bundles.bundle_runs import TINY_TRAINING, config_files
from tests.prepared_release import make_prepared_release


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
