import logging

import pytest
import torch
from ignite.engine import Engine

from tests.tiny_text_model import make_tiny_text_model
from vlm3d_ext.handlers import DiseaseTextInitialization
from vlm3d_ext.networks.blocks import PromptedTextEncoder, TextEmbedder
from vlm3d_ext.text.disease_set import load_disease_set


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    texts = [disease.description for disease in load_disease_set().diseases]
    folder = make_tiny_text_model(tmp_path_factory.mktemp("text") / "bert", max_positions=96, texts=texts)
    return PromptedTextEncoder(str(folder))


def trainer_of(embedder, text_encoder):
    engine = Engine(lambda *_: None)
    engine.logger.setLevel(logging.INFO)
    DiseaseTextInitialization(embedder, text_encoder).attach(engine)
    return engine


def test_descriptions_are_embedded_when_training_starts(text_encoder, caplog):
    embedder = TextEmbedder(text_hidden_size=16, hidden_size=8)
    trainer = trainer_of(embedder, text_encoder)
    assert not embedder.embeddings.any()  # nothing before the start
    with caplog.at_level(logging.INFO):
        trainer.run([0, 1], max_epochs=2)
    expected = text_encoder.embed_findings(load_disease_set().findings(), use_negative=False).positive
    torch.testing.assert_close(embedder.embeddings, expected)
    assert len({tuple(row) for row in embedder.embeddings.tolist()}) == 5
    assert bytes(embedder.text_encoder_sha256.tolist()).hex() == text_encoder.embeddings_sha256
    assert caplog.text.count("5 disease descriptions embedded by ") == 1


def test_they_are_of_the_descriptions_and_not_of_the_names(text_encoder):
    """The rows follow the set's order, and each is what its own description alone gives."""
    embedder = TextEmbedder(text_hidden_size=16, hidden_size=8)
    trainer_of(embedder, text_encoder).run([0])
    for row, finding in zip(embedder.embeddings, load_disease_set().findings(), strict=True):
        alone = text_encoder.embed_findings([finding], use_negative=False).positive[0]
        torch.testing.assert_close(row, alone, atol=1e-5, rtol=1e-4)


def test_a_text_encoder_of_another_width_is_refused_before_the_first_step(text_encoder):
    embedder = TextEmbedder(text_hidden_size=24, hidden_size=8)
    with pytest.raises(ValueError, match=r"has 16 channels, .* for 24; set --text_hidden_size 16"):
        trainer_of(embedder, text_encoder).run([0])
