"""What a run folder holds, in figures, and the commands to look at it.

``python -m vlm3d_ext.run_summary demo_run``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .data.case_manifest import SPLITS

__all__ = ["main", "summarise_run"]


def _read(path: Path) -> Any | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _data_lines(folder: Path) -> list[str]:
    manifest = _read(folder / "prepared" / "manifest.json")
    if manifest is None:
        return [f"data              none prepared in {folder / 'prepared'}"]
    counts = ", ".join(f"{len(manifest[split])} {split}" for split in SPLITS)
    log = _read(folder / "prepared" / "preparation_log.json") or {"summary": {}}
    refused = log["summary"].get("refused", 0)
    text = f"{counts} volumes, {refused} refused; label set {manifest['label_set']}; {folder / 'prepared'}"
    return [f"data              {text}"]


def _training_lines(folder: Path) -> list[str]:
    lines = []
    for path in sorted(folder.glob("*/output/history.json")):
        rows = json.loads(path.read_text())
        losses = [row["loss"] for row in rows if row["loss"] is not None]
        validated = [(row["validation"] or {}).get("loss") for row in rows]
        best = min((loss for loss in validated if loss is not None), default=None)
        lines.append(
            f"{path.parts[-3]:17} {len(rows)} epochs"
            + (f", training loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else "")
            + (f", best validation loss {best:.3f}" if best is not None else "")
            + f"; {path.parent.parent / 'models' / 'model.pt'}"
        )
    for path in sorted(folder.glob("*/output_rl/history.json")):
        rewards = [row["losses"]["reward"] for row in json.loads(path.read_text())]
        lines.append(
            f"{path.parts[-3]:17} {len(rewards)} epochs of reinforcement learning, reward {rewards[0]:.3f} to "
            f"{rewards[-1]:.3f}; {path.parent.parent / 'models_rl' / 'model.pt'}"
        )
    return lines


def _joint_lines(folder: Path) -> list[str]:
    """Return the joint network beside the single-task ones, and the pages of the scans it has read."""
    rows = _read(folder / "multitask" / "eval" / "comparison.json")
    lines = []
    if rows is not None:
        from .engines.task_comparison import ComparedFigure, format_task_comparison

        figures = [ComparedFigure(**{name: value for name, value in row.items() if name != "verdict"}) for row in rows]
        lines += [
            f"single-task bundles and the joint network on the {figures[0].num_cases} scans of the test split",
            *format_task_comparison(figures).splitlines(),
            "",
        ]
    pages = sorted(folder.glob("multitask/inference*/pages/*.html"))
    lines += [f"page of {path.stem:17} {path.resolve().as_uri()}" for path in pages]
    return [*lines, ""] if lines else []


def _encoder_lines(folder: Path) -> list[str]:
    representation = _read(folder / "encoder" / "eval" / "representation.json")
    if representation is None:
        return []
    # only a run that has evaluated needs the table, and with it scikit-learn and torch
    from .handlers.representation_probes import format_figures

    figures = {name: float("nan") if value is None else value for name, value in representation["figures"].items()}
    return ["", "encoder on the test split (held-out patients)", *format_figures(figures).splitlines()]


_BASELINES = {"all_negative": "all neg.", "all_positive": "all pos.", "prevalence": "prevalence"}
_CLASSIFICATION_FIGURES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "f1": "F1",
    "crg": "CRG (pooled)",
}


def _classification_lines(folder: Path) -> list[str]:
    """Return the macro figures of both ways, beside the image-blind baselines and the encoder's linear probe."""
    reports = {
        way: _read(folder / "classification" / "eval" / f"classification_{way}.json") for way in ("unguided", "guided")
    }
    probes = (_read(folder / "encoder" / "eval" / "representation.json") or {"figures": {}})["figures"]
    lines = ["", "classification on the test split, mean over the findings (unguided: without anatomical mask)"]
    lines.append(
        f"{'':28}{'classifier':>11}{'95 % interval':>17}{'probe':>8}" + "".join(f"{t:>11}" for t in _BASELINES.values())
    )
    for way, report in reports.items():
        if report is None:
            continue
        for figure, title in _CLASSIFICATION_FIGURES.items():
            macro = report["macro"]
            probe = probes.get(f"linear_probe_macro_auroc_trained_{way}") if figure == "auroc" else None
            interval = "[" + ", ".join(_shown(macro[f"{figure}_{end}"]) for end in ("low", "high")) + "]"
            blind = "".join(f"{_shown(report['baselines'][name][figure]):>11}" for name in _BASELINES)
            lines.append(f"{title + ', ' + way:28}{_shown(macro[figure]):>11}{interval:>17}{_shown(probe):>8}{blind}")
    return lines if any(reports.values()) else []


_SIZES = ("small", "medium", "large")
_RIVAL = "localization_segresnet"
_SECOND_RIVAL = "localization_attention_unet"


