"""A language model that reads an image as embeddings in front of, or within, its prompt.

It knows nothing of what the image is: a chest CT, a radiograph, or anything that a projector turns into embeddings.
Shape letters: B prompts; K samples of each; Q prefix embeddings; P prompt positions; T report tokens; C channels.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...text.pretrained_language_model import base_weights_sha256, load_language_model
from ...text.report_prompt import encode_prompt

__all__ = ["LORA_TARGETS", "GeneratedTexts", "ImagePrefixLanguageModel", "PrefixedPrompts"]

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrefixedPrompts:
    """Prompts with their images, as the language model reads them, filled up on the left to one length.

    Attributes:
        embeddings: (B, P, C).
        mask: (B, P) bool, False where filled up.
        last_tokens: (B,) the token of the last position, which is always one of the text.
    """

    embeddings: Tensor
    mask: Tensor
    last_tokens: Tensor


@dataclass(frozen=True)
class GeneratedTexts:
    """What was written, K texts for each prompt in turn.

    Attributes:
        token_ids: (B · K, T), filled up with the padding token after the end.
        mask: (B · K, T) bool, True up to and with the token that ends a text.
        finished: (B · K,) bool, whether a text ended by itself within the tokens it had.
        texts: B · K strings.
    """

    token_ids: Tensor
    mask: Tensor
    finished: Tensor
    texts: list[str]


class ImagePrefixLanguageModel(nn.Module):
    """A pretrained causal language model, frozen, with trainable LoRA adapters, that takes image embeddings.

    The base model is deliberately not a submodule. It follows this module to a device, but its weights are in no
    `state_dict()` and no `parameters()`: a checkpoint holds the adapters alone, and no optimizer reaches the base. The
    adapters' weights, which sit inside the base model's layers, are registered here under their own names.

    Source: LoRA, Hu et al., ICLR 2022 (`peft`); four-bit weights, Dettmers et al., "QLoRA", NeurIPS 2023
    (`bitsandbytes`).

    Args:
        language_model: name on the Hugging Face hub, or a folder; see
            `vlm3d_ext.text.pretrained_language_model.load_language_model`.
        quantization: "nf4" for four-bit weights, None for weights of `dtype`.
        dtype: "bfloat16", "float32" or "auto"; that of the computation, too.
        lora_rank: rank of the adapters; 0 for none.
        lora_alpha: the adapters' output is multiplied by alpha / rank.
        lora_dropout: on the adapters' input, while training.
        lora_targets: names of the linear layers that get adapters.
        gradient_checkpointing: compute each layer again in the backward pass, to save memory. The K samples of a prompt
            then cannot share its computation.
        max_prompt_tokens: of a prompt, without the image; a longer one is refused
            (`vlm3d_ext.text.report_prompt.ReportPrompt.fitted` makes one that fits).
        max_report_tokens: of a report in training, with the token that ends it; a longer one is cut there, without that
            token, and counted in `num_cut_reports`.

    Attributes:
        tokenizer: of transformers.
        hidden_size: C, read from the model.
        embedding_scale: root mean square of the token embeddings.
        num_cut_reports: reports cut so far.
        is_sharded: whether the base model's layers are spread over ranks, which then have to run it equally often;
            `vlm3d_ext.engines.sharded_layers.shard_decoder_layers` sets it.

    Raises:
        FileNotFoundError: if the model cannot be found.
        ValueError: if it cannot be loaded, or has none of the layers that are to get adapters.
    """

    def __init__(
        self,
        language_model: str,
        quantization: str | None = None,
        dtype: str = "bfloat16",
        lora_rank: int = 32,
        lora_alpha: float = 128,
        lora_dropout: float = 0.0,
        lora_targets: Sequence[str] = LORA_TARGETS,
        gradient_checkpointing: bool = False,
        max_prompt_tokens: int = 512,
        max_report_tokens: int = 512,
    ) -> None:
        super().__init__()
        loaded = load_language_model(language_model, quantization=quantization, dtype=dtype)
        self.name = loaded.name
        self.folder = loaded.folder
        self.tokenizer = loaded.tokenizer
        model = loaded.model
        self.hidden_size: int = model.config.get_text_config().hidden_size
        self.max_positions: int = model.config.get_text_config().max_position_embeddings
        self.embedding_scale = float(model.get_input_embeddings().weight.detach().float().square().mean().sqrt())
        self.lora_rank = lora_rank
        self.gradient_checkpointing = gradient_checkpointing
        self.max_prompt_tokens = max_prompt_tokens
        self.max_report_tokens = max_report_tokens
        self.num_cut_reports = 0
        self.is_sharded = False
        if gradient_checkpointing:
            # transformers renames the method, too
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable()
        if lora_rank:
            _add_adapters(model, lora_rank, lora_alpha, lora_dropout, lora_targets, self.name)
        # A list hides the model from nn.Module, see the class.
        self._held = [model.eval()]
        self.adapters = nn.ParameterDict(
            {name.replace(".", "/"): weight for name, weight in model.named_parameters() if "lora_" in name}
        )
        # transformers renames the argument from 5.24 on
        known = inspect.signature(type(model).forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"
        self._reference: dict[str, Tensor] | None = None

    @property
    def model(self) -> Any:
        """The base model of transformers, with the adapters in its layers."""
        return self._held[0]

    @property
    def device(self) -> torch.device:
        """Where the base model is."""
        return self.model.get_input_embeddings().weight.device

    @property
    def base_sha256(self) -> str:
        """SHA-256 of the base model's weights as they are now, computed at every call; where `is_sharded`, every rank
        has to ask for it."""
        return base_weights_sha256(self.model)

    @property
    def num_base_parameters(self) -> int:
        """Number of frozen weights; four-bit ones count as the weights they stand for."""
        return sum(
            weight.numel() * (2 if type(weight).__name__ == "Params4bit" else 1)
            for name, weight in self.model.named_parameters()
            if "lora_" not in name
        )

    def train(self, mode: bool = True) -> ImagePrefixLanguageModel:
        """Set the mode, of the base model too: it decides on the adapters' dropout and on recomputation."""
        self.model.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ImagePrefixLanguageModel:
        # What .to(), .cuda() ... of this module and of all that contain it come down to.
        self.model._apply(fn)
        return super()._apply(fn, recurse)

    # --- text to tokens -----------------------------------------------------------------------------------------------

    def encode_reports(self, reports: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids (B, T) and mask (B, T) of reports, each with the token that ends it, filled up on the right.

        A report of more than `max_report_tokens` is cut there: what is learnt of it does not include an end.
        """
        end, limit = self.tokenizer.eos_token_id, self.max_report_tokens
        rows = [[*self.tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in reports]
        cut = sum(len(row) > limit for row in rows)
        if cut:
            if not self.num_cut_reports:
                logger.warning("Reports of more than max_report_tokens = %d tokens are cut there.", limit)
            self.num_cut_reports += cut
        rows = [row[:limit] for row in rows]
        longest = max(len(row) for row in rows)
        fill = self.tokenizer.pad_token_id
        ids = torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
        return ids.to(self.device), mask.to(self.device)

    def embed_prompts(self, prefix: Tensor | None, prompts: Sequence[str]) -> PrefixedPrompts:
        """Put images into their prompts.

        Args:
            prefix: (B, Q, C) image embeddings; None reads the prompts without their images.
            prompts: B texts with `vlm3d_ext.text.report_prompt.IMAGE_MARKER` once.

        Raises:
            ValueError: if a prompt takes more than `max_prompt_tokens`, or prompt and report do not fit the model's
                positions.
        """
        encoded = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        longest = max(len(one) for one in encoded)
        if longest > self.max_prompt_tokens:
            raise ValueError(
                f"a prompt takes {longest} tokens, expected at most {self.max_prompt_tokens}; raise max_prompt_tokens, "
                "or write it with ReportPrompt.fitted, which leaves lesions out."
            )
        size = longest + (0 if prefix is None else prefix.shape[1])
        if size + self.max_report_tokens > self.max_positions:
            raise ValueError(
                f"a prompt of {size} positions and a report of {self.max_report_tokens} do not fit the "
                f"{self.max_positions} positions of {self.name}; lower max_prompt_tokens, max_report_tokens or "
                "num_queries."
            )
        embed = self.model.get_input_embeddings()
        rows, mask = [], torch.zeros(len(encoded), size, dtype=torch.bool)
        for row, one in enumerate(encoded):
            if not one.after:
                raise ValueError(
                    f"prompt {prompts[row]!r} ends with the image, expected text after it; put the image earlier."
                )
            tokens = embed(torch.tensor([[*one.before, *one.after]], device=self.device))[0]
            parts = [tokens[: len(one.before)], tokens[len(one.before) :]]
            if prefix is not None:
                parts.insert(1, prefix[row].to(tokens.dtype))
            fill = tokens.new_zeros(longest - len(one), self.hidden_size)
            rows.append(torch.cat([fill, *parts]))
            mask[row, len(fill) :] = True
        last_tokens = torch.tensor([one.after[-1] for one in encoded], device=self.device)
        return PrefixedPrompts(torch.stack(rows), mask.to(self.device), last_tokens)

    # --- tokens to probabilities --------------------------------------------------------------------------------------

    def log_probabilities(
        self,
        prompts: PrefixedPrompts,
        token_ids: Tensor,
        mask: Tensor,
        share_prefix: bool = True,
        temperature: float = 1.0,
    ) -> Tensor:
        """Return the log-probability of each token, (B · K, T), 0 where the mask is False.

        Args:
            prompts: B prompts.
            token_ids: (B · K, T), K texts for each prompt in turn.
            mask: (B · K, T) bool.
            share_prefix: compute each prompt once, with gradients, and let its K texts attend to it; False repeats the
                prompt for each text, which gives the same numbers. Under `gradient_checkpointing` it is always
                repeated, because recomputation and a cache exclude each other.
            temperature: logits are divided by it, as when sampling.
        """
        num_asked = token_ids.shape[1]
        if self.is_sharded and num_asked == 1:
            # The second pass below must not be left out on one rank alone, neither forward nor backward.
            token_ids, mask = token_ids.repeat(1, 2), nn.functional.pad(mask, (0, 1))
        logits = self.report_logits(prompts, token_ids, mask, share_prefix).float() / temperature
        chosen = logits.gather(-1, token_ids[..., None])[..., 0] - logits.logsumexp(-1)
        return chosen.masked_fill(~mask, 0.0)[:, :num_asked]

    def report_logits(
        self, prompts: PrefixedPrompts, token_ids: Tensor, mask: Tensor, share_prefix: bool = True
    ) -> Tensor:
        """Return for each token the logits before it was chosen, (B · K, T, vocabulary); arguments as in
        `log_probabilities`."""
        samples = token_ids.shape[0] // prompts.mask.shape[0]
        prompt_mask = prompts.mask.repeat_interleave(samples, 0)
        whole_mask = torch.cat([prompt_mask, mask], dim=1)
        positions = (whole_mask.long().cumsum(-1) - 1).clamp_min(0)
        length, num_tokens = prompts.mask.shape[1], token_ids.shape[1]
        if share_prefix and not (self.gradient_checkpointing and self.training):
            first, cache = self._fill_cache(prompts.embeddings, prompts.mask)
            cache.batch_repeat_interleave(samples)
            rest = self.model(
                input_ids=token_ids[:, :-1],
                attention_mask=whole_mask[:, :-1].long(),
                position_ids=positions[:, length:-1],
                use_cache=True,
                **{self._cache_name: cache},
            ).logits if num_tokens > 1 else None  # fmt: skip
            logits = first.repeat_interleave(samples, 0)
            if rest is not None:
                logits = torch.cat([logits, rest], dim=1)
        else:
            tokens = self.model.get_input_embeddings()(token_ids)
            embeddings = torch.cat([prompts.embeddings.repeat_interleave(samples, 0), tokens], dim=1)
            logits = self.model(
                inputs_embeds=embeddings,
                attention_mask=whole_mask.long(),
                position_ids=positions,
                use_cache=False,
                logits_to_keep=num_tokens + 1,
            ).logits[:, :-1]
        return logits

    def _fill_cache(self, embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        """Return the logits after the last position of each prompt, (B, 1, vocabulary), and the keys and values."""
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        output = self.model(
            inputs_embeds=embeddings,
            attention_mask=mask.long(),
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits, getattr(output, self._cache_name)

    # --- reinforcement learning ---------------------------------------------------------------------------------------

    def keep_reference(self) -> None:
        """Remember the adapters as they are now, as the policy that `reference_policy` goes back to."""
        self._reference = {name: weight.detach().clone() for name, weight in self.adapters.items()}

    @contextmanager
    def reference_policy(self) -> Iterator[None]:
        """Answer as the model did when `keep_reference` was called; where the adapters did nothing then, as with them
        switched off. No second copy of the model is needed. Inside, no gradients are computed.

        Raises:
            RuntimeError: if no reference was kept.
        """
        if self._reference is None:
            raise RuntimeError("there is no reference policy yet; call keep_reference before training begins.")
        current = {name: weight.data for name, weight in self.adapters.items()}
        try:
            with torch.no_grad():
                for name, weight in self.adapters.items():
                    weight.data = self._reference[name].to(weight.device)
                yield
        finally:
            for name, weight in self.adapters.items():
                weight.data = current[name]

    # --- generation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        prompts: PrefixedPrompts,
        num_samples: int = 1,
        max_new_tokens: int | None = None,
        share_prefix: bool = True,
        **generation: Any,
    ) -> GeneratedTexts:
        """Write K texts for each prompt.

        Args:
            prompts: B prompts.
            num_samples: K.
            max_new_tokens: at most so many tokens; None takes `max_report_tokens`.
            share_prefix: fill the key/value cache once for each prompt and repeat it for its samples; False lets the
                model read the prompt once for each sample, which gives the same texts in greedy decoding.
            generation: further settings of transformers' `generate`, such as ``do_sample``, ``temperature``, ``top_p``,
                ``num_beams``, ``repetition_penalty``. What is not given is neutral, whatever the model's own defaults.

        Raises:
            ValueError: for several samples of greedy decoding, which would all be the same.
        """
        num_beams = generation.get("num_beams", 1)
        if num_samples > 1 and not generation.get("do_sample", False) and num_beams < num_samples:
            raise ValueError(f"{num_samples} samples of greedy decoding are all alike; set do_sample.")
        settings = {
            "do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, **generation,
            "max_new_tokens": max_new_tokens or self.max_report_tokens,
            "pad_token_id": self.tokenizer.pad_token_id, "eos_token_id": self.tokenizer.eos_token_id,
        }  # fmt: skip
        if self.is_sharded:
            # A rank whose texts have ended goes on until those of all have, and forgets what it computes.
            settings["synced_gpus"] = torch.distributed.get_world_size() > 1
        if not settings["do_sample"]:
            for name in ("temperature", "top_p", "top_k"):
                settings.pop(name)
        was_training = self.training
        self.eval()
        try:
            if share_prefix:
                token_ids = self._generate_from_cache(prompts, num_samples, settings)
            else:
                token_ids = self.model.generate(
                    inputs_embeds=prompts.embeddings,
                    attention_mask=prompts.mask.long(),
                    num_return_sequences=num_samples,
                    **settings,
                )
        finally:
            self.train(was_training)
        is_end = token_ids == self.tokenizer.eos_token_id
        before_end = is_end.long().cumsum(-1) - is_end.long() == 0
        finished = is_end.any(-1)
        texts = [
            self.tokenizer.decode(row[kept], skip_special_tokens=True).strip()
            for row, kept in zip(token_ids, before_end & ~is_end, strict=True)
        ]
        return GeneratedTexts(token_ids, before_end, finished, texts)

    def _generate_from_cache(self, prompts: PrefixedPrompts, num_samples: int, settings: dict[str, Any]) -> Tensor:
        copies = num_samples if settings["num_beams"] == 1 else settings["num_beams"]
        # `generate` computes the last position itself. It wants tokens, and does not look at those that are cached.
        _, cache = self._fill_cache(prompts.embeddings[:, :-1], prompts.mask[:, :-1])
        cache.batch_repeat_interleave(copies)
        batch, length = prompts.mask.shape
        token_ids = torch.full((batch, length), settings["pad_token_id"], device=self.device)
        token_ids[:, -1] = prompts.last_tokens
        return self.model.generate(
            input_ids=token_ids,
            attention_mask=prompts.mask.long(),
            num_return_sequences=num_samples,
            **{self._cache_name: cache},
            **settings,
        )[:, length:]


def _add_adapters(model: Any, rank: int, alpha: float, dropout: float, targets: Sequence[str], name: str) -> None:
    """Put LoRA adapters into the model's linear layers, in float32, the only weights that are trained."""
    from peft import LoraConfig, inject_adapter_in_model

    present = {module_name.rpartition(".")[2] for module_name, _ in model.named_modules()}
    missing = [target for target in targets if target not in present]
    if missing:
        raise ValueError(
            f"language model {name} has no layers named {', '.join(missing)} to put adapters into; choose lora_targets "
            f"among its linear layers."
        )
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets)),  # type: ignore[arg-type]
        model,
    )
    for parameter_name, weight in model.named_parameters():
        is_adapter = "lora_" in parameter_name
        weight.requires_grad_(is_adapter)
        if is_adapter:
            weight.data = weight.data.float()
