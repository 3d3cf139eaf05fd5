"""The loss of GRPO: several answers to one prompt are judged against each other, without a value network.

Shapes: B prompts, K sampled answers of each (a group), N = B * K answers in the order of the prompts, T tokens of the
longest answer.

Source: Shao et al. 2024 (DeepSeekMath), section 4.1, equations 3 and 4; Liu et al. 2025 (Understanding R1-Zero-like
training) for ``dr_grpo``; Yu et al. 2025 (DAPO), sections 3.1 and 3.3, for the upper clip limit of its own and
``dapo``. Where these leave something open (Bessel's correction, the constants, the divisors) it is as in TRL's
`GRPOTrainer`, with which the tests compare.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LOSS_TYPES", "REWARD_SCALES", "Advantages", "PolicyLoss", "group_advantages", "policy_loss"]

REWARD_SCALES = ("group", "batch", "none")
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")

# Added to the standard deviation before dividing by it, as in TRL.
_STD_OFFSET = 1e-4
# Rewards closer than this differ by the rounding of a sum of a few float32 parts only.
_EQUAL_SPREAD = 1e-6


@dataclass(frozen=True)
class Advantages:
    """How much better each answer is than the others of its group.

    Args:
        advantages: (B, K); flattened, it is what `policy_loss` takes.
        group_std: (B,) standard deviation of each group's rewards, with Bessel's correction; to be logged.
        equal_groups: (B,) bool, True where all rewards of the group are equal: such a group teaches nothing, its
            advantages are exactly 0.
    """

    advantages: Tensor
    group_std: Tensor
    equal_groups: Tensor

    @property
    def num_equal_groups(self) -> int:
        """Number of groups that teach nothing."""
        return int(self.equal_groups.sum())


@dataclass(frozen=True)
class PolicyLoss:
    """The loss, and what to watch of it; only `loss` has a gradient.

    Args:
        loss: scalar, to be minimised.
        mean_kl: scalar, mean over active tokens of the estimated divergence from the reference; None without one.
        clip_fraction_low: scalar, share of active tokens whose ratio is below 1 - epsilon with a negative advantage:
            they get no gradient.
        clip_fraction_high: scalar, the same above 1 + epsilon_high with a positive advantage.
        mean_ratio: scalar, mean over active tokens of the probability ratio; 1 at the first step on new answers.
    """

    loss: Tensor
    mean_kl: Tensor | None
    clip_fraction_low: Tensor
    clip_fraction_high: Tensor
    mean_ratio: Tensor


def group_advantages(rewards: Tensor, scale: str = "group") -> Advantages:
    """Return the rewards less their group's mean, divided by a standard deviation.

    Args:
        rewards: (B, K), finite, K answers to each of B prompts. With several ranks, `scale` "batch" asks for the
            rewards of all of them.
        scale: "group" divides by the group's standard deviation + 1e-4, "batch" by that of all rewards + 1e-4, "none"
            by nothing. Dividing by the group's own gives the nearly equal groups the same weight as the others.

    Raises:
        ValueError: if the shape is not (B, K) with K of at least 2, a reward is not finite, or `scale` is unknown.

    Example:
        >>> group_advantages(torch.tensor([[0.0, 1.0, 2.0]]), scale="none").advantages
        tensor([[-1.,  0.,  1.]])
    """
    if scale not in REWARD_SCALES:
        raise ValueError(f"scale must be one of {REWARD_SCALES}, got {scale!r}.")
    if rewards.ndim != 2 or rewards.shape[0] < 1 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be (prompts, answers) with at least 2 answers to each, got {tuple(rewards.shape)}."
        )
    bad = (~rewards.isfinite()).nonzero().tolist()
    if bad:
        named = ", ".join(f"[{prompt}, {answer}] = {rewards[prompt, answer].item()}" for prompt, answer in bad[:8])
        raise ValueError(
            f"rewards: {len(bad)} of {rewards.numel()} are not finite: {named}{', ...' if len(bad) > 8 else ''}; "
            "leave the groups of these answers out."
        )
    rewards = _at_least_float32(rewards.detach())
    advantages = rewards - rewards.mean(1, keepdim=True)
    group_std = rewards.std(1)
    if scale == "group":
        advantages = advantages / (group_std[:, None] + _STD_OFFSET)
    elif scale == "batch":
        advantages = advantages / (rewards.std() + _STD_OFFSET)
    equal = rewards.amax(1) - rewards.amin(1) <= _EQUAL_SPREAD
    return Advantages(advantages.masked_fill(equal[:, None], 0), group_std, equal)


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    num_active_tokens: int | Tensor | None = None,
) -> PolicyLoss:
    """Return the clipped policy-gradient loss, plus `beta` times the divergence from a reference.

    Per token, with ratio r = exp(logp - old) and advantage A, it is -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)
    + beta (exp(ref - logp) - (ref - logp) - 1). What `loss_type` says is how tokens are added up:

    - ``grpo``: mean over answers of the mean over their tokens, so that a token of a long answer weighs less.
    - ``bnpo``: mean over all active tokens given here.
    - ``dr_grpo``: sum over tokens, divided by N * max_completion_length, a constant.
    - ``dapo``: sum over tokens, divided by `num_active_tokens`.

    Args:
        logps: (N, T) log-probabilities of the sampled tokens under the policy, with gradient.
        old_logps: (N, T) the same under the policy that sampled them; None if that is the present one.
        advantages: (N,).
        mask: (N, T) bool or 0 / 1, 1 for tokens of the answer, its end-of-text token among them. What is elsewhere in
            the log-probabilities is not looked at.
        ref_logps: (N, T) the same under the frozen reference; with `beta` 0 it only gives `mean_kl`.
        beta: weight of the divergence, at least 0; .04 is the classic value.
        epsilon: the ratio's lower limit is 1 - epsilon.
        epsilon_high: its upper limit is 1 + epsilon_high; None means `epsilon`. DAPO has .28.
        loss_type: one of `LOSS_TYPES`.
        max_completion_length: of ``dr_grpo``, the most tokens that may be sampled.
        num_active_tokens: of ``dapo``, active tokens of all pieces of the batch whose losses are *added up*; None
            means those given here. Divide it by the number of ranks where gradients are averaged over them.

    Raises:
        ValueError: if shapes do not fit, `loss_type` is unknown, or a value that it or `beta` needs is missing or out
            of range.
    """
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    _check_settings(loss_type, beta, epsilon, epsilon_high, ref_logps is not None, max_completion_length)
    _check_shapes(logps, old_logps, advantages, mask, ref_logps)
    active = mask.bool()
    # A factor of zero would let an infinite log-probability of the padding through as NaN.
    logps = _at_least_float32(logps).masked_fill(~active, 0)
    old = logps.detach() if old_logps is None else _constant(old_logps, active)
    weight = active.to(logps.dtype)
    advantages = advantages.detach().to(logps.dtype)[:, None]

    ratio = (logps - old).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    divergence = None
    if ref_logps is not None:
        log_ratio_to_reference = _constant(ref_logps, active) - logps
        divergence = log_ratio_to_reference.exp() - log_ratio_to_reference - 1
        if beta > 0:
            per_token = per_token + beta * divergence

    per_token = per_token * weight
    num_tokens = weight.sum().clamp_min(1)
    if loss_type == "grpo":
        loss = (per_token.sum(1) / weight.sum(1).clamp_min(1)).mean()
    elif loss_type == "bnpo":
        loss = per_token.sum() / num_tokens
    elif loss_type == "dr_grpo":
        assert max_completion_length is not None  # checked above
        loss = per_token.sum() / (len(per_token) * max_completion_length)
    else:
        divisor = num_tokens if num_active_tokens is None else torch.as_tensor(num_active_tokens).to(num_tokens)
        loss = per_token.sum() / divisor.clamp_min(1)

    def token_mean(values: Tensor) -> Tensor:
        return (values.detach() * weight).sum() / num_tokens

    return PolicyLoss(
        loss=loss,
        mean_kl=None if divergence is None else token_mean(divergence),
        clip_fraction_low=token_mean((ratio < 1 - epsilon) & (advantages < 0)),
        clip_fraction_high=token_mean((ratio > 1 + epsilon_high) & (advantages > 0)),
        mean_ratio=token_mean(ratio),
    )


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _constant(logps: Tensor, active: Tensor) -> Tensor:
    return _at_least_float32(logps.detach()).masked_fill(~active, 0)


def _check_settings(
    loss_type: str,
    beta: float,
    epsilon: float,
    epsilon_high: float,
    has_reference: bool,
    max_completion_length: int | None,
) -> None:
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {LOSS_TYPES}, got {loss_type!r}.")
    if not (0 <= epsilon < 1 and epsilon_high >= 0):
        raise ValueError(
            f"epsilon must be in [0, 1) and epsilon_high at least 0, got epsilon {epsilon} and epsilon_high "
            f"{epsilon_high}."
        )
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0, got {beta}.")
    if beta > 0 and not has_reference:
        raise ValueError(
            f"beta is {beta}, so that ref_logps is needed: the log-probabilities under the frozen reference, e.g. with "
            "the adapters switched off."
        )
    if loss_type == "dr_grpo" and (max_completion_length is None or max_completion_length < 1):
        raise ValueError(
            f"loss_type 'dr_grpo' divides by max_completion_length, which must be at least 1, got "
            f"{max_completion_length}."
        )


def _check_shapes(
    logps: Tensor, old_logps: Tensor | None, advantages: Tensor, mask: Tensor, ref_logps: Tensor | None
) -> None:
    if logps.ndim != 2 or len(logps) < 1:
        raise ValueError(f"logps must be (answers, tokens), got {tuple(logps.shape)}.")
    for name, tensor in (("old_logps", old_logps), ("mask", mask), ("ref_logps", ref_logps)):
        if tensor is not None and tensor.shape != logps.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, logps {tuple(logps.shape)}; expected the same.")
    if advantages.shape != logps.shape[:1]:
        raise ValueError(
            f"advantages are {tuple(advantages.shape)}, expected {tuple(logps.shape[:1])}: one to each answer, "
            "flattened over the groups."
        )
