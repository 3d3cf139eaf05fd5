"""The checkpoint holds projector and adapters alone, training learns to read the image, and the policy's gradient."""

import copy
import math

import pytest
import torch

from tests.tiny_language_model import make_tiny_language_model
from vlm3d_ext.networks.blocks import VisionToLLMProjector
from vlm3d_ext.networks.nets import ImagePrefixLanguageModel, PolicyTraining, ReportGenerator, ReportTraining
from vlm3d_ext.networks.nets.report_generator import PrefixEmbeddings

CHANNELS, REGIONS, TOKENS = 6, 3, 5
REPORTS = ["Findings: nodule in the right lung.", "Findings: normal."]
PROMPT = "<image>\nReport:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    words = ("nodule", "in", "the", "right", "lung", "normal", "effusion")
    return make_tiny_language_model(tmp_path_factory.mktemp("language_model") / "tiny", words=words)


def make_generator(folder, seed=0, lora_rank=4, generation=None, **settings):
    torch.manual_seed(seed)
    model = ImagePrefixLanguageModel(
        str(folder), dtype="float32", lora_rank=lora_rank, lora_alpha=2 * lora_rank, max_prompt_tokens=64,
        max_report_tokens=48, **settings,
    )  # fmt: skip
    projector = VisionToLLMProjector(
        CHANNELS, model.hidden_size, num_queries=4, num_layers=1, num_heads=2, num_regions=REGIONS,
        output_scale=model.embedding_scale,
    )  # fmt: skip
    return ReportGenerator(projector, model, generation)


def stir_adapters(generator, size=0.1):
    """Adapters begin with an output of zero, which would hide them."""
    random = torch.Generator().manual_seed(9)
    for weight in generator.language_model.adapters.values():
        weight.data = torch.randn(weight.shape, generator=random) * size
    return generator


def make_inputs(batch=2, seed=3, prompt=PROMPT):
    random = torch.Generator().manual_seed(seed)
    shapes = {"local": (batch, TOKENS, CHANNELS), "global": (batch, CHANNELS), "region": (batch, REGIONS, CHANNELS)}
    features = {f"{name}_features": torch.randn(shape, generator=random) for name, shape in shapes.items()}
    return {**features, "prompt": [prompt] * batch}


# --- what a checkpoint holds ------------------------------------------------------------------------------------------


def test_widths_that_differ_are_named(folder):
    model = make_generator(folder).language_model
    projector = VisionToLLMProjector(CHANNELS, 16, num_queries=2, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match=r"projector gives 16 channels, the language model .*tiny reads 32; make"):
        ReportGenerator(projector, model)


def test_the_state_dict_holds_projector_and_adapters_and_no_base_weight(folder):
    generator = make_generator(folder)
    names = set(generator.state_dict())
    projector = {f"projector.{name}" for name in generator.projector.state_dict()}
    adapters = {f"language_model.adapters.{name}" for name in generator.language_model.adapters}
    assert names == projector | adapters
    assert len(adapters) == 2 * 2 * 7 and all("lora_" in name for name in adapters)  # A and B, 2 layers, 7 targets
    held = {value.data_ptr() for value in generator.state_dict().values()}
    base = [weight for name, weight in generator.language_model.model.named_parameters() if "lora_" not in name]
    assert len(base) > 10 and held.isdisjoint(weight.data_ptr() for weight in base)
    assert not any(weight.requires_grad for weight in base)
    assert set(make_generator(folder, lora_rank=0).state_dict()) == projector


def test_a_state_dict_makes_another_instance_write_the_same(folder):
    settings = {"generation": {"max_new_tokens": 8}}
    generator, other = stir_adapters(make_generator(folder, **settings)), make_generator(folder, seed=1, **settings)
    inputs = make_inputs()
    wanted = generator(**inputs).token_ids
    assert not torch.equal(other(**inputs).token_ids, wanted)
    other.load_state_dict(generator.state_dict())
    assert torch.equal(other(**inputs).token_ids, wanted)


def test_settings_of_generation_are_obeyed(folder):
    inputs = make_inputs()
    assert make_generator(folder, generation={"max_new_tokens": 3})(**inputs).token_ids.shape == (2, 3)
    several = make_generator(folder, generation={"max_new_tokens": 3, "do_sample": True, "num_samples": 2})(**inputs)
    assert len(several.texts) == 4


def test_tokens_that_fill_up_the_batch_are_not_read(folder):
    generator, inputs = make_generator(folder, generation={"max_new_tokens": 6}), make_inputs()
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, 3:] = False
    changed = {**inputs, "local_features": inputs["local_features"].masked_fill(~mask[..., None], 7.0)}
    got = generator.prompts(**changed, token_mask=mask).embeddings
    torch.testing.assert_close(got, generator.prompts(**inputs, token_mask=mask).embeddings)
    assert not torch.allclose(generator.prompts(**changed).embeddings[1], got[1], rtol=1e-3)


