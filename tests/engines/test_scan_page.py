import base64
import configparser
import fnmatch
import html
import re
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from tests.engines.page_phantom import (
    ATTACK,
    DISEASES,
    GEOMETRY,
    NODULE_SLICES,
    embedded_data,
    finding,
    page_content,
    phantom_hu,
    phantom_masks,
)
from tests.engines.test_scan_page_volume import decode_mask
from vlm3d_ext.data.scan_reader import read_mask, read_scan
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.engines.localization_montage import DISEASE_COLOURS
from vlm3d_ext.engines.scan_page import scan_page, write_scan_page
from vlm3d_ext.engines.scan_page_volume import decode_bands

ROOT = Path(__file__).parents[2]
REAL_SCAN = ROOT.parent / "shared" / "data" / "ct_chest" / "nsclc_LUNG1-001"


@pytest.fixture(scope="module")
def page():
    return scan_page(page_content())


def test_what_comes_from_outside_is_shown_and_not_run():
    evil_lineage = {"bundle": ATTACK, "upstream": {ATTACK: {"path": f"/x/{ATTACK}", "sha256": ATTACK, "lineage": None}}}
    written = scan_page(
        page_content(
            volume_id=f"v{ATTACK}",
            diseases={**DISEASES, "lung_nodule": ATTACK},
            findings=[finding(ATTACK, 0.9)],
            lineage=evil_lineage,
            checkpoint_sha256=ATTACK,
        )
    )
    assert "<img" not in written
    # Three scripts and the data; what an id or a report says adds none.
    assert len(re.findall(r"<script", written)) == len(re.findall(r"</script", written)) == 4
    assert embedded_data(written)["diseases"][0]["name"] == ATTACK
    assert written.count(html.escape(ATTACK, quote=True)) >= 7


def test_text_that_looks_like_the_templates_marks_stays_text():
    written = scan_page(page_content(notes=["costs $5, ${data} and $report"]))
    assert "costs $5, ${data} and $report" in written


def test_nothing_outside_the_file_is_asked_for(page):
    assert (
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
    ) in page
    assert not re.search(r"https?:|wss?://|@import|url\(|XMLHttpRequest|fetch\(|sendBeacon", page)
    for address in re.findall(r"(?:src|href)\s*=\s*[\"'`]([^\"'`]*)", page.replace(html.escape(ATTACK), "")):
        assert address.startswith(("#", "data:")), address


def test_the_banner_says_what_the_page_is_not(page):
    assert "Research software. Not a medical device, not for clinical use." in page


def test_masks_arrive_without_loss(page):
    data = embedded_data(page)
    masks = phantom_masks()
    assert [disease["key"] for disease in data["diseases"]] == list(DISEASES)
    assert [disease["colour"] for disease in data["diseases"]] == list(DISEASE_COLOURS[:3])
    for disease in data["diseases"][:2]:
        np.testing.assert_array_equal(decode_mask(disease["runs"], GEOMETRY.shape), masks[disease["key"]])
    assert data["diseases"][2]["runs"] is None


def test_the_sheets_hold_the_scan(page):
    data = embedded_data(page)
    sheets = [[base64.b64decode(sheet) for sheet in band] for band in data["sheets"]]
    values = decode_bands(sheets, data["rows_per_slice"])[:, : GEOMETRY.shape[1]]
    hu = phantom_hu()
    # Within the blocks, away from their edges, where JPEG rings.
    assert values[6, 25, 32] == pytest.approx(40, abs=12)
    assert values[16, 7, 29] == pytest.approx(900, abs=40)
    assert values[10, 1, 1] == pytest.approx(-1000, abs=12)
    assert np.abs(values - hu).mean() < 12
    assert data["shape"] == [20, 36, 44] and data["spacing_mm"] == [3.0, 1.5, 1.5]


def test_findings_are_sorted_marked_and_placed(page):
    rows = re.findall(r'<li>(<(?:button|div)[^>]*class="finding.*?)</li>', page)
    names = re.findall(r'class="name">(?:<span class="swatch[^>]*></span>)?([^<]+?) ?<', "".join(rows))
    assert names == ["Lung nodule", "Consolidation", "Emphysema", "Cardiomegaly"]
    assert ["positive" in row for row in rows] == [True, True, False, False]
    assert ["untrained" in row for row in rows] == [False, False, True, False]
    slices = [re.search(r'data-slices="([\d,]+)"', row) for row in rows]
    assert [found and found[1] for found in slices] == ["6,25,32", "14,8,9", None, "3,7,10"]
    assert 'style="width:91.0%"' in rows[0] and 'style="left:50.0%"' in rows[0]
    assert embedded_data(page)["start"] == list(NODULE_SLICES)


