import pytest

from vlm3d_ext.metrics import of_task


def test_a_metric_is_given_what_its_task_returned_in_the_order_asked_for():
    output = {
        "pred": {
            "classification": {"logits": "z", "labels": "y"},
            "localization": {"probabilities": "p", "target": "t"},
        },
        "loss": 0.5,
    }
    assert of_task("classification", ["logits", "labels"])(output) == ("z", "y")
    assert of_task("localization", ["target", "probabilities"])(output) == ("t", "p")
    with pytest.raises(KeyError, match="report"):
        of_task("report", ["texts"])(output)
