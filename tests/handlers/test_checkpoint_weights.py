import pytest
import torch
from torch import nn

from tests.handlers.tiny_trainer import make_trainer
from vlm3d_ext.checkpoint_files import CheckpointError
from vlm3d_ext.handlers import CheckpointWeights
from vlm3d_ext.text.label_record import LabelRecord


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(5)
    parts = {"model": nn.Linear(3, 1), "heads": nn.Linear(2, 2)}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "model.pt")
    return tmp_path / "model.pt", parts


def test_weights_are_there_before_the_first_iteration(checkpoint):
    path, parts = checkpoint
    network, heads = nn.Linear(3, 1), nn.Linear(2, 2)
    handler = CheckpointWeights(path, {"model": network, "heads": heads})
    assert not torch.equal(network.weight, parts["model"].weight)  # nothing happens before the engine starts
    make_trainer(handler, network=network, epochs=1, learning_rate=0.0).run()
    assert torch.equal(network.weight, parts["model"].weight) and torch.equal(heads.bias, parts["heads"].bias)


def test_a_missing_file_is_named_with_the_option_and_the_command(tmp_path):
    handler = CheckpointWeights(tmp_path / "model.pt", {"model": nn.Linear(3, 1)}, "encoder_ckpt", "make encoder")
    trainer = make_trainer(handler)
    with pytest.raises(FileNotFoundError, match=r"model\.pt does not exist\..*make encoder.*--encoder_ckpt PATH"):
        trainer.run()
    assert trainer.state.iteration == 0


def test_weights_that_do_not_fit_change_nothing(checkpoint):
    path, _ = checkpoint
    network = nn.Linear(4, 1)
    before = network.weight.clone()
    with pytest.raises(CheckpointError, match=r"weight is \(1, 3\) in the file and \(1, 4\) here"):
        make_trainer(CheckpointWeights(path, {"model": network})).run()
    assert torch.equal(network.weight, before)
    with pytest.raises(CheckpointError, match="no entry 'classifier'"):
        make_trainer(CheckpointWeights(path, {"classifier": network})).run()


@pytest.fixture
def labelled_checkpoint(tmp_path):
    torch.manual_seed(5)
    model = nn.Linear(3, 1)
    torch.save({"model": model.state_dict(), "labels": LabelRecord("ct_rate_18").state_dict()}, tmp_path / "model.pt")
    return tmp_path / "model.pt", model


def test_a_checkpoint_of_the_same_labels_is_loaded(labelled_checkpoint):
    path, model = labelled_checkpoint
    network = nn.Linear(3, 1)
    handler = CheckpointWeights(path, {"model": network}, checks={"labels": LabelRecord("ct_rate_18")})
    make_trainer(handler, network=network, epochs=1, learning_rate=0.0).run()
    assert torch.equal(network.weight, model.weight)


def test_a_checkpoint_of_other_labels_is_refused_before_any_weight_is_loaded(labelled_checkpoint):
    """Both sets have 18 findings, so that the shapes fit."""
    path, _ = labelled_checkpoint
    network = nn.Linear(3, 1)
    before = network.weight.clone()
    trainer = make_trainer(
        CheckpointWeights(path, {"model": network}, checks={"labels": LabelRecord("vlm3d_18")}), network=network
    )
    with pytest.raises(ValueError, match=r"model\.pt: the checkpoint is of label set ct_rate_18.*choose --label_set"):
        trainer.run()
    assert torch.equal(network.weight, before) and trainer.state.iteration == 0


def test_a_checkpoint_that_does_not_say_its_labels_is_refused(checkpoint):
    path, _ = checkpoint
    network = nn.Linear(3, 1)
    before = network.weight.clone()
    handler = CheckpointWeights(path, {"model": network}, command="make it", checks={"labels": LabelRecord("vlm3d_18")})
    with pytest.raises(CheckpointError, match=r"has no entry 'labels'; it has \['heads', 'model'\].*make it.*--ckpt"):
        make_trainer(handler, network=network).run()
    assert torch.equal(network.weight, before)
