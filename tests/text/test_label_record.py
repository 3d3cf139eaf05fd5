import json

import pytest

from vlm3d_ext.text.label_record import LabelRecord


def test_a_checkpoint_of_other_findings_is_refused():
    own, source = LabelRecord("ct_rate_18"), LabelRecord("vlm3d_18")
    state = own.state_dict()
    assert json.loads(json.dumps(state)) == state and state["finding_keys"][9] == "lung_nodule"
    own.load_state_dict(state)
    with pytest.raises(ValueError, match=r"ct_rate_18 \(18 findings\), this run of vlm3d_18 \(18\)") as caught:
        source.load_state_dict(state)
    assert "only the checkpoint has Medical material" in str(caught.value)
    assert "only this run has Ground-glass opacity, Pneumothorax" in str(caught.value) and "\n" not in str(caught.value)
    turned = {**state, "finding_keys": state["finding_keys"][::-1], "finding_names": state["finding_names"][::-1]}
    with pytest.raises(ValueError, match="the same findings in another order"):
        own.load_state_dict(turned)
    with pytest.raises(ValueError, match=r"\['finding_keys', 'finding_names'\] missing"):
        own.load_state_dict({"label_set": "ct_rate_18"})
