"""The reference is what the adapters are after loading and before resuming."""

import pytest
import torch
from ignite.engine import Engine, Events

from tests.tiny_language_model import make_tiny_language_model
from vlm3d_ext.handlers import ReferencePolicy
from vlm3d_ext.networks.nets import ImagePrefixLanguageModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_language_model(tmp_path_factory.mktemp("language_model") / "tiny", hidden_size=16, num_layers=1)


def fill(value):
    """Return a handler that sets every adapter of a model, as loading a checkpoint or a training step does."""

    def handler(engine, model):
        for weight in model.adapters.values():
            weight.data.fill_(value)

    return handler


def values_of(model):
    return {round(float(value), 3) for weight in model.adapters.values() for value in weight.detach().flatten()}


def run(folder, epochs=2):
    """Load 0.1, keep the reference, resume with 0.2, train to 0.3."""
    model = ImagePrefixLanguageModel(str(folder), dtype="float32", lora_rank=2, max_report_tokens=8)
    trainer = Engine(lambda engine, batch: None)
    trainer.add_event_handler(Events.STARTED, fill(0.1), model)
    ReferencePolicy(model).attach(trainer)
    trainer.add_event_handler(Events.STARTED, fill(0.2), model)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, fill(0.3), model)
    trainer.run([0, 1, 2], max_epochs=epochs)
    return model


def test_the_reference_is_kept_after_loading_and_before_resuming(folder):
    model = run(folder)
    assert values_of(model) == {0.3}
    with model.reference_policy():
        assert values_of(model) == {0.1}
    assert values_of(model) == {0.3}


def test_the_reference_answers_as_the_loaded_adapters_do(folder):
    model = run(folder)
    prompts = model.embed_prompts(None, ["<image>\nReport:"])
    token_ids = torch.tensor([[20, 30, 40]])
    mask = torch.ones_like(token_ids, dtype=torch.bool)
    with model.reference_policy():
        reference = model.log_probabilities(prompts, token_ids, mask)
    now = model.log_probabilities(prompts, token_ids, mask)
    assert not torch.allclose(now, reference, atol=1e-2)
    fill(0.1)(None, model)
    torch.testing.assert_close(model.log_probabilities(prompts, token_ids, mask).detach(), reference)
