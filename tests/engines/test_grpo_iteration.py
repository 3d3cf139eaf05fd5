"""One iteration of reinforcement learning in a real MONAI trainer, with rewards that a test gives out."""

import copy
import logging

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents

from tests.tiny_language_model import make_tiny_language_model
from vlm3d_ext.engines.grpo_iteration import GrpoIteration
from vlm3d_ext.handlers import GradientClipping, LossHistory, ReferencePolicy
from vlm3d_ext.metrics.report_rewards import RewardBreakdown
from vlm3d_ext.networks.blocks import VisionToLLMProjector
from vlm3d_ext.networks.nets import ImagePrefixLanguageModel, PolicyTraining, ReportGenerator
from vlm3d_ext.networks.nets.image_prefix_language_model import GeneratedTexts

CHANNELS, REGIONS, TOKENS = 6, 3, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_language_model(tmp_path_factory.mktemp("language_model") / "tiny")


class GivenRewards:
    """Judges by a function of (index, text), as `vlm3d_ext.metrics.report_rewards.ReportReward` judges by findings."""

    def __init__(self, judge):
        self.judge = judge
        self.calls = []

    def __call__(self, reports, finished, references, labels):
        self.calls.append((list(reports), list(finished), list(references), labels))
        total = np.array([self.judge(index, text) for index, text in enumerate(reports)], dtype=np.float64)
        return RewardBreakdown(
            total=total,
            parts={"clinical": total, "length_penalty": np.linspace(0, 1, len(total))},
            watched={"num_words": np.array([len(text.split()) for text in reports], dtype=np.float64)},
            num_nan={},
            without_reward=tuple(int(index) for index in np.flatnonzero(np.isnan(total))),
        )