def test_the_exported_prefix_is_the_projectors(folder):
    generator, inputs = make_generator(folder), make_inputs()
    parts = [inputs["global_features"][:, None], inputs["region_features"], inputs["local_features"]]
    exported = PrefixEmbeddings(generator.projector, generator.language_model)
    wanted = generator.projector(inputs["global_features"], inputs["region_features"], inputs["local_features"])
    torch.testing.assert_close(exported(torch.cat(parts, dim=1)), wanted)
    assert set(exported.state_dict()) == set(generator.state_dict())  # so that a checkpoint loads strictly


# --- alignment --------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_cases_of_a_tokens_mean(folder):
    generator, inputs = stir_adapters(make_generator(folder)), make_inputs()
    got = ReportTraining(generator)(**inputs, report=REPORTS)
    model = generator.language_model
    token_ids, mask = model.encode_reports(REPORTS)
    lengths = [len(model.tokenizer(report, add_special_tokens=False)["input_ids"]) + 1 for report in REPORTS]
    assert mask.sum(1).tolist() == lengths and lengths[0] != lengths[1]
    log_probabilities = model.log_probabilities(generator.prompts(**inputs), token_ids, mask, share_prefix=False)
    by_hand = [-sum(log_probabilities[row, : lengths[row]].tolist()) / lengths[row] for row in range(2)]
    assert got["token_losses"].tolist() == pytest.approx(by_hand, rel=1e-5)
    assert got["losses"]["report"].item() == pytest.approx(sum(by_hand) / 2, rel=1e-5)
    assert got["losses"]["report"].requires_grad and not got["token_losses"].requires_grad


