"""The exported projector: none of this package, the same prefix; and the metadata's claim about its shapes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ckpt_export, onnx_export, verify_net_in_out

from tests.bundles.bundle_runs import (
    TINY_CLASSIFIER,
    TINY_LOCALIZER,
    TINY_NETWORK,
    TINY_REPORTS,
    eager_export_network,
    run_command,
    write_export_configs,
)
from vlm3d_ext.engines.torch_export import main as torch_export

NUM_TOKENS, CHANNELS = 1 + 20 + 8, TINY_NETWORK["hidden_size"]

RUN_ALL = """
import sys
import numpy as np
import onnxruntime
import torch
from pathlib import Path

folder = Path(sys.argv[1])
image = np.load(folder / "image.npy")
with torch.no_grad():
    script = torch.jit.load(folder / "model.ts")(torch.from_numpy(image))
    program = torch.export.load(folder / "model.pt2").module()(torch.from_numpy(image))
session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
(onnx,) = session.run(None, {session.get_inputs()[0].name: image})
np.savez(folder / "prefix.npz", script=script.numpy(), program=program.numpy(), onnx=onnx)
foreign = {"transformers", "peft", "monai", "vlm3d_ext"} & {name.split(".")[0] for name in sys.modules}
print("imported:", sorted(foreign))
"""


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(2, NUM_TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def export_configs(tmp_path_factory, language_model) -> Path:
    sizes = {**TINY_NETWORK, **TINY_CLASSIFIER, **TINY_LOCALIZER, **TINY_REPORTS, "language_model": str(language_model)}
    folder = write_export_configs(tmp_path_factory.mktemp("export"), "report_generation", sizes, [CHANNELS])
    metadata = json.loads((folder / "metadata.json").read_text())
    formats = metadata["network_data_format"]
    formats["inputs"]["image"]["num_channels"] = NUM_TOKENS
    formats["outputs"]["pred"] |= {"num_channels": TINY_REPORTS["num_queries"], "spatial_shape": [32]}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


def test_metadata_says_what_the_network_does(export_configs):
    arguments = {
        "meta_file": str(export_configs / "metadata.json"),
        "config_file": str(export_configs / "inference.json"),
        "net_id": "export_network",
        "device": "cpu",
    }
    verify_net_in_out(**arguments)
    metadata = json.loads((export_configs / "metadata.json").read_text())
    metadata["network_data_format"]["outputs"]["pred"]["num_channels"] = 9
    (export_configs / "wrong.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="output channel number"):
        verify_net_in_out(**{**arguments, "meta_file": str(export_configs / "wrong.json")})


def test_exports_agree_and_need_nothing_of_ours(report_run, export_configs, features):
    checkpoint = report_run / "models" / "model.pt"
    arguments = {
        "net_id": "export_network",
        "ckpt_file": str(checkpoint),
        "meta_file": str(export_configs / "metadata.json"),
        "config_file": str(export_configs / "inference.json"),
        "key_in_ckpt": "model",
        "input_shape": list(features.shape),
        "use_trace": True,
    }
    ckpt_export(filepath=str(export_configs / "model.ts"), **arguments)
    onnx_export(filepath=str(export_configs / "model.onnx"), **arguments)
    options = {
        "config_file": export_configs / "inference.json",
        "ckpt_file": checkpoint,
        "filepath": export_configs / "model.pt2",
        "input_shape": ",".join(map(str, features.shape)),
    }
    torch_export([part for name, value in options.items() for part in (f"--{name}", str(value))])
    np.save(export_configs / "image.npy", features.numpy())
    result = run_command([sys.executable, "-c", RUN_ALL, str(export_configs)])
    assert "imported: []" in result.stdout
    with torch.no_grad():
        wanted = eager_export_network(export_configs, checkpoint)(features).numpy()
    assert wanted.shape == (2, TINY_REPORTS["num_queries"], 32)
    with np.load(export_configs / "prefix.npz") as prefix:
        for name, tolerance in (("script", 1e-5), ("program", 1e-5), ("onnx", 1e-4)):
            np.testing.assert_allclose(prefix[name], wanted, rtol=tolerance * 10, atol=tolerance, err_msg=name)
