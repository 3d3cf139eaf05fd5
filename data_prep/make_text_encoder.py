"""Make a tiny text encoder in Hugging Face format from the training reports of a prepared data set, without network.

    python -m data_prep.make_text_encoder --reports prepared/manifest.json --output text_encoder

It stands in for Bio_ClinicalBERT in the demo and in tests, and is loaded by the very same code. Only training reports
are read, never those of validation or test. It ends with 0, or with 2 if nothing was written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.pretrained_folder import refuse_existing, whole_folder
from data_prep.progress import progress_bar
from data_prep.wordpiece_vocabulary import build_tokenizer, learn_wordpieces, write_tokenizer
from vlm3d_ext.data.atomic_files import write_bytes
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.text.label_set import available_label_sets, load_label_set
from vlm3d_ext.text.report_sections import split_sentences

__all__ = ["TextEncoderSummary", "main", "make_text_encoder", "training_sentences"]

_SECTIONS = ("findings", "impression")


@dataclass(frozen=True)
class TextEncoderSummary:
    """What was made.

    Attributes:
        num_reports: training reports that were read.
        num_sentences: distinct sentences in them.
        vocab_size: tokens that the tokenizer knows.
        num_parameters: weights of the model.
        loss_before: masked-token cross-entropy in nats on training sentences, before training.
        loss_after: the same after training.
        unigram_entropy: in nats, what guessing by frequency alone reaches on these sentences.
        weights_sha256: as `PromptedTextEncoder.weights_sha256` gives it.
    """

    num_reports: int
    num_sentences: int
    vocab_size: int
    num_parameters: int
    loss_before: float
    loss_after: float
    unigram_entropy: float
    weights_sha256: str


def training_sentences(manifest: CaseManifest) -> tuple[list[str], int]:
    """Return the distinct sentences of the training reports in the order of their first appearance, and the number of
    reports.

    Each distinct sentence counts once: most of a report says what is normal, in the same words as all others.

    Raises:
        ValueError: if no training case has a report with a sentence.
    """
    reports = [case["report"] for case in manifest.cases("training") if case.get("report")]
    sentences = {
        sentence: None
        for report in reports
        for section in _SECTIONS
        for sentence in split_sentences(report.get(section) or "")
    }
    if not sentences:
        raise ValueError(
            f"{manifest.path}: no training case has a report to learn from; prepare a data set with reports "
            f"(radiology_text_reports in CT-RATE), or use a published text encoder."
        )
    return list(sentences), len(reports)


def make_text_encoder(
    manifest_path: Path | str,
    output: Path | str,
    vocab_size: int = 2000,
    overwrite: bool = False,
    progress: bool = True,
    **settings: Any,
) -> TextEncoderSummary:
    """Learn a vocabulary and a small BERT, and write them as one folder.

    The vocabulary is also learnt from the prompts of the label sets that ship, so that it knows their words; the model
    is trained on report sentences alone.

    Args:
        manifest_path: manifest.json of a prepared data set.
        output: folder to make; whatever happens, it is whole or as it was.
        vocab_size: at most so many tokens.
        overwrite: replace the text model that `output` holds.
        progress: show a progress bar on stderr.
        settings: of `data_prep.masked_language_model.MaskedLanguageModelSettings`.

    Raises:
        ValueError: if the manifest is not one or has no training report, or a setting cannot be.
        FileExistsError: if `output` exists and is not to be overwritten, or holds something else than a text model.
        OSError: if the folder cannot be written.
    """
    # only now: torch and transformers take seconds, which a wrong path should not cost
    from data_prep.masked_language_model import (
        MaskedLanguageModelSettings,
        train_masked_language_model,
        unigram_entropy,
    )
    from vlm3d_ext.networks.blocks.prompted_text_encoder import state_dict_sha256
    from vlm3d_ext.text.pretrained_text_model import quiet_transformers

    output = Path(output)
    refuse_existing(output, overwrite)
    manifest = CaseManifest(manifest_path)
    sentences, num_reports = training_sentences(manifest)
    chosen = MaskedLanguageModelSettings(**settings)
    vocabulary = learn_wordpieces([*sentences, *_shipped_prompts()], vocab_size)
    sequences = [encoding.ids for encoding in build_tokenizer(vocabulary).encode_batch(sentences)]
    with progress_bar(chosen.num_steps, 0, "step", quiet=not progress) as bar:
        result = train_masked_language_model(sequences, len(vocabulary), chosen, bar.update)
    summary = TextEncoderSummary(
        num_reports=num_reports,
        num_sentences=len(sentences),
        vocab_size=len(vocabulary),
        num_parameters=sum(parameter.numel() for parameter in result.model.parameters()),
        loss_before=result.loss_before,
        loss_after=result.loss_after,
        unigram_entropy=unigram_entropy(sequences),
        weights_sha256=state_dict_sha256(result.model.state_dict()),
    )
    with whole_folder(output) as folder:
        with quiet_transformers():
            result.model.save_pretrained(folder)
        write_tokenizer(folder, vocabulary, chosen.max_positions)
        write_bytes(folder / "README.md", _model_card(manifest, asdict(chosen), summary).encode())
    return summary


def _shipped_prompts() -> list[str]:
    findings = [finding for name in available_label_sets() for finding in load_label_set(name).findings]
    return sorted({text for finding in findings for text in (*finding.positive_prompts, *finding.negative_prompts)})


def _model_card(manifest: CaseManifest, settings: dict[str, Any], summary: TextEncoderSummary) -> str:
    rows = "".join(f"| {name} | {value} |\n" for name, value in settings.items())
    return f"""---
