import hashlib
import json
from dataclasses import asdict

import pytest
import torch

from tests.tiny_text_model import make_tiny_text_model
from vlm3d_ext.networks.blocks import PromptedTextEncoder, TextEmbedder
from vlm3d_ext.text.disease_set import load_disease_set

DISEASES = load_disease_set("chest_ct_5").diseases


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    texts = [disease.description for disease in DISEASES]
    folder = tmp_path_factory.mktemp("text")
    return PromptedTextEncoder(str(make_tiny_text_model(folder, max_positions=256, texts=texts)))


def _set_of(path, diseases):
    content = {"name": path.stem, "label_set": "vlm3d_18", "diseases": [asdict(disease) for disease in diseases]}
    path.write_text(json.dumps(content))
    return str(path)


def test_embeddings_are_those_of_the_descriptions(text_encoder):
    embedder = TextEmbedder(text_hidden_size=16, hidden_size=8)
    embedder.compute(text_encoder)
    for disease, embedding in zip(DISEASES, embedder.embeddings, strict=True):
        tokens = text_encoder.tokenizer(disease.description, return_tensors="pt")
        expected = text_encoder(tokens["input_ids"], tokens["attention_mask"])[0]
        torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-5)
    assert bytes(embedder.text_encoder_sha256.tolist()).hex() == text_encoder.embeddings_sha256
    assert len(text_encoder.embeddings_sha256) == 2 * hashlib.sha256().digest_size


def test_projection_sees_centred_embeddings_of_unit_variance():
    embedder = TextEmbedder(text_hidden_size=3, hidden_size=3)
    torch.nn.init.eye_(embedder.projection.weight)
    torch.nn.init.zeros_(embedder.projection.bias)
    embedder.embeddings.copy_(7 + torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [-2, -2, -2], [0, 0, 0]]))
    centred = embedder.embeddings - 7  # their mean is zero
    torch.testing.assert_close(embedder(), centred / (24 / 15) ** 0.5)  # six squares of 4 among 15 numbers
    before = embedder()
    embedder.embeddings.mul_(0.01).add_(3)  # neither scale nor common part of a text encoder matters
    torch.testing.assert_close(embedder(), before, rtol=1e-3, atol=1e-4)


def test_order_of_the_set_is_the_order_of_the_texts(text_encoder, tmp_path):
    order = [3, 0, 4, 2, 1]
    torch.manual_seed(0)
    embedder = TextEmbedder(text_hidden_size=16, hidden_size=8)
    other = TextEmbedder(_set_of(tmp_path / "other.json", [DISEASES[i] for i in order]), 16, 8)
    other.load_state_dict(embedder.state_dict())
    embedder.compute(text_encoder)
    other.compute(text_encoder)
    torch.testing.assert_close(other(), embedder()[order], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(embedder()[0], embedder()[1], atol=1e-2)


def test_one_disease_has_a_text(text_encoder, tmp_path):
    """Nothing tells a single text from its mean: what is left is the projection's bias, not a division by zero."""
    embedder = TextEmbedder(_set_of(tmp_path / "one.json", DISEASES[-1:]), 16, 8)
    embedder.compute(text_encoder)
    torch.testing.assert_close(embedder(), embedder.projection.bias[None])


def test_texts_travel_in_the_state_dict(text_encoder):
    embedder = TextEmbedder(text_hidden_size=16, hidden_size=8)
    embedder.compute(text_encoder)
    torch.manual_seed(1)
    fresh = TextEmbedder(text_hidden_size=16, hidden_size=8)
    fresh.load_state_dict(embedder.state_dict())
    assert torch.equal(fresh(), embedder())
    assert {name for name, _ in embedder.named_parameters()} == {"projection.weight", "projection.bias"}


def test_text_encoder_of_other_width_is_refused(text_encoder):
    with pytest.raises(ValueError, match=r"has 16 channels.*built for 32; set --text_hidden_size 16"):
        TextEmbedder(text_hidden_size=32).compute(text_encoder)