def _localization_lines(folder: Path) -> list[str]:
    """Return one line for each disease, beside what ignores the scan, what a plain network reaches where one was
    trained, and what the resolution allows; then the lesions by size."""
    report = _read(folder / "localization" / "eval" / "localization.json")
    if report is None:
        return []
    rival = _read(folder / _RIVAL / "eval" / "localization.json") or {"per_disease": [], "mean": {}}
    rival_dice = {row["disease"]: row["dice"] for row in rival["per_disease"]} | {"mean": rival["mean"].get("dice")}
    rows = [*report["per_disease"], {**report["mean"], "disease": "mean"}]
    lines = [
        "",
        f"localization on the {report['num_scans']} scans of the test split, on their own grids",
        "(blind: where training had lesions; ceiling: the prepared true mask; FP: false positives a scan without any)",
        f"{'':22}{'scans':>6}{'Dice':>7}{'95 % interval':>17}{'blind':>7}{'SegResNet':>11}{'ceiling':>9}{'found':>7}"
        f"{'precision':>11}{'FP':>7}{'FROC@1':>8}",
    ]
    for row in rows:
        interval = "[" + ", ".join(_shown(row[f"dice_{end}"]) for end in ("low", "high")) + "]"
        lines.append(
            f"{row['disease']:22}{_count(row, 'positive_scans'):>6}{_shown(row['dice']):>7}{interval:>17}"
            f"{_shown(row['baseline_dice']):>7}{_shown(rival_dice.get(row['disease'])):>11}"
            f"{_shown(row['ceiling_dice']):>9}{_shown(row['sensitivity']):>7}{_shown(row['precision']):>11}"
            f"{_shown(row['false_positives_per_negative_scan']):>7}{_shown(row['froc_1']):>8}"
        )
    second = _read(folder / _SECOND_RIVAL / "eval" / "localization.json")
    if second is not None:
        dice = [*((row["disease"], row["dice"]) for row in second["per_disease"]), ("mean", second["mean"]["dice"])]
        lines.append(f"Dice of MONAI's AttentionUnet: {', '.join(f'{name} {_shown(value)}' for name, value in dice)}")
    sizes = {"small": "small: < 10 voxels", "medium": "medium: 10 to 1000", "large": "large: > 1000"}
    lines.append("".join([f"{'':22}", *(f"{sizes[size]:>30}" for size in _SIZES)]))
    lines.append(f"{'lesions by size':22}" + f"{'lesions':>9}{'Dice':>7}{'found':>7}{'ceil.':>7}" * len(_SIZES))
    for row in rows:
        cells = [
            f"{_count(row, f'lesions_{size}'):>9}{_shown(row[f'lesion_dice_{size}']):>7}"
            f"{_shown(row[f'sensitivity_{size}']):>7}{_shown(row[f'ceiling_{size}']):>7}"
            for size in _SIZES
        ]
        lines.append(f"{row['disease']:22}{''.join(cells)}")
    return [line.rstrip() for line in lines]


_SEES_THE_SCAN = ("generated", "other patients' scans")


def _report_lines(folder: Path) -> list[str]:
    """Return a table of the generated reports of both phases, the control, the baselines, and the references."""
    phases = {"align": "eval", "rl": "eval_rl"}
    read = {phase: _read(folder / "report_generation" / name / "reports.json") for phase, name in phases.items()}
    reports = {phase: content for phase, content in read.items() if content is not None}
    if not reports:
        return []
    from .engines.report_evaluation import format_reports

    first = next(iter(reports.values()))
    systems = {
        f"{phase}: {name}": content["systems"][name] for phase, content in reports.items() for name in _SEES_THE_SCAN
    }
    systems |= {name: figures for name, figures in first["systems"].items() if name not in _SEES_THE_SCAN}
    return [
        "",
        f"reports of the {first['num_cases']} scans of the test split",
        "(clinical figures: the findings that a text names, against the labels; laterality: share of the true findings",
        "named whose sides are the reference's; named: findings in a report)",
        *format_reports(systems).splitlines(),
    ]


def _count(row: Mapping[str, Any], name: str) -> str:
    # A mean over diseases of how many there are says nothing.
    return "" if row["disease"] == "mean" else str(row[name])


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def summarise_run(folder: Path) -> str:
    """Return the summary of a folder with ``prepared/`` and one folder per bundle.

    Raises:
        FileNotFoundError: if the folder does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; `make demo` makes demo_run.")
    lines = [*_joint_lines(folder), *_data_lines(folder), *_training_lines(folder)]
    features = len(list(folder.glob("encoder/features/*.npz")))
    if features:
        lines.append(f"features          {features} volumes; {folder / 'encoder' / 'features'}")
    predictions = len(list(folder.glob("classification/predictions/*.json"))) - 1
    if predictions > 0:
        lines.append(f"findings          {predictions} volumes; {folder / 'classification' / 'predictions' / 'tables'}")
    drawn = len(list(folder.glob("localization/predictions/*.json"))) - 1
    if drawn > 0:
        lines.append(f"lesions           {drawn} volumes; {folder / 'localization' / 'predictions' / 'masks'}")
    written = len(list(folder.glob("report_generation/reports/*.json"))) - 1
    if written > 0:
        lines.append(f"reports           {written} volumes; {folder / 'report_generation' / 'reports'}")
    lines += _encoder_lines(folder)
    lines += _classification_lines(folder)
    lines += _localization_lines(folder)
    lines += _report_lines(folder)
    lines += ["", "look at"]
    lines += [f"  {path}" for path in sorted(folder.glob("*/eval/*.png"))]
    lines += [f"  {path}" for path in sorted(folder.glob("*/eval/montages")) if any(path.glob("*.png"))]
    lines += [f"  {path}" for path in sorted(folder.glob("*/eval*/reports_examples.txt"))]
    if (folder / "mlruns.db").is_file():
        lines.append(f"  mlflow ui --backend-store-uri sqlite:///{(folder / 'mlruns.db').resolve()}")
    checkpoints = sorted(folder.glob("*/models*/model.pt"))
    lines += [f"  python -m vlm3d_ext.lineage {path}" for path in checkpoints]
    lines += [
        "",
        "Synthetic phantoms, a demo-size model: the figures say that the chain works, not how well it reads scans.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m vlm3d_ext.run_summary", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="run folder, for instance demo_run")
    print(summarise_run(parser.parse_args(arguments).folder))


if __name__ == "__main__":
    main()
