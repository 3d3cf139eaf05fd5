"""Spreading a frozen language model that fits no single GPU over the ranks of a run, layer by layer.

Each rank holds its part of every decoder layer. A layer is gathered when it is needed, forward and backward, and given
back after it. Embeddings, last normalisation and head stay whole on every rank: they are used outside of the layers,
and may be one table. So do the adapters, although they sit within the layers: they are trained by
`DistributedDataParallel` like any other weight, so that optimizers, checkpoints and resuming know nothing of sharding.

Source: ZeRO stage 3 (Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", SC
2020), as `torch.distributed.fsdp.fully_shard` implements it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ..networks.nets.image_prefix_language_model import ImagePrefixLanguageModel

__all__ = ["shard_decoder_layers"]


def shard_decoder_layers(language_model: ImagePrefixLanguageModel, device: torch.device | str) -> None:
    """Spread the base model's decoder layers over all ranks, in place.

    It is called once, on every rank, when the process group and the current GPU are set and before the model moves to
    its device: layers go there one by one, so that the GPU never sees the whole model. The host's memory does, once for
    each rank, while it is loaded.

    From then on all ranks have to run the model equally often, forward and backward, or they wait for each other
    forever. `ImagePrefixLanguageModel` sees to it within a call; who calls it sees to equal numbers of calls, such as
    `vlm3d_ext.data.seeded_dataset.SeededDataLoader` with ``even``.

    Args:
        language_model: whose base model is frozen and not in 4 bits.
        device: where this rank computes.

    Raises:
        RuntimeError: if there is no process group.
        ValueError: if the model is in 4 bits, or has not exactly one list of decoder layers.
    """
    model, name = language_model.model, language_model.name
    if not distributed.is_initialized():
        raise RuntimeError(
            f"the layers of language model {name} cannot be sharded: there is no process group. Start the run with "
            "torchrun, and call torch.distributed.init_process_group first."
        )
    if any(type(weight).__name__ == "Params4bit" for weight in model.parameters()):
        raise ValueError(
            f"language model {name} is in 4 bits, which cannot be sharded, expected quantization None. Lay "
            "bundles/_overlays/ddp.json over the training instead: each GPU then holds the whole 4-bit model."
        )
    decoder = model.get_decoder()
    layers = _decoder_layers(decoder, model.config.get_text_config().num_hidden_layers, name)
    mesh = init_device_mesh(torch.device(device).type, (distributed.get_world_size(),))
    adapters = set(language_model.adapters.values())
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
    # With a unit around them the layers know of each other, and gather the next while one computes.
    fully_shard(decoder, mesh=mesh, ignored_params=_unsharded(decoder, layers) | adapters)
    decoder.register_forward_hook(_forget_forward_without_gradients)
    language_model.is_sharded = True


def _decoder_layers(decoder: nn.Module, num_layers: int, name: str) -> nn.ModuleList:
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == num_layers]
    if len(lists) != 1:
        raise ValueError(
            f"language model {name}: {type(decoder).__name__} has {len(lists)} lists of {num_layers} modules, expected "
            "one, its decoder layers. Choose a model that is built like Llama or Gemma, or lay "
            "bundles/_overlays/ddp.json over the training instead."
        )
    return lists[0]


def _unsharded(decoder: nn.Module, layers: nn.ModuleList) -> set[nn.Parameter]:
    return set(decoder.parameters()) - set(layers.parameters())


def _forget_forward_without_gradients(decoder: FSDPModule, *_: Any) -> None:
    """Drop the order in which layers were run, which only a backward pass would read and clear: it would grow with
    every token generated."""
    if not torch.is_grad_enabled():
        decoder.reset_iter_state()
