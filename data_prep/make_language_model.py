"""Make a tiny causal language model in Hugging Face format that writes chest CT reports, without network.

    python -m data_prep.make_language_model --reports prepared/manifest.json --output language_model

It stands in for an instruction-tuned Llama in the demo and in tests, and is loaded by the very same code: given a
prompt that lists findings and located lesions, it writes a report that says so. It is trained on the reports of the
training cases, never on those of validation or test, and on reports of phantoms that are in no data set. It ends with
0, or with 2 if nothing was written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.pretrained_folder import refuse_existing, whole_folder
from data_prep.progress import progress_bar
from vlm3d_ext.data.atomic_files import write_bytes
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.text.report_prompt import encode_prompt

if TYPE_CHECKING:
    from data_prep.causal_language_model import Answer
    from data_prep.report_corpus import ReportExample

__all__ = ["LanguageModelSummary", "main", "make_language_model"]

_KIND = "language model"


@dataclass(frozen=True)
class LanguageModelSummary:
    """What was made.

    Attributes:
        num_training_reports: distinct reports of training cases that were read.
        num_synthetic_reports: reports of phantoms that were written for it.
        vocab_size: tokens that the tokenizer knows.
        tokens_per_report: mean over all reports.
        num_parameters: weights of the model.
        loss_before: cross-entropy in nats of the reports' tokens, given their prompts, before training.
        loss_after: the same after training.
        unigram_entropy: in nats, what guessing by frequency alone reaches on the reports.
        weights_sha256: as `vlm3d_ext.checkpoint_files.state_dict_sha256` gives it.
    """

    num_training_reports: int
    num_synthetic_reports: int
    vocab_size: int
    tokens_per_report: float
    num_parameters: int
    loss_before: float
    loss_after: float
    unigram_entropy: float
    weights_sha256: str


def make_language_model(
    manifest_path: Path | str,
    output: Path | str,
    num_synthetic_reports: int = 4000,
    vocab_size: int = 4000,
    num_phrases: int = 800,
    overwrite: bool = False,
    progress: bool = True,
    **settings: Any,
) -> LanguageModelSummary:
    """Write a corpus, learn its words and a small Llama, and write tokenizer and model as one folder.

    Args:
        manifest_path: manifest.json of a prepared data set.
        output: folder to make; whatever happens, it is whole or as it was.
        num_synthetic_reports: reports of phantoms besides those of the manifest; 0 for none.
        vocab_size: at most so many tokens for words and their pieces.
        num_phrases: so many tokens more for frequent phrases.
        overwrite: replace the language model that `output` holds.
        progress: show progress bars on stderr.
        settings: of `data_prep.causal_language_model.CausalLanguageModelSettings`.

    Raises:
        ValueError: if the manifest is not one, there is no report to learn from, or a setting cannot be.
        FileExistsError: if `output` exists and is not to be overwritten, or holds something else than a model.
        OSError: if the folder cannot be written.
    """
    # only now: torch and transformers take seconds, which a wrong path should not cost
    from data_prep.byte_pair_vocabulary import learn_byte_pairs, write_chat_tokenizer
    from data_prep.causal_language_model import CausalLanguageModelSettings, train_causal_language_model
    from data_prep.report_corpus import synthetic_examples, training_examples
    from data_prep.token_batches import token_entropy
    from vlm3d_ext.checkpoint_files import state_dict_sha256
    from vlm3d_ext.text.pretrained_files import quiet_transformers

    output = Path(output)
    refuse_existing(output, overwrite, _KIND)
    manifest = CaseManifest(manifest_path)
    if num_synthetic_reports < 0:
        raise ValueError(f"num_synthetic_reports must not be negative, got {num_synthetic_reports}.")
    chosen = CausalLanguageModelSettings(**settings)
    examples = training_examples(manifest, chosen.seed)
    num_training_reports = len(examples)
    if not examples and not num_synthetic_reports:
        raise ValueError(
            f"{manifest.path}: no training case has a report and labels to learn from; prepare a data set with both, "
            f"or ask for --synthetic-reports."
        )
    with progress_bar(num_synthetic_reports, 0, "report", quiet=not progress or not num_synthetic_reports) as bar:
        synthetic = synthetic_examples(num_synthetic_reports, chosen.seed, on_report=bar.update)
    examples += synthetic.whole
    texts = [example.prompt for example in examples] + [example.report for example in examples]
    learnt = learn_byte_pairs(texts, vocab_size, num_phrases)
    with whole_folder(output) as folder, quiet_transformers():
        tokenizer = write_chat_tokenizer(folder, learnt, chosen.max_positions)
        answers, easy_answers = ([_encode(tokenizer, e) for e in kind] for kind in (examples, synthetic.easy))
        with progress_bar(chosen.num_steps, 0, "step", quiet=not progress) as bar:
            result = train_causal_language_model(
                answers,
                len(tokenizer),
                padding=tokenizer.pad_token_id,
                end=tokenizer.eos_token_id,
                settings=chosen,
                easy_examples=easy_answers,
                on_step=bar.update,
            )
        summary = LanguageModelSummary(
            num_training_reports=num_training_reports,
            num_synthetic_reports=num_synthetic_reports,
            vocab_size=len(tokenizer),
            tokens_per_report=sum(len(answer.answer) for answer in answers) / len(answers),
            num_parameters=sum(parameter.numel() for parameter in result.model.parameters()),
            loss_before=result.loss_before,
            loss_after=result.loss_after,
            unigram_entropy=token_entropy(token for answer in answers for token in answer.answer),
            weights_sha256=state_dict_sha256(result.model.state_dict()),
        )
        result.model.save_pretrained(folder)
        sizes = {"vocab_size": vocab_size, "num_phrases": num_phrases}
        write_bytes(folder / "README.md", _model_card(manifest, sizes | asdict(chosen), summary).encode())
    return summary


def _encode(tokenizer: Any, example: ReportExample) -> Answer:
    from data_prep.causal_language_model import Answer

    prompt = encode_prompt(tokenizer, example.prompt)
    report = tokenizer(example.report, add_special_tokens=False)["input_ids"]
    return Answer((*prompt.before, *prompt.after), (*report, tokenizer.eos_token_id))


def _model_card(manifest: CaseManifest, settings: dict[str, Any], summary: LanguageModelSummary) -> str:
    rows = "".join(f"| {name} | {value} |\n" for name, value in settings.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [llama, radiology, stand-in]
---
# A tiny stand-in for an instruction-tuned language model

Made by `python -m data_prep.make_language_model` for trying and testing the software without network. It is **no**
general language model: it has {summary.num_parameters:,} weights, knows the one prompt of the template
`chest_ct_report`, and answers with reports in the style of its corpus. For real use take an instruction-tuned model
such as `meta-llama/Llama-3.1-8B-Instruct`, which the same code loads.

- **Trained on** {summary.num_training_reports} distinct reports of the training cases of the data set
  "{manifest.content.get("name")}", never on those of validation or test (fingerprint of the manifest:
  `{manifest.fingerprint}`), and on {summary.num_synthetic_reports} reports of phantoms that are in no data set.
- **How**: Llama, next-word prediction from random weights. A prompt names the findings that are true of the report,
  with probabilities that mean nothing, and where lesions lie, as far as that is known and not left out at random; the
  loss is of the report alone. Some steps, none of the last tenth, are of prompts and reports that speak of located
  lesions only. No image was seen.
- **Tokens**: byte pairs within words, then {settings["num_phrases"]} phrases of up to four words;
  {summary.vocab_size} in all, {summary.tokens_per_report:.0f} to a report. Each digit is one of its own.
- **Loss** on reports of the corpus, given their prompts: {summary.loss_before:.3f} before, {summary.loss_after:.3f}
  after, in nats per token; guessing by frequency alone gives {summary.unigram_entropy:.3f}.
- **Weights**: SHA-256 `{summary.weights_sha256}`.
- **Limits**: what the prompt does not say, the model makes up as the corpus has it. It follows no other instruction.

| setting | value |
| --- | --- |
{rows}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = vars(_parser().parse_args(arguments))
    output = options.pop("output")
    try:
        summary = make_language_model(options.pop("reports"), output, **options)
    except (ValueError, OSError) as error:
        # A full disk names no file; it can only be the output's.
        place = f"--output {output}: " if isinstance(error, OSError) and error.errno and not error.filename else ""
        print(f"error: {place}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(
        f"{output}: tiny stand-in language model, {summary.num_parameters:,} weights, {summary.vocab_size} tokens, "
        f"from {summary.num_training_reports} training reports and {summary.num_synthetic_reports} reports of "
        f"undrawn phantoms ({summary.tokens_per_report:.0f} tokens each)"
    )
    print(
        f"loss per token of reports given their prompts {summary.loss_before:.3f} -> {summary.loss_after:.3f} "
        f"(by frequency alone: {summary.unigram_entropy:.3f})"
    )
    print(f"weights sha256 {summary.weights_sha256}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.make_language_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--reports", type=Path, required=True, metavar="MANIFEST", help="manifest.json of a prepared data set")
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder to make")
    add("--overwrite", action="store_true", help="replace the language model that the folder holds")
    numbers = {
        "--synthetic-reports": "reports of phantoms to write besides; 0 for none",
        "--vocab-size": "at most so many tokens for words and their pieces",
        "--num-phrases": "so many tokens more for frequent phrases",
        "--hidden-size": "width of the model",
        "--layers": "transformer layers",
        "--heads": "attention heads",
        "--max-positions": "tokens that it takes, an image included",
        "--steps": "optimizer steps",
        "--batch-size": "reports in a step",
        "--threads": "of the processor; more than are free make it slow",
        "--seed": "of phantoms, weights and order",
    }
    names = {
        "--synthetic-reports": "num_synthetic_reports",
        "--layers": "num_layers",
        "--heads": "num_heads",
        "--steps": "num_steps",
        "--threads": "num_threads",
    }
    # without a default, so that the functions' and the settings' own hold
    for name, text in numbers.items():
        destination = names.get(name, name.strip("-").replace("-", "_"))
        add(name, type=int, default=argparse.SUPPRESS, dest=destination, metavar="N", help=text)
    add("--learning-rate", type=float, default=argparse.SUPPRESS)
    easy = "share of the steps, none of the last tenth, with prompts and reports of located lesions alone"
    add("--easy-share", type=float, default=argparse.SUPPRESS, metavar="SHARE", help=easy)
    return parser


if __name__ == "__main__":
    sys.exit(main())
