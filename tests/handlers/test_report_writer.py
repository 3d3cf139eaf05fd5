"""Reports go to the store of their kind, batch by batch."""

import hashlib

import pytest
import torch
from monai.engines import SupervisedEvaluator

from tests.engines.reported_cases import CASE_IDS, GENERATED
from vlm3d_ext.data.report_store import ReportStore
from vlm3d_ext.engines.keyword_batch import PrepareKeywordBatch
from vlm3d_ext.handlers import ReportWriter
from vlm3d_ext.networks.nets.image_prefix_language_model import GeneratedTexts

ORIGIN = {"fingerprint": "f", "prompt": "chest_ct_report"}


class GivenReports(torch.nn.Module):
    """Writes the reports whose numbers stand in the image; the second is cut, the first ends after three tokens."""

    def forward(self, numbers):
        numbers = numbers.tolist()
        mask = torch.ones(len(numbers), 8, dtype=torch.bool)
        mask[0, 3:] = False
        finished = torch.tensor([number != 1 for number in numbers])
        return GeneratedTexts(mask.long(), mask, finished, [GENERATED[number] for number in numbers])


class Stop(Exception):
    pass


def make_batch(*numbers, evidence_of=None):
    ids = [CASE_IDS[number] for number in numbers]
    return {
        "local_features": torch.tensor(numbers),
        "volume_id": ids,
        "evidence_of": evidence_of or ids,
        "prompt": [f"<image> prompt of {volume_id}" for volume_id in ids],
        "num_lesions_left_out": torch.tensor(numbers),
    }


def run(batches, *handlers):
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=batches,
        network=GivenReports(),
        prepare_batch=PrepareKeywordBatch([], image_key="local_features"),
        val_handlers=list(handlers),
        decollate=False,
    )
    evaluator.run()


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")
    return path


def test_reports_and_controls_go_to_their_stores(tmp_path, checkpoint):
    own, control = ReportStore(tmp_path / "own", ORIGIN), ReportStore(tmp_path / "control", ORIGIN)
    writer = ReportWriter({False: own, True: control}, "ct_rate_18", checkpoint, metadata=ORIGIN)
    batches = [
        make_batch(0, 1),
        make_batch(0, 3, evidence_of=["valid_9_a_1", CASE_IDS[3]]),  # one of another scan, one of its own
    ]
    run(batches, writer)
    assert own.volume_ids() == [CASE_IDS[0], CASE_IDS[1], CASE_IDS[3]]
    assert control.volume_ids() == [CASE_IDS[0]]
    assert own.read(CASE_IDS[0])["metadata"]["evidence_of"] == CASE_IDS[0]
    assert control.read(CASE_IDS[0])["metadata"]["evidence_of"] == "valid_9_a_1"
    assert control.text_path(CASE_IDS[0]).read_text() == GENERATED[0] + "\n"


def test_what_is_kept_of_a_report(tmp_path, checkpoint):
    store = ReportStore(tmp_path / "reports", ORIGIN)
    run([make_batch(0, 1)], ReportWriter(store, "ct_rate_18", checkpoint, metadata=ORIGIN))
    first, second = store.read(CASE_IDS[0]), store.read(CASE_IDS[1])
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert first["report_id"] == f"{CASE_IDS[0]}-{sha256[:12]}"
    assert first["report_text"] == GENERATED[0]
    assert first["diseases_mentioned"] == ["Lung nodule", "Pleural effusion"]
    notice = first["metadata"].pop("notice")
    assert "not for clinical use" in notice
    assert first["metadata"] == {
        **ORIGIN,
        "finished": True,
        "num_tokens": 3,
        "prompt": f"<image> prompt of {CASE_IDS[0]}",
        "num_lesions_left_out": 0,
        "evidence_of": CASE_IDS[0],
    }
    assert second["metadata"]["finished"] is False and second["metadata"]["num_tokens"] == 8


def test_the_findings_are_those_of_the_label_set(tmp_path, checkpoint):
    store = ReportStore(tmp_path / "reports", ORIGIN)
    run([make_batch(3)], ReportWriter(store, "vlm3d_18", checkpoint))
    assert store.read(CASE_IDS[3])["diseases_mentioned"] == ["Emphysema"]


def test_a_run_that_is_stopped_keeps_the_batches_that_were_done(tmp_path, checkpoint):
    store = ReportStore(tmp_path / "reports", ORIGIN)
    writer = ReportWriter(store, "ct_rate_18", checkpoint)

    def batches():
        yield make_batch(0, 1)
        raise Stop

    with pytest.raises(Stop):
        run(batches(), writer)
    assert store.volume_ids() == CASE_IDS[:2]
    assert store.pending([{"volume_id": volume_id} for volume_id in CASE_IDS]) == [
        {"volume_id": volume_id} for volume_id in CASE_IDS[2:]
    ]


def test_other_evidence_without_a_store_for_it(tmp_path, checkpoint):
    """A control must never pass for the report of its scan."""
    store = ReportStore(tmp_path / "reports", ORIGIN)
    with pytest.raises(KeyError):
        run([make_batch(0, evidence_of=["valid_9_a_1"])], ReportWriter(store, "ct_rate_18", checkpoint))
    assert store.volume_ids() == []