class Recorder(torch.nn.Module):
    """What the trainer sees as its network; remembers what it is given and gives."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy
        self.given, self.results = [], []

    def forward(self, *arguments):
        self.given.append(arguments)
        self.results.append(self.policy(*arguments))
        return self.results[-1]


def make_policy(folder, **settings):
    torch.manual_seed(0)
    model = ImagePrefixLanguageModel(
        str(folder), dtype="float32", lora_rank=4, lora_alpha=8, max_prompt_tokens=64, max_report_tokens=16
    )
    projector = VisionToLLMProjector(
        CHANNELS, model.hidden_size, num_queries=3, num_layers=1, num_heads=2, num_regions=REGIONS,
        output_scale=model.embedding_scale,
    )  # fmt: skip
    policy = PolicyTraining(ReportGenerator(projector, model), **{"beta": 0.0, **settings})
    random = torch.Generator().manual_seed(9)
    for weight in model.adapters.values():  # they begin with an output of zero, which would hide them
        weight.data = torch.randn(weight.shape, generator=random) * 0.1
    model.keep_reference()
    return policy


def make_batch(cases=2):
    random = torch.Generator().manual_seed(1)
    return {
        "local_features": torch.randn(2, TOKENS, CHANNELS, generator=random)[:cases],
        "global_features": torch.randn(2, CHANNELS, generator=random)[:cases],
        "region_features": torch.randn(2, REGIONS, CHANNELS, generator=random)[:cases],
        "prompt": ["<image>\nReport:", "<image>\nnodule\nReport:"][:cases],
        "report": ["Findings: one.", "Findings: two."][:cases],
        "labels": torch.tensor([[1.0, 0.0], [float("nan"), 1.0]])[:cases],
    }


def make_trainer(
    policy, reward, *handlers, iterations=1, cases=2, learning_rate=0.01, optimizer=None, batch=None,
    iteration=GrpoIteration, **settings,
):  # fmt: skip
    options = {name: settings.pop(name) for name in ("accumulation_steps",) if name in settings}
    network = Recorder(policy)
    settings = {"num_samples": 3, "max_new_tokens": 4, **settings}
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[batch or make_batch(cases)] * iterations,
        network=network,
        optimizer=optimizer or torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.1),
        loss_function=None,
        iteration_update=iteration(policy, reward, **settings),
        train_handlers=list(handlers),
        decollate=False,
        **options,
    )
    trainer.logger.setLevel(logging.WARNING)
    torch.manual_seed(5)
    return trainer


def adapters_of(policy):
    return copy.deepcopy(dict(policy.network.language_model.adapters.items()))


def by_length(index, text):
    return float(len(text) + index % 3)


def equal(index, text):
    return 0.5


# --- learning ---------------------------------------------------------------------------------------------------------


def test_what_is_rewarded_becomes_likelier(folder):
    """Rewarded is one letter; probabilities are read from the model, not from samples."""
    policy = make_policy(folder)
    model, batch = policy.network.language_model, make_batch(1)
    features = {name: value for name, value in batch.items() if name.endswith("features") or name == "prompt"}

    def probabilities():
        with torch.no_grad():
            prompts = policy.network.prompts(**features)
            token_ids = torch.arange(len(model.tokenizer))[:, None]
            mask = torch.ones_like(token_ids, dtype=torch.bool)
            return policy.log_probabilities(prompts, token_ids, mask).exp()[:, 0]

    before = probabilities()
    assert before.sum().item() == pytest.approx(1, abs=1e-4)
    letters = {token: model.tokenizer.decode([token]) for token in range(len(model.tokenizer))}
    likely = before.argsort(descending=True).tolist()
    token = next(
        token for token in likely if letters[token].isalpha() and letters[token].isascii() and before[token] < 0.2
    )
    reward = GivenRewards(lambda index, text: float(text == letters[token]))
    trainer = make_trainer(policy, reward, iterations=12, cases=1, learning_rate=0.02, num_samples=16, max_new_tokens=1)
    trainer.run()
    assert 0.01 < before[token] < 0.2 and probabilities()[token] > max(0.5, 3 * before[token])
    first, last = (sum(text == letters[token] for text in call[0]) for call in (reward.calls[0], reward.calls[-1]))
    assert last > first


def test_the_base_and_the_projector_stay(folder):
    policy = make_policy(folder)
    base = policy.network.language_model.base_sha256
    projector, adapters = copy.deepcopy(policy.network.projector.state_dict()), adapters_of(policy)
    make_trainer(policy, GivenRewards(by_length)).run()
    assert policy.network.language_model.base_sha256 == base
    assert all(torch.equal(value, projector[name]) for name, value in policy.network.projector.state_dict().items())
    assert any(not torch.equal(value, adapters[name]) for name, value in adapters_of(policy).items())


def test_equal_rewards_leave_every_bit_of_the_weights(folder):
    """Also after an iteration that did teach, when the optimizer has momentum, and although it has weight decay."""
    policy = make_policy(folder)
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.1, weight_decay=0.5)
    make_trainer(policy, GivenRewards(by_length), optimizer=optimizer).run()
    before, state = adapters_of(policy), copy.deepcopy(optimizer.state_dict())
    trainer = make_trainer(policy, GivenRewards(equal), optimizer=optimizer)
    steps = []
    trainer.add_event_handler(IterationEvents.MODEL_COMPLETED, lambda: steps.append(1))
    trainer.run()
    assert all(torch.equal(value, before[name]) for name, value in adapters_of(policy).items())
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    output = trainer.state.output
    assert output["pred"]["losses"]["without_lesson"] == 1 and output["loss"] == 0 and not steps
    assert not trainer.network.given


# --- groups -----------------------------------------------------------------------------------------------------------


def test_samples_are_judged_case_by_case(folder):
    reward = GivenRewards(by_length)
    make_trainer(make_policy(folder), reward).run()
    ((reports, finished, references, labels),) = reward.calls
    assert len(reports) == len(finished) == 6
    assert references == ["Findings: one."] * 3 + ["Findings: two."] * 3
    np.testing.assert_array_equal(labels, [[1, 0]] * 3 + [[np.nan, 1]] * 3)


def test_advantages_are_compared_within_a_case(folder):
    rewards = [0.0, 1.0, 2.0, 5.0, 5.0, 8.0]
    trainer = make_trainer(make_policy(folder), GivenRewards(lambda index, _: rewards[index]), reward_scale="none")
    trainer.run()
    ((_, token_ids, mask, advantages, _, _, per_rank),) = trainer.network.given
    assert advantages.tolist() == pytest.approx([-1, 0, 1, -1, -1, 2])
    assert per_rank == mask.sum() and mask.shape == token_ids.shape and mask.any(1).all()


def test_a_missing_reward_drops_its_group_only(folder, caplog):
    rewards = [0.0, float("nan"), 2.0, 1.0, 2.0, 3.0]
    trainer = make_trainer(make_policy(folder), GivenRewards(lambda index, _: rewards[index]), reward_scale="none")
    with caplog.at_level(logging.WARNING, logger="vlm3d_ext.engines.grpo_iteration"):
        trainer.run()
    assert "1 of 2 cases have no reward and are left out" in caplog.text
    ((_, _, mask, advantages, _, _, per_rank),) = trainer.network.given
    assert advantages.tolist() == [0, 0, 0, -1, 0, 1]
    assert not mask[:3].any() and mask[3:].any(1).all() and per_rank == mask.sum()
    losses = trainer.state.output["pred"]["losses"]
    assert losses["without_lesson"] == 0.5
    assert losses["reward"].item() == pytest.approx(8 / 5) and losses["reward_spread"].item() == pytest.approx(1)
    assert trainer.state.output["loss"].isfinite()


def test_the_other_group_learns_as_it_would_alone(folder):
    """A group without a lesson gets neither a gradient nor a share of the divisor, whatever the divergence's weight."""
    token_ids = torch.randint(5, 200, (6, 4), generator=torch.Generator().manual_seed(2))

    class GivenSamples(GrpoIteration):
        def sample(self, prompts):
            given = token_ids[: 3 * len(prompts.mask)]
            return GeneratedTexts(given, given > 0, torch.ones(len(given), dtype=torch.bool), ["text"] * len(given))

    gradients = []
    rewards = [1.0, 2.0, 4.0, 3.0, 3.0, 3.0]
    for cases in (2, 1):
        policy = make_policy(folder, beta=0.1)
        random = torch.Generator().manual_seed(11)
        for weight in policy.network.language_model.adapters.values():
            weight.data += 0.05 * torch.randn(weight.shape, generator=random)  # away from the reference
        reward = GivenRewards(lambda index, _: rewards[index])
        make_trainer(policy, reward, cases=cases, iteration=GivenSamples).run()
        gradients.append([weight.grad for weight in policy.network.language_model.adapters.values()])
    for both, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(both, alone, rtol=1e-3, atol=1e-5)
        assert both.abs().max() > 1e-4


