"""Where a checkpoint came from: which data, which config, which versions, and which checkpoints before it.

Every checkpoint carries a record of plain types under ``"lineage"``. The record of an upstream checkpoint is copied
into it, so the whole chain can be read from the last file alone: ``python -m vlm3d_ext.lineage models/model.pt``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .checkpoint_files import CheckpointError, file_sha256, load_upstream_weights, read_checkpoint

__all__ = [
    "CheckpointError",
    "Lineage",
    "LineageError",
    "check_chain",
    "format_lineage",
    "load_upstream_weights",
    "read_lineage",
]

LINEAGE_FORMAT = 1
_RECORDED_PACKAGES = ("vlm3d", "torch", "monai", "pytorch-ignite", "numpy", "transformers", "peft")
_EVALUATED = ("$", "@", "%")
_SHORT = 12

logger = logging.getLogger(__name__)


class LineageError(ValueError):
    """Parts of a chain that do not belong together, or a checkpoint that does not say where it came from."""


class Lineage:
    """The record of one run, to be saved in its checkpoints.

    Files are fingerprinted when the object is made, that is, when they are read, so a file that changes during the
    run is recorded as it was.

    Args:
        bundle: name of the bundle, e.g. ``"encoder"``.
        version: the bundle's version.
        phase: what this run does, e.g. ``"pretraining"``, ``"align"``.
        manifest: path of the data manifest, or None where no data is used.
        upstream: name -> path of a checkpoint that this run starts from; None as a path says that it starts without,
            from random weights.
        config: the merged config as written, e.g. of `vlm3d_ext.engines.checked_overrides.command_line_config`.
        network: network whose class and number of parameters are recorded.
        allow_mismatch: only warn about upstream checkpoints that do not belong together or come from other data.

    Raises:
        FileNotFoundError: if the manifest or an upstream checkpoint does not exist.
        LineageError: if the parts do not belong together (see `check_chain`), or an upstream checkpoint has no lineage.
        ValueError: if the manifest is not JSON.
    """

    def __init__(
        self,
        bundle: str,
        version: str,
        phase: str,
        manifest: str | os.PathLike | None = None,
        upstream: Mapping[str, str | os.PathLike | None] | None = None,
        config: Mapping[str, Any] | None = None,
        network: nn.Module | None = None,
        allow_mismatch: bool = False,
    ) -> None:
        self.allow_mismatch = allow_mismatch
        self._record: dict[str, Any] = {
            "format": LINEAGE_FORMAT,
            "bundle": bundle,
            "version": version,
            "phase": phase,
            "manifest": None if manifest is None else _describe_manifest(manifest),
            "upstream": {name: _describe_upstream(path, allow_mismatch) for name, path in (upstream or {}).items()},
            "config": _plain(config),
            "network": None if network is None else _describe_network(network),
            "package_versions": _package_versions(),
        }
        check_chain({bundle: self}, allow_mismatch=allow_mismatch)

    def state_dict(self) -> dict[str, Any]:
        """Return the record, of plain types only, so that `torch.load(weights_only=True)` reads it."""
        return json.loads(json.dumps(self._record))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue a run: check that the checkpoint belongs to the same bundle, data and upstream, and keep the
        record of this process.

        Raises:
            LineageError: if it does not, unless `allow_mismatch`.
        """
        problems = []
        for what, old, new in (
            ("bundle", state_dict.get("bundle"), self._record["bundle"]),
            ("phase", state_dict.get("phase"), self._record["phase"]),
            ("data fingerprint", _fingerprint(state_dict), _fingerprint(self._record)),
        ):
            if old != new:
                problems.append(f"its {what} is {_shorten(old)}, this run's is {_shorten(new)}")
        for name, entry in (state_dict.get("upstream") or {}).items():
            here = self._record["upstream"].get(name)
            if (entry or {}).get("sha256") != (here or {}).get("sha256"):
                problems.append(f"it began from another {name} checkpoint than this run names")
        _refuse_or_warn(
            [f"this checkpoint cannot be continued here: {'; '.join(problems)}"] if problems else [],
            self.allow_mismatch,
        )


def read_lineage(path: str | os.PathLike) -> dict[str, Any]:
    """Read the lineage of a checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not a checkpoint.
        LineageError: if it carries no lineage.
    """
    record = read_checkpoint(path).get("lineage")
    if not isinstance(record, dict) or "bundle" not in record:
        raise LineageError(f"{path} carries no lineage; it was not written by a VLM3D bundle. Train it again with one.")
    return record


def check_chain(
    lineages: Mapping[str, Lineage | Mapping[str, Any] | str | os.PathLike], *, allow_mismatch: bool = False
) -> list[str]:
    """Check that several checkpoints belong together: one and the same upstream file for each upstream name, and one
    data set.

    Another data set is refused because its test patients may be among the first one's training patients.

    Args:
        lineages: bundle name -> lineage, its record, or the path of a checkpoint. A path is compared as well: the
            classification's encoder must be the very file given as ``"encoder"``.
        allow_mismatch: warn instead of raising.

    Returns:
        The mismatches that were allowed, in words; empty for a sound chain.

    Raises:
        LineageError: if there is a mismatch and `allow_mismatch` is false.
    """
    checkpoints: dict[str, dict[str, list[str]]] = {}  # upstream name -> sha256 -> who says so
    fingerprints: dict[str, list[str]] = {}
    for name, given in lineages.items():
        if isinstance(given, (str, os.PathLike)):
            checkpoints.setdefault(name, {}).setdefault(file_sha256(given), []).append(f"{given} itself")
            record: Mapping[str, Any] = read_lineage(given)
        else:
            record = given.state_dict() if isinstance(given, Lineage) else given
        for who, node in _nodes(name, record):
            if _fingerprint(node):
                fingerprints.setdefault(str(_fingerprint(node)), []).append(who)
            for upstream, entry in (node.get("upstream") or {}).items():
                if entry:
                    checkpoints.setdefault(upstream, {}).setdefault(entry["sha256"], []).append(who)
    problems = [
        f"there are {len(found)} different {upstream} checkpoints: {_by_origin(found)}"
        for upstream, found in checkpoints.items()
        if len(found) > 1
    ]
    if len(fingerprints) > 1:
        problems.append(f"the data differ, by the manifests' fingerprints: {_by_origin(fingerprints)}")
    _refuse_or_warn(problems, allow_mismatch)
    return problems


