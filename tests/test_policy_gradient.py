"""The loss of GRPO, by hand and against TRL's own code, which runs on a stand-in for its trainer."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from vlm3d_ext.losses.policy_gradient import LOSS_TYPES, group_advantages, policy_loss

PROMPTS, ANSWERS, TOKENS = 3, 4, 7
MAX_LENGTH = 11


def test_advantages_by_hand():
    """Standard deviations with Bessel's correction: 1 of (0, 1, 2), 2 of (1, 5, 3), 0 of equal ones."""
    rewards = torch.tensor([[0.0, 1, 2], [1, 5, 3], [0.1, 0.1, 0.1]])
    by_group = group_advantages(rewards)
    one, two = 1 / 1.0001, 2 / 2.0001
    expected = torch.tensor([[-one, 0, one], [-two, two, 0], [0, 0, 0]])
    torch.testing.assert_close(by_group.advantages, expected)
    torch.testing.assert_close(by_group.group_std, torch.tensor([1.0, 2.0, 0.0]))
    assert by_group.equal_groups.tolist() == [False, False, True]
    assert by_group.num_equal_groups == 1

    unscaled = group_advantages(rewards, scale="none").advantages
    torch.testing.assert_close(unscaled, torch.tensor([[-1.0, 0, 1], [-2, 2, 0], [0, 0, 0]]))
    mean = 12.3 / 9
    squares = sum((reward - mean) ** 2 for reward in (0, 1, 2, 1, 5, 3, 0.1, 0.1, 0.1))
    by_batch = group_advantages(rewards, scale="batch").advantages
    torch.testing.assert_close(by_batch, unscaled / (math.sqrt(squares / 8) + 1e-4))


def test_groups_equal_but_for_rounding_teach_nothing():
    """0.1 + 0.2 is not 0.3 in float32 either way round; over 1e-4 that would be an advantage of three in 10,000."""
    rounded = torch.tensor([[0.3, 0.3 + 3e-8], [0.3, 0.3001]])
    assert rounded[0, 0] != rounded[0, 1]
    result = group_advantages(rounded)
    assert result.advantages[0].tolist() == [0.0, 0.0]
    assert result.equal_groups.tolist() == [True, False]
    assert result.advantages[1, 1] > 0.1


