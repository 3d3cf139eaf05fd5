"""House rules of configs, checked over all bundles."""

import json
import re
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from tests.bundles.bundle_runs import BUNDLES, REPOSITORY, SHARED_DATA, config_files, run_command
from vlm3d_ext.engines.checked_overrides import check_overrides

BUNDLE_NAMES = sorted(path.name for path in BUNDLES.iterdir() if (path / "configs").is_dir())
CONFIGS = sorted(BUNDLES.glob("*/configs/**/*.json")) + sorted((BUNDLES / "_overlays").glob("*.json"))
# the localizer has three stages to write out, and crops, targets and thresholds beside them
MOST_LINES = {"train": 210, "inference": 126, "evaluate": 72, "localization/train": 225}
# the report generator begins with the evidence of three other networks, at training and at inference
MOST_LINES |= {"report_generation/train": 245, "report_generation/inference": 175}
# the joint network has the parts of four bundles, and its inference writes what four would
MOST_LINES |= {"multitask/train": 330, "multitask/inference": 195, "multitask/evaluate": 95}
KNOBS = {"dataset_dir", "manifest", "run_dir", "ckpt_dir", "output_dir", "epochs", "batch_size", "global_batch_size",
         "learning_rate", "seed", "resume", "amp", "num_workers", "max_cases"}  # fmt: skip

# arguments of networks that change nothing outside training
TRAINING_ONLY = {"max_noise", "activation_checkpointing", "gradient_checkpointing"}
SHARED_WIRING = {
    "train": ["device", "accumulation_steps", "manifest", "ckpt_dir", "output_dir", "network", "loss::_target_",
              "optimizer::_target_", "optimizer::lr", "optimizer::params::network", "lr_scheduler", "case_manifest",
              "lineage::_target_", "lineage::manifest", "lineage::allow_mismatch", "lineage::config", "history",
              "checkpoint::training_objects", "checkpoint::resume", "checkpoint::lineage", "checkpoint::save_dir",
              "train::dataset::_target_", "train::dataset::seed", "train::trainer", "validate::evaluator::network",
              "validate::evaluator::val_handlers", "validate::evaluator::amp"],
    "inference": ["device", "ckpt_path", "manifest", "case_manifest", "lineage::_target_", "lineage::manifest",
                  "lineage::phase", "lineage::allow_mismatch", "inferer", "evaluator"],
}  # fmt: skip
# the joint network's inference makes its manifest itself, of whatever scans it is given
WIRED_APART = {("multitask", "inference", "manifest")}


def _load(path: Path) -> dict:
    return ConfigParser.load_config_file(str(path))


def test_no_python_in_bundles():
    assert not list(BUNDLES.rglob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parts[-3]}/{path.stem}")
def test_config_is_strict_json_of_readable_size(path):
    text = path.read_text()
    pairs_seen = []
    json.loads(text, object_pairs_hook=lambda pairs: pairs_seen.append(pairs) or dict(pairs))
    for pairs in pairs_seen:
        keys = [key for key, _ in pairs]
        assert len(keys) == len(set(keys)), f"duplicate keys in {path}: {keys}"
    lines = text.splitlines()
    assert path.stem == "metadata" or max(map(len, lines)) <= 130  # metadata holds whole sentences
    assert len(lines) <= MOST_LINES.get(f"{path.parts[-3]}/{path.stem}", MOST_LINES.get(path.stem, 90))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parts[-3]}/{path.stem}")
def test_every_target_exists(path):
    from monai.utils import optional_import

    for target in re.findall(r'"_target_": "([^"]+)"', path.read_text()):
        module, name = target.rsplit(".", 1)
        if module.split(".")[-1][0].isupper():  # a class's own constructor, such as SentenceBank.from_cases
            module, owner = module.rsplit(".", 1)
            found, exists = optional_import(module, name=owner)
            assert exists and hasattr(found, name), target
        else:
            assert optional_import(module, name=name)[1], f"{target} in {path} cannot be imported"


@pytest.mark.parametrize("bundle", BUNDLE_NAMES)
def test_train_and_inference_agree(bundle):
    train, inference = (_load(BUNDLES / bundle / "configs" / f"{name}.json") for name in ("train", "inference"))
    assert _without(TRAINING_ONLY, train["network_def"]) == _without(TRAINING_ONLY, inference["network_def"])
    for key in set(re.findall(r"@(\w+)", json.dumps(inference["network_def"]))) - TRAINING_ONLY:
        assert train[key] == inference[key], f"{key} differs between {bundle}'s train.json and inference.json"
    assert train.keys() >= KNOBS, f"missing: {KNOBS - train.keys()}"
    assert train["bundle_root"] == inference["bundle_root"]


def _without(names: set[str], content):
    """Return nested dictionaries without some keys."""
    if not isinstance(content, dict):
        return content
    return {key: _without(names, value) for key, value in content.items() if key not in names}


def _flat(content: dict, prefix: str = "") -> dict:
    """Return the leaves of nested dictionaries by their ids, lists as leaves."""
    leaves = {}
    for key, value in content.items():
        nested = isinstance(value, dict) and value
        leaves |= _flat(value, f"{prefix}{key}::") if nested else {f"{prefix}{key}": value}
    return leaves


