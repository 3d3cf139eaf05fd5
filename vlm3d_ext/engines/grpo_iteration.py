"""One iteration of reinforcement learning: sample, judge, and move the policy.

Source: GRPO, Shao et al. 2024 (DeepSeekMath), algorithm 1; see `vlm3d_ext.losses.policy_gradient` for the formulas.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.engines.utils import IterationEvents
from torch import Tensor

from ..losses.policy_gradient import PolicyLoss, group_advantages
from ..metrics.report_rewards import ReportReward, RewardBreakdown
from ..networks.nets.image_prefix_language_model import GeneratedTexts, PrefixedPrompts
from ..networks.nets.report_generator import PolicyTraining

__all__ = ["GrpoIteration"]

logger = logging.getLogger(__name__)

_INPUTS = ("local_features", "global_features", "region_features", "token_mask")


class GrpoIteration:
    """The `iteration_update` of a MONAI trainer whose network is `PolicyTraining`, maybe wrapped for several ranks.

    The policy writes K reports for each case. Their rewards are compared within the case; a case whose rewards are all
    equal, or one of whose rewards is not a number, changes nothing and is counted. If that is so of all cases of all
    ranks, no optimizer step is taken at all, so that neither momentum nor weight decay moves the weights.

    What it returns as ``output["pred"]["losses"]`` is logged like any losses: the mean reward, each part of it and its
    spread within groups (``..._spread``), what is watched beside it (words, findings named, distinct reports), the
    divergence from the reference, the share of clipped tokens, and the share of cases that taught nothing.

    Args:
        policy: the module that the trainer's network is or wraps.
        reward: judges reports.
        num_samples: K, at least 2.
        num_updates: policy steps on the same samples.
        max_new_tokens: at most so many tokens of a sample; None takes the language model's `max_report_tokens`.
        reward_scale: "group", "batch" or "none"; see `group_advantages`.
        generation: further settings of sampling, such as ``top_p``.

    Raises:
        ValueError: if K is below 2, or there is no update.
    """

    def __init__(
        self,
        policy: PolicyTraining,
        reward: ReportReward,
        num_samples: int = 4,
        num_updates: int = 1,
        max_new_tokens: int | None = None,
        reward_scale: str = "group",
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        if num_samples < 2 or num_updates < 1:
            raise ValueError(
                f"expected at least 2 samples to compare and 1 update, got {num_samples} and {num_updates}."
            )
        self.policy = policy
        self.reward = reward
        self.num_samples = num_samples
        self.num_updates = num_updates
        self.max_new_tokens = max_new_tokens
        self.reward_scale = reward_scale
        self.generation = dict(generation or {})

    def __call__(self, engine: Any, batchdata: Mapping[str, Any]) -> dict[str, Any]:
        """Run one iteration; fires the events that gradient clipping and its kin wait for.

        Raises:
            ValueError: if the trainer accumulates gradients: each iteration takes its own steps, and gradient clipping
                would leave most of them out.
        """
        if getattr(engine, "accumulation_steps", 1) != 1:
            raise ValueError(
                f"reinforcement learning steps in every iteration, but the trainer has accumulation_steps "
                f"{engine.accumulation_steps}; make global_batch_size the batch_size times the number of ranks."
            )
        device = engine.state.device
        engine.network.train()
        inputs = {name: batchdata[name].to(device) for name in _INPUTS if name in batchdata}
        with self._precision(engine):
            with torch.no_grad():
                prompts = self.policy.network.prompts(prompt=batchdata["prompt"], **inputs)
            samples = self.sample(prompts)
            rewards = self.judge(samples, batchdata["report"], batchdata["labels"])
            advantages, watched = self.compare(rewards)
            advantages = advantages.to(device)
            mask = samples.mask & (advantages != 0).any(1).repeat_interleave(self.num_samples)[:, None]
            result = self._update(engine, prompts, samples.token_ids, mask, advantages.flatten())
        if result is not None:
            watched["clipped"] = result.clip_fraction_low + result.clip_fraction_high
            watched["ratio"] = result.mean_ratio
            if result.mean_kl is not None:
                watched["kl"] = result.mean_kl
        loss = torch.zeros(()) if result is None else result.loss.detach()
        output = {"image": inputs["local_features"], "label": None, "pred": {"losses": watched}, "loss": loss}
        return {**output, "reward": watched["reward"]}

    def sample(self, prompts: PrefixedPrompts) -> GeneratedTexts:
        """Let the policy write K reports for each prompt."""
        return self.policy.network.language_model.generate(
            prompts,
            num_samples=self.num_samples,
            max_new_tokens=self.max_new_tokens,
            **{**self.generation, "do_sample": True, "temperature": self.policy.temperature},
        )

    def judge(self, samples: GeneratedTexts, references: Sequence[str], labels: Tensor) -> RewardBreakdown:
        """Return the rewards of the samples, K for each case in turn."""
        return self.reward(
            samples.texts,
            samples.finished.tolist(),
            [report for report in references for _ in range(self.num_samples)],
            labels.repeat_interleave(self.num_samples, 0).numpy(),
        )

    def compare(self, rewards: RewardBreakdown) -> tuple[Tensor, dict[str, Tensor]]:
        """Return advantages (B, K), exactly 0 for cases that teach nothing, and what is watched of the rewards."""
        total = torch.from_numpy(rewards.total).float().view(-1, self.num_samples)
        sound = total.isfinite().all(1)
        if not sound.all():
            logger.warning("%d of %d cases have no reward and are left out.", int((~sound).sum()), len(sound))
        advantages = torch.zeros_like(total)
        equal = ~sound
        if sound.any():
            compared = group_advantages(total[sound], self.reward_scale)
            advantages[sound] = compared.advantages
            equal[sound] = compared.equal_groups
        watched = {"reward": _mean(rewards.total), "without_lesson": equal.float().mean()}
        watched["reward_spread"] = _spread(rewards.total, self.num_samples)
        for name, values in rewards.parts.items():
            watched[name] = _mean(values)
            watched[f"{name}_spread"] = _spread(values, self.num_samples)
        watched.update({name: _mean(values) for name, values in rewards.watched.items() if name not in watched})
        return advantages, watched

    def _update(
        self, engine: Any, prompts: PrefixedPrompts, token_ids: Tensor, mask: Tensor, advantages: Tensor
    ) -> PolicyLoss | None:
        """Take the policy steps; return the last one's loss, or None if there was nothing to learn on any rank."""
        num_active = float(idist.all_reduce(float(mask.sum())))
        if not num_active:
            return None
        per_rank = torch.tensor(num_active / idist.get_world_size())
        reference = old = None
        if self.policy.beta > 0:
            with self.policy.network.language_model.reference_policy():
                reference = self.policy.log_probabilities(prompts, token_ids, mask)
        if self.num_updates > 1:
            with torch.no_grad():
                old = self.policy.log_probabilities(prompts, token_ids, mask)
        for _ in range(self.num_updates):
            engine.optimizer.zero_grad(set_to_none=engine.optim_set_to_none)
            result: PolicyLoss = engine.network(prompts, token_ids, mask, advantages, old, reference, per_rank)
            engine.fire_event(IterationEvents.FORWARD_COMPLETED)
            engine.fire_event(IterationEvents.LOSS_COMPLETED)
            result.loss.backward()
            engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
            engine.optimizer.step()
            engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return result

    def _precision(self, engine: Any) -> torch.autocast:
        return torch.autocast(torch.device(engine.state.device).type, torch.bfloat16, enabled=engine.amp)


def _mean(values: np.ndarray) -> Tensor:
    known = values[np.isfinite(values)]
    return torch.tensor(float(known.mean()) if len(known) else float("nan"))


def _spread(values: np.ndarray, num_samples: int) -> Tensor:
    """Return the mean over cases of the standard deviation within a case, of the cases where all values are known."""
    groups = values.reshape(-1, num_samples)
    groups = groups[np.isfinite(groups).all(1)]
    return torch.tensor(float(groups.std(1, ddof=1).mean()) if len(groups) else float("nan"))
