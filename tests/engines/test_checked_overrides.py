import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm3d_ext.engines.checked_overrides import check_overrides, command_line_config

CONFIG = {
    "epochs": 2,
    "learning_rate": 0.1,
    "encoder_ckpt": "encoder.pt",
    "resume": None,
    "train": {
        "optimizer": {"_target_": "torch.optim.SGD", "params": "$[]", "lr": "@learning_rate"},
        "handlers": [{"_target_": "StatsHandler", "name": "train"}],
        "anything": {"_target_": "builtins.dict", "a": 1},
    },
}


@pytest.fixture
def bundle(tmp_path):
    """A function that writes the config and returns a command line for it."""
    (tmp_path / "train.json").write_text(json.dumps(CONFIG))
    (tmp_path / "delta.json").write_text(json.dumps({"epochs": 5, "train::optimizer::lr": 0.5, "demo": True}))
    (tmp_path / "metadata.json").write_text(json.dumps({"version": "0.1.0"}))

    def command(*options, verb="run", files=("train.json",)):
        named = str([str(tmp_path / file) for file in files]) if len(files) != 1 else str(tmp_path / files[0])
        return ["/x/monai/bundle/__main__.py", verb, "--config_file", named, *options]

    return command


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--epochs", "3"),
        ("--epochs=3",),
        ("training", "--init_id", "initialize", "--epochs=3"),
        ("--train::optimizer::lr", "0.2"),
        ("--train#optimizer#lr=0.2",),
        ("--train::optimizer::momentum", "0.9"),  # not in the config, but SGD takes it
        ("--train::optimizer::_disabled_", "True"),
        ("--train::handlers::0::name", "other"),
        ("--train::handlers::0::tag_name", "loss"),  # StatsHandler by its short name
        ("--train::anything::new", "1"),  # a target that takes any keyword
        ("--resume", "None"),
        ("--encoder_ckpt", "$None"),
        ("--workflow_type", "infer"),
        ("--tracking", "mlflow", "--run_name", "first", "--output_dir", "out"),
        ("--_meta_::version", "0.2.0"),
        ("--train", "{'optimizer': {'_target_': 'torch.optim.SGD'}}", "--train::optimizer::nesterov", "True"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "run_workflow"])
def test_options_with_an_effect_are_accepted(bundle, options, verb):
    if verb == "run_workflow" and options[:1] == ("training",):
        options = options[1:]
    check_overrides(bundle(*options, verb=verb))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epoch", "3"), r"--epoch would have no effect: the config has no 'epoch' .*did you mean --epochs\b"),
        (("--epoch=3",), r"--epoch would have no effect"),
        (("--learning-rat", "3"), r"--learning_rat would .*did you mean --learning_rate"),
        (("--lr", "3"), r"did you mean --train::optimizer::lr"),
        (("--momentum", "3"), r"the config has no 'momentum'"),
        (("--train::optimiser::lr", "3"), r"train has no 'optimiser' .*did you mean --train::optimizer"),
        (("--train#optimizer#momentun", "3"), r"did you mean --train::optimizer::momentum"),
        (("--train::handlers::1::name", "x"), r"train::handlers has no '1'"),
        (("--train::handlers::0::tagname", "x"), r"did you mean --train::handlers::0::tag_name"),
        (("--train::optimizer::parms", "[]"), r"did you mean --train::optimizer::params\?$"),
        (("--epochs::more", "3"), r"epochs has no 'more'"),
        (("--config_fle", "x.json"), r"did you mean --config_file"),
        (("--run_name", "first"), r"the config has no 'run_name'"),  # only tracking brings it
        (("--encoder_ckpt", "None"), r"--encoder_ckpt None has no effect.*Write --encoder_ckpt '\$None'"),
        (("--demo", "True"), r"the config has no 'demo'"),
        (("--epochs", "3", "--+train", "{}"), r"--\+train would replace 'train', not merge"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "run_workflow"])
def test_options_without_an_effect_are_refused(bundle, options, message, verb):
    with pytest.raises(ValueError, match=message) as caught:
        check_overrides(bundle(*options, verb=verb))
    assert "\n" not in str(caught.value)


