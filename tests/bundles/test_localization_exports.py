"""The exported localizer: no text encoder, none of this package, the same probabilities."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from monai.bundle import ckpt_export, onnx_export, verify_net_in_out

from tests.bundles.bundle_runs import (
    TINY_LOCALIZER,
    TINY_NETWORK,
    eager_export_network,
    run_command,
    write_export_configs,
)
from tests.prepared_release import SIZE
from vlm3d_ext.engines.torch_export import main as torch_export
from vlm3d_ext.text.disease_set import load_disease_set

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
np.savez(folder / "probabilities.npz", script=script.numpy(), program=program.numpy(), onnx=onnx)
foreign = {"transformers", "tokenizers", "monai", "vlm3d_ext"} & {name.split(".")[0] for name in sys.modules}
print("imported:", sorted(foreign))
"""


@pytest.fixture(scope="module")
def export_configs(tmp_path_factory):
    folder = write_export_configs(
        tmp_path_factory.mktemp("export"), "localization", {**TINY_NETWORK, **TINY_LOCALIZER}, SIZE
    )
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["network_data_format"]["outputs"]["pred"]["spatial_shape"] = list(SIZE)
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


@pytest.fixture(scope="module")
def eager(localization_run, export_configs):
    return eager_export_network(export_configs, localization_run / "models/model.pt")


@pytest.fixture(scope="module")
def exported(localization_run, export_configs, example) -> Path:
    """Folder with model.ts, model.onnx and model.pt2."""
    checkpoint, config = localization_run / "models/model.pt", export_configs / "inference.json"
    arguments = {
        "net_id": "export_network",
        "ckpt_file": str(checkpoint),
        "meta_file": str(export_configs / "metadata.json"),
        "config_file": str(config),
        "key_in_ckpt": "model",
        "input_shape": list(example.shape),
        "use_trace": True,
    }
    ckpt_export(filepath=str(export_configs / "model.ts"), **arguments)
    onnx_export(filepath=str(export_configs / "model.onnx"), **arguments)
    options = {"config_file": config, "ckpt_file": checkpoint, "filepath": export_configs / "model.pt2"}
    shape = ",".join(map(str, example.shape))
    torch_export([part for name, value in options.items() for part in (f"--{name}", str(value))]
                 + ["--input_shape", shape])  # fmt: skip
    return export_configs


def test_network_returns_what_the_metadata_says(export_configs, eager, example):
    verify_net_in_out(
        net_id="export_network",
        meta_file=str(export_configs / "metadata.json"),
        config_file=str(export_configs / "inference.json"),
        device="cpu",
    )
    with torch.no_grad():
        probabilities = eager(example)
    pred = json.loads((export_configs / "metadata.json").read_text())["network_data_format"]["outputs"]["pred"]
    assert list(pred["channel_def"].values()) == list(load_disease_set().keys)
    assert probabilities.shape == (2, pred["num_channels"], *SIZE)
    assert (probabilities > 0).all() and (probabilities < 1).all()
    assert (probabilities[0] - probabilities[1]).abs().max() > 1e-3  # images differ, so do their masks
    assert (probabilities[:, 0] - probabilities[:, 1]).abs().max() > 1e-3  # and so do diseases


def test_the_exported_network_draws_what_the_network_of_inference_draws(export_configs, eager, example):
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(export_configs / "inference.json"))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(eager.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(eager(example), network(example)["probabilities"], rtol=0, atol=0)


def test_torchscript_export_agrees(exported, eager, example):
    script = torch.jit.load(exported / "model.ts")
    with torch.no_grad():
        torch.testing.assert_close(script(example), eager(example), rtol=1e-4, atol=1e-5)


def test_onnx_export_agrees(exported, eager, example):
    session = onnxruntime.InferenceSession(str(exported / "model.onnx"))
    (result,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(result, eager(example).numpy(), rtol=1e-3, atol=1e-4)


def test_torch_export_agrees(exported, eager, example):
    extra = {"config.json": ""}
    program = torch.export.load(exported / "model.pt2", extra_files=extra)
    assert json.loads(extra["config.json"])["base_channels"] == 8
    with torch.no_grad():
        for batch in (example[:1], example, example.repeat(2, 1, 1, 1, 1)):
            torch.testing.assert_close(program.module()(batch), eager(batch), rtol=1e-4, atol=1e-5)


def test_exports_run_without_this_package_and_without_transformers(exported, eager, example, tmp_path):
    """In a process of its own, whose working directory is elsewhere."""
    np.save(exported / "image.npy", example.numpy())
    result = run_command([sys.executable, "-c", RUN_ALL, str(exported)], cwd=tmp_path)
    assert "imported: []" in result.stdout
    with torch.no_grad():
        expected = eager(example).numpy()
    with np.load(exported / "probabilities.npz") as found:
        for name in ("script", "program", "onnx"):
            np.testing.assert_allclose(found[name], expected, rtol=1e-3, atol=1e-4, err_msg=name)
