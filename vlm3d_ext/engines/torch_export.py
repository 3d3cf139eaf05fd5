"""`torch.export` of a bundle's network, which MONAI's command line has no verb for.

``python -m vlm3d_ext.engines.torch_export --config_file bundles/encoder/configs/inference.json --net_id export_network
--ckpt_file bundles/encoder/models/model.pt --input_shape 2,1,64,512,512 --filepath encoder.pt2``
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from ..data.atomic_files import whole_or_absent
from ..lineage import load_upstream_weights

__all__ = ["export_network", "main"]


def export_network(
    network: nn.Module, example: Tensor, path: str | os.PathLike, extra_files: Mapping[str, str] | None = None
) -> torch.export.ExportedProgram:
    """Write ``path`` (.pt2) with a dynamic batch size; check that it computes what the network computes.

    Args:
        network: takes one tensor and returns one, or a tuple of tensors.
        example: batch of at least 2; export would otherwise fix the batch size to 1.
        path: file to write.
        extra_files: name -> text, stored inside, for instance the config and the lineage.

    Raises:
        ValueError: if the example's batch is smaller than 2.
        RuntimeError: if the exported program and the network disagree.
    """
    if len(example) < 2:
        raise ValueError(
            f"example must have a batch of at least 2 for a dynamic batch size, got shape {tuple(example.shape)}."
        )
    network = network.eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        eager, exported = (_as_tuple(of(example[:1])) for of in (network, program.module()))
    for number, (expected, found) in enumerate(zip(eager, exported, strict=True)):
        if not torch.allclose(expected, found, rtol=1e-4, atol=1e-5):
            worst = (expected - found).abs().max().item()
            which = f" in output {number}" if len(eager) > 1 else ""
            raise RuntimeError(
                f"the exported program differs from the network by up to {worst:.3g}{which}; {path} was not written."
            )
    with whole_or_absent(path) as file:
        torch.export.save(program, file, extra_files=dict(extra_files or {}))
    return program


def _as_tuple(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vlm3d_ext.engines.torch_export", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--config_file", required=True, action="append", help="config, repeated to merge several")
    parser.add_argument("--net_id", default="export_network", help="id of the network in the config")
    parser.add_argument("--ckpt_file", required=True, help="checkpoint with the weights under 'model'")
    parser.add_argument("--input_shape", required=True, help="example shape, for instance 2,1,64,512,512")
    parser.add_argument("--filepath", required=True, help="the .pt2 to write")
    options = parser.parse_args(arguments)
    config = ConfigParser()
    config.read_config(options.config_file)
    network = config.get_parsed_content(options.net_id)
    load_upstream_weights(network, options.ckpt_file, parameter_name="ckpt_file")
    example = torch.rand(*[int(size) for size in options.input_shape.split(",")])
    export_network(network, example, options.filepath, {"config.json": json.dumps(config.get())})
    print(f"wrote {options.filepath}")


if __name__ == "__main__":
    main()