def test_advantages_do_not_change_with_an_offset_or_the_order():
    rewards = torch.rand(PROMPTS, ANSWERS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    offset = torch.tensor([[5.0], [-1.0], [0.25]], dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    result = group_advantages(rewards).advantages
    torch.testing.assert_close(group_advantages(rewards + offset).advantages, result)
    torch.testing.assert_close(group_advantages(rewards[:, order]).advantages, result[:, order])
    torch.testing.assert_close(result.sum(1), torch.zeros(PROMPTS, dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_named(bad):
    rewards = torch.rand(3, 4)
    rewards[2, 1] = bad
    with pytest.raises(ValueError, match=rf"1 of 12 are not finite: \[2, 1\] = {bad}"):
        group_advantages(rewards)


def test_what_advantages_refuse():
    with pytest.raises(ValueError, match=r"at least 2 answers to each, got \(3, 1\)"):
        group_advantages(torch.rand(3, 1))
    with pytest.raises(ValueError, match=r"got \(3,\)"):
        group_advantages(torch.rand(3))
    with pytest.raises(ValueError, match=r"scale must be one of .* got 'groups'"):
        group_advantages(torch.rand(3, 2), scale="groups")


def two_answers():
    """Two answers of two and three tokens, their ratios 1.5, 1 | 0.5, 1.1, 1.3 and advantages 2, -1.

    With limits 0.8 and 1.2 the terms -min(r A, clip(r) A) are -2.4 (clipped), -2 | 0.8 (clipped), 1.1, 1.3 (a ratio
    above the limit is clipped for good answers only).
    """
    ratio = torch.tensor([[1.5, 1.0, math.nan], [0.5, 1.1, 1.3]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    old = torch.full((2, 3), -1.25)
    return (old + ratio.log()), old, torch.tensor([2.0, -1.0]), mask


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", ((-2.4 - 2) / 2 + (0.8 + 1.1 + 1.3) / 3) / 2),
        ("bnpo", (-4.4 + 3.2) / 5),
        ("dr_grpo", (-4.4 + 3.2) / (2 * MAX_LENGTH)),
        ("dapo", (-4.4 + 3.2) / 8),
    ],
)
def test_loss_by_hand(loss_type, expected):
    """The padding is NaN, as a probability of zero may leave it."""
    result = policy_loss(
        *two_answers(), loss_type=loss_type, max_completion_length=MAX_LENGTH, num_active_tokens=torch.tensor(8)
    )
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    assert result.clip_fraction_low.item() == pytest.approx(1 / 5)
    assert result.clip_fraction_high.item() == pytest.approx(1 / 5)
    assert result.mean_ratio.item() == pytest.approx((1.5 + 1 + 0.5 + 1.1 + 1.3) / 5)
    assert result.mean_kl is None


def test_divergence_by_hand():
    """Where the reference is half as probable: exp(-log 2) + log 2 - 1."""
    logps, old, advantages, mask = two_answers()
    reference = logps.clone()
    reference[1, 2] -= math.log(2)
    divergence = (0.5 + math.log(2) - 1) / 5
    without = policy_loss(logps, old, advantages, mask, ref_logps=reference)
    result = policy_loss(logps, old, advantages, mask, ref_logps=reference, beta=0.7)
    assert without.mean_kl is not None
    assert result.mean_kl is not None
    assert without.mean_kl.item() == pytest.approx(divergence, rel=1e-5)
    assert result.mean_kl.item() == pytest.approx(divergence, rel=1e-5)
    assert (result.loss - without.loss).item() == pytest.approx(0.7 * divergence, rel=1e-4)


def test_an_upper_limit_of_its_own():
    """1.5 is now clipped to 1.28: -2.56; the fourth and fifth tokens are as before."""
    result = policy_loss(*two_answers(), epsilon=0.6, epsilon_high=0.28)
    assert result.loss.item() == pytest.approx((-2.56 - 2 + 0.5 + 1.1 + 1.3) / 5, rel=1e-5)
    assert result.clip_fraction_low.item() == 0
    assert result.clip_fraction_high.item() == pytest.approx(1 / 5)


def gradient(logps, *args, **settings):
    logps = logps.clone().requires_grad_()
    policy_loss(logps, *args, **settings).loss.backward()
    return logps.grad


def test_gradient_by_hand():
    """-r A / 5 for each token that is not clipped, and exactly nothing for the clipped ones and the padding."""
    result = gradient(*two_answers())
    expected = torch.tensor([[0.0, -2.0, 0.0], [0.0, 1.1, 1.3]]) / 5
    torch.testing.assert_close(result, expected)
    assert (result == 0).tolist() == (expected == 0).tolist()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_advantage_no_gradient(loss_type):
    case = random_case(seed=3)
    case["advantages"] = torch.zeros(PROMPTS * ANSWERS)
    settings = {"loss_type": loss_type, "max_completion_length": MAX_LENGTH}
    assert (gradient(**case, **settings) == 0).all()
    assert (gradient(**case, **settings, beta=0.04) != 0).any()


def test_on_new_answers_the_gradient_is_that_of_plain_policy_gradient():
    case = random_case(seed=4)
    case["old_logps"] = None
    expected = -case["advantages"][:, None] * case["mask"] / case["mask"].sum()
    torch.testing.assert_close(gradient(**case), expected)


def test_pieces_of_a_batch_add_up():
    """What lets `dapo` go through an answer at a time: the same divisor for all, and the losses are added."""
    case = random_case(seed=5)
    whole = policy_loss(**case, beta=0.04).loss
    pieces = [
        policy_loss(
            **{name: value[row : row + 1] for name, value in case.items()},
            beta=0.04,
            num_active_tokens=int(case["mask"].sum()),
        ).loss
        for row in range(len(case["mask"]))
    ]
    torch.testing.assert_close(torch.stack(pieces).sum(), whole)


def test_no_active_token_gives_zero():
    case = random_case(seed=6)
    case["mask"] = torch.zeros_like(case["mask"])
    for loss_type in LOSS_TYPES:
        result = policy_loss(**case, beta=0.04, loss_type=loss_type, max_completion_length=MAX_LENGTH)
        assert result.loss.item() == 0
        assert result.mean_ratio.item() == 0


def test_half_precision_is_computed_in_single():
    case = random_case(seed=7)
    rounded = {name: value.bfloat16() if value.is_floating_point() else value for name, value in case.items()}
    loss = policy_loss(**rounded, beta=0.04).loss
    assert loss.dtype == torch.float32
    single = {name: value.float() if value.is_floating_point() else value for name, value in rounded.items()}
    assert loss.item() == policy_loss(**single, beta=0.04).loss.item()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "ppo"}, r"loss_type must be one of .* got 'ppo'"),
        ({"loss_type": "dr_grpo"}, r"max_completion_length, which must be at least 1, got None"),
        ({"beta": 0.04, "ref_logps": None}, r"beta is 0\.04, so that ref_logps is needed"),
        ({"beta": -1.0}, r"beta must be at least 0, got -1\.0"),
        ({"epsilon": 1.5}, r"epsilon must be in \[0, 1\).* got epsilon 1\.5"),
        ({"advantages": torch.zeros(3, 4)}, r"advantages are \(3, 4\), expected \(12,\)"),
        ({"mask": torch.ones(12, 3)}, r"mask is \(12, 3\), logps \(12, 7\)"),
        ({"logps": torch.zeros(12)}, r"logps must be \(answers, tokens\), got \(12,\)"),
    ],
)
def test_what_the_loss_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(**(random_case(seed=0) | settings))