@pytest.mark.parametrize("name", SHARED_WIRING)
def test_bundles_are_wired_alike(name):
    """What no bundle has a reason to do in its own way, written out in each of them, is the same in all."""
    configs = {bundle: _flat(_load(BUNDLES / bundle / "configs" / f"{name}.json")) for bundle in BUNDLE_NAMES}
    assert len(configs) >= 3
    for start in SHARED_WIRING[name]:
        shared = {}
        for bundle, config in configs.items():
            if (bundle, name, start) in WIRED_APART:
                continue
            shared[bundle] = {k: v for k, v in config.items() if k == start or k.startswith(f"{start}::")}
            assert shared[bundle], f"{bundle}'s {name}.json lacks {start}"
            assert shared[bundle] == shared[BUNDLE_NAMES[0]], f"{start} of {bundle} and {BUNDLE_NAMES[0]} differ"


@pytest.mark.parametrize("bundle", BUNDLE_NAMES)
def test_a_run_ends_with_its_training(bundle):
    assert _load(BUNDLES / bundle / "configs" / "train.json")["run"][-1] == "$@train::trainer.run()"


@pytest.mark.parametrize("bundle", BUNDLE_NAMES)
def test_a_training_s_handlers_stand_in_order(bundle):
    """The upstream weights come before everything that looks at weights; the checkpoint is written when all is done."""
    handlers = _load(BUNDLES / bundle / "configs" / "train.json")["train"]["handlers"]
    names = [handler if isinstance(handler, str) else handler["_target_"].rsplit(".", 1)[1] for handler in handlers]
    shared = ["LineageHandler", "IterationSeed", "GradientClipping", "LrScheduleHandler", "ValidationHandler"]
    shared += ["@history", "ProgressBar", "@checkpoint"]
    assert [name for name in names if name in shared] == shared and names[-1] == "@checkpoint"
    assert "@upstream_weights" not in names[1:]


def test_export_network_is_built_like_network_def():
    inference = _load(BUNDLES / "encoder" / "configs" / "inference.json")
    plain = [
        {k: v for k, v in inference[name].items() if k not in ("_target_", "_desc_")}
        for name in ("network_def", "export_network")
    ]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("bundle", BUNDLE_NAMES)
def test_metadata_tells_the_truth(bundle):
    import vlm3d_ext

    metadata = json.loads((BUNDLES / bundle / "configs" / "metadata.json").read_text())
    assert metadata["version"] == vlm3d_ext.__version__
    assert metadata["version"] in metadata["changelog"]
    train = _load(BUNDLES / bundle / "configs" / "train.json")
    assert train["lineage"]["version"] == metadata["version"]
    assert (BUNDLES / bundle / "LICENSE").is_file() and (BUNDLES / bundle / "docs" / "README.md").is_file()


@pytest.mark.parametrize("bundle", BUNDLE_NAMES)
def test_verify_metadata(bundle, tmp_path):
    schema = SHARED_DATA / "monai" / "meta_schema_20240725.json"
    if not schema.is_file():
        pytest.skip(f"needs the metadata schema, {schema}")
    from monai.bundle import verify_metadata

    metadata = BUNDLES / bundle / "configs" / "metadata.json"
    verify_metadata(meta_file=str(metadata), filepath=str(schema))
    broken = {key: value for key, value in json.loads(metadata.read_text()).items() if key != "version"}
    (tmp_path / "metadata.json").write_text(json.dumps(broken))
    with pytest.raises(Exception, match="version"):
        verify_metadata(meta_file=str(tmp_path / "metadata.json"), filepath=str(schema))


def test_unknown_option_is_refused_with_the_nearest_name():
    (train,) = config_files("encoder/train")
    program = ["/anywhere/monai/bundle/__main__.py", "run", "--config_file", train]
    check_overrides([*program, "--epochs", "1"])
    with pytest.raises(ValueError, match=r"epoch\b.*epochs"):
        check_overrides([*program, "--epoch", "1"])


def _commands(path: Path) -> list[str]:
    blocks = re.findall(r"```(?:sh|bash|)\n(.*?)```", path.read_text(), flags=re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in joined.splitlines() if line.strip()]


PAGES = [REPOSITORY / "README.md", BUNDLES / "README.md", *sorted(BUNDLES.glob("*/docs/README.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_files_and_options_named_in_the_docs_exist(page, monkeypatch):
    """Each bundle command's configs exist and its options are accepted; each module named exists."""
    import importlib.util
    import shlex

    commands = _commands(page)
    assert commands, f"{page} has no command"
    for line in commands:
        for name in re.findall(r"(?:bundles|docs)/[\w/.-]+\.(?:json|md)", line):
            made_by_a_run = "/predictions/" in name
            assert made_by_a_run or (REPOSITORY / name).exists(), f"{page}: {name} in {line!r}"
        for module in re.findall(r"-m ((?:vlm3d_ext|data_prep)[\w.]*)", line):
            assert importlib.util.find_spec(module), f"{page}: {module} in {line!r}"
        if "monai.bundle run " in line:
            arguments = shlex.split(line.split("monai.bundle run ")[1].replace("/path/encoder", "bundles/encoder"))
            if "configs/" in line and not line.startswith("cd "):
                monkeypatch.chdir(REPOSITORY)
                check_overrides(["/anywhere/monai/bundle/__main__.py", "run", *arguments])


def test_help_of_the_commands_named_in_the_docs_runs():
    for module in (
        "data_prep.synthesize",
        "data_prep.prepare",
        "vlm3d_ext.run_summary",
        "vlm3d_ext.engines.torch_export",
        "vlm3d_ext.engines.challenge_localization_score",
        "vlm3d_ext.engines.finding_extractor_score",
        "vlm3d_ext.engines.language_model_requirements",
        "data_prep.make_language_model",
        "data_prep.write_reports",
        "vlm3d_ext.engines.challenge_container",
    ):
        result = run_command([__import__("sys").executable, "-m", module, "--help"])
        assert "usage" in result.stdout.lower()