def test_two_half_batches_average_to_the_whole(folder):
    generator = stir_adapters(make_generator(folder))
    training, inputs = ReportTraining(generator), make_inputs(batch=4)
    inputs["prompt"] = [PROMPT, "<image>\nnodule 7 mm\nReport:", PROMPT, "See <image> and write:"]
    reports = [*REPORTS, "Findings: effusion.", "x"]
    weights = [weight for weight in training.parameters() if weight.requires_grad]

    def loss_and_gradients(places):
        batch = {name: value[places] for name, value in inputs.items()}
        loss = training(**batch, report=reports[places])["losses"]["report"]
        return loss.detach(), torch.autograd.grad(loss, weights)

    whole, gradients = loss_and_gradients(slice(0, 4))
    halves = [loss_and_gradients(slice(0, 2)), loss_and_gradients(slice(2, 4))]
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, whole)
    for one, other, both in zip(halves[0][1], halves[1][1], gradients, strict=True):
        torch.testing.assert_close((one + other) / 2, both, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("train_adapters", [True, False])
def test_training_leaves_the_base_alone_and_adapters_where_told(folder, train_adapters):
    generator = stir_adapters(make_generator(folder))
    training = ReportTraining(generator, train_adapters=train_adapters)
    before, base = copy.deepcopy(generator.state_dict()), generator.language_model.base_sha256
    optimizer = torch.optim.AdamW([w for w in training.parameters() if w.requires_grad], lr=0.01, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        training(**make_inputs(), report=REPORTS)["losses"]["report"].backward()
        optimizer.step()
    assert generator.language_model.base_sha256 == base
    for name, weight in generator.state_dict().items():
        moves = train_adapters or name.startswith("projector.")
        assert torch.equal(weight, before[name]) != moves, name


def test_adapters_that_were_frozen_learn_again(folder):
    generator = make_generator(folder)
    ReportTraining(generator, train_adapters=False)
    assert not any(weight.requires_grad for weight in generator.language_model.adapters.values())
    ReportTraining(generator)
    assert all(weight.requires_grad for weight in generator.language_model.adapters.values())


def test_two_scans_with_one_prompt_get_reports_of_their_own(folder):
    """The prompts are equal, so only the image can tell which report is whose; exchanged images exchange reports."""
    generator = make_generator(folder, lora_rank=8)
    training, inputs = ReportTraining(generator), make_inputs()
    optimizer = torch.optim.AdamW(training.parameters(), lr=0.01, weight_decay=0)
    for _ in range(80):
        optimizer.zero_grad()
        loss = training(**inputs, report=REPORTS)["losses"]["report"]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3  # the frozen head of so narrow a model gives no token more than about 0.9
    written = generator(**inputs)
    assert written.texts == REPORTS and written.finished.all()
    features = {name: value.flip(0) for name, value in inputs.items() if name != "prompt"}
    assert generator(**features, prompt=inputs["prompt"]).texts == REPORTS[::-1]


# --- policy -----------------------------------------------------------------------------------------------------------


def make_policy(folder, **settings):
    generator = stir_adapters(make_generator(folder))
    return PolicyTraining(generator, **settings), generator.prompts(**make_inputs())


def make_samples(length=4, samples=2, seed=4):
    random = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(5, 200, (2 * samples, length), generator=random)
    mask = torch.arange(length) < torch.tensor([[length], [1], [2], [length - 1]])
    return token_ids, mask


def adapter_gradients(policy, loss):
    weights = list(policy.network.language_model.adapters.values())
    return torch.autograd.grad(loss, weights, retain_graph=True)


def test_only_the_adapters_learn(folder):
    policy, _ = make_policy(folder)
    learning = {id(weight) for weight in policy.parameters() if weight.requires_grad}
    assert learning == {id(weight) for weight in policy.network.language_model.adapters.values()}
    assert not any(weight.requires_grad for weight in policy.network.projector.parameters())


def test_without_advantage_or_divergence_nothing_moves(folder):
    policy, prompts = make_policy(folder, beta=0.0)
    token_ids, mask = make_samples()
    result = policy(prompts, token_ids, mask, torch.zeros(4))
    assert result.loss == 0 and result.mean_kl is None
    assert all((gradient == 0).all() for gradient in adapter_gradients(policy, result.loss))


@pytest.mark.parametrize("share_prefix", [True, False])
def test_the_gradient_of_single_tokens_is_that_of_reinforce(folder, share_prefix):
    """On the policy's own samples the ratio is 1, so the gradient is the mean of -A times that of log p."""
    policy, prompts = make_policy(folder, beta=0.0, share_prefix=share_prefix)
    token_ids, mask = make_samples()
    mask = torch.ones(4, 1, dtype=torch.bool)
    token_ids, advantages = token_ids[:, :1], torch.tensor([1.0, -1.0, 0.5, 0.0])
    got = adapter_gradients(policy, policy(prompts, token_ids, mask, advantages).loss)

    model = policy.network.language_model
    log_p = []
    for row in range(4):
        embeddings = prompts.embeddings[row // 2][prompts.mask[row // 2]]
        logits = model.model(inputs_embeds=embeddings[None]).logits[0, -1]
        log_p.append(logits.log_softmax(-1)[token_ids[row, 0]])
    by_hand = adapter_gradients(policy, -(advantages * torch.stack(log_p)).sum() / 4)
    for one, other in zip(got, by_hand, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert max(gradient.abs().max() for gradient in got) > 1e-3


def test_the_divergence_pulls_back_to_the_reference(folder):
    policy, prompts = make_policy(folder, beta=0.5)
    token_ids, mask = make_samples()
    now = policy.log_probabilities(prompts, token_ids, mask).detach()
    same = policy(prompts, token_ids, mask, torch.zeros(4), reference_log_probabilities=now)
    assert float(same.mean_kl) == pytest.approx(0, abs=1e-6)
    shift = 0.3
    other = policy(prompts, token_ids, mask, torch.zeros(4), reference_log_probabilities=now + shift)
    divergence = math.exp(shift) - shift - 1
    assert float(other.mean_kl) == pytest.approx(divergence, rel=1e-4)
    assert other.loss.item() == pytest.approx(0.5 * divergence, rel=1e-4)


def test_what_the_policy_is_told_arrives_at_the_loss(folder):
    policy, prompts = make_policy(folder, beta=0.0, epsilon=0.1, epsilon_high=0.3, temperature=2.0)
    token_ids, mask = make_samples()
    model = policy.network.language_model
    now = policy.log_probabilities(prompts, token_ids, mask).detach()
    torch.testing.assert_close(now, model.log_probabilities(prompts, token_ids, mask, temperature=2.0))
    assert not torch.allclose(now, model.log_probabilities(prompts, token_ids, mask), atol=1e-2)
    # ratios of e^0.5 exceed 1.3: rewarded tokens are clipped there, and the sum is over a number of tokens given
    result = policy(prompts, token_ids, mask, torch.ones(4), now - 0.5, num_active_tokens=20)
    assert result.loss.item() == pytest.approx(-1.3 * int(mask.sum()) / 20, rel=1e-5)
    assert float(result.clip_fraction_high) == 1 and float(result.mean_ratio) == pytest.approx(math.exp(0.5), rel=1e-4)
    by_answer = make_policy(folder, beta=0.0, loss_type="dr_grpo")[0]
    loss = by_answer(prompts, token_ids, mask, torch.ones(4)).loss
    assert loss.item() == pytest.approx(-int(mask.sum()) / (4 * 48), rel=1e-5)  # 48 is max_report_tokens


def test_a_policy_without_adapters_is_refused(folder):
    with pytest.raises(ValueError, match="trains the adapters, but lora_rank is 0"):
        PolicyTraining(make_generator(folder, lora_rank=0))