def random_case(seed):
    """Log-probabilities whose ratios fall on both sides of both limits; the answers have 1 to 7 tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (PROMPTS * ANSWERS, TOKENS)
    logps = -torch.rand(shape, generator=generator) * 3
    lengths = torch.randint(1, TOKENS + 1, shape[:1], generator=generator)
    return {
        "logps": logps,
        "old_logps": logps + 0.4 * torch.randn(shape, generator=generator),
        "advantages": torch.randn(shape[0], generator=generator),
        "mask": (torch.arange(TOKENS) < lengths[:, None]).long(),
        "ref_logps": logps + 0.3 * torch.randn(shape, generator=generator),
    }


@pytest.fixture(scope="module")
def trl_trainer():
    return pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with").GRPOTrainer


def one_process():
    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        sync_gradients=True,
        gather=lambda values: values,
        reduce=lambda values, reduction: values,
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("epsilon", "epsilon_high"), [(0.2, None), (0.2, 0.28), (0.9, 50.0)])
@pytest.mark.parametrize("beta", [0.0, 0.04, 0.5])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_agrees_with_trl(trl_trainer, loss_type, beta, epsilon, epsilon_high, training):
    """Value, gradient and the logged figures of `GRPOTrainer._compute_loss`; only the model's output is given to it.

    In training, TRL scales by its gradient accumulation, here one step of one.
    """
    case = random_case(seed=11)
    num_active_tokens = case["mask"].sum() + 13  # the rest of a global batch
    given = case["logps"].clone().requires_grad_()
    metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (given, torch.zeros_like(given), None),
        accelerator=one_process(),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        model=SimpleNamespace(training=training),
        _metrics=metrics,
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=1,
        epsilon_low=epsilon,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high,
        importance_sampling_level="token",
        loss_type=loss_type,
        max_completion_length=MAX_LENGTH,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    prompt = torch.ones(PROMPTS * ANSWERS, 2, dtype=torch.long)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": torch.ones_like(case["mask"]),
        "completion_mask": case["mask"],
        "advantages": case["advantages"],
        "old_per_token_logps": case["old_logps"],
        "ref_per_token_logps": case["ref_logps"],
        "num_items_in_batch": num_active_tokens,
    }
    theirs = trl_trainer._compute_loss(trainer, None, inputs)
    theirs.backward()

    settings = {
        "beta": beta,
        "epsilon": epsilon,
        "epsilon_high": epsilon_high,
        "loss_type": loss_type,
        "max_completion_length": MAX_LENGTH,
        "num_active_tokens": num_active_tokens,
    }
    ours = policy_loss(**case, **settings)
    assert ours.loss.item() == pytest.approx(theirs.item(), abs=1e-6)
    torch.testing.assert_close(gradient(**case, **settings), given.grad, atol=1e-6, rtol=0)
    logged = metrics["train" if training else "eval"]
    assert ours.clip_fraction_low.item() == pytest.approx(logged["clip_ratio/low_mean"][0], abs=1e-6)
    assert ours.clip_fraction_high.item() == pytest.approx(logged["clip_ratio/high_mean"][0], abs=1e-6)
    if epsilon_high != 50:
        assert min(ours.clip_fraction_low, ours.clip_fraction_high) > 0.05  # the comparison has clipped tokens
    if beta > 0:
        assert ours.mean_kl is not None
        assert ours.mean_kl.item() == pytest.approx(logged["kl"][0], abs=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_agree_with_trl(trl_trainer, scale):
    """TRL computes them inside `_generate_and_score_completions`; the sampling and the rewards are given to it."""
    rewards = torch.rand(PROMPTS, ANSWERS, generator=torch.Generator().manual_seed(12))
    rewards[1] = 0.25
    num_answers = PROMPTS * ANSWERS
    tokens = [[5, 6]] * num_answers
    trainer = SimpleNamespace(
        _calculate_rewards=lambda *args: rewards.view(-1, 1),
        _generate=lambda prompts: (tokens, tokens, None, prompts, None, {}, None, None),
        _logs=defaultdict(lambda: defaultdict(list)) | {name: [] for name in ("prompt", "completion", "advantages")},
        _metrics={"eval": defaultdict(list)},
        _pending_extra_logs={},
        _pending_metrics={},
        _tokenizer=SimpleNamespace(pad_token_id=0),
        accelerator=one_process(),
        args=SimpleNamespace(
            per_device_eval_batch_size=num_answers,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        ),
        beta=0.0,
        environment_factories=None,
        environments=None,
        log_multimodal=False,
        mask_truncated_completions=False,
        model=SimpleNamespace(training=False, is_gradient_checkpointing=False),
        multi_objective_aggregation="sum_then_normalize",
        num_generations_eval=ANSWERS,
        num_iterations=1,
        pad_to_multiple_of=None,
        processing_class=SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: [""] * len(ids)),
        reward_func_names=["reward"],
        reward_weights=torch.ones(1),
        scale_rewards=scale,
        tools=None,
        use_vllm=False,
    )
    theirs = trl_trainer._generate_and_score_completions(trainer, [{"prompt": "a"} for _ in range(num_answers)])
    ours = group_advantages(rewards, scale)
    torch.testing.assert_close(ours.advantages.flatten(), theirs["advantages"], atol=1e-6, rtol=0)
    assert ours.equal_groups.tolist() == [False, True, False]
    if scale != "batch":
        equal_share = trainer._metrics["eval"]["frac_reward_zero_std"][0]
        assert ours.num_equal_groups / PROMPTS == pytest.approx(equal_share)
