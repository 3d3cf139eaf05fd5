import hashlib
import importlib.metadata
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from vlm3d_ext.checkpoint_files import CheckpointError, file_sha256, read_checkpoint
from vlm3d_ext.lineage import (
    Lineage,
    LineageError,
    check_chain,
    format_lineage,
    load_upstream_weights,
    main,
    read_lineage,
)


class Chain:
    """Writes manifests and checkpoints of a chain of bundles into one folder."""

    def __init__(self, folder):
        self.folder = folder

    def manifest(self, name="manifest.json", fingerprint="f" * 64):
        path = self.folder / name
        path.write_text(json.dumps({"name": "demo", "fingerprint": fingerprint, "label_set": "ct_rate_18"}))
        return path

    def checkpoint(self, bundle, name=None, seed=0, **options):
        torch.manual_seed(seed)
        network = nn.Linear(3, 2)
        lineage = Lineage(bundle, "0.1.0", "training", network=network, **options)
        path = self.folder / f"{name or bundle}.pt"
        torch.save({"model": network.state_dict(), "lineage": lineage.state_dict()}, path)
        return path


@pytest.fixture
def chain(tmp_path):
    return Chain(tmp_path)


def test_the_record_says_where_a_checkpoint_came_from(chain):
    manifest = chain.manifest()
    config = {"epochs": 3, "bundle_root": "$'.'", "train": {"sizes": (1, 2)}, "device": torch.device("cpu")}
    encoder = chain.checkpoint("encoder", manifest=manifest, config=config)
    head = chain.checkpoint("classification", manifest=manifest, upstream={"encoder": encoder, "text": None})
    record = read_lineage(head)
    assert (record["bundle"], record["version"], record["phase"]) == ("classification", "0.1.0", "training")
    assert record["manifest"]["sha256"] == hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert (record["manifest"]["fingerprint"], record["manifest"]["label_set"]) == ("f" * 64, "ct_rate_18")
    assert record["upstream"]["text"] is None
    upstream = record["upstream"]["encoder"]
    assert upstream["sha256"] == hashlib.sha256(encoder.read_bytes()).hexdigest()
    assert upstream["lineage"] == read_lineage(encoder)
    assert upstream["lineage"]["config"] == {
        "epochs": 3, "bundle_root": "$'.'", "train": {"sizes": [1, 2]}, "device": "cpu",
    }  # fmt: skip
    assert record["network"] == {"class": "Linear", "num_parameters": 8, "num_trainable_parameters": 8}
    assert record["package_versions"]["torch"] == importlib.metadata.version("torch")


def test_the_record_is_what_was_read_at_the_start(chain):
    manifest = chain.manifest()
    lineage = Lineage("encoder", "0.1.0", "pretraining", manifest=manifest)
    before = lineage.state_dict()
    chain.manifest(fingerprint="0" * 64)
    lineage.state_dict()["bundle"] = "changed"
    assert lineage.state_dict() == before
    assert Lineage("encoder", "0.1.0", "pretraining", manifest=manifest).state_dict() != before


