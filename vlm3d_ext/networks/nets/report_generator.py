"""From evidence to a report: the projector and the language model together, and their training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...losses.policy_gradient import PolicyLoss, policy_loss
from ..blocks.vision_to_llm_projector import VisionToLLMProjector
from .image_prefix_language_model import GeneratedTexts, ImagePrefixLanguageModel, PrefixedPrompts

__all__ = ["PolicyTraining", "PrefixEmbeddings", "ReportGenerator", "ReportTraining", "report_generator_network"]


class ReportGenerator(nn.Module):
    """`VisionToLLMProjector` and `ImagePrefixLanguageModel`, whose state dict is what a report checkpoint holds: the
    projector and the adapters, never the base language model.

    Args:
        projector: its `output_channels` are the language model's hidden size.
        language_model: which writes.
        generation: settings of `ImagePrefixLanguageModel.generate`.

    Raises:
        ValueError: if the widths differ.
    """

    def __init__(
        self,
        projector: VisionToLLMProjector,
        language_model: ImagePrefixLanguageModel,
        generation: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if projector.output_channels != language_model.hidden_size:
            raise ValueError(
                f"the projector gives {projector.output_channels} channels, the language model {language_model.name} "
                f"reads {language_model.hidden_size}; make output_channels the language model's hidden_size."
            )
        self.projector = projector
        self.language_model = language_model
        self.generation = dict(generation or {})

    def prompts(
        self,
        local_features: Tensor,
        global_features: Tensor,
        region_features: Tensor,
        prompt: Sequence[str],
        token_mask: Tensor | None = None,
    ) -> PrefixedPrompts:
        """Return the prompts with their images.

        Args:
            local_features: (B, N, V), pooled in-plane.
            global_features: (B, V).
            region_features: (B, R, V).
            prompt: B texts with the image's marker.
            token_mask: (B, N) bool, False for tokens that fill up the batch; or None.
        """
        prefix = self.projector(global_features, region_features, local_features, token_mask)
        return self.language_model.embed_prompts(prefix, prompt)

    def forward(
        self,
        local_features: Tensor,
        global_features: Tensor,
        region_features: Tensor,
        prompt: Sequence[str],
        token_mask: Tensor | None = None,
    ) -> GeneratedTexts:
        """Write one report for each case; arguments as in `prompts`."""
        prompts = self.prompts(local_features, global_features, region_features, prompt, token_mask)
        return self.language_model.generate(prompts, **self.generation)


def report_generator_network(
    vision_channels: int,
    num_queries: int,
    projector_layers: int,
    projector_heads: int,
    generation: dict[str, Any] | None = None,
    **language_model: Any,
) -> ReportGenerator:
    """Return the networks as the config of the report_generation bundle builds them; arguments are that config's knobs,
    `language_model` those of `ImagePrefixLanguageModel`."""
    model = ImagePrefixLanguageModel(**language_model)
    projector = VisionToLLMProjector(
        vision_channels,
        model.hidden_size,
        num_queries,
        projector_layers,
        projector_heads,
        output_scale=model.embedding_scale,
    )
    return ReportGenerator(projector, model, generation)


class PrefixEmbeddings(ReportGenerator):
    """`ReportGenerator` for export: vision features in one tensor in, the prefix out, the same weights under the same
    names. The language model is exported by the tools that it comes from."""

    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
        """Return the prefix (B, Q, C).

        Args:
            image: (B, 1 + R + N, V): the global feature, the regions, then the pooled local features.
        """
        regions = 1 + self.projector.region_embeddings.shape[0]
        return self.projector(image[:, 0], image[:, 1:regions], image[:, regions:])


class ReportTraining(nn.Module):
    """Trains `ReportGenerator` to write the reports of the training cases (phase align).

    Args:
        network: what the checkpoint will hold.
        train_adapters: whether the language model's adapters learn, or the projector alone.
    """

    def __init__(self, network: ReportGenerator, train_adapters: bool = True) -> None:
        super().__init__()
        self.network = network
        self.network.language_model.adapters.requires_grad_(train_adapters)

    def forward(
        self,
        local_features: Tensor,
        global_features: Tensor,
        region_features: Tensor,
        prompt: Sequence[str],
        report: Sequence[str],
        token_mask: Tensor | None = None,
    ) -> dict[str, Any]:
        """Return ``"losses": {"report": scalar}``, the mean over cases of the mean cross-entropy of a token, in nats,
        and ``"token_losses"``, (B,) the same of each case. Arguments as in `ReportGenerator.prompts`.

        Args:
            report: B reports; an empty one teaches to write nothing, so leave cases without a report out.
        """
        network, model = self.network, self.network.language_model
        prompts = network.prompts(local_features, global_features, region_features, prompt, token_mask)
        token_ids, mask = model.encode_reports(report)
        log_probabilities = model.log_probabilities(prompts, token_ids, mask, share_prefix=False)
        losses = -log_probabilities.sum(-1) / mask.sum(-1)
        return {"losses": {"report": losses.mean()}, "token_losses": losses.detach()}


class PolicyTraining(nn.Module):
    """The policy step of reinforcement learning (phase rl): the loss of samples whose advantages are known.

    Args:
        network: whose adapters learn; the projector is frozen.
        epsilon: clipping range of the probability ratio, below 1.
        epsilon_high: above 1; None is `epsilon`.
        beta: weight of the divergence from the reference policy.
        loss_type: "grpo", "bnpo", "dr_grpo" or "dapo"; see `vlm3d_ext.losses.policy_gradient.policy_loss`.
        temperature: at which samples are drawn.
        share_prefix: compute each prompt once for its samples.

    Raises:
        ValueError: if the language model has no adapters.
    """

    def __init__(
        self,
        network: ReportGenerator,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        beta: float = 0.04,
        loss_type: str = "dapo",
        temperature: float = 1.0,
        share_prefix: bool = True,
    ) -> None:
        super().__init__()
        if not network.language_model.lora_rank:
            raise ValueError("reinforcement learning trains the adapters, but lora_rank is 0; give it a rank.")
        self.network = network
        network.projector.requires_grad_(False)
        self.epsilon = epsilon
        self.epsilon_high = epsilon_high
        self.beta = beta
        self.loss_type = loss_type
        self.temperature = temperature
        self.share_prefix = share_prefix

    def log_probabilities(self, prompts: PrefixedPrompts, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Return log-probabilities (B · K, T) of samples, at the temperature at which they were drawn."""
        return self.network.language_model.log_probabilities(
            prompts, token_ids, mask, self.share_prefix, self.temperature
        )

    def forward(
        self,
        prompts: PrefixedPrompts,
        token_ids: Tensor,
        mask: Tensor,
        advantages: Tensor,
        old_log_probabilities: Tensor | None = None,
        reference_log_probabilities: Tensor | None = None,
        num_active_tokens: int | Tensor | None = None,
    ) -> PolicyLoss:
        """Return the loss; only it has a gradient.

        Args:
            prompts: B prompts.
            token_ids: (B · K, T).
            mask: (B · K, T) bool.
            advantages: (B · K,).
            old_log_probabilities: (B · K, T), of the policy that sampled; None if it is the present one.
            reference_log_probabilities: (B · K, T), or None where `beta` is 0.
            num_active_tokens: see `vlm3d_ext.losses.policy_gradient.policy_loss`.
        """
        return policy_loss(
            self.log_probabilities(prompts, token_ids, mask),
            old_log_probabilities,
            advantages,
            mask,
            ref_logps=reference_log_probabilities,
            beta=self.beta,
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
            loss_type=self.loss_type,
            max_completion_length=self.network.language_model.max_report_tokens,
            num_active_tokens=num_active_tokens,
        )
