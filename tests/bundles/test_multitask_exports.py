"""The exported joint network: findings and lesions of one image, with no text encoder and no language model."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ckpt_export, onnx_export, verify_net_in_out

from tests.bundles.bundle_runs import (
    TINY_CLASSIFIER,
    TINY_LOCALIZER,
    TINY_NETWORK,
    TINY_REPORTS,
    checkpoint_weights,
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
onnx = session.run(None, {session.get_inputs()[0].name: image})
outputs = {"script": script, "program": program, "onnx": onnx}
parts = {f"{name}_{number}": np.asarray(part) for name, of in outputs.items() for number, part in enumerate(of)}
np.savez(folder / "outputs.npz", **parts)
foreign = {"transformers", "peft", "monai", "vlm3d_ext"} & {name.split(".")[0] for name in sys.modules}
print("imported:", sorted(foreign))
"""


@pytest.fixture(scope="module")
def export_configs(tmp_path_factory, language_model) -> Path:
    sizes = {**TINY_NETWORK, **TINY_CLASSIFIER, **TINY_LOCALIZER, **TINY_REPORTS, "language_model": str(language_model)}
    folder = write_export_configs(tmp_path_factory.mktemp("export"), "multitask", sizes, SIZE)
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["network_data_format"]["outputs"]["pred"]["spatial_shape"] = list(SIZE)
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


@pytest.fixture(scope="module")
def eager(multitask_run, export_configs) -> torch.nn.Module:
    return eager_export_network(export_configs, multitask_run / "models/model.pt")


def test_lesion_network_returns_what_the_metadata_says(export_configs):
    arguments = {
        "meta_file": str(export_configs / "metadata.json"),
        "config_file": str(export_configs / "inference.json"),
        "net_id": "lesion_network",
        "device": "cpu",
    }
    verify_net_in_out(**arguments)
    metadata = json.loads((export_configs / "metadata.json").read_text())
    pred = metadata["network_data_format"]["outputs"]["pred"]
    assert list(pred["channel_def"].values()) == list(load_disease_set().keys)
    pred["num_channels"] = 4
    (export_configs / "wrong.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="output channel number"):
        verify_net_in_out(**{**arguments, "meta_file": str(export_configs / "wrong.json")})


def test_the_exported_networks_answer_as_that_of_inference_does(export_configs, multitask_run, eager, example):
    parser = ConfigParser()
    parser.read_config(str(export_configs / "inference.json"))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(checkpoint_weights(multitask_run / "models/model.pt"))
    lesion_network = parser.get_parsed_content("lesion_network").eval()
    with torch.no_grad():
        whole = network(example, generate=False)
        findings, lesions = eager(example)
        drawn = lesion_network(example)  # shares the weights that network_def has just got
    assert network.is_fused.any()  # so that both ways to a finding are exported
    torch.testing.assert_close(findings, whole["classification"]["probabilities"])
    for probabilities in (lesions, drawn):
        torch.testing.assert_close(probabilities, torch.stack(list(whole["localization"].values()), dim=1))
    assert (lesions[0] - lesions[1]).abs().max() > 1e-3 and (findings[0] - findings[1]).abs().max() > 1e-3


def test_exports_agree_and_need_nothing_of_ours(multitask_run, export_configs, eager, example, tmp_path):
    """TorchScript, ONNX and `torch.export`, in a process of its own, whose working directory is elsewhere."""
    checkpoint = multitask_run / "models/model.pt"
    arguments = {
        "net_id": "export_network",
        "ckpt_file": str(checkpoint),
        "meta_file": str(export_configs / "metadata.json"),
        "config_file": str(export_configs / "inference.json"),
        "key_in_ckpt": "model",
        "input_shape": list(example.shape),
        "use_trace": True,
    }
    ckpt_export(filepath=str(export_configs / "model.ts"), **arguments)
    onnx_export(filepath=str(export_configs / "model.onnx"), **arguments)
    options = {
        "config_file": export_configs / "inference.json",
        "ckpt_file": checkpoint,
        "filepath": export_configs / "model.pt2",
        "input_shape": ",".join(map(str, example.shape)),
    }
    torch_export([part for name, value in options.items() for part in (f"--{name}", str(value))])
    np.save(export_configs / "image.npy", example.numpy())
    result = run_command([sys.executable, "-c", RUN_ALL, str(export_configs)], cwd=tmp_path)
    assert "imported: []" in result.stdout
    with torch.no_grad():
        wanted = [part.numpy() for part in eager(example)]
        program = torch.export.load(export_configs / "model.pt2").module()
        for batch in (example[:1], example.repeat(2, 1, 1, 1, 1)):  # of any size
            torch.testing.assert_close(program(batch), eager(batch), rtol=1e-4, atol=1e-5)
    assert wanted[0].shape == (2, 18) and wanted[1].shape == (2, 5, *SIZE)
    with np.load(export_configs / "outputs.npz") as outputs:
        for name, tolerance in (("script", 1e-5), ("program", 1e-5), ("onnx", 1e-4)):
            for number, expected in enumerate(wanted):
                found = outputs[f"{name}_{number}"]
                np.testing.assert_allclose(found, expected, rtol=tolerance * 10, atol=tolerance, err_msg=name)
