import json
import os

import pytest
import torch
from torch import nn

from vlm3d_ext.checkpoint_files import CheckpointError
from vlm3d_ext.engines.torch_export import export_network, main
from vlm3d_ext.networks.nets import RegionTokenEncoder

SMALL = {
    "patch_size": [2, 4, 4],
    "hidden_size": 24,
    "num_layers": 1,
    "num_heads": 3,
    "num_depth_heads": 1,
    "mlp_dim": 16,
}
SHAPE = (1, 4, 8, 8)


def _encoder(seed=0):
    torch.manual_seed(seed)
    return RegionTokenEncoder(**SMALL).eval()


@pytest.mark.parametrize("shape", [SHAPE, (1, 5, 9, 10)])
def test_the_written_program_agrees_with_the_network_for_any_batch(tmp_path, shape):
    """Also where the network fills the last patches."""
    network = _encoder()
    export_network(network, torch.rand(2, *shape), tmp_path / "encoder.pt2", {"config.json": "{}"})
    extra = {"config.json": ""}
    program = torch.export.load(tmp_path / "encoder.pt2", extra_files=extra).module()
    assert extra["config.json"] == "{}"
    for batch in (1, 3):
        image = torch.rand(batch, *shape)
        with torch.no_grad():
            torch.testing.assert_close(program(image), network(image), rtol=1e-4, atol=1e-5)
    assert os.listdir(tmp_path) == ["encoder.pt2"]


def test_an_example_of_one_is_refused(tmp_path):
    """It would fix the batch size to one without a word."""
    with pytest.raises(ValueError, match=r"batch of at least 2.*got shape \(1, 1, 4, 8, 8\)"):
        export_network(_encoder(), torch.rand(1, *SHAPE), tmp_path / "encoder.pt2")


class _OtherwiseWhenExported(nn.Module):
    def forward(self, x):
        return x + 0.5 if torch.compiler.is_exporting() else x


def test_a_program_that_disagrees_is_not_written(tmp_path):
    with pytest.raises(RuntimeError, match=r"differs from the network by up to 0\.5; .*x\.pt2 was not written"):
        export_network(_OtherwiseWhenExported(), torch.rand(2, 3), tmp_path / "x.pt2")
    assert os.listdir(tmp_path) == []


class _TwoOutputs(nn.Module):
    def __init__(self, disagreement=0.0):
        super().__init__()
        self.disagreement = disagreement

    def forward(self, x):
        return x.mean(1), x * 2 + (self.disagreement if torch.compiler.is_exporting() else 0.0)


def test_a_network_may_return_several_tensors(tmp_path):
    export_network(_TwoOutputs(), torch.rand(2, 3), tmp_path / "x.pt2")
    batch = torch.rand(5, 3)
    mean, double = torch.export.load(tmp_path / "x.pt2").module()(batch)
    torch.testing.assert_close(mean, batch.mean(1))
    torch.testing.assert_close(double, batch * 2)
    with pytest.raises(RuntimeError, match=r"by up to 0\.25 in output 1; .*y\.pt2 was not written"):
        export_network(_TwoOutputs(0.25), torch.rand(2, 3), tmp_path / "y.pt2")


@pytest.fixture
def command(tmp_path):
    config = {"export_network": {"_target_": "vlm3d_ext.networks.nets.RegionTokenEncoder", **SMALL}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"model": _encoder(seed=7).state_dict()}, tmp_path / "model.pt")
    return {
        "--config_file": str(tmp_path / "config.json"),
        "--ckpt_file": str(tmp_path / "model.pt"),
        "--input_shape": "2,1,4,8,8",
        "--filepath": str(tmp_path / "out" / "encoder.pt2"),
    }


def _arguments(command):
    return [word for pair in command.items() for word in pair]


def test_command_line(command, capsys):
    main(_arguments(command))
    assert capsys.readouterr().out == f"wrote {command['--filepath']}\n"
    extra = {"config.json": ""}
    program = torch.export.load(command["--filepath"], extra_files=extra).module()
    assert json.loads(extra["config.json"])["export_network"]["hidden_size"] == 24
    image = torch.rand(1, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(program(image), _encoder(seed=7)(image), rtol=1e-4, atol=1e-5)


def test_weights_that_do_not_fit_are_refused(command, tmp_path):
    torch.save({"model": nn.Linear(2, 2).state_dict()}, tmp_path / "other.pt")
    command["--ckpt_file"] = str(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"do not fit RegionTokenEncoder.*--ckpt_file PATH"):
        main(_arguments(command))
    assert not os.path.exists(command["--filepath"])