library_name: transformers
pipeline_tag: feature-extraction
tags: [bert, radiology, stand-in]
---
# A tiny stand-in for a clinical text encoder

Made by `python -m data_prep.make_text_encoder` for trying and testing the software without network. It is **no**
clinical language model: it has {summary.num_parameters:,} weights and has seen {summary.num_sentences:,} distinct
sentences. For real use take `emilyalsentzer/Bio_ClinicalBERT` or another published encoder, which the same code loads.

- **Trained on** the {summary.num_reports} training reports of the data set "{manifest.content.get("name")}", never on
  those of validation or test. Fingerprint of the manifest: `{manifest.fingerprint}`.
- **How**: BERT, masked language modelling on single sentences, each distinct sentence equally often, from random
  weights. The vocabulary of {summary.vocab_size} WordPieces was learnt from these sentences and from the prompts of
  the label sets that ship, so that their words are known; the model was not trained on the prompts.
- **Masked-token loss** on training sentences: {summary.loss_before:.3f} before, {summary.loss_after:.3f} after, in
  nats; guessing by frequency alone gives {summary.unigram_entropy:.3f}.
- **Weights**: SHA-256 `{summary.weights_sha256}`.
- **Limits**: positions that no training sentence reaches keep their random embeddings.

| setting | value |
| --- | --- |
{rows}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = vars(_parser().parse_args(arguments))
    output = options.pop("output")
    try:
        summary = make_text_encoder(options.pop("reports"), output, **options)
    except (ValueError, OSError) as error:
        # A full disk names no file; it can only be the output's.
        place = f"--output {output}: " if isinstance(error, OSError) and error.errno and not error.filename else ""
        print(f"error: {place}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(
        f"{output}: tiny stand-in text encoder, {summary.num_parameters:,} weights, {summary.vocab_size} tokens, "
        f"from {summary.num_sentences} distinct sentences of {summary.num_reports} training reports"
    )
    print(
        f"masked-token loss on training sentences {summary.loss_before:.3f} -> {summary.loss_after:.3f} "
        f"(by frequency alone: {summary.unigram_entropy:.3f})"
    )
    print(f"weights sha256 {summary.weights_sha256}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.make_text_encoder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--reports", type=Path, required=True, metavar="MANIFEST", help="manifest.json of a prepared data set")
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder to make")
    add("--overwrite", action="store_true", help="replace the text model that the folder holds")
    add("--vocab-size", type=int, default=2000, help="at most so many tokens")
    numbers = {
        "--hidden-size": "width of the model and of its embeddings",
        "--num-layers": "transformer layers",
        "--num-heads": "attention heads",
        "--max-positions": "tokens that it takes, special tokens and soft prompts included",
        "--num-steps": "optimizer steps",
        "--batch-size": "sentences in a step",
        "--seed": "of weights, order and masks",
    }
    # without a default, so that the settings' own hold
    for name, text in numbers.items():
        add(name, type=int, default=argparse.SUPPRESS, help=text)
    add("--learning-rate", type=float, default=argparse.SUPPRESS)
    add("--mask-probability", type=float, default=argparse.SUPPRESS, help="share of the tokens to predict")
    return parser


if __name__ == "__main__":
    sys.exit(main())
