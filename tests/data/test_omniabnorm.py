import json
import math
import subprocess
import sys

import numpy as np
import pytest

from vlm3d_ext.data.omniabnorm import OmniAbnormError, main, read_omniabnorm_case, read_omniabnorm_folder
from vlm3d_ext.text.label_set import load_label_set

KEYS = load_label_set("vlm3d_18").keys


def finding(disease, present=True, confidence=0.9, location="right upper lobe"):
    return {"disease": disease, "present": present, "confidence": confidence, "location": location}


def case(image_id="case_00001", findings=(), **changes):
    return {
        "image_id": image_id,
        "image_path": f"images/{image_id}.jpg",
        "findings": [finding("lung_nodule"), finding("pleural_effusion", confidence=0.87, location="bilateral")]
        if not findings
        else list(findings),
        "reasoning": "Step 1: look at the lungs.",
        "summary": "A nodule and effusions.",
        "generated_by": "llama-3.1-70b",
        "timestamp": "2025-11-29T10:30:00Z",
        **changes,
    }


def write(folder, content, name=None, image=True):
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path = folder / f"{name or (content['image_id'])}.json"
    path.write_text(text)
    if image and not isinstance(content, str):
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / f"{content['image_id']}.jpg").write_bytes(b"jpg")
    return path


def labels_of(case_read):
    return {key: value for key, value in zip(KEYS, case_read.labels, strict=True) if not math.isnan(value)}


def test_a_case_as_documented(tmp_path):
    read = read_omniabnorm_case(write(tmp_path, case()))
    assert labels_of(read) == {"lung_nodule": 1.0, "pleural_effusion": 1.0}  # the other 16 are unknown, not absent
    assert read.locations == {"lung_nodule": ("right upper lobe",), "pleural_effusion": ("bilateral",)}
    assert (read.image_id, read.reasoning, read.summary) == (
        "case_00001", "Step 1: look at the lungs.", "A nodule and effusions."
    )  # fmt: skip
    assert read.image_path == tmp_path / "images/case_00001.jpg" and read.has_image


@pytest.mark.parametrize(
    ("findings", "expected"),
    [
        ([finding("Lung nodule"), finding("Ground glass opacity")], {"lung_nodule": 1, "ground_glass_opacity": 1}),
        ([finding("Pulmonary-Nodule", False), finding("hydrothorax")], {"lung_nodule": 0, "pleural_effusion": 1}),
        ([finding("mass", True, 0.49), finding("fracture", False, 0.5)], {"fracture": 0}),
        ([finding("mass"), finding("mass", False)], {}),
        ([finding("mass"), finding("mass", False, 0.2)], {"mass": 1}),
        ([finding("mass"), finding("Mass")], {"mass": 1}),
        ([finding("spleen rupture")], {}),
    ],
)
def test_labels_are_tri_state(tmp_path, findings, expected):
    assert labels_of(read_omniabnorm_case(write(tmp_path, case(findings=findings)))) == expected


def test_unsure_contradictory_and_unknown_findings_are_counted(tmp_path):
    findings = [
        finding("mass"), finding("mass", False), finding("fracture", True, 0.1), finding("pleural_efusion"),
        finding("lung_nodule", True, 0.9, "left"), finding("lung_nodule", True, 0.8, "right"),
    ]  # fmt: skip
    read = read_omniabnorm_case(write(tmp_path, case(findings=findings)))
    assert (read.num_contradictory, read.num_unsure, read.unknown_diseases) == (1, 1, ("pleural_efusion",))
    assert read.locations == {"lung_nodule": ("left", "right")}
    strict = read_omniabnorm_case(tmp_path / "case_00001.json", min_confidence=0.85)
    assert strict.locations == {"lung_nodule": ("left",)}


def test_another_label_set_has_its_own_order(tmp_path):
    read = read_omniabnorm_case(write(tmp_path, case()), "ct_rate_18")
    names = load_label_set("ct_rate_18").names
    assert {names[index] for index in np.flatnonzero(np.array(read.labels) == 1)} == {"Lung nodule", "Pleural effusion"}


