"""The report generator's training with its language model's layers spread over two ranks."""

import json

import pytest
import torch
from monai.bundle import run

from tests.bundles.bundle_runs import (
    TINY_REPORT_TRAINING,
    assert_same_curve,
    checkpoint_weights,
    command,
    config_files,
    history,
    run_command,
    two_processes,
)

ALIGN = "report_generation/train"
RL = "report_generation/train_rl"


@pytest.fixture
def options(report_options, report_run):
    """Options of a short training on four cases, two at a time, with the evidence that is there already."""

    def make(run_dir, ranks=1, **further):
        sizes = {
            "epochs": 2,
            "validation_interval": 1,
            "max_cases": 4,
            "batch_size": 2 // ranks,
            "global_batch_size": 2,
        }
        evidence = {"evidence_dir": str(report_run / "evidence")}
        return report_options(run_dir, **{**TINY_REPORT_TRAINING, **sizes, **evidence, **further})

    return make


def test_two_ranks_that_share_the_layers_equal_one_process(options, tmp_path):
    """Of three validation cases they leave out the last, which only one of them could take."""
    one, two = tmp_path / "one", tmp_path / "two"
    cases = "$with_report(@labelled_cases.cases('validation',3))"  # the second has no report
    run(config_file=config_files(ALIGN), **options(str(one), **{"validate::dataset::data": cases}))
    files = config_files(ALIGN, "_overlays/fsdp")
    run_command(command(files, options(two, ranks=2), launcher=two_processes(29781)))
    assert len(history(two)) == 2
    assert_same_curve(one, two)
    weights, shared = (checkpoint_weights(folder / "models" / "model.pt") for folder in (one, two))
    assert weights.keys() == shared.keys() and all(type(weight) is torch.Tensor for weight in shared.values())
    for name, weight in weights.items():
        torch.testing.assert_close(shared[name], weight, rtol=1e-2, atol=1e-4)


def test_reinforcement_learning_of_two_ranks_goes_on_in_one_process(options, report_run, tmp_path):
    """Samples of each rank are of lengths of their own, and so are those of validation."""
    run_dir = tmp_path / "rl"
    # room for samples to end by themselves: those that do not earn nothing, and nothing is learnt if none does
    further = {"num_samples": 8, "max_report_tokens": 240, "reward_penalties": {}}
    further |= {"align_ckpt": str(report_run / "models" / "model.pt"), "learning_rate": 1e-3, "warmup_epochs": 0}
    files = config_files(ALIGN, RL, "_overlays/fsdp")
    two_ranks = options(run_dir, ranks=2, epochs=1, num_updates=2, **further)
    run_command(command(files, two_ranks, launcher=two_processes(29782)))
    trained = torch.load(run_dir / "models_rl" / "last.pt", weights_only=True)["model"]
    before = checkpoint_weights(report_run / "models" / "model.pt")
    assert trained.keys() == before.keys()
    changed = {name for name, weight in trained.items() if not torch.equal(weight, before[name])}
    assert changed and all("lora_" in name for name in changed)

    run(config_file=config_files(ALIGN, RL), **options(str(run_dir), resume=True, **further))
    epochs = json.loads((run_dir / "output_rl" / "history.json").read_text())
    assert [row["epoch"] for row in epochs] == [1, 2]
    assert epochs[0]["losses"]["without_lesson"] < 1 and 0 <= epochs[0]["validation"]["clinical_f1"] <= 1