def test_all_rewards_missing(folder, caplog):
    policy = make_policy(folder)
    before = adapters_of(policy)
    trainer = make_trainer(policy, GivenRewards(lambda *_: float("nan")))
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert "2 of 2 cases have no reward" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in adapters_of(policy).items())
    losses = trainer.state.output["pred"]["losses"]
    assert losses["without_lesson"] == 1 and losses["reward"].isnan()


# --- updates ----------------------------------------------------------------------------------------------------------


def test_one_update_is_on_the_policys_own_samples(folder):
    trainer = make_trainer(make_policy(folder), GivenRewards(by_length))
    trainer.run()
    ((_, _, _, _, old, reference, _),) = trainer.network.given
    assert old is None and reference is None
    assert trainer.state.output["pred"]["losses"]["ratio"] == 1
    assert trainer.state.output["pred"]["losses"]["clipped"] == 0


def test_a_second_update_compares_with_the_policy_that_sampled(folder):
    policy = make_policy(folder)
    trainer = make_trainer(policy, GivenRewards(by_length), num_updates=2)
    trainer.run()
    (prompts, token_ids, mask, _, old, _, _), second = trainer.network.given
    assert second[4] is old and torch.equal(second[1], token_ids)
    fresh = make_policy(folder)
    torch.testing.assert_close(old, fresh.log_probabilities(prompts, token_ids, mask).detach())
    first_result, second_result = trainer.network.results
    assert first_result.mean_ratio.item() == pytest.approx(1, abs=1e-5)
    assert abs(second_result.mean_ratio.item() - 1) > 1e-3
    assert trainer.state.output["pred"]["losses"]["ratio"] == second_result.mean_ratio
    # the second loss is of the weights after the first step
    assert not torch.allclose(policy.log_probabilities(prompts, token_ids, mask), old, atol=1e-2)