def test_missing_and_broken_inputs_are_named(chain, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data manifest .*none\.json does not exist.*--manifest"):
        Lineage("encoder", "0.1.0", "p", manifest=tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
        Lineage("encoder", "0.1.0", "p", manifest=tmp_path / "broken.json")
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist"):
        Lineage("encoder", "0.1.0", "p", upstream={"encoder": tmp_path / "none.pt"})
    torch.save({"model": {}}, tmp_path / "bare.pt")
    with pytest.raises(LineageError, match=r"bare\.pt carries no lineage"):
        Lineage("classification", "0.1.0", "p", upstream={"encoder": tmp_path / "bare.pt"})
    allowed = Lineage("classification", "0.1.0", "p", upstream={"encoder": tmp_path / "bare.pt"}, allow_mismatch=True)
    assert allowed.state_dict()["upstream"]["encoder"]["lineage"] is None


def test_a_sound_chain_passes(chain):
    manifest = chain.manifest()
    encoder = chain.checkpoint("encoder", manifest=manifest)
    heads = {name: chain.checkpoint(name, manifest=manifest, upstream={"encoder": encoder}) for name in ("a", "b")}
    assert check_chain({"encoder": encoder, **heads}) == []
    chain.checkpoint("multitask", manifest=manifest, upstream={"encoder": encoder, **heads})


def test_heads_on_different_encoders_are_refused(chain, caplog):
    manifest = chain.manifest()
    first = chain.checkpoint("encoder", "first", seed=1, manifest=manifest)
    second = chain.checkpoint("encoder", "second", seed=2, manifest=manifest)
    heads = {
        "classification": chain.checkpoint("classification", manifest=manifest, upstream={"encoder": first}),
        "localization": chain.checkpoint("localization", manifest=manifest, upstream={"encoder": second}),
    }
    with pytest.raises(LineageError, match="2 different encoder checkpoints") as caught:
        check_chain(heads)
    for word in ("classification", "localization", file_sha256(first)[:12], file_sha256(second)[:12]):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(LineageError, match="2 different encoder checkpoints"):
        Lineage("multitask", "0.1.0", "p", manifest=manifest, upstream=heads)
    problems = check_chain(heads, allow_mismatch=True)
    assert len(problems) == 1 and "2 different encoder checkpoints" in caplog.text
    with pytest.raises(LineageError, match=r"second\.pt itself"):
        check_chain({"encoder": second, "classification": heads["classification"]})


def test_other_data_are_refused_at_any_depth(chain):
    encoder = chain.checkpoint("encoder", manifest=chain.manifest("one.json", "1" * 64))
    with pytest.raises(LineageError, match=r"the data differ.*222222222222 \(head\), 111111111111 \(head's encoder\)"):
        Lineage("head", "0.1.0", "p", manifest=chain.manifest("two.json", "2" * 64), upstream={"encoder": encoder})
    same_data_elsewhere = chain.manifest("copy.json", "1" * 64)
    Lineage("head", "0.1.0", "p", manifest=same_data_elsewhere, upstream={"encoder": encoder})


def test_continuing_a_run_checks_that_it_is_the_same(chain):
    manifest = chain.manifest()
    record = Lineage("encoder", "0.1.0", "p", manifest=manifest).state_dict()
    Lineage("encoder", "0.2.0", "p", manifest=manifest).load_state_dict(record)
    with pytest.raises(LineageError, match="its phase is p, this run's is other"):
        Lineage("encoder", "0.1.0", "other", manifest=manifest).load_state_dict(record)
    other = chain.manifest("other.json", "0" * 64)
    with pytest.raises(LineageError, match="its data fingerprint is ffffffffffff, this run's is 000000000000"):
        Lineage("encoder", "0.1.0", "p", manifest=other).load_state_dict(record)
    Lineage("encoder", "0.1.0", "p", manifest=other, allow_mismatch=True).load_state_dict(record)


def test_the_tree_goes_down_to_the_data(chain):
    manifest = chain.manifest()
    encoder = chain.checkpoint("encoder", manifest=manifest, config={"epochs": 3, "lr": "$1", "net": {}, "seed": 7})
    head = chain.checkpoint("classification", upstream={"encoder": encoder, "text": None})
    lines = format_lineage(read_lineage(head), "head.pt").split("\n")
    assert lines[0] == "head.pt: classification 0.1.0, phase training"
    assert "  network: Linear, 8 parameters" in lines and "  upstream text: none, random weights" in lines
    below = [line for line in lines if line.startswith("  upstream encoder")]
    assert below == [
        f"  upstream encoder: {encoder} (sha256 {file_sha256(encoder)[:12]}): encoder 0.1.0, phase training"
    ]
    assert "    config: epochs=3, seed=7" in lines
    assert any(
        line.startswith(f"    manifest: {manifest} (sha256 ") and "fingerprint ffffffffffff" in line for line in lines
    )


def test_the_command(chain, capsys):
    encoder = chain.checkpoint("encoder", manifest=chain.manifest())
    result = subprocess.run(
        [sys.executable, "-m", "vlm3d_ext.lineage", str(encoder)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and "encoder 0.1.0, phase training" in result.stdout, result.stderr
    assert main([str(encoder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[str(encoder)] == read_lineage(encoder)
    assert main([str(chain.folder / "none.pt")]) == 1
    assert "none.pt does not exist" in capsys.readouterr().err


def test_a_file_is_fingerprinted_once_and_again_after_a_change(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    status = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()  # same path, size and time: taken from the cache
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest()


def test_upstream_weights_are_loaded(chain):
    path = chain.checkpoint("encoder", seed=5)
    module = nn.Linear(3, 2)
    assert load_upstream_weights(module, path) is module
    torch.testing.assert_close(module.weight, torch.load(path, weights_only=True)["model"]["weight"], rtol=0, atol=0)
    torch.save({f"encoder.{k}": v + 1 for k, v in module.state_dict().items()} | {"head.x": torch.zeros(1)}, path)
    inner = load_upstream_weights(nn.Linear(3, 2), path, prefix="encoder.")
    torch.testing.assert_close(inner.bias, module.bias + 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"net": {}}, r"has no entry 'model'; it has \['net'\]"),
        ({"model": [1]}, r"entry 'model' of .* is not a state dict"),
        ([1, 2], "holds a list, not a dictionary"),
        (
            {"model": {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}},
            r"weight is \(2, 4\) in the file and \(2, 3\) here",
        ),
        ({"model": {"weight": torch.zeros(2, 3)}}, "missing in the file: bias"),
        (
            {
                "model": {
                    "weight": torch.zeros(2, 3),
                    "bias": torch.zeros(2),
                    **{f"x{i}": torch.zeros(1) for i in range(6)},
                }
            },
            "not known here: x0, x1, x2, x3 and 2 more",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path, content, message):
    path = tmp_path / "encoder.pt"
    torch.save(content, path)
    module = nn.Linear(3, 2)
    before = module.weight.clone()
    with pytest.raises(CheckpointError, match=message) as caught:
        load_upstream_weights(module, path, parameter_name="encoder_ckpt", command="python -m monai.bundle run")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert torch.equal(module.weight, before)
    if isinstance(content, dict):
        assert "Make it with: python -m monai.bundle run, or point to another file with --encoder_ckpt PATH." in str(
            caught.value
        )


def test_a_missing_file_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"none\.pt does not exist\. Make it with: make x, or .*--text_ckpt PATH"
    ):
        load_upstream_weights(nn.Linear(3, 2), tmp_path / "none.pt", parameter_name="text_ckpt", command="make x")


class Touch:
    """Creates a file when unpickled: what a hostile checkpoint could do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_broken_and_hostile_files_are_refused_without_running_them(tmp_path, chain):
    whole = chain.checkpoint("encoder").read_bytes()
    victim = str(tmp_path / "victim")
    torch.save({"model": Touch(victim)}, tmp_path / "hostile.pt")
    files = {
        "text.pt": b"this is no checkpoint",
        "empty.pt": b"",
        "cut.pt": whole[: len(whole) // 2],
        "pickle.pt": pickle.dumps({"model": Touch(victim)}, protocol=2),
        "hostile.pt": (tmp_path / "hostile.pt").read_bytes(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name) as caught:
            read_checkpoint(tmp_path / name, hint="Train it again.")
        assert str(caught.value).endswith("Train it again.") and "\n" not in str(caught.value)
        assert ("could run code" in str(caught.value)) == (name in ("pickle.pt", "hostile.pt"))
    assert not os.path.exists(victim)


def test_checkpoints_of_the_old_format_are_read(tmp_path):
    torch.save({"model": {"x": torch.ones(2)}}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / "old.pt")["model"]["x"], torch.ones(2))
