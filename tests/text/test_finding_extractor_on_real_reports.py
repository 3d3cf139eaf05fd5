"""The extractor on real labelled reports: ../shared/data beside the repository, skipped where it is not there."""

from pathlib import Path

import pytest

from vlm3d_ext.engines.finding_extractor_score import score_finding_extractor
from vlm3d_ext.text.finding_extractor import FindingExtractor

LABELLED = Path(__file__).parents[3] / "shared/data/ctrate/text_classifier_val_labels.head120.csv"

pytestmark = pytest.mark.skipif(not LABELLED.is_file(), reason="the shared sample data are not there")


# The wording was learnt from the odd rows; the even rows were held out.
@pytest.mark.parametrize(("rows", "num_reports", "least"), [("all", 120, 0.93), ("odd", 60, 0.95), ("even", 60, 0.90)])
def test_macro_f1(rows, num_reports, least):
    scores = score_finding_extractor(LABELLED, FindingExtractor("ct_rate_18"), rows)
    assert scores.num_reports == num_reports and (scores.positives > 0).all()
    assert scores.macro_f1 >= least, scores.as_text()
    assert scores.f1.min() >= 0.75, scores.as_text()
    assert (scores.f1 > scores.all_positive_f1).all(), scores.as_text()