def test_each_update_has_a_gradient_of_its_own(folder):
    """Where the weights do not move, the second update's gradient is the first's, and not twice as much."""
    gradients = []
    for num_updates in (1, 2):
        policy = make_policy(folder)
        make_trainer(policy, GivenRewards(by_length), learning_rate=0.0, num_updates=num_updates).run()
        gradients.append([weight.grad for weight in policy.network.language_model.adapters.values()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
        assert one.abs().max() > 1e-4


def test_the_reference_is_the_policy_that_was_kept(folder):
    policy = make_policy(folder, beta=0.1)
    trainer = make_trainer(policy, GivenRewards(by_length), iterations=3)
    trainer.run()
    prompts, token_ids, mask, _, _, reference, _ = trainer.network.given[-1]
    fresh = make_policy(folder)
    torch.testing.assert_close(reference, fresh.log_probabilities(prompts, token_ids, mask).detach())
    assert trainer.network.results[0].mean_kl.item() == pytest.approx(0, abs=1e-6)
    assert trainer.state.output["pred"]["losses"]["kl"] > 1e-4


def test_a_reference_that_was_not_kept(folder):
    policy = make_policy(folder, beta=0.1)
    policy.network.language_model._reference = None
    with pytest.raises(RuntimeError, match="keep_reference"):
        make_trainer(policy, GivenRewards(by_length)).run()
    # the handler keeps it
    make_trainer(policy, GivenRewards(by_length), ReferencePolicy(policy.network.language_model)).run()


@pytest.mark.parametrize("num_updates", [1, 3])
def test_events_and_gradient_clipping(folder, num_updates):
    policy = make_policy(folder)
    trainer = make_trainer(policy, GivenRewards(by_length), GradientClipping(0.01), num_updates=num_updates)
    events, norms = [], []
    weights = list(policy.network.language_model.adapters.values())
    for event in (Events.ITERATION_STARTED, *IterationEvents, Events.ITERATION_COMPLETED):
        trainer.add_event_handler(event, lambda _, name: events.append(name), event.value)

    def gradient_norm():
        norms.append(torch.stack([weight.grad.norm() for weight in weights]).norm().item())

    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, gradient_norm)
    trainer.run()
    step = ["forward_completed", "loss_completed", "backward_completed", "model_completed"]
    assert events == ["iteration_started", *step * num_updates, "iteration_completed"]
    assert trainer.state.gradient_norm > 0.01  # before clipping
    assert norms == pytest.approx([0.01] * num_updates, rel=1e-3)


def test_accumulation_of_gradients_is_refused(folder):
    """The trainer's clipping follows its accumulation_steps, the iteration steps at once: the two would not agree."""
    with pytest.raises(ValueError, match="accumulation_steps 2; make global_batch_size the batch_size times"):
        make_trainer(make_policy(folder), GivenRewards(by_length), accumulation_steps=2).run()


# --- sampling and output ----------------------------------------------------------------------------------------------


def test_sampling_has_the_policys_temperature_and_the_settings_given(folder):
    policy = make_policy(folder, temperature=1e-4)
    reward = GivenRewards(equal)
    make_trainer(policy, reward).run()
    reports = reward.calls[0][0]
    assert reports[:3] == [reports[0]] * 3 and reports[3:] == [reports[3]] * 3  # as good as greedy
    reward = GivenRewards(equal)
    make_trainer(make_policy(folder), reward, generation={"top_k": 1, "do_sample": False}).run()
    assert len(set(reward.calls[0][0][:3])) == 1  # the most likely token alone is drawn from
    reward = GivenRewards(equal)
    make_trainer(make_policy(folder), reward).run()
    assert len(set(reward.calls[0][0])) > 2


def test_what_is_logged(folder, tmp_path):
    rewards = [0.0, 0.5, 1.0, 0.4, 0.4, 0.4]
    history = LossHistory(tmp_path / "history.json")
    policy = make_policy(folder, beta=0.1)
    trainer = make_trainer(policy, GivenRewards(lambda index, _: rewards[index]), history)
    trainer.run()
    output = trainer.state.output
    losses = {name: value.item() for name, value in output["pred"]["losses"].items()}
    assert set(losses) == {
        "reward", "reward_spread", "without_lesson", "clinical", "clinical_spread", "length_penalty",
        "length_penalty_spread", "num_words", "clipped", "ratio", "kl",
    }  # fmt: skip
    assert losses["reward"] == losses["clinical"] == pytest.approx(2.7 / 6)
    assert losses["reward_spread"] == losses["clinical_spread"] == pytest.approx((0.5 + 0) / 2)
    assert losses["length_penalty"] == pytest.approx(0.5) and losses["length_penalty_spread"] == pytest.approx(0.2)
    assert losses["without_lesson"] == 0.5 and losses["ratio"] == pytest.approx(1)
    assert output["reward"] == output["pred"]["losses"]["reward"]
    assert not output["loss"].requires_grad
    (row,) = history.rows
    assert row["losses"]["reward"] == pytest.approx(0.45) and row["loss"] == pytest.approx(output["loss"].item())


def test_masked_tokens_of_the_scan_are_passed_on(folder):
    policy = make_policy(folder)
    batch = make_batch()
    batch["token_mask"] = torch.ones(2, TOKENS, dtype=torch.bool)
    batch["token_mask"][0, 2:] = False
    trainer = make_trainer(policy, GivenRewards(by_length), batch=batch)
    trainer.run()
    given = trainer.network.given[0][0].embeddings
    features = {name: value for name, value in batch.items() if name not in ("report", "labels")}
    torch.testing.assert_close(given, policy.network.prompts(**features).embeddings.detach())
    del features["token_mask"]
    assert not torch.allclose(given, policy.network.prompts(**features).embeddings, rtol=1e-3)


@pytest.mark.parametrize(("num_samples", "num_updates"), [(1, 1), (0, 1), (4, 0)])
def test_settings_without_comparison_or_update(folder, num_samples, num_updates):
    message = f"at least 2 samples to compare and 1 update, got {num_samples} and {num_updates}"
    with pytest.raises(ValueError, match=message):
        GrpoIteration(None, None, num_samples=num_samples, num_updates=num_updates)


def test_an_unknown_scale_of_rewards(folder):
    with pytest.raises(ValueError, match="scale must be one of"):
        make_trainer(make_policy(folder), GivenRewards(by_length), reward_scale="std").run()
