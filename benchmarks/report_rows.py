"""Report generation: the projector's pooling, samples that share a prompt, and policy steps that share it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vlm3d_ext.networks.blocks import VisionToLLMProjector
from vlm3d_ext.networks.nets.image_prefix_language_model import GeneratedTexts, ImagePrefixLanguageModel
from vlm3d_ext.networks.nets.scan_evidence import pool_in_plane

from .measuring import MOST_LOAD_OF_OTHERS, cpu_seconds, time_pairs
from .random_language_model import random_language_model, random_prompts, random_tokens
from .row import ResultsDiffer, Row

__all__ = ["generation_16_samples", "policy_step_packed", "projector_with_pooling"]

NUM_REGIONS = 20
# Of the largest value: what float32 leaves of sums that are taken in another order.
LARGEST_DIFFERENCE = 1e-5


# --- projector --------------------------------------------------------------------------------------------------------


def projector_with_pooling(
    grid: Sequence[int] = (16, 32, 32),
    vision_channels: int = 768,
    output_channels: int = 4096,
    timed_channels: int = 1024,
    repeats: int = 5,
) -> Row:
    """operations of the projector on tokens pooled 2 × 2 in-plane, against all tokens"""
    _constant_features_give_one_prefix()
    with torch.device("meta"):
        # counting looks for the gradients' functions of what has gradients, which nothing here needs
        projector = VisionToLLMProjector(vision_channels, output_channels).eval().requires_grad_(False)
    flops, shapes = {}, {}
    key_value = 0
    for pooling in (2, 1):
        features = _vision_features(grid, vision_channels, pooling, "meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            shapes[pooling] = tuple(projector(*features).shape)
        flops[pooling] = counter.get_total_flops()
        key_value = sum(counter.get_flop_counts()["VisionToLLMProjector.key_value"].values())
    of_each_layer = flops[1] + (len(projector.layers) - 1) * key_value
    if shapes[2] != shapes[1]:
        raise ResultsDiffer(f"prefixes have shapes {shapes[2]} and {shapes[1]}")
    torch.manual_seed(0)
    timed = VisionToLLMProjector(vision_channels, timed_channels).eval()

    def project(pooling: int) -> Callable[[int], None]:
        features = _vision_features(grid, vision_channels, 1, "cpu")

        def action(_: int) -> None:
            with torch.inference_mode():
                timed(features[0], features[1], _pooled(features[2], grid, pooling))

        return action

    times = time_pairs(project(2), project(1), repeats)
    quiet = times.load <= MOST_LOAD_OF_OTHERS
    return Row(
        "projector_with_pooling",
        projector_with_pooling.__doc__ or "",
        flops[2] / flops[1],
        None,
        f"prefixes have the shape {shapes[1]}, and are equal where all features are",
        figures={
            "pooled": f"{flops[2] / 1e12:.3g} TFLOP",
            "all tokens": f"{flops[1] / 1e12:.3g} TFLOP",
            "pooled, against all tokens with keys and values for each layer": flops[2] / of_each_layer,
            f"CPU time, pooling included, {timed_channels} channels": times.ratio if quiet else "not told, others busy",
            "pooled_s": sorted(times.ours),
            "all_s": sorted(times.peer),
        },
    )


def _vision_features(grid: Sequence[int], channels: int, pooling: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    with torch.device(device):
        local = torch.rand(1, grid[0] * grid[1] * grid[2], channels)
        return torch.rand(1, channels), torch.rand(1, NUM_REGIONS, channels), _pooled(local, grid, pooling)


def _pooled(local: Tensor, grid: Sequence[int], pooling: int) -> Tensor:
    return pool_in_plane(local.unflatten(1, tuple(grid)), pooling).flatten(1, 3)


def _constant_features_give_one_prefix() -> None:
    """Where all features are the same, it cannot matter how many there are."""
    torch.manual_seed(0)
    projector = VisionToLLMProjector(24, 32, num_queries=5, num_heads=4).eval()
    with torch.no_grad():
        # what tells regions from tokens would make the number of tokens matter
        projector.global_embedding.zero_()
        projector.region_embeddings.zero_()
        one = torch.rand(1, 24)
        grid = (3, 6, 4)
        local = one[:, None].expand(-1, 72, -1)
        regions = one[:, None].expand(-1, NUM_REGIONS, -1)
        prefixes = [projector(one, regions, _pooled(local, grid, pooling)) for pooling in (2, 1)]
    _refuse_difference("prefixes of constant features", *prefixes)


# --- generation -------------------------------------------------------------------------------------------------------


def generation_16_samples(
    num_queries: int = 256, num_words: int = 128, num_tokens: int = 64, repeats: int = 7, **model_sizes: Any
) -> Row:
    """CPU time of sampling 16 reports of one scan against sampling one"""
    model = random_language_model(**model_sizes)
    prompts = random_prompts(model, num_queries, num_words)

    def write(num_samples: int, **settings: Any) -> GeneratedTexts:
        # no text ends early, so that all sides take as many steps
        return model.generate(
            prompts,
            num_samples,
            max_new_tokens=num_tokens,
            **{"min_new_tokens": num_tokens, "do_sample": True, **settings},
        )

    greedy = write(1, do_sample=False).token_ids
    for options in ({"num_samples": 16}, {"num_samples": 16, "share_prefix": False}):
        sampled = write(temperature=1e-4, **options).token_ids
        if sampled.shape != (16, num_tokens) or not torch.equal(sampled, greedy.expand(16, -1)):
            raise ResultsDiffer(f"samples at a temperature near 0, {options}, are not the greedy text")
    times = time_pairs(lambda _: write(16), lambda _: write(1), repeats)
    alone = statistics.median(times.peer)
    ours = statistics.median(times.ours)
    return Row.of_times(
        "generation_16_samples",
        generation_16_samples.__doc__ or "",
        times,
        3.0,
        "at a temperature near 0 all samples are the greedy text; all have as many tokens",
        **{
            "ratio of 4 samples": _median_seconds(lambda: write(4)) / alone,
            "16 samples against reading the prompt 16 times": ours
            / _median_seconds(lambda: write(16, share_prefix=False)),
            "sizes": f"{num_queries} + {num_words} positions of prompt, {num_tokens} new tokens, {_sizes(model)}",
        },
    )


# --- policy step ------------------------------------------------------------------------------------------------------


def policy_step_packed(
    num_queries: int = 256,
    num_words: int = 128,
    answers: Sequence[int] = (64, 85, 107, 128),
    longer_answers: Sequence[int] = (250, 500),
    repeats: int = 7,
    **model_sizes: Any,
) -> Row:
    """CPU time of a policy step, forward and backward, its prompt packed once for all answers, against repeated"""
    model = random_language_model(**model_sizes).train()
    prompts = random_prompts(model, num_queries, num_words)
    token_ids, mask = _answers(model, answers)

    def step(share_prefix: bool, token_ids: Tensor = token_ids, mask: Tensor = mask) -> Tensor:
        for weight in model.adapters.values():
            weight.grad = None
        chosen = model.log_probabilities(prompts, token_ids, mask, share_prefix)
        # as with advantages, whose signs differ
        (chosen * torch.linspace(-1, 1, len(chosen))[:, None]).sum().backward()
        return chosen.detach()

    results, flops = [], []
    for share_prefix in (True, False):
        with FlopCounterMode(display=False) as counter:
            chosen = step(share_prefix)
        gradients = torch.cat([weight.grad.flatten() for weight in model.adapters.values() if weight.grad is not None])
        results.append((chosen, gradients))
        flops.append(counter.get_total_flops())
    for name, ours, peer in zip(("log-probabilities", "gradients"), *results, strict=True):
        _refuse_difference(name, ours, peer)
    by_length = {}
    for length in longer_answers:
        counts = []
        for share_prefix in (True, False):
            with FlopCounterMode(display=False) as counter:
                step(share_prefix, *_answers(model, [length] * len(answers)))
            counts.append(counter.get_total_flops())
        by_length[f"operations, answers of {length}"] = counts[0] / counts[1]
    return Row.of_times(
        "policy_step_packed",
        policy_step_packed.__doc__ or "",
        time_pairs(lambda _: step(True), lambda _: step(False), repeats),
        0.45,
        f"log-probabilities and gradients differ by at most {LARGEST_DIFFERENCE:g} of the largest",
        **{
            "operations, counted": flops[0] / flops[1],
            **by_length,
            "sizes": f"{num_queries} + {num_words} positions of prompt, answers of {tuple(answers)}, {_sizes(model)}",
        },
    )


def _answers(model: ImagePrefixLanguageModel, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    token_ids = random_tokens(model, len(lengths), max(lengths), seed=2)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return token_ids.masked_fill(~mask, model.tokenizer.pad_token_id), mask


# --- for all ----------------------------------------------------------------------------------------------------------


def _refuse_difference(name: str, ours: Tensor, peer: Tensor) -> None:
    if ours.shape != peer.shape:
        raise ResultsDiffer(f"{name} have shapes {tuple(ours.shape)} and {tuple(peer.shape)}")
    difference = float((ours - peer).abs().max() / peer.abs().max())
    if not difference <= LARGEST_DIFFERENCE:  # a NaN differs, too
        raise ResultsDiffer(
            f"{name} differ by {difference:.2g} of the largest, at most {LARGEST_DIFFERENCE:g} was expected"
        )


def _median_seconds(action: Callable[[], Any], repeats: int = 3) -> float:
    return statistics.median(cpu_seconds(action) for _ in range(repeats))


def _sizes(model: ImagePrefixLanguageModel) -> str:
    return f"{model.num_base_parameters / 1e6:.0f}M weights, {model.hidden_size} wide, float32"
