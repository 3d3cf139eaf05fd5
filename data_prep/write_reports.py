"""Write reports for the cases of a prepared data set that have none, from their labels and lesion masks.

    python -m data_prep.write_reports --manifest prepared/manifest.json --output reports.csv
    python -m data_prep.write_reports --manifest prepared/manifest.json --output reports.csv \\
        --output-manifest prepared/with_reports.json \\
        --rewrite-share 0.2 --language-model meta-llama/Llama-3.1-8B-Instruct

The table has the columns of CT-RATE's report tables, and ``Source``: template or rewritten. In a release without
reports it can take the place of radiology_text_reports/train_reports.csv before `data_prep.prepare`. The option
`--output-manifest` puts the reports into a copy of the manifest instead, which has a fingerprint of its own. All
reconstructions of a scan share one report. By default only training cases get one: what is measured against an
invented report means little.

A rewriting is kept if `vlm3d_ext.text.finding_extractor` reads the same findings and sides in it; the template stays
otherwise. It ends with 0, with 3 if some scans could not be read, with 2 if nothing was written.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.case_reports import COLUMNS, REWRITTEN, TEMPLATE, Rewrite, label_set_of, write_case_reports
from data_prep.manifest_reports import manifest_with_reports
from data_prep.phantom_reports import NOT_GIVEN
from vlm3d_ext.data.atomic_files import write_bytes, write_json
from vlm3d_ext.data.case_manifest import SPLITS, CaseManifest
from vlm3d_ext.text.label_set import LabelSet, available_label_sets

__all__ = ["main"]

_EXIT_NOTHING_DONE = 2
_EXIT_SOME_REFUSED = 3
_EXIT_INTERRUPTED = 130
_SHOWN_REFUSALS = 10
_DRAWN_LABEL_SET = "vlm3d_18"


def _table(rows: Sequence[dict[str, str]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _with_reports(manifest: CaseManifest, rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    reports, sources = {}, {}
    for row in rows:
        volume_id = row["VolumeName"].removesuffix(".nii.gz")
        impression = row["Impressions_EN"]
        reports[volume_id] = {
            "findings": row["Findings_EN"],
            "impression": "" if impression == NOT_GIVEN else impression,
        }
        sources[volume_id] = row["Source"]
    return manifest_with_reports(manifest, reports, sources)


def _rewriter(name: str, label_set: LabelSet, device: str | None) -> Rewrite:
    # only now: torch and transformers take seconds, which a wrong path should not cost
    from data_prep.report_rewriting import ReportRewriter
    from vlm3d_ext.text.finding_extractor import FindingExtractor
    from vlm3d_ext.text.pretrained_language_model import load_language_model

    model = load_language_model(name, device_map=None if device is None else {"": device})
    # The drawn diseases are read too: not every label set knows ground glass.
    union = f"{label_set.name}+{_DRAWN_LABEL_SET}"
    known = label_set.name in available_label_sets() and label_set.name != _DRAWN_LABEL_SET
    return ReportRewriter(model, FindingExtractor(union if known else label_set)).rewrite


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except (ValueError, OSError) as error:
        # A full disk names no file; it can only be the output's.
        unnamed = isinstance(error, OSError) and error.errno and not error.filename
        place = f"--output {options.output}: " if unnamed else ""
        print(f"error: {place}{' '.join(str(error).split())}", file=sys.stderr)
        return _EXIT_NOTHING_DONE
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return _EXIT_INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    if options.rewrite_share > 0 and options.language_model is None:
        raise ValueError(
            f"--rewrite-share {options.rewrite_share:g} needs a model: give --language-model FOLDER_OR_NAME, or leave "
            f"the share at 0 for templates alone."
        )
    _check_outputs(options)
    manifest = CaseManifest(options.manifest)
    rewrite = None
    if options.rewrite_share > 0:
        rewrite = _rewriter(options.language_model, label_set_of(manifest), options.device)
    elif options.language_model is not None:
        print("note: --language-model is not used, because --rewrite-share is 0", file=sys.stderr)
    written = write_case_reports(
        manifest, options.split, options.all, options.seed, options.rewrite_share, rewrite, not options.quiet
    )
    for line in written.refused[:_SHOWN_REFUSALS]:
        print(f"refused: {line}", file=sys.stderr)
    if len(written.refused) > _SHOWN_REFUSALS:
        print(f"refused: {len(written.refused) - _SHOWN_REFUSALS} more", file=sys.stderr)
    if not written.rows:
        raise ValueError(
            f"{options.manifest}: no report to write in {', '.join(options.split)}: {written.num_with_report} volumes "
            f"have one (--all replaces them), of {written.num_unknown} scans nothing is known, "
            f"{len(written.refused)} could not be read."
        )
    changed = None if options.output_manifest is None else _with_reports(manifest, written.rows)
    write_bytes(options.output, _table(written.rows))
    if changed is not None:
        write_json(options.output_manifest, changed)
        print(f"{options.output_manifest}: manifest with these reports, fingerprint {changed['fingerprint']}")
    print(
        f"{options.output}: {len(written.rows)} volumes of {sum(written.num_scans.values())} scans have a new report, "
        f"{written.num_scans[TEMPLATE]} from templates, {written.num_scans[REWRITTEN]} rewritten"
    )
    if written.num_not_kept:
        print(f"{written.num_not_kept} rewritings did not say the same, or had no end: their template stays")
    print(f"left alone: {written.num_with_report} volumes with a report, {written.num_unknown} scans without a fact")
    return _EXIT_SOME_REFUSED if written.refused else 0


def _check_outputs(options: argparse.Namespace) -> None:
    outputs = [path for path in (options.output, options.output_manifest) if path is not None]
    for path in outputs:
        if path.resolve() == options.manifest.resolve():
            raise ValueError(f"{path}: is the manifest that is read; choose another file to write.")
        if path.exists() and not options.overwrite:
            raise FileExistsError(f"{path}: exists; choose another file, or replace it with --overwrite.")
    manifest_folder = options.manifest.resolve().parent
    if options.output_manifest is not None and options.output_manifest.resolve().parent != manifest_folder:
        raise ValueError(
            f"--output-manifest {options.output_manifest}: must lie in {options.manifest.parent}, because a manifest's "
            f"paths are relative to its folder."
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.write_reports",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--manifest", type=Path, required=True, help="manifest.json of a prepared data set")
    add("--output", type=Path, required=True, metavar="CSV", help="table to write")
    add("--output-manifest", type=Path, metavar="JSON", help="also write the manifest with the reports, beside the old")
    add("--split", nargs="+", choices=SPLITS, default=["training"], help="whose cases get reports")
    add("--all", action="store_true", help="also for cases that have a report")
    add("--rewrite-share", type=float, default=0.0, help="share of the reports that a language model rewrites")
    add("--language-model", metavar="FOLDER_OR_NAME", help="in Hugging Face format")
    add("--device", help="where the language model runs, such as cuda; the CPU by default")
    add("--seed", type=int, default=0, help="of the wording, and of which reports are rewritten")
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


if __name__ == "__main__":
    sys.exit(main())
