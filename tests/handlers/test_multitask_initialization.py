"""Joint training begins from four checkpoints of one encoder, or not at all."""

import copy
import logging

import pytest
import torch
from ignite.engine import Engine

from tests.networks.tiny_multitask import tiny_multitask, tiny_vision
from tests.tiny_language_model import make_tiny_language_model
from vlm3d_ext.checkpoint_files import CheckpointError
from vlm3d_ext.handlers import MultiTaskInitialization

PARTS = ("encoder", "classification", "localization", "report_generation")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return make_tiny_language_model(tmp_path_factory.mktemp("language_model") / "tiny", max_positions=2048)


@pytest.fixture
def network(language_model):
    """The joint network before training, with weights that no checkpoint has."""
    network = tiny_multitask(language_model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    return network


@pytest.fixture
def upstream(language_model):
    """State dicts of the four bundles."""
    vision = tiny_vision()
    modules = {
        "encoder": vision.encoder,
        "classification": vision.classifier,
        "localization": vision.localizer,
        "report_generation": tiny_multitask(language_model).report_generation,
    }
    return {part: copy.deepcopy(module.state_dict()) for part, module in modules.items()}


def write(folder, upstream, **entries):
    paths = {part: folder / f"{part}.pt" for part in PARTS}
    for part, path in paths.items():
        torch.save({"model": upstream[part], **entries.get(part, {})}, path)
    return paths


class Refusal:
    def load_state_dict(self, state):
        raise ValueError(f"refused: {state['name']}")


def weights_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_untouched(network, before):
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_every_part_gets_its_bundle_s_weights_when_the_engine_starts(tmp_path, network, upstream, caplog):
    handler = MultiTaskInitialization(network, write(tmp_path, upstream))
    handler.check_file()
    handler.check_encoders()
    engine = Engine(lambda engine, batch: None)
    engine.logger.setLevel(logging.INFO)
    handler.attach(engine)
    engine.run([0])
    for part in PARTS:
        found = getattr(network, part).state_dict()
        assert all(torch.equal(found[name], value) for name, value in upstream[part].items()), part
    assert network.classification.encoder is network.localization.encoder is network.encoder


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_file_is_named_with_its_command(tmp_path, network, upstream, part):
    paths = write(tmp_path, upstream)
    paths[part].unlink()
    with pytest.raises(FileNotFoundError) as raised:
        MultiTaskInitialization(network, paths).check_file()
    message = str(raised.value)
    assert str(paths[part]) in message and f"bundles/{part}/configs/train.json" in message
    assert f"--{part}_ckpt" in message


@pytest.mark.parametrize("part", ["classification", "localization"])
def test_one_other_number_in_a_head_s_encoder_is_enough(tmp_path, network, upstream, part):
    name = "encoder.norm.weight"
    upstream[part][name][0] += 1e-6
    paths, before = write(tmp_path, upstream), weights_of(network)
    handler = MultiTaskInitialization(network, paths)
    number = len(upstream["encoder"])
    for refused in (handler.check_encoders, lambda: handler.load(logging.getLogger())):
        with pytest.raises(CheckpointError) as raised:
            refused()
        message = str(raised.value)
        assert message.startswith(f"{paths[part]}: its encoder is not the one in {paths['encoder']}: ")
        assert f"1 of {number} tensors differ, norm.weight first" in message
        assert f"train {part} on this encoder with --train_encoder False" in message and f"--{part}_ckpt." in message
    assert_untouched(network, before)


def test_a_head_without_the_encoder_and_a_file_without_a_model(tmp_path, network, upstream):
    bare = {name: value for name, value in upstream["localization"].items() if not name.startswith("encoder.")}
    handler = MultiTaskInitialization(network, write(tmp_path, {**upstream, "localization": bare}))
    number = len(upstream["encoder"])
    with pytest.raises(CheckpointError, match=rf"{number} of {number} tensors differ"):
        handler.check_encoders()
    for part in PARTS[:3]:
        paths = write(tmp_path, upstream)
        torch.save({"optimizer": {}}, paths[part])
        with pytest.raises(CheckpointError, match=rf"{part}\.pt has no entry 'model'.*--{part}_ckpt PATH"):
            MultiTaskInitialization(network, paths).check_encoders()


def test_parts_of_other_sizes_are_refused(tmp_path, network, upstream):
    name = next(name for name in upstream["report_generation"] if name.endswith("queries"))
    upstream["report_generation"][name] = torch.zeros(1, 5, 24)
    with pytest.raises(CheckpointError, match=r"report_generation\.pt do not fit .*--report_generation_ckpt"):
        MultiTaskInitialization(network, write(tmp_path, upstream)).load(logging.getLogger())


@pytest.mark.parametrize("part", PARTS)
def test_what_a_check_refuses_is_not_loaded(tmp_path, network, upstream, part):
    paths = write(tmp_path, upstream, **{part: {"record": {"name": "another set"}}})
    before = weights_of(getattr(network, part))
    handler = MultiTaskInitialization(network, paths, {part: {"record": Refusal()}})
    with pytest.raises(ValueError, match="refused: another set"):
        handler.load(logging.getLogger())
    # the encoder is shared, and was loaded before the heads' turn
    own = {name: value for name, value in before.items() if part == "encoder" or not name.startswith("encoder.")}
    found = getattr(network, part).state_dict()
    assert all(torch.equal(found[name], value) for name, value in own.items())