BAD_FILES = {
    "not_json": ('{"image_id": ', "is not JSON"),
    "list": ([1], "is list, expected one JSON object"),
    "no_id": ({k: v for k, v in case().items() if k != "image_id"}, "'image_id' is None, expected a str"),
    "findings": (case() | {"findings": "none"}, "'findings' is 'none', expected a list"),
    "disease": (case(findings=[finding("")]), "finding 0: 'disease' is ''"),
    "present": (case(findings=[finding("mass", "yes")]), "'present' is 'yes', expected true or false"),
    "number": (case(findings=[finding("mass", True, "high")]), "'confidence' is 'high', expected a number"),
    "range": (case(findings=[finding("mass", True, 92)]), "'confidence' is 92, expected a number from 0 to 1"),
    "nan": (case(findings=[finding("mass", True, float("nan"))]), "'confidence' is nan"),
    "up": (case(image_path="../../etc/passwd"), "'../../etc/passwd' leads out of"),
    "absolute": (case(image_path="/etc/passwd"), "leads out of"),
    "windows": (case(image_path="..\\secret.jpg"), "leads out of"),
    "null_byte": (case(image_path="a\0b"), "is no path"),
    "surrogate": (case(summary="\ud800"), "surrogate"),
    "reasoning": (case(reasoning=["Step 1"]), "'reasoning' is .*, expected text"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_in_one_line(tmp_path, content, message):
    path = write(tmp_path, content, "bad", image=False) if isinstance(content, str) else tmp_path / "bad.json"
    if not isinstance(content, str):
        path.write_text(json.dumps(content))
    with pytest.raises(OmniAbnormError, match=message) as error:
        read_omniabnorm_case(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_links_out_of_the_folder_are_refused(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"")
    path = write(tmp_path / "cases", case(), image=False)
    (tmp_path / "cases/images").mkdir()
    (tmp_path / "cases/images/case_00001.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(OmniAbnormError, match="leads out of"):
        read_omniabnorm_case(path)


def folder_with_bad_files(tmp_path):
    folder = tmp_path / "omniabnorm"
    write(folder, case("case_1"))
    write(folder, case("case_2", [finding("lung_nodule", False), finding("pleural_efusion")]), image=False)
    write(folder, case("case_1", [finding("mass")]), "later_copy")
    for name, (content, _) in BAD_FILES.items():
        (folder / f"bad_{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_bad_files_do_not_stop_the_rest(tmp_path):
    read = read_omniabnorm_folder(folder_with_bad_files(tmp_path))
    assert [read_case.image_id for read_case in read.cases] == ["case_1", "case_2"]
    assert len(read.problems) == len(BAD_FILES) + 1
    assert any("later_copy.json" in problem and "case_1.json already" in problem for problem in read.problems)
    assert [path.name for path in read.missing_images] == ["case_2.jpg"]
    assert read.unknown_diseases == {"pleural_efusion": 1}
    assert read.nearest_finding("pleural_efusion") == "pleural_effusion" and read.nearest_finding("zzz") is None


def test_command(tmp_path, capsys):
    folder = folder_with_bad_files(tmp_path)
    output = folder / "all.json"
    for _ in range(2):  # the output itself is not taken for a case
        assert main([str(folder), "--output", str(output)]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"2 cases, {len(BAD_FILES) + 1} files left out, 1 images missing")
    assert "not in vlm3d_18: 'pleural_efusion' (nearest: pleural_effusion), in 1 case(s)" in printed
    nodule = next(line.split() for line in printed.splitlines() if line.startswith("Lung nodule"))
    assert nodule[2:] == ["1", "1", "0"]
    content = json.loads(output.read_text())
    assert content["label_names"] == list(load_label_set("vlm3d_18").names)
    first, second = content["cases"]
    assert first["image_path"] == "images/case_1.jpg" and first["has_image"] and not second["has_image"]
    assert first["labels"][:3] == [1, 1, None] and second["labels"][:3] == [0, None, None]
    assert first["locations"] == {"lung_nodule": ["right upper lobe"], "pleural_effusion": ["bilateral"]}
    assert first["reasoning"].startswith("Step 1") and first["summary"] and second["locations"] == {}


def test_command_without_a_usable_case(tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{")
    assert main([str(tmp_path), "--output", str(tmp_path / "out.json")]) == 2
    assert "none of its 1 files can be used" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
    for arguments, message in (
        ([str(tmp_path / "absent")], "no such folder"),
        ([str(tmp_path), "--label-set", "vlm3d_81"], "Did you mean"),
        ([str(tmp_path), "--min-confidence", "7"], r"must lie in [0, 1], got 7.0"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_command_needs_no_torch(tmp_path):
    write(tmp_path / "cases", case())
    code = (
        "import sys; from vlm3d_ext.data.omniabnorm import main; "
        "status = main([sys.argv[1]]); sys.exit(status or 9 * ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "cases")]).returncode == 0
