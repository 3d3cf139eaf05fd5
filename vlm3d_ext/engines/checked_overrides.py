"""Refuse command line options that would have no effect.

`python -m monai.bundle run --config_file train.json --epoch 1` accepts the option, adds a key ``epoch`` that nothing
reads, and trains with the ``epochs`` of the file. Every config of ours therefore begins its ``initialize`` list with
`check_overrides`.

The command line is read by the very parser that MONAI uses (fire) and with the very signatures of `monai.bundle.run`
and `run_workflow`, so ``--epochs=3``, ``--epochs 3``, positional arguments, lists and an ``--args_file`` mean here
what they mean there.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc import locate
from typing import Any

import fire
import monai.bundle
from monai.bundle import ConfigComponent, ConfigParser, ConfigWorkflow
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS, ID_SEP_KEY, MERGE_KEY

__all__ = ["check_overrides", "command_line_config"]

_ENTRY_POINT = ("monai", "bundle", "__main__.py")
_VERBS: dict[str, Callable[..., Any]] = {"run": monai.bundle.run, "run_workflow": monai.bundle.run_workflow}
_META_KEY = ConfigParser.meta_key


@dataclass(frozen=True)
class _CommandLine:
    """What one bundle command line asks for: MONAI's own arguments, and the options that override the config."""

    arguments: dict[str, Any]
    overrides: dict[str, Any]
    known_arguments: frozenset[str]
    merging: tuple[str, ...]  # options with MONAI's prefix for merging, such as --+initialize


def check_overrides(argv: Sequence[str] | None = None) -> None:
    """Check every ``--option`` of a ``python -m monai.bundle run`` or ``run_workflow`` command against the merged
    config.

    An option is accepted if it is an argument of MONAI's command, or a key of the config. In a nested id
    (``--train::trainer::max_epochs 3``, or with ``#``) every part must exist; only the last part may be new where it
    is an argument that the component's ``_target_`` takes. Started in any other way than by that command, nothing is
    checked.

    Use it as the first entry of ``initialize``: ``{"_target_":
    "vlm3d_ext.engines.checked_overrides.check_overrides"}``.

    Args:
        argv: the command line, program first; `sys.argv` by default.

    Raises:
        ValueError: if an option would have no effect: the config has no such key (the message names the nearest
            ones), its value is ``None``, which MONAI drops, or it asks to merge (``--+key``), which replaces; or if it
            would have the wrong effect: ``true`` or ``false`` in lower case for a boolean, which MONAI takes as text.
    """
    command = _read_command_line(argv)
    if command is None:
        return
    if command.merging:
        raise ValueError(
            f"--{command.merging[0]} would replace {command.merging[0][1:]!r}, not merge into it: MONAI merges only "
            f"what config files give; put it into a further --config_file."
        )
    config = _merged_config(command, with_overrides=False)
    # two overrides may build on each other, e.g. a component and an argument of it, so each is applied before the
    # next is checked
    parser = ConfigParser(config)
    for option, value in command.overrides.items():
        _check_option(option, value, parser, command)
        parser[option] = value


def command_line_config(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Return the merged config of the running bundle command with its overrides, as written: nothing is evaluated or
    instantiated.

    Args:
        argv: the command line, program first; `sys.argv` by default.

    Returns:
        The config without its metadata, or None when the process was not started by ``python -m monai.bundle run``
        or ``run_workflow``.
    """
    command = _read_command_line(argv)
    if command is None:
        return None
    config = _merged_config(command, with_overrides=True)
    config.pop(_META_KEY, None)
    return config


def _read_command_line(argv: Sequence[str] | None) -> _CommandLine | None:
    argv = sys.argv if argv is None else argv
    if len(argv) < 2 or Path(argv[0]).parts[-3:] != _ENTRY_POINT or argv[1] not in _VERBS:
        return None
    verb = _VERBS[argv[1]]
    recorded: dict[str, Any] = {}

    def record(*args: Any, **kwargs: Any) -> None:
        recorded.update(_by_name(verb, args, kwargs))

    record.__signature__ = inspect.signature(verb)  # type: ignore[attr-defined]
    fire.Fire(record, command=list(argv[2:]), name=argv[1])
    merging = tuple(name for name in recorded if name.startswith(MERGE_KEY))
    recorded = {name: value for name, value in recorded.items() if name not in merging}
    given = monai.bundle.update_kwargs(args=recorded.pop("args_file", None), ignore_none=False, **recorded)
    workflow = _workflow_class(given.pop("workflow_name", None))
    known = _named_parameters(verb) | _named_parameters(monai.bundle.create_workflow) | _named_parameters(workflow)
    arguments = {name: given.pop(name) for name in sorted(known) if name in given}
    return _CommandLine(arguments, given, frozenset(known), merging)


def _by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Give positional arguments their names and put what went into ``**kwargs`` beside them."""
    signature = inspect.signature(function)
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(parameter.name, {}))
    # a parameter that was not given keeps its default, and must not hide what an args file says
    defaults = {name for name, parameter in signature.parameters.items() if bound.get(name, ...) is parameter.default}
    return {name: value for name, value in bound.items() if name not in defaults}


