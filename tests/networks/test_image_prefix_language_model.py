"""Sharing a prompt's computation changes nothing, and the base model never changes."""

import copy

import pytest
import torch

from tests.tiny_language_model import make_tiny_language_model
from vlm3d_ext.networks.nets.image_prefix_language_model import ImagePrefixLanguageModel
from vlm3d_ext.text.report_prompt import IMAGE_MARKER

PROMPTS = [f"{IMAGE_MARKER}\nnodule 7 mm, right\nReport:", f"See {IMAGE_MARKER} effusion and more words here\nReport:"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_language_model(tmp_path_factory.mktemp("language_model") / "tiny", max_positions=512)


def make_model(folder, **settings):
    settings = {"dtype": "float32", "lora_rank": 4, "max_prompt_tokens": 128, "max_report_tokens": 24, **settings}
    model = ImagePrefixLanguageModel(str(folder), **settings)
    generator = torch.Generator().manual_seed(1)
    for weight in model.adapters.values():  # adapters begin with an output of zero, which would hide them
        weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    return model


def make_prompts(model, num_queries=5):
    prefix = torch.randn(2, num_queries, model.hidden_size, generator=torch.Generator().manual_seed(0))
    return model.embed_prompts(prefix, PROMPTS)


def random_samples(model, num_samples=3, length=7):
    generator = torch.Generator().manual_seed(2)
    token_ids = torch.randint(0, 200, (2 * num_samples, length), generator=generator)
    lengths = torch.randint(1, length + 1, (2 * num_samples, 1), generator=generator)
    return token_ids, torch.arange(length) < lengths


def test_the_image_stands_where_its_marker_is(folder):
    model = make_model(folder, lora_rank=0)
    prefix = torch.randn(2, 5, model.hidden_size)
    with_image, without = model.embed_prompts(prefix, PROMPTS), model.embed_prompts(None, PROMPTS)
    for row in range(2):
        real = with_image.embeddings[row][with_image.mask[row]]
        text = without.embeddings[row][without.mask[row]]
        found = [n for n in range(len(real)) if torch.equal(real[n : n + 5], prefix[row])]
        assert len(found) == 1
        torch.testing.assert_close(torch.cat([real[: found[0]], real[found[0] + 5 :]]), text, rtol=0, atol=0)


def test_log_probabilities_with_a_shared_prompt_equal_those_without(folder):
    model = make_model(folder)
    prompts = make_prompts(model)
    token_ids, mask = random_samples(model)
    shared = model.log_probabilities(prompts, token_ids, mask)
    unshared = model.log_probabilities(prompts, token_ids, mask, share_prefix=False)
    torch.testing.assert_close(shared, unshared, rtol=1e-5, atol=1e-5)
    assert (shared[~mask] == 0).all() and (shared[mask] < 0).all()


def test_gradients_with_a_shared_prompt_equal_those_without(folder):
    gradients = []
    for share in (True, False):
        model = make_model(folder)
        token_ids, mask = random_samples(model)
        weights = torch.linspace(-1, 1, mask.numel()).view(mask.shape)
        (model.log_probabilities(make_prompts(model), token_ids, mask, share_prefix=share) * weights).sum().backward()
        gradients.append([weight.grad for weight in model.adapters.values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        assert one.abs().max() > 0


def test_gradients_reach_the_image(folder):
    model = make_model(folder)
    prefix = torch.randn(2, 5, model.hidden_size, requires_grad=True)
    token_ids, mask = random_samples(model)
    model.log_probabilities(model.embed_prompts(prefix, PROMPTS), token_ids, mask).sum().backward()
    assert (prefix.grad.abs().sum(-1) > 0).all()


def test_a_prompt_does_not_depend_on_the_others_of_its_batch(folder):
    model = make_model(folder)
    prompts = make_prompts(model)
    token_ids, mask = random_samples(model, num_samples=1)
    together = model.log_probabilities(prompts, token_ids, mask)
    prefix = torch.randn(2, 5, model.hidden_size, generator=torch.Generator().manual_seed(0))
    for row in range(2):
        alone = model.embed_prompts(prefix[row : row + 1], PROMPTS[row : row + 1])
        got = model.log_probabilities(alone, token_ids[row : row + 1], mask[row : row + 1])
        torch.testing.assert_close(got[0], together[row], rtol=1e-5, atol=1e-5)


def test_log_probabilities_are_those_of_the_softmax(folder):
    model = make_model(folder, lora_rank=0)
    prompts = make_prompts(model)
    token_ids, mask = random_samples(model, num_samples=1)
    row, real = 1, prompts.mask[1]
    tokens = model.model.get_input_embeddings()(token_ids[row])
    logits = model.model(inputs_embeds=torch.cat([prompts.embeddings[row][real], tokens])[None]).logits[0]
    first = int(real.sum()) - 1
    wanted = torch.stack([logits[first + n].log_softmax(-1)[token_ids[row, n]] for n in range(token_ids.shape[1])])
    got = model.log_probabilities(prompts, token_ids, mask)[row]
    torch.testing.assert_close(got, wanted.masked_fill(~mask[row], 0), rtol=1e-5, atol=1e-5)
    warm = model.log_probabilities(prompts, token_ids, mask, temperature=2.0)[row, 0]
    torch.testing.assert_close(warm, (logits[first] / 2).log_softmax(-1)[token_ids[row, 0]])


def greedy_by_hand(model, prompts, row, num_tokens):
    """Read everything again for each token: no cache, no library's generation."""
    embeddings = prompts.embeddings[row][prompts.mask[row]][None]
    tokens = []
    for _ in range(num_tokens):
        token = int(model.model(inputs_embeds=embeddings, use_cache=False).logits[0, -1].argmax())
        tokens.append(token)
        if token == model.tokenizer.eos_token_id:
            break
        embeddings = torch.cat([embeddings, model.model.get_input_embeddings()(torch.tensor([[token]]))], dim=1)
    return tokens


@torch.no_grad()
def test_greedy_texts_are_the_same_with_and_without_cache_and_with_sharing(folder):
    model = make_model(folder)
    prompts = make_prompts(model)
    shared = model.generate(prompts, max_new_tokens=20)
    unshared = model.generate(prompts, max_new_tokens=20, share_prefix=False)
    uncached = model.generate(prompts, max_new_tokens=20, share_prefix=False, use_cache=False)
    assert torch.equal(shared.token_ids, unshared.token_ids) and torch.equal(shared.token_ids, uncached.token_ids)
    for row in range(2):
        assert shared.token_ids[row][shared.mask[row]].tolist() == greedy_by_hand(model, prompts, row, 20)


def test_samples_of_one_prompt_share_it_token_by_token(folder):
    """At a temperature near zero each sample is the greedy text, so sharing the prompt has changed nothing."""
    model = make_model(folder)
    prompts = make_prompts(model)
    greedy = model.generate(prompts, max_new_tokens=12)
    sampled = model.generate(prompts, num_samples=3, max_new_tokens=12, do_sample=True, temperature=1e-4)
    assert torch.equal(sampled.token_ids, greedy.token_ids.repeat_interleave(3, 0))


def test_samples_differ_by_seed_and_are_the_same_for_one(folder):
    model = make_model(folder)
    prompts = make_prompts(model)

    def draw(seed, **settings):
        torch.manual_seed(seed)
        return model.generate(prompts, num_samples=4, max_new_tokens=10, do_sample=True, **settings)

    assert torch.equal(draw(0).token_ids, draw(0).token_ids)
    assert not torch.equal(draw(0).token_ids, draw(1).token_ids)
    assert torch.equal(draw(0).token_ids, draw(0, share_prefix=False).token_ids)
    assert len(set(draw(0).texts[:4])) > 1


def test_beams_are_those_without_sharing(folder):
    model = make_model(folder)
    prompts = make_prompts(model)
    shared = model.generate(prompts, max_new_tokens=10, num_beams=3)
    unshared = model.generate(prompts, max_new_tokens=10, num_beams=3, share_prefix=False)
    assert shared.texts == unshared.texts and len(shared.texts) == 2


def test_several_greedy_samples_are_refused(folder):
    model = make_model(folder)
    with pytest.raises(ValueError, match="all alike"):
        model.generate(make_prompts(model), num_samples=2)


def test_texts_end_where_their_end_token_is(folder):
    model = make_model(folder)
    token_ids, mask = model.encode_reports(["one nodule", "a much longer report about an effusion"])
    assert (token_ids[0][mask[0]] == model.tokenizer.eos_token_id).sum() == 1
    assert token_ids[0][mask[0]][-1] == model.tokenizer.eos_token_id
    assert mask.sum(1).tolist() != [mask.shape[1]] * 2
    assert model.num_cut_reports == 1 and len(token_ids[1]) == 24  # spelt in bytes it takes more
    assert model.tokenizer.eos_token_id not in token_ids[1]


def test_training_changes_the_adapters_and_not_the_base(folder):
    model = make_model(folder)
    before, adapters = model.base_sha256, copy.deepcopy(model.adapters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    token_ids, mask = random_samples(model)
    for _ in range(2):
        optimizer.zero_grad()
        model.log_probabilities(make_prompts(model), token_ids, mask).sum().backward()
        optimizer.step()
    assert model.base_sha256 == before
    assert all(not torch.equal(weight, adapters[name]) for name, weight in model.adapters.items())
    assert {id(weight) for weight in model.parameters()} == {id(weight) for weight in model.adapters.values()}
    assert all("lora_" in name for name in model.state_dict())


def test_adapters_of_a_state_dict_act_in_another_instance(folder):
    model, other = (
        make_model(folder),
        ImagePrefixLanguageModel(
            str(folder), dtype="float32", lora_rank=4, max_prompt_tokens=128, max_report_tokens=24
        ),
    )
    token_ids, mask = random_samples(model)
    wanted = model.log_probabilities(make_prompts(model), token_ids, mask)
    assert not torch.allclose(other.log_probabilities(make_prompts(other), token_ids, mask), wanted, atol=1e-3)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.log_probabilities(make_prompts(other), token_ids, mask), wanted)


def test_the_reference_is_the_policy_that_was_kept(folder):
    model = make_model(folder)
    prompts, (token_ids, mask) = make_prompts(model), random_samples(model)
    kept = model.log_probabilities(prompts, token_ids, mask).detach()
    model.keep_reference()
    with torch.no_grad():
        for weight in model.adapters.values():
            weight += 0.05
    now = model.log_probabilities(prompts, token_ids, mask)
    with model.reference_policy():
        reference = model.log_probabilities(prompts, token_ids, mask)
    torch.testing.assert_close(reference, kept)
    assert not reference.requires_grad
    torch.testing.assert_close(model.log_probabilities(prompts, token_ids, mask), now)
    now.sum().backward()  # the graph of the policy has survived the exchange
    assert all(weight.grad is not None for weight in model.adapters.values())


def test_a_reference_of_fresh_adapters_is_the_model_without_them(folder):
    model = ImagePrefixLanguageModel(str(folder), dtype="float32", lora_rank=4, max_report_tokens=24)
    plain = make_model(folder, lora_rank=0)
    model.keep_reference()
    with torch.no_grad():
        for weight in model.adapters.values():
            weight += 0.1
    token_ids, mask = random_samples(model)
    with model.reference_policy():
        got = model.log_probabilities(make_prompts(model), token_ids, mask)
    torch.testing.assert_close(got, plain.log_probabilities(make_prompts(plain), token_ids, mask))


def test_no_reference_is_an_error(folder):
    with pytest.raises(RuntimeError, match="keep_reference"), make_model(folder).reference_policy():
        pass


def test_recomputation_gives_the_same_numbers(folder):
    model, plain = make_model(folder, gradient_checkpointing=True).train(), make_model(folder).train()
    token_ids, mask = random_samples(model)
    gradients = []
    for one in (model, plain):
        one.log_probabilities(make_prompts(one), token_ids, mask).sum().backward()
        gradients.append([weight.grad for weight in one.adapters.values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"quantization": "nf4"}])
def test_other_precisions_write_and_learn(folder, settings):
    if "quantization" in settings:
        pytest.importorskip("bitsandbytes")
    model = make_model(folder, **settings)
    assert model.num_base_parameters == make_model(folder, lora_rank=0).num_base_parameters
    prompts, (token_ids, mask) = make_prompts(model), random_samples(model)
    close = make_model(folder).log_probabilities(make_prompts(make_model(folder)), token_ids, mask)
    before = model.base_sha256
    got = model.log_probabilities(prompts, token_ids, mask)
    assert (got - close).abs().mean() < 0.2 * close.abs().mean()
    got.sum().backward()
    assert all(weight.grad is not None and weight.dtype == torch.float32 for weight in model.adapters.values())
    assert len(model.generate(prompts, max_new_tokens=4).texts) == 2
    assert model.base_sha256 == before


def test_without_chat_template_or_padding_token(tmp_path):
    folder = make_tiny_language_model(
        tmp_path / "plain", with_chat_template=False, with_pad_token=False, max_positions=512
    )
    model = make_model(folder)
    prompts = make_prompts(model)
    parts = ["See", "effusion and more words here\nReport:\n"]  # plain text: no role, a line break at the end
    num_tokens = sum(len(model.tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts)
    assert prompts.mask[1].sum() == 1 + num_tokens + 5  # one token begins the text
    assert model.generate(prompts, max_new_tokens=3).token_ids.shape[0] == 2


def test_a_prompt_that_does_not_fit_is_refused(folder):
    with pytest.raises(ValueError, match="max_prompt_tokens"):
        make_prompts(make_model(folder, max_prompt_tokens=10))
    with pytest.raises(ValueError, match="do not fit the 512 positions"):
        make_prompts(make_model(folder, max_report_tokens=500))


def test_layers_that_do_not_exist_are_named(folder):
    with pytest.raises(ValueError, match="no layers named query_key_value"):
        make_model(folder, lora_targets=["q_proj", "query_key_value"])