def format_lineage(record: Mapping[str, Any], title: str = "") -> str:
    """Write a lineage as an indented tree, from the checkpoint down to the data manifests.

    Args:
        record: of `read_lineage` or `Lineage.state_dict`.
        title: what stands on the first line before the bundle, e.g. the file's name.
    """
    return "\n".join(_lines(record, title))


def _lines(record: Mapping[str, Any], title: str) -> Iterator[str]:
    head = f"{record.get('bundle')} {record.get('version')}, phase {record.get('phase')}"
    yield f"{title}: {head}" if title else head
    network = record.get("network")
    if network:
        yield f"  network: {network['class']}, {network['num_parameters']:,} parameters"
    versions = record.get("package_versions") or {}
    if versions:
        yield "  versions: " + ", ".join(f"{name} {version}" for name, version in versions.items())
    knobs = _knobs(record.get("config"))
    if knobs:
        yield "  config: " + ", ".join(f"{name}={value}" for name, value in knobs.items())
    manifest = record.get("manifest")
    if manifest:
        yield (
            f"  manifest: {manifest['path']} (sha256 {_shorten(manifest['sha256'])}, "
            f"fingerprint {_shorten(manifest['fingerprint'])}, label set {manifest['label_set']})"
        )
    for name, entry in (record.get("upstream") or {}).items():
        if entry is None:
            yield f"  upstream {name}: none, random weights"
            continue
        title = f"upstream {name}: {entry['path']} (sha256 {_shorten(entry['sha256'])})"
        if entry.get("lineage"):
            yield from ("  " + line for line in _lines(entry["lineage"], title))
        else:
            yield f"  {title}: no lineage"


def _describe_manifest(path: str | os.PathLike) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"data manifest {path} does not exist; run the data preparation, or point to it with --manifest."
        )
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"data manifest {path} is not JSON ({error}); prepare the data again.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"data manifest {path} holds a {type(content).__name__}, not an object; prepare the data again."
        )
    return {
        "path": str(path),
        "sha256": file_sha256(path),
        "fingerprint": content.get("fingerprint"),
        "name": content.get("name"),
        "label_set": content.get("label_set"),
    }


def _describe_upstream(path: str | os.PathLike | None, allow_mismatch: bool) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        record: dict[str, Any] | None = read_lineage(path)
    except LineageError as error:
        _refuse_or_warn([str(error).rstrip(".")], allow_mismatch)
        record = None
    return {"path": str(path), "sha256": file_sha256(path), "lineage": record}


def _describe_network(network: nn.Module) -> dict[str, Any]:
    parameters = list(network.parameters())
    return {
        "class": type(network).__name__,
        "num_parameters": sum(parameter.numel() for parameter in parameters),
        "num_trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    }


def _package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _knobs(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The top-level plain values of a config: what one turns on the command line."""
    return {
        name: value
        for name, value in (config or {}).items()
        if isinstance(value, (str, int, float, bool))
        and not str(value).startswith(_EVALUATED)
        and not name.startswith("_")
    }


def _nodes(name: str, record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield name, record
    for upstream, entry in (record.get("upstream") or {}).items():
        if entry and entry.get("lineage"):
            yield from _nodes(f"{name}'s {upstream}", entry["lineage"])


def _fingerprint(record: Mapping[str, Any]) -> str | None:
    manifest = record.get("manifest") or {}
    return manifest.get("fingerprint") or manifest.get("sha256")


def _by_origin(found: Mapping[str, list[str]]) -> str:
    return ", ".join(f"{_shorten(value)} ({', '.join(dict.fromkeys(who))})" for value, who in found.items())


def _shorten(value: str | None) -> str:
    return "none" if value is None else value[:_SHORT]


def _refuse_or_warn(problems: list[str], allow_mismatch: bool) -> None:
    if not problems:
        return
    message = "; ".join(problems)
    if not allow_mismatch:
        raise LineageError(f"{message}. Use checkpoints of one chain, or allow it with --allow_lineage_mismatch True.")
    logger.warning("%s; allowed by allow_mismatch.", message)


def main(arguments: list[str] | None = None) -> int:
    """Print the chain behind a checkpoint; with several, also check that they belong together."""
    parser = argparse.ArgumentParser(prog="python -m vlm3d_ext.lineage", description=main.__doc__)
    parser.add_argument("checkpoint", nargs="+", help="a checkpoint that a bundle wrote, e.g. models/model.pt")
    parser.add_argument("--json", action="store_true", help="print the records as JSON, with the whole config")
    options = parser.parse_args(arguments)
    try:
        records = {path: read_lineage(path) for path in options.checkpoint}
        if options.json:
            print(json.dumps(records, indent=1))
        else:
            for path, record in records.items():
                print(format_lineage(record, f"{path} (sha256 {_shorten(file_sha256(path))})"))
        check_chain(records)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