def _workflow_class(name: str | None) -> Callable[..., Any]:
    if name is None:
        return ConfigWorkflow
    return getattr(monai.bundle, str(name), None) or locate(str(name)) or ConfigWorkflow  # type: ignore[return-value]


def _named_parameters(function: Callable[..., Any]) -> set[str]:
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {
        name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind not in variadic
    }


def _merged_config(command: _CommandLine, with_overrides: bool) -> dict[str, Any]:
    parser = ConfigParser()
    config_file = command.arguments.get("config_file")
    if config_file is not None:
        parser.read_config(config_file)
    meta_file = command.arguments.get("meta_file") or _default_meta_file(config_file)
    if meta_file is not None:
        parser.read_meta(meta_file)
    if with_overrides:
        parser.update({option: value for option, value in command.overrides.items() if value is not None})
    return copy.deepcopy(parser.get())


def _default_meta_file(config_file: str | Sequence[str] | None) -> str | None:
    """Where MONAI looks for the metadata when no file is named: beside the first config file."""
    if config_file is None:
        return None
    first = config_file.split(",")[0] if isinstance(config_file, str) else config_file[0]
    path = Path(first).parent / "metadata.json"
    return str(path) if path.is_file() else None


def _check_option(option: str, value: Any, parser: ConfigParser, command: _CommandLine) -> None:
    parts = option.replace("#", ID_SEP_KEY).split(ID_SEP_KEY)
    found: Any = parser.get()
    for depth, part in enumerate(parts):
        if isinstance(found, dict) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.lstrip("-").isdigit() and -len(found) <= int(part) < len(found):
            found = found[int(part)]
        elif depth == len(parts) - 1 and _is_argument_of(found, part):
            return
        elif len(parts) == 1 and part in _tracking_keys(command):
            return
        else:
            raise ValueError(_refusal(option, parts[:depth], part, found, parser.get(), command))
    if value is None and found is not None:
        raise ValueError(
            f"--{option} None has no effect, because MONAI drops options that are None; the config keeps {found!r}. "
            f"Write --{option} '$None' to set it to None."
        )
    if isinstance(found, bool) and isinstance(value, str) and value.lower() in ("true", "false", "yes", "no"):
        # any text that is not empty counts as true, so `--resume false` would resume
        raise ValueError(
            f"--{option} {value} is text to MONAI, and text counts as true; write --{option} True or --{option} False."
        )


def _is_argument_of(component: Any, name: str) -> bool:
    """Whether `name` may be added to a component: an argument it takes, or a key of MONAI's such as ``_disabled_``."""
    if not isinstance(component, dict) or "_target_" not in component:
        return False
    if name in ConfigComponent.non_arg_keys:
        return True
    parameters = _target_parameters(component)
    if parameters is None:
        return True  # cannot be known before the run; the constructor refuses what it does not take
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _target_parameters(component: dict[str, Any]) -> dict[str, inspect.Parameter] | None:
    target = ConfigComponent(config={"_target_": component["_target_"]}).resolve_module_name()
    resolved = locate(target) if isinstance(target, str) else target
    try:
        return dict(inspect.signature(resolved).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _tracking_keys(command: _CommandLine) -> set[str]:
    """Keys that ``--tracking`` itself brings into the config."""
    tracking = command.arguments.get("tracking")
    if tracking is None:
        return set()
    if isinstance(tracking, str) and tracking in DEFAULT_EXP_MGMT_SETTINGS:
        settings: dict[str, Any] = DEFAULT_EXP_MGMT_SETTINGS[tracking]
        return set(settings["configs"])
    return set(ConfigParser.load_config_files(tracking).get("configs", {}))


def _refusal(option: str, above: list[str], part: str, found: Any, config: Any, command: _CommandLine) -> str:
    prefix = "".join(name + ID_SEP_KEY for name in above)
    keys: list[str] = []
    if isinstance(found, dict):
        keys = [key for key in found if key != "_target_"]
        if "_target_" in found:
            keys += [name for name in _target_parameters(found) or {} if name != "self"]
    elif isinstance(found, list):
        keys = [str(index) for index in range(len(found))]
    if not above:
        keys += sorted(command.known_arguments | _tracking_keys(command))
    near = [prefix + key for key in difflib.get_close_matches(part, dict.fromkeys(keys), n=3)]
    # the right name at the wrong place is the other common mistake
    last = option.replace("#", ID_SEP_KEY).split(ID_SEP_KEY)[-1]
    near += [path for path in _paths_ending_in(config, last) if path not in near][:3]
    where = ID_SEP_KEY.join(above) or "the config"
    advice = f"did you mean {' or '.join('--' + name for name in near)}?" if near else "see the file for its keys."
    files = command.arguments.get("config_file")
    return f"--{option} would have no effect: {where} has no {part!r} (config_file {files}); {advice}"


def _paths_ending_in(config: Any, name: str, above: str = "") -> list[str]:
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    paths = []
    for key, value in items:
        if key == name:
            paths.append(above + str(key))
        if key != _META_KEY:
            paths += _paths_ending_in(value, name, f"{above}{key}{ID_SEP_KEY}")
    return paths
