"""Reports from labels and masks of a small prepared release, and their rewriting by language models that are faked."""

import csv
import json
import re

import numpy as np
import pytest

from data_prep.case_reports import COLUMNS, write_case_reports
from data_prep.manifest_reports import manifest_with_reports
from data_prep.prepare import main as prepare
from data_prep.report_rewriting import ReportRewriter
from data_prep.template_reports import TemplateReport, write_template_report
from data_prep.write_reports import main
from tests.data_prep.tiny_release import GEOMETRY, LABEL_NAMES, TinyRelease, write_volume
from vlm3d_ext.data.atomic_files import write_json
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.text.finding_extractor import FindingExtractor
from vlm3d_ext.text.label_set import load_label_set
from vlm3d_ext.text.lesion_locations import LesionLocation

CT_RATE = load_label_set("ct_rate_18")
NODULE = LesionLocation("lung_nodule", "Lung nodule", "right", ("right_upper_lobe",), ("upper",), 7.4, "", 0.2, 1)
EFFUSION = LesionLocation("pleural_effusion", "Pleural effusion", "left", ("pleura",), (), None, "small", 90.0, 1)
FLUID = LesionLocation("pericardial_effusion", "Pericardial effusion", "", ("heart",), (), None, "large", 500.0, 1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Five patients without reports; the first has two reconstructions, lobes, and a nodule in the right lung."""
    folder = tmp_path_factory.mktemp("reports")
    release = TinyRelease(folder / "raw")
    for number in range(1, 6):
        positive = ("Lung nodule", "Cardiomegaly") if number == 1 else ("Emphysema",) if number % 2 else ()
        release.add(f"train_{number}_a_1", positive=positive, seed=number)
    release.add("train_1_a_2", positive=("Lung nodule", "Cardiomegaly"), seed=11)
    release.add("valid_1_a_1", seed=20)
    release.add_anatomical_mask("train_1_a_1")
    nodule = np.zeros(GEOMETRY.shape, dtype=np.uint8)
    nodule[7:11, 8:12, 4:8] = 1
    write_volume(release.root / "lesion_masks" / "lung_nodule" / "train_1_a_1.nii.gz", nodule)
    release.write_tables()
    for path in (release.root / "radiology_text_reports").iterdir():
        path.unlink()
    settings = ["--spatial-size", "12", "20", "24", "--workers", "0", "--validation-fraction", "0"]
    assert prepare(["--source", str(release.root), "--output", str(folder / "prepared"), *settings]) == 0
    return folder / "prepared" / "manifest.json"


def write(manifest, output, *more):
    return main(["--manifest", str(manifest), "--output", str(output), "--quiet", *more])


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def labels_of(report):
    return dict(zip(CT_RATE.keys, FindingExtractor("ct_rate_18").labels(report), strict=True))


def test_a_table_in_the_columns_of_the_release(prepared, tmp_path, capsys):
    assert write(prepared, tmp_path / "reports.csv") == 0
    rows = {row["VolumeName"].removesuffix(".nii.gz"): row for row in rows_of(tmp_path / "reports.csv")}
    assert list(rows) == ["train_1_a_1", "train_1_a_2", *(f"train_{n}_a_1" for n in range(2, 6))]
    assert tuple(rows["train_1_a_1"]) == COLUMNS and {row["Source"] for row in rows.values()} == {"template"}
    findings = rows["train_1_a_1"]["Findings_EN"]
    assert re.search(r"nodul[^.]*right (upper|lower) lobe", findings)
    assert {"Emphysema"} <= set(re.findall("Emphysema", rows["train_3_a_1"]["Impressions_EN"]))
    # What is true of the scan is said of all its reconstructions.
    assert rows["train_1_a_2"] | {"VolumeName": ""} == rows["train_1_a_1"] | {"VolumeName": ""}
    out = capsys.readouterr().out
    assert "6 volumes of 5 scans have a new report, 5 from templates, 0 rewritten" in out


def test_the_reports_say_what_the_labels_say(prepared, tmp_path):
    assert write(prepared, tmp_path / "reports.csv", "--split", "training", "test") == 0
    manifest = CaseManifest(prepared)
    known = {case["volume_id"]: case["labels"] for case in manifest.cases(("training", "test"))}
    extractor = FindingExtractor("ct_rate_18")
    rows = rows_of(tmp_path / "reports.csv")
    assert len(rows) == len(known) == 7
    for row in rows:
        text = f"Findings: {row['Findings_EN']} Impression: {row['Impressions_EN']}"
        np.testing.assert_array_equal(extractor.labels(text), known[row["VolumeName"].removesuffix(".nii.gz")])


@pytest.mark.parametrize("seed", range(12))
def test_any_labels_are_read_back(seed):
    rng = np.random.default_rng(seed)
    labels = {key: int(rng.random() < 0.3) for key in CT_RATE.keys}
    # CT-RATE's opacity is what the others show too.
    labels["lung_opacity"] = max(labels["lung_opacity"], labels["consolidation"])
    report = write_template_report(labels, CT_RATE, [], (), [seed])
    assert labels_of(f"Findings: {report.findings} Impression: {report.impression}") == labels


def test_a_scan_keeps_its_words_whoever_else_is_there(prepared, tmp_path):
    for name, more in {"a": (), "b": ("--split", "training", "test"), "c": ("--seed", "1")}.items():
        assert write(prepared, tmp_path / f"{name}.csv", *more) == 0
    a, b, c = ({row["VolumeName"]: row["Findings_EN"] for row in rows_of(tmp_path / f"{name}.csv")} for name in "abc")
    assert a.items() < b.items()
    assert a != c and a.keys() == c.keys()


def test_unknown_is_not_mentioned():
    labels = dict.fromkeys(CT_RATE.keys) | {"emphysema": 1, "cardiomegaly": 0}
    for seed in range(8):
        report = write_template_report(labels, CT_RATE, [], (), [seed])
        assert 1 <= report.findings.count(".") <= 2
        assert labels_of(report.findings) == {key: float(key == "emphysema") for key in CT_RATE.keys}
    nothing = write_template_report(dict.fromkeys(CT_RATE.keys), CT_RATE, [], (), [0])
    assert nothing is None


def test_normal_is_concluded_only_where_all_is_known():
    normal = write_template_report(dict.fromkeys(CT_RATE.keys, 0), CT_RATE, [], (), [3])
    assert "thora" in normal.impression.lower()
    partly = write_template_report(
        dict.fromkeys(CT_RATE.keys, 0) | {"mass": None, "emphysema": None}, CT_RATE, [], (), [3]
    )
    assert partly.impression == "Not given."


def test_masks_give_place_size_and_grade():
    said = set()
    for seed in range(20):
        report = write_template_report({}, CT_RATE, [FLUID, NODULE, EFFUSION], (), [seed])
        fluid, nodule, effusion = report.findings.split(". ")
        assert "large" in fluid.lower() and "mm" not in fluid
        assert "right upper lobe" in nodule and "nodules" not in nodule
        assert "small" in effusion.lower() and "on the left" in effusion
        assert "{" not in report.findings + report.impression
        said.add(report.findings)
        if " mm" in nodule:
            assert "7 mm" in nodule
    assert len(said) > 8


def test_a_drawn_lesion_outweighs_its_label_and_an_empty_mask_says_absent():
    report = write_template_report({"lung_nodule": 0}, CT_RATE, [NODULE], ("consolidation",), [1])
    assert labels_of(report.findings)["lung_nodule"] == 1
    alone = write_template_report({}, CT_RATE, [], ("consolidation",), [1])
    assert "consolidation" in alone.findings.lower() and labels_of(alone.findings)["consolidation"] == 0


def test_a_measured_nodule_stays_a_nodule():
    wide = LesionLocation("lung_nodule", "Lung nodule", "right", ("right_upper_lobe",), (), 33.0, "", 14.0, 1)
    for seed in range(8):
        report = write_template_report({}, CT_RATE, [wide], (), [seed])
        assert labels_of(f"Findings: {report.findings} Impression: {report.impression}")["lung_nodule"] == 1


def test_the_manifest_with_reports_has_its_own_fingerprint(prepared, tmp_path):
    output = prepared.with_name("with_reports.json")
    assert write(prepared, tmp_path / "reports.csv", "--output-manifest", str(output)) == 0
    before, after = CaseManifest(prepared), CaseManifest(output)
    assert before.fingerprint != after.fingerprint
    rows = {row["VolumeName"].removesuffix(".nii.gz"): row for row in rows_of(tmp_path / "reports.csv")}
    for case in after.cases("training"):
        assert case["report"]["findings"] == rows[case["volume_id"]]["Findings_EN"]
        assert case["report_source"] == "template"
    assert after.content["test"] == before.content["test"]
    assert manifest_with_reports(before, {}, {}) == before.content
    # With reports in place there is nothing left to do.
    assert write(output, tmp_path / "again.csv") == 2 and not (tmp_path / "again.csv").exists()
    assert write(output, tmp_path / "again.csv", "--all") == 0
    output.unlink()


def test_the_table_put_into_the_release_makes_the_same_cases(prepared, tmp_path):
    raw = prepared.parent.parent / "raw"
    table = raw / "radiology_text_reports" / "train_reports.csv"
    assert write(prepared, table) == 0
    settings = ["--spatial-size", "12", "20", "24", "--workers", "0", "--validation-fraction", "0"]
    assert prepare(["--source", str(raw), "--output", str(tmp_path / "prepared"), *settings]) == 0
    reports = {
        case["volume_id"]: case["report"]
        for case in CaseManifest(tmp_path / "prepared" / "manifest.json").cases("training")
    }
    expected = {row["VolumeName"].removesuffix(".nii.gz"): row for row in rows_of(table)}
    table.unlink()
    assert {name: report["findings"] for name, report in reports.items()} == {
        name: row["Findings_EN"] for name, row in expected.items()
    }
    changed = manifest_with_reports(CaseManifest(prepared), reports, dict.fromkeys(reports, "template"))
    for entry in changed["training"]:
        del entry["report_source"]
    again = CaseManifest(tmp_path / "prepared" / "manifest.json")
    assert changed["training"] == again.content["training"]
    assert again.fingerprint not in (changed["fingerprint"], CaseManifest(prepared).fingerprint)
    assert manifest_with_reports(again, {}, {})["fingerprint"] == again.fingerprint


def test_an_edited_manifest_is_not_given_a_new_fingerprint(prepared, tmp_path, capsys):
    content = json.loads(prepared.read_text())
    content["training"][0]["labels"][0] = 1
    edited = prepared.with_name("edited.json")
    write_json(edited, content)
    output = prepared.with_name("changed.json")
    assert write(edited, tmp_path / "reports.csv", "--output-manifest", str(output)) == 2
    assert "fingerprint" in capsys.readouterr().err
    assert not output.exists() and not (tmp_path / "reports.csv").exists()
    edited.unlink()


def test_bad_options(prepared, tmp_path, capsys):
    assert write(prepared, tmp_path / "a.csv", "--rewrite-share", "0.2") == 2
    assert "--language-model" in capsys.readouterr().err
    assert write(prepared, tmp_path / "a.csv", "--output-manifest", str(tmp_path / "m.json")) == 2
    assert "relative" in capsys.readouterr().err
    assert write(tmp_path / "none.json", tmp_path / "a.csv") == 2
    (tmp_path / "a.csv").write_text("mine")
    assert write(prepared, tmp_path / "a.csv") == 2 and (tmp_path / "a.csv").read_text() == "mine"
    assert write(prepared, tmp_path / "a.csv", "--overwrite") == 0
    with pytest.raises(ValueError, match=r"1\.5"):
        write_case_reports(CaseManifest(prepared), rewrite_share=1.5, rewrite=lambda report: report, progress=False)


def test_a_damaged_scan_is_refused_and_the_others_are_written(prepared, tmp_path, capsys):
    mask = prepared.parent / "lesion_masks" / "lung_nodule" / "train_1_a_1.nii.gz"
    content = mask.read_bytes()
    mask.write_bytes(content[:-20])
    try:
        assert write(prepared, tmp_path / "reports.csv") == 3
    finally:
        mask.write_bytes(content)
    assert len(rows_of(tmp_path / "reports.csv")) == 4
    assert "train_1_a_1.nii.gz" in capsys.readouterr().err


# Rewriting


class FakeTokenizer:
    """A token is a word, or the space between two; 0 is padding, 1 the begin, 2 the end."""

    pad_token_id = 0

    def __init__(self, chat_template=None):
        self.chat_template = chat_template
        self.vocabulary = ["", "<begin>", "<end>"]

    def ids(self, text):
        words = re.findall(r"\s+|\S+", text)
        self.vocabulary += [word for word in dict.fromkeys(words) if word not in self.vocabulary]
        return [self.vocabulary.index(word) for word in words]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "<user>" + "".join(message["content"] for message in messages) + "<assistant>"

    def __call__(self, text, return_tensors, add_special_tokens=True):
        import torch

        return {"input_ids": torch.tensor([[1] * add_special_tokens + self.ids(text)])}

    def decode(self, ids, skip_special_tokens):
        return "".join(self.vocabulary[number] for number in ids.tolist() if number > 2)


class FakeLanguageModel:
    """Answers with `answer(report)`; `prompts` keeps what it was asked."""

    device = "cpu"

    def __init__(self, answer, chat_template=None):
        self.tokenizer, self.model = FakeTokenizer(chat_template), self
        self.answer, self.prompts = answer, []

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, pad_token_id):
        import torch

        assert not do_sample and attention_mask.shape == input_ids.shape
        self.prompts.append(self.tokenizer.decode(input_ids[0], True))
        report = [line for line in self.prompts[-1].replace("<assistant>", "").split("\n") if line][-1]
        answer = [*self.tokenizer.ids(self.answer(report)), 2]
        return torch.cat([input_ids, torch.tensor([answer[:max_new_tokens]])], dim=1)


REPORT = TemplateReport(
    "Small pleural effusion is seen on the left. There is no emphysema.", "Pleural effusion on the left."
)


def rewritten(answer, max_new_tokens=512, **model):
    fake = FakeLanguageModel(answer, **model)
    return ReportRewriter(fake, FindingExtractor("ct_rate_18"), max_new_tokens).rewrite(REPORT), fake


def other_words(report):
    return report.replace("is seen", "is present").replace("There is no emphysema", "Emphysema is not seen")


def test_other_words_for_the_same_are_kept():
    for template in (None, "a template"):
        report, fake = rewritten(other_words, chat_template=template)
        assert report == TemplateReport(
            "Small pleural effusion is present on the left. Emphysema is not seen.", "Pleural effusion on the left."
        )
        assert fake.prompts[0].startswith("<user>") == bool(template)
        assert "Findings: Small pleural effusion" in fake.prompts[0] and "{report}" not in fake.prompts[0]


@pytest.mark.parametrize(
    "answer",
    [
        lambda report: report.replace("There is no emphysema", "There is emphysema"),
        lambda report: report.replace("left", "right"),
        lambda report: report.replace("Findings", "Findings: Cardiomegaly is present. Findings"),
        lambda report: report.split(" Impression")[0].replace("is seen", "is present"),
        lambda report: report,
        lambda report: "",
        lambda report: "I cannot help with that.",
    ],
)
def test_what_says_something_else_is_not_kept(answer):
    assert rewritten(answer)[0] is None


def test_an_answer_without_an_end_is_not_kept():
    words = (
        "Findings: Small pleural effusion is present on the left. Emphysema is not seen. Impression: Pleural effusion "
    )
    length = len(FakeTokenizer().ids(words + "on the left."))
    assert rewritten(other_words, max_new_tokens=length + 2)[0] is not None
    assert rewritten(other_words, max_new_tokens=length)[0] is None


def test_the_command_rewrites_its_share_and_counts_what_is_lost(prepared, tmp_path, capsys, monkeypatch):
    fake = FakeLanguageModel(lambda report: report.replace(" Impression:", " As described above. Impression:"))
    monkeypatch.setattr(
        "vlm3d_ext.text.pretrained_language_model.load_language_model", lambda name, device_map=None: fake
    )
    model = ["--language-model", "any"]
    assert write(prepared, tmp_path / "all.csv", "--rewrite-share", "1", *model) == 0
    rows = rows_of(tmp_path / "all.csv")
    assert {row["Source"] for row in rows} == {"rewritten"} and len(fake.prompts) == 5
    assert all(row["Findings_EN"].endswith("As described above.") for row in rows)
    assert "0 from templates, 5 rewritten" in capsys.readouterr().out

    fake.answer = lambda report: "Findings: Hiatal hernia and bronchiectasis. Impression: Hiatal hernia."
    assert write(prepared, tmp_path / "lost.csv", "--rewrite-share", "1", *model) == 0
    assert "5 rewritings did not say the same" in capsys.readouterr().out
    assert write(prepared, tmp_path / "plain.csv") == 0
    assert (tmp_path / "lost.csv").read_bytes() == (tmp_path / "plain.csv").read_bytes()


def test_the_share_is_drawn_scan_by_scan(tmp_path):
    names = list(LABEL_NAMES)
    cases = [
        {
            "volume_id": f"train_{n}_a_1",
            "scan_id": f"train_{n}_a",
            "patient_id": f"train_{n}",
            "image": "x.npz",
            "geometry": "x.json",
            "has_anatomical_mask": False,
            "labels": [n % 2] * len(names),
            "lesion_masks": {},
        }
        for n in range(400)
    ]
    content = {"label_set": "ct_rate_18", "label_names": names, "fingerprint": "x", "validation": [], "test": []}
    write_json(tmp_path / "manifest.json", content | {"training": cases})
    manifest = CaseManifest(tmp_path / "manifest.json")

    def chosen(share):
        written = write_case_reports(
            manifest, rewrite_share=share, rewrite=lambda report: TemplateReport("Other.", "Words."), progress=False
        )
        return {row["VolumeName"] for row in written.rows if row["Source"] == "rewritten"}

    assert 0.13 < len(chosen(0.2)) / 400 < 0.27
    assert chosen(0.1) < chosen(0.2) < chosen(0.6)
    assert len(chosen(1.0)) == 400 and not chosen(0.0)