def test_several_config_files_are_merged(bundle, tmp_path):
    check_overrides(bundle("--demo", "False", files=("train.json", "delta.json")))
    comma = ["/x/monai/bundle/__main__.py", "run", "--config_file", f"{tmp_path}/train.json,{tmp_path}/delta.json"]
    for command in (comma, bundle(files=("train.json", "delta.json"))):
        config = command_line_config([*command, "--demo", "False", "--epochs", "7"])
        assert (config["demo"], config["epochs"], config["train"]["optimizer"]["lr"]) == (False, 7, 0.5)


def test_the_args_file_counts_and_the_command_line_wins(bundle, tmp_path):
    (tmp_path / "args.json").write_text(
        json.dumps({"config_file": str(tmp_path / "train.json"), "epochs": 4, "learning_rate": 3})
    )
    command = ["/x/monai/bundle/__main__.py", "run", "--args_file", str(tmp_path / "args.json")]
    config = command_line_config([*command, "--epochs=9"])
    assert (config["epochs"], config["learning_rate"]) == (9, 3)
    check_overrides(command)
    (tmp_path / "args.json").write_text(json.dumps({"config_file": str(tmp_path / "train.json"), "epoch": 4}))
    with pytest.raises(ValueError, match="--epoch would have no effect"):
        check_overrides(command)


def test_the_config_is_returned_as_written_and_anew(bundle):
    config = command_line_config(bundle("--train::optimizer::momentum", "0.9"))
    expected = json.loads(json.dumps(CONFIG))
    expected["train"]["optimizer"]["momentum"] = 0.9
    assert config == expected
    config["train"].clear()
    assert command_line_config(bundle())["train"] == CONFIG["train"]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["pytest"],
        ["pytest", "run", "--epoch", "1"],
        ["/x/monai/bundle/__main__.py", "verify_metadata", "--epoch", "1"],
        ["/x/other/bundle/__main__.py", "run", "--epoch", "1"],
    ],
)
def test_other_programs_are_left_alone(argv):
    check_overrides(argv)
    assert command_line_config(argv) is None


def _run_bundle(folder: Path, *options: str, launcher: tuple[str, ...] = ("-m",)) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *launcher, "monai.bundle", "run", "--config_file", "configs/train.json", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_real_run_accepts_and_refuses(tmp_path):
    """The whole way: MONAI's command line, a config that calls the check, and the merged config as MONAI has it."""
    (tmp_path / "configs").mkdir()
    config = {
        "imports": [
            "$import vlm3d_ext.engines.checked_overrides as checked_overrides",
            "$import json",
            "$import pathlib",
        ],
        "epochs": 2,
        "optimizer": {"_target_": "torch.optim.SGD", "params": "$[torch.nn.Parameter(torch.zeros(1))]", "lr": 0.1},
        "initialize": [{"_target_": "vlm3d_ext.engines.checked_overrides.check_overrides"}],
        "run": [
            "$pathlib.Path('config.json').write_text(json.dumps(checked_overrides.command_line_config()))",
            "$pathlib.Path('ran.txt').write_text(f\"{@epochs} {@optimizer.defaults['momentum']}\")",
        ],
    }
    (tmp_path / "configs/train.json").write_text(json.dumps(config))
    accepted = _run_bundle(tmp_path, "--epochs=3", "--optimizer::momentum", "0.5")
    assert accepted.returncode == 0, accepted.stderr
    assert (tmp_path / "ran.txt").read_text() == "3 0.5"
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert (recorded["epochs"], recorded["optimizer"]["momentum"], recorded["run"]) == (3, 0.5, config["run"])
    (tmp_path / "ran.txt").unlink()
    refused = _run_bundle(tmp_path, "--epoch", "3")
    assert refused.returncode != 0 and not (tmp_path / "ran.txt").exists()
    assert "--epoch would have no effect: the config has no 'epoch'" in refused.stderr
    assert "did you mean --epochs?" in refused.stderr


@pytest.mark.parametrize("text", ["false", "true", "no", "FALSE"])
def test_a_truth_value_given_as_text_is_refused(bundle, text):
    """MONAI would hand on the text, and any text counts as true: `--demo false` would switch it on."""
    files = ("train.json", "delta.json")  # delta.json has "demo": true
    check_overrides(bundle("--demo", "False", files=files))
    with pytest.raises(ValueError, match=rf"--demo {text} is text to MONAI.*--demo False"):
        check_overrides(bundle("--demo", text, files=files))
