"""Saying a report in other words by a language model, kept only if it still says the same."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from data_prep.phantom_reports import NOT_GIVEN
from data_prep.template_reports import TemplateReport
from vlm3d_ext.text.finding_extractor import FindingExtractor
from vlm3d_ext.text.report_sections import parse_report, sections_from_columns, write_report

if TYPE_CHECKING:
    from vlm3d_ext.text.pretrained_language_model import PretrainedLanguageModel

__all__ = ["ReportRewriter"]


class ReportRewriter:
    """Rewrites reports with a causal language model, greedily, so that the same report gives the same words.

    Args:
        language_model: see `vlm3d_ext.text.pretrained_language_model.load_language_model`; the prompt is put into its
            tokenizer's chat template, where it has one.
        extractor: reads the findings that must be the same, and their sides.
        max_new_tokens: a rewriting that has not come to its end by then is not kept.
    """

    def __init__(
        self, language_model: PretrainedLanguageModel, extractor: FindingExtractor, max_new_tokens: int = 1024
    ) -> None:
        self._tokenizer, self._model = language_model.tokenizer, language_model.model
        self._extractor = extractor
        self._max_new_tokens = max_new_tokens
        template = files("vlm3d_ext.text.prompt_templates") / "rewrite_report.txt"
        self._template = template.read_text(encoding="utf-8").strip()

    def prompt(self, report: TemplateReport) -> str:
        """Return what the model is asked, without its chat template."""
        return self._template.replace("{report}", _text(report))

    def rewrite(self, report: TemplateReport) -> TemplateReport | None:
        """Return the report in other words; None if the model changed a finding or a side, lost a section, did not end,
        or gave back what it got.
        """
        sections = parse_report(self._generate(self.prompt(report)))
        rewritten = TemplateReport(sections.findings, sections.impression or NOT_GIVEN)
        lost = not rewritten.findings or (rewritten.impression == NOT_GIVEN) != (report.impression == NOT_GIVEN)
        if lost or _text(rewritten) == _text(report):
            return None
        before, after = _text(report), _text(rewritten)
        same = np.array_equal(self._extractor.labels(before), self._extractor.labels(after), equal_nan=True)
        return rewritten if same and self._extractor.sides(before) == self._extractor.sides(after) else None

    def _generate(self, prompt: str) -> str:
        """Return the model's answer, "" if it did not come to an end."""
        import torch

        if self._tokenizer.chat_template is not None:
            message = [{"role": "user", "content": prompt}]
            text = self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            # The chat template writes the special tokens itself.
            inputs = self._tokenizer(text, add_special_tokens=False, return_tensors="pt")
        else:
            inputs = self._tokenizer(prompt + "\n\n", return_tensors="pt")
        ids = inputs["input_ids"].to(self._model.device)
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        answer = output[0, ids.shape[1] :]
        if len(answer) >= self._max_new_tokens:
            return ""
        return self._tokenizer.decode(answer, skip_special_tokens=True)


def _text(report: TemplateReport) -> str:
    return write_report(sections_from_columns(report.findings, report.impression))
