import io

import numpy as np
import pytest

from tests.engines.drawn_cases import PREPARED_SIZE, SOURCE, ball
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.data.volume_resampling import target_geometry
from vlm3d_ext.engines import localization_montage
from vlm3d_ext.engines.localization_montage import DISEASE_COLOURS, MontageRow, draw_montage

(PREPARED,) = target_geometry(SOURCE.canonical(), PREPARED_SIZE)
IMAGE = np.random.default_rng(0).integers(40, 90, PREPARED_SIZE, dtype=np.uint8)


def row(prediction, truth=None, colour=DISEASE_COLOURS[0], name="Lung nodule"):
    return MontageRow("lung_nodule", name, colour, "", prediction, truth)


def pixels(png):
    from matplotlib.image import imread

    return imread(io.BytesIO(png), format="png")[..., :3]


@pytest.fixture
def figures(monkeypatch):
    """Return the figures that were drawn."""
    made = []
    make = localization_montage.new_figure

    def remember(*args):
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(localization_montage, "new_figure", remember)
    return made


def lines_of(axes):
    return [np.stack(line.get_data(), axis=1) for line in axes.get_lines()]


def test_outlines_lie_on_the_voxels_edges_in_mm(figures):
    mask = np.zeros(SOURCE.shape, dtype=bool)
    mask[5:7, 10:13, 20:24] = True  # RAS: k up, j to the front, i to the right
    draw_montage("x", IMAGE, PREPARED, [row(mask)], SOURCE)
    axial, _, _, coronal, sagittal, *_ = figures[0].axes
    # The scan has 20 x 36 x 40 voxels of 3 x 1.5 x 1.5 mm. From the patient's right: columns 16 to 20 of 40;
    # from the front: rows 23 to 26 of 36.
    right, down, up = (16 * 1.5, 20 * 1.5), (23 * 1.5, 26 * 1.5), (5 * 3.0, 7 * 3.0)
    for axes, across, along in ((axial, right, down), (coronal, right, up), (sagittal, down, up)):
        (outline,) = lines_of(axes)
        assert (outline[:, 0].min(), outline[:, 0].max()) == pytest.approx(across)
        assert (outline[:, 1].min(), outline[:, 1].max()) == pytest.approx(along)
        assert len(outline) == 5
    # Right is on the left and front on top; up is up.
    assert axial.get_xlim() == (0.0, 60.0) and axial.get_ylim() == (54.0, 0.0)
    assert coronal.get_ylim() == sagittal.get_ylim() == (0.0, 60.0) and sagittal.get_xlim() == (0.0, 54.0)
    assert [text.get_text() for text in axial.texts[-4:]] == ["R", "L", "A", "P"]


def test_the_image_lies_under_the_outlines_where_it_lies_in_the_patient(figures):
    """A block of the scan that is bright, resampled or not, is where its mask is outlined."""
    mask = np.zeros(SOURCE.shape, dtype=bool)
    mask[5:9, 8:20, 24:36] = True
    source_image = np.where(SOURCE.to_canonical(mask), 200, 20).astype(np.uint8)
    draw_montage("x", source_image, SOURCE.canonical(), [row(mask)], SOURCE)
    for axes in (figures[0].axes[index] for index in (0, 3, 4)):
        image = axes.get_images()[0]
        left, right, bottom, top = image.get_extent()
        values = np.asarray(image.get_array())
        rows, columns = np.nonzero(values == 200)
        edges_x = np.linspace(left, right, values.shape[1] + 1)
        edges_y = np.linspace(top, bottom, values.shape[0] + 1)
        (outline,) = lines_of(axes)
        assert outline[:, 0].min() == pytest.approx(edges_x[columns.min()])
        assert outline[:, 0].max() == pytest.approx(edges_x[columns.max() + 1])
        ends = sorted([edges_y[rows.min()], edges_y[rows.max() + 1]])
        assert [outline[:, 1].min(), outline[:, 1].max()] == pytest.approx(ends)
    # The prepared image covers the same extent, with padding where the scan is not square.
    draw_montage("x", IMAGE, PREPARED, [row(mask)], SOURCE)
    assert figures[1].axes[0].get_images()[0].get_extent() == pytest.approx((0.0, 60.0, 57.0, -3.0))


def test_true_and_predicted_lesions_are_told_apart():
    big = ball((10, 18, 20), 9.0)
    png = pixels(draw_montage("x", IMAGE, PREPARED, [row(big, np.roll(big, 3, axis=2), "#FF0000")], SOURCE))
    red = (png[..., 0] > 0.9) & (png[..., 1] < 0.2) & (png[..., 2] < 0.2)
    assert red.sum() > 200
    without = pixels(draw_montage("x", IMAGE, PREPARED, [row(~big & big, big, "#FF0000")], SOURCE))
    legend_only = (without[..., 0] > 0.9) & (without[..., 1] < 0.2) & (without[..., 2] < 0.2)
    assert legend_only.sum() < 0.3 * red.sum()


def test_rows_without_lesions_are_left_out_and_none_at_all_shows_the_scan(figures):
    big, nothing = ball((10, 18, 20), 9.0), np.zeros(SOURCE.shape, dtype=bool)
    draw_montage("x", IMAGE, PREPARED, [row(nothing), row(big, name="Effusion"), row(nothing)], SOURCE)
    assert [axes.get_ylabel() for axes in figures[0].axes if axes.get_ylabel()] == ["Effusion"]
    draw_montage("x", IMAGE, PREPARED, [row(nothing, nothing)], SOURCE)
    assert "no lesion" in figures[1].get_suptitle() and not figures[1].axes[0].get_lines()
    assert [axes.get_visible() for axes in figures[1].axes] == [True, False, False, True, True]


def test_the_window_is_the_one_that_does_not_clip_the_lesion(figures):
    big = ball((10, 18, 20), 9.0)
    clipped, graded = np.zeros_like(IMAGE), IMAGE
    for windows, shown in ((np.stack([clipped, graded]), graded), (np.stack([graded, clipped]), graded)):
        draw_montage("x", windows, PREPARED, [row(big)], SOURCE)
        drawn = np.asarray(figures[-1].axes[0].get_images()[0].get_array())
        assert any(np.array_equal(drawn, part) for part in shown)
    flat = np.full_like(IMAGE, 128)  # neither clips: the one that shows more differences
    draw_montage("x", np.stack([flat, graded]), PREPARED, [row(big)], SOURCE)
    assert np.asarray(figures[-1].axes[0].get_images()[0].get_array()).std() > 0


def test_what_does_not_fit_is_refused():
    big = ball((10, 18, 20), 9.0)
    with pytest.raises(ValueError, match="at least one disease"):
        draw_montage("x", IMAGE, PREPARED, [], SOURCE)
    with pytest.raises(ValueError, match="its grid has"):
        draw_montage("x", IMAGE[1:], PREPARED, [row(big)], SOURCE)
    turned = VolumeGeometry(PREPARED.shape, PREPARED.affine_lps @ np.diag([-1.0, -1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="not parallel"):
        draw_montage("x", IMAGE, turned, [row(big)], SOURCE)


def test_equal_input_gives_equal_bytes():
    big = ball((10, 18, 20), 9.0)
    first, second = (draw_montage("x", IMAGE, PREPARED, [row(big, big)], SOURCE) for _ in range(2))
    assert first == second