def test_the_page_starts_in_the_middle_without_a_lesion():
    data = embedded_data(scan_page(page_content(findings=[finding("Emphysema", 0.9, position_mm=[0.0, 30.0, -190.0])])))
    assert data["start"] == [10, 18, 22]


def test_a_scan_that_is_too_large_is_shown_coarser_with_its_positions():
    data = embedded_data(scan_page(page_content(), max_in_plane=22, max_slices=10))
    assert data["shape"] == [10, 18, 22] and data["spacing_mm"] == pytest.approx([6.0, 3.0, 3.0])
    # Voxels of 2 x 2 x 2 old ones: the nodule's middle (6, 25, 32) is (2.75, 12.25, 15.75) here.
    assert data["start"] == [3, 12, 16]
    assert decode_mask(data["diseases"][0]["runs"], (10, 18, 22))[3, 12, 16]
    assert data["affine_lps"][0][3] == pytest.approx(-30 + 0.75)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hu": phantom_hu()[1:]}, r"valid_1_a_1: the scan has shape \(19, 36, 44\)"),
        ({"hu": np.full(GEOMETRY.shape, np.nan)}, "holds NaN"),
        ({"masks": {"lung_nodule": np.zeros(GEOMETRY.shape, dtype=np.uint8)}}, "mask of 'lung_nodule' is uint8"),
        ({"masks": {"mass": np.zeros(GEOMETRY.shape, dtype=bool)}}, r"no name for \['mass'\]"),
        ({"findings": [{"name": "Mass"}]}, r"finding, number 1, lacks \['probability', 'threshold'"),
        (
            {"lesions": {"lung_nodule": [{"bbox_mm": [0] * 6}]}},
            r"lesion of 'lung_nodule', number 1, lacks \['centroid_mm'",
        ),
        (
            {"geometry": VolumeGeometry(GEOMETRY.shape, GEOMETRY.affine_lps @ np.diag([-1, 1, 1, 1]))},
            "axes are RPS, expected LPS",
        ),
    ],
)
def test_content_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        page_content(**changes)


def test_a_finding_outside_the_scan_is_named():
    with pytest.raises(
        ValueError, match=r"valid_1_a_1: finding 'Mass': the position \[500.0, 20.0, -190.0\] mm lies out"
    ):
        scan_page(page_content(findings=[finding("Mass", 0.9, position_mm=[500.0, 20.0, -190.0])]))


def test_a_page_is_written_whole_and_always_the_same(tmp_path, page):
    write_scan_page(tmp_path / "new" / "page.html", page_content())
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == page
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_the_pages_parts_are_shipped():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = [pattern.strip() for pattern in setup["options.package_data"]["vlm3d_ext.engines"].split(",")]
    names = [f"scan_page/{part.name}" for part in (files("vlm3d_ext.engines") / "scan_page").iterdir()]
    assert len(names) == 5
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in patterns) for name in names)


@pytest.mark.skipif(not REAL_SCAN.is_dir(), reason="the shared sample data are not there")
def test_a_real_scan_makes_a_page_of_bearable_size_and_error():
    scan = read_scan(REAL_SCAN / "ct.nii.gz")
    labels, _ = read_mask(REAL_SCAN / "seg.nii.gz")
    tumour = labels == 4
    content = page_content(
        hu=scan.hu, geometry=scan.geometry, masks={"lung_nodule": tumour}, lesions={}, findings=[], report={}
    )
    started = time.process_time()
    written = scan_page(content)
    assert time.process_time() - started < 15
    assert len(written.encode()) < 8e6
    data = embedded_data(written)
    assert data["shape"] == [97, 190, 256]
    error = re.search(r"HU are off by ([\d.]+) on average", written)
    assert error is not None and float(error[1]) < 8
    shown = decode_mask(data["diseases"][0]["runs"], tuple(data["shape"]))
    volume_ratio = np.prod(data["spacing_mm"]) * shown.sum() / (np.prod(scan.geometry.spacing_mm) * tumour.sum())
    assert volume_ratio == pytest.approx(1, abs=0.02)
