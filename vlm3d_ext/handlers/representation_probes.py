"""Evaluation of the encoder as part of an evaluator's run."""

from __future__ import annotations

import copy
import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor

from ..data.anatomical_regions import region_by_name
from ..data.atomic_files import write_bytes, write_json
from ..engines.representation_evaluation import RepresentationReport, evaluate_representation
from ..networks.nets import EncoderPretraining
from ..text.label_set import load_label_set

__all__ = ["RepresentationProbes"]


class RepresentationProbes:
    """After the evaluator's epoch, compares the encoder with an untrained one and adds the figures to its metrics.

    The untrained encoder is a copy taken when this handler is made, which is before any checkpoint is loaded. Writes
    ``representation.json``, ``representation.csv`` (per label) and ``representation.png`` into `output_dir`.

    Args:
        network: the network under evaluation.
        loaders: "training", "validation", "test" -> batches.
        label_set: name or path of the label set that the labels follow.
        output_dir: where the three files go.
        num_resamples: bootstrap resamples.
        seed: of probes and bootstrap.
    """

    def __init__(
        self,
        network: EncoderPretraining,
        loaders: Mapping[str, Iterable[Mapping[str, Tensor]]],
        label_set: str,
        output_dir: str | os.PathLike,
        num_resamples: int = 200,
        seed: int = 0,
    ) -> None:
        self.network = network
        self.untrained = copy.deepcopy(network)
        self.loaders = loaders
        self.label_set = load_label_set(label_set)
        self.output_dir = Path(output_dir)
        self.num_resamples = num_resamples
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Measure, write, print, and add to ``engine.state.metrics``."""
        state: Any = engine.state
        regions = [[region_by_name(name).index for name in finding.regions] for finding in self.label_set.findings]
        report = evaluate_representation(
            {"untrained": self.untrained, "trained": self.network},
            self.loaders,
            self.label_set.names,
            regions,
            torch.device(state.device),
            self.num_resamples,
            self.seed,
        )
        state.metrics.update({name: value for name, value in report.figures.items() if not math.isnan(value)})
        rounded = {name: None if math.isnan(v) else round(v, 6) for name, v in sorted(report.figures.items())}
        write_json(self.output_dir / "representation.json", {"figures": rounded, "per_label": report.per_label})
        write_bytes(self.output_dir / "representation.csv", _as_csv(report.per_label).encode())
        write_bytes(self.output_dir / "representation.png", _draw(report, self.label_set.names))
        engine.logger.info("Representation of the test split:\n" + format_figures(report.figures))


def format_figures(figures: Mapping[str, float]) -> str:
    """Return the comparison as a text table: rows are figures, columns the encoder and its baselines."""

    def value(name: str) -> str:
        return f"{figures[name]:10.4f}" if name in figures and not math.isnan(figures[name]) else f"{'-':>10}"

    def interval(name: str) -> str:
        low, high = f"{name}_low", f"{name}_high"
        return f"  [{figures[low]:.3f}, {figures[high]:.3f}]" if low in figures else ""

    lines = [f"{'':38}{'trained':>10}{'untrained':>10}{'baseline':>10}"]
    for name, baseline in (("reconstruction_error", "training mean"), ("region_share_error", "training mean")):
        row = value(f"{name}_trained") + value(f"{name}_untrained") + value(f"{name}_training_mean")
        lines.append(f"{name:38}{row}  ({baseline})")
    for way in ("unguided", "guided"):
        name = f"linear_probe_macro_auroc_trained_{way}"
        row = (
            value(name)
            + value(f"linear_probe_macro_auroc_untrained_{way}")
            + value("linear_probe_macro_auroc_histogram")
        )
        lines.append(f"{'linear probe macro AUROC, ' + way:38}{row}  (histogram){interval(name)}")
    row = value("knn_macro_auroc_trained_unguided") + value("knn_macro_auroc_untrained_unguided") + f"{0.5:10.4f}"
    lines.append(f"{'kNN macro AUROC, unguided':38}{row}  (chance)")
    lines.append(f"{'effective rank':38}{value('effective_rank_trained')}{value('effective_rank_untrained')}{'-':>10}")
    return "\n".join(lines)


def _as_csv(rows: Sequence[Mapping[str, object]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _draw(report: RepresentationReport, label_names: Sequence[str]) -> bytes:
    """Return a PNG: AUROC of the linear probe per label, trained beside untrained and histogram."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sources = {
        "trained_unguided": "trained encoder",
        "untrained_unguided": "untrained encoder",
        "histogram": "intensity histogram",
    }
    auroc = {
        (row["features"], row["label"]): row["auroc"] for row in report.per_label if row["probe"] == "linear_probe"
    }
    figure = Figure(figsize=(9, 0.42 * len(label_names) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for offset, (source, title) in enumerate(sources.items()):
        values = [auroc.get((source, name)) or math.nan for name in label_names]
        macro = report.figures.get(f"linear_probe_macro_auroc_{source}", math.nan)
        places = [index + (offset - 1) * 0.27 for index in range(len(label_names))]
        axes.barh(places, values, height=0.25, label=f"{title} (macro {macro:.3f})")
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(label_names)), label_names)
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel("AUROC of a linear probe on frozen features, test split, no anatomical mask given")
    axes.margins(y=0.01)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
