import io
import json

import pytest
import torch
from monai.bundle import ConfigParser

from tests.handlers.tiny_trainer import make_trainer
from vlm3d_ext.handlers.lineage import LineageHandler
from vlm3d_ext.lineage import Lineage, LineageError


@pytest.fixture
def files(tmp_path):
    """A manifest, two encoders trained on it, and a bare checkpoint."""
    (tmp_path / "manifest.json").write_text(json.dumps({"fingerprint": "f" * 64, "label_set": "ct_rate_18"}))
    for name in ("first", "second"):
        lineage = Lineage("encoder", "0.1.0", name, manifest=tmp_path / "manifest.json")
        torch.save({"model": {}, "lineage": lineage.state_dict()}, tmp_path / f"{name}.pt")
    torch.save({"model": {}}, tmp_path / "bare.pt")
    return tmp_path


def _run(handler):
    make_trainer(handler, epochs=1).run()


def test_one_block_tells_what_was_loaded_and_what_runs(files):
    stream = io.StringIO()
    this = Lineage("classification", "0.2.0", "training", upstream={"encoder": files / "first.pt"})
    _run(LineageHandler(this, {"encoder": files / "first.pt"}, stream=stream))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Lineage" and all(line.startswith("  ") for line in lines[1:])
    assert lines[1].startswith(f"  loaded encoder from {files / 'first.pt'} (sha256 ")
    assert lines[1].endswith(": encoder 0.1.0, phase first")
    assert "  this run: classification 0.2.0, phase training" in lines
    assert sum("fingerprint ffffffffffff" in line for line in lines) == 2


def test_a_chain_that_does_not_fit_stops_the_run_before_its_first_iteration(files):
    this = Lineage("classification", "0.2.0", "training", upstream={"encoder": files / "first.pt"})
    trainer = make_trainer(LineageHandler(this, {"encoder": files / "second.pt"}))
    with pytest.raises(LineageError, match="2 different encoder checkpoints"):
        trainer.run()
    assert trainer.state.iteration == 0
    stream = io.StringIO()
    _run(LineageHandler(this, {"encoder": files / "second.pt"}, allow_mismatch=True, stream=stream))
    assert "phase second" in stream.getvalue()


def test_a_checkpoint_without_lineage(files):
    with pytest.raises(LineageError, match=r"bare\.pt carries no lineage"):
        _run(LineageHandler(checkpoints={"encoder": files / "bare.pt"}))
    stream = io.StringIO()
    _run(LineageHandler(checkpoints={"encoder": files / "bare.pt"}, allow_mismatch=True, stream=stream))
    assert stream.getvalue().rstrip().endswith(": no lineage")
    with pytest.raises(ValueError, match="got neither"):
        LineageHandler()


def test_other_ranks_are_silent(files, monkeypatch):
    monkeypatch.setattr("vlm3d_ext.handlers.lineage.idist.get_rank", lambda: 1)
    stream = io.StringIO()
    _run(LineageHandler(checkpoints={"encoder": files / "first.pt"}, stream=stream))
    assert stream.getvalue() == ""


def test_all_handlers_can_be_written_in_a_config(files):
    config = {
        "lineage": {"_target_": "vlm3d_ext.lineage.Lineage", "bundle": "encoder", "version": "0.1.0", "phase": "p"},
        "handlers": [
            {"_target_": "vlm3d_ext.handlers.LineageHandler", "lineage": "@lineage"},
            {"_target_": "vlm3d_ext.handlers.GradientClipping", "max_norm": 1.0},
            {"_target_": "vlm3d_ext.handlers.ProgressBar", "name": "train"},
            {"_target_": "vlm3d_ext.handlers.IterationSeed", "seed": 0},
        ],
    }
    trainer = make_trainer(*ConfigParser(config).get_parsed_content("handlers"), epochs=1)
    trainer.run()
    assert trainer.state.metrics["gradient_norm"] > 0
