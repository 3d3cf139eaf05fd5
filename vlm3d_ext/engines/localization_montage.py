"""Pictures of true and predicted lesions in their scan, one row for each disease."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.ndimage

from ..data.area_averaging import are_parallel
from ..data.volume_geometry import VolumeGeometry
from ..data.volume_resampling import resample_mask
from .mask_outlines import mask_outlines
from .png_figures import as_png, new_figure

__all__ = ["DISEASE_COLOURS", "MontageRow", "draw_montage"]

DISEASE_COLOURS = ("#E69F00", "#56B4E9", "#F0E442", "#FF5A36", "#3DDC97", "#CC79A7", "#5B7BFF", "#A6761D")
"""One for each disease of a set, in its order; told apart with colour-blindness too (after Okabe and Ito 2008)."""

_COLUMNS = ("axial, largest area", "enlarged", "axial, most wrong", "coronal", "sagittal")
_PANEL_INCHES = 2.3
_DPI = 130
_LEAST_ENLARGED_MM = 60.0
_CLIPPED_ALIKE = 0.05  # share of voxels
# Letters at the left, right, top and bottom of a panel; a scan is looked at from the feet.
_LETTERS = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}


@dataclass(frozen=True, eq=False)
class MontageRow:
    """One disease in a montage.

    Args:
        disease: key.
        name: as in the legend.
        colour: of the predicted outlines.
        caption: what stands beside the row, such as "Dice 0.71"; may be empty.
        prediction: (D, H, W) bool on the scan's stored grid.
        truth: the same, None where it is not known.
    """

    disease: str
    name: str
    colour: str
    caption: str
    prediction: np.ndarray
    truth: np.ndarray | None = None


@dataclass(frozen=True)
class _Plane:
    """A slice direction: the canonical array axis that it fixes, and those that run down and to the right."""

    fixed: int
    down: int
    right: int
    upwards: bool


_PLANES = {"axial": _Plane(0, 1, 2, False), "coronal": _Plane(1, 0, 2, True), "sagittal": _Plane(2, 0, 1, True)}


def draw_montage(
    title: str,
    image: np.ndarray,
    image_geometry: VolumeGeometry,
    rows: Sequence[MontageRow],
    source_geometry: VolumeGeometry,
) -> bytes:
    """Return a PNG of slices through the lesions: true outlines dashed and white, predicted ones in the disease's
    colour.

    Each row with a lesion, true or predicted, shows the axial slice with the largest lesion area, the same enlarged,
    the axial slice where truth and prediction differ most, a coronal and a sagittal one. Right is on the left and
    front on top, as radiologists look at a scan; lengths are to scale. Outlines follow the voxels of the scan's own
    grid, whatever the grid of the image. Of an image with several windows a row shows the one that clips
    fewest of its lesions' voxels.

    Args:
        title: above the picture, such as the volume id.
        image: (D, H, W) or (C, D, H, W) uint8 grey levels.
        image_geometry: its grid; parallel to the canonical form of `source_geometry`.
        rows: at least one. If none of them has a lesion, the middle of the scan is shown.
        source_geometry: the scan's grid as stored.

    Raises:
        ValueError: if there is no row, an array does not fit its grid, or the grids are not parallel.
    """
    if not rows:
        raise ValueError(f"{title}: a montage needs at least one disease, got none.")
    windows = image if image.ndim == 4 else image[None]
    if windows.shape[1:] != image_geometry.shape:
        raise ValueError(f"{title}: the image has shape {image.shape}, but its grid has {image_geometry.shape}.")
    canonical = source_geometry.canonical()
    if not are_parallel(image_geometry, canonical):
        raise ValueError(f"{title}: the image's axes are not parallel to the scan's; draw on the prepared image.")
    shown = [_OnCanonical(row, source_geometry) for row in rows]
    with_lesion = [row for row in shown if row.either.any()]
    num_rows = len(with_lesion) or 1
    figure = new_figure(_PANEL_INCHES * len(_COLUMNS) + 0.4, _PANEL_INCHES * num_rows + 0.9)
    grid = figure.subplots(len(with_lesion) or 1, len(_COLUMNS), squeeze=False)
    scene = _Scene(windows, image_geometry, canonical)
    for panels, row in zip(grid, with_lesion or [shown[0]], strict=True):
        scene.draw_row(panels, row)
    for axes, text in zip(grid[0], _COLUMNS, strict=True):
        axes.set_title(text if with_lesion else text.split(",")[0], fontsize=8)
    figure.suptitle(title if with_lesion else f"{title}\nno lesion, neither true nor predicted", fontsize=10)
    if with_lesion:
        _add_legend(figure, with_lesion)
    return as_png(figure, _DPI)


class _OnCanonical:
    """A row with its masks in canonical axes."""

    def __init__(self, row: MontageRow, geometry: VolumeGeometry) -> None:
        self.row = row
        self.prediction = geometry.to_canonical(row.prediction)
        known = np.zeros_like(row.prediction) if row.truth is None else row.truth
        self.truth = geometry.to_canonical(known)
        self.either = self.prediction | self.truth

    def slices(self) -> dict[str, int]:
        """Return the index of the slice for each column but the enlarged one."""
        area = self.either.sum(axis=(1, 2))
        wrong = (self.prediction ^ self.truth).sum(axis=(1, 2))
        largest = int(area.argmax())
        # A second slice, if there is another one with a lesion.
        wrong[largest] = 0
        area[largest] = 0
        second = int((wrong if wrong.any() else area).argmax()) if area.any() else largest
        coronal, sagittal = (int(self.either.sum(axis=axes).argmax()) for axes in ((0, 2), (0, 1)))
        return {_COLUMNS[0]: largest, _COLUMNS[2]: second, _COLUMNS[3]: coronal, _COLUMNS[4]: sagittal}


class _Scene:
    """An image, and where its voxels and those of the scan lie, in mm from the scan's first edge along its axes."""

    def __init__(self, windows: np.ndarray, image_geometry: VolumeGeometry, canonical: VolumeGeometry) -> None:
        self.windows, self.image_geometry, self.canonical = windows, image_geometry, canonical
        self.spacing_mm = np.array(canonical.spacing_mm)
        self.extent_mm = np.array(canonical.extent_mm)
        self.image_spacing_mm = np.array(image_geometry.spacing_mm)
        first = (np.linalg.inv(canonical.affine_lps) @ image_geometry.affine_lps[:, 3])[2::-1]
        self.image_first_edge_mm = (first + 0.5) * self.spacing_mm - self.image_spacing_mm / 2

    def draw_row(self, panels: Any, shown: _OnCanonical) -> None:
        lesions = bool(shown.either.any())
        middle = (_COLUMNS[0], *_COLUMNS[3:])
        shape = self.canonical.shape
        places = shown.slices() if lesions else {text: n // 2 for text, n in zip(middle, shape, strict=True)}
        volume = self.windows[self._window(shown) if lesions else 0]
        for axes, text in zip(panels, _COLUMNS, strict=True):
            if not lesions and text in _COLUMNS[1:3]:
                axes.set_visible(False)
                continue
            index = places.get(text, places[_COLUMNS[0]])
            plane = text.split(",")[0] if text != "enlarged" else "axial"
            self._draw_slice(axes, plane, index, volume, shown)
            if text == "enlarged" and lesions:
                self._enlarge(axes, shown, index)
            else:
                _write_letters(axes, _LETTERS[plane])
        if lesions:
            label = "\n".join(part for part in (shown.row.name, shown.row.caption) if part)
            panels[0].set_ylabel(label, fontsize=8, color="black")

    def _draw_slice(self, axes: Any, name: str, index: int, volume: np.ndarray, shown: _OnCanonical) -> None:
        plane = _PLANES[name]
        centre_mm = (index + 0.5) * self.spacing_mm[plane.fixed]
        offset = (centre_mm - self.image_first_edge_mm[plane.fixed]) / self.image_spacing_mm[plane.fixed]
        image_index = int(np.clip(np.floor(offset), 0, volume.shape[plane.fixed] - 1))
        first = self.image_first_edge_mm
        last = first + self.image_spacing_mm * volume.shape
        axes.imshow(
            volume.take(image_index, axis=plane.fixed),
            cmap="gray",
            vmin=0,
            vmax=255,
            interpolation="nearest",
            origin="upper",
            extent=(first[plane.right], last[plane.right], last[plane.down], first[plane.down]),
        )
        for mask, style in ((shown.prediction, _predicted_style(shown.row.colour)), (shown.truth, _true_style())):
            for outline in mask_outlines(mask.take(index, axis=plane.fixed)):
                down, right = outline[:, 0] * self.spacing_mm[plane.down], outline[:, 1] * self.spacing_mm[plane.right]
                axes.plot(right, down, **style)
        height, width = self.extent_mm[plane.down], self.extent_mm[plane.right]
        axes.set(xlim=(0, width), ylim=(0, height) if plane.upwards else (height, 0), xticks=(), yticks=())
        axes.set_aspect("equal", anchor="N")
        axes.set_facecolor("black")
        position = self._position_mm(plane, index)
        _write(axes, 0.985, 0.015, f"{round(position)} mm", "right", "bottom", fontsize=6)

    def _position_mm(self, plane: _Plane, index: int) -> float:
        """Return where a slice lies along its own patient axis, LPS, at the scan's centre."""
        place = (np.array(self.canonical.shape) - 1) / 2
        place[plane.fixed] = index
        return float(self.canonical.positions_lps(place[None])[0][2 - plane.fixed])

    def _enlarge(self, axes: Any, shown: _OnCanonical, index: int) -> None:
        """Show the surroundings of the largest lesion in an axial slice."""
        mask = shown.truth[index] if shown.truth[index].any() else shown.prediction[index]
        labels, _ = scipy.ndimage.label(mask, structure=np.ones((3, 3)))
        largest = scipy.ndimage.find_objects(labels)[int(np.bincount(labels[mask]).argmax()) - 1]
        sides = [(side.start * mm, side.stop * mm) for side, mm in zip(largest, self.spacing_mm[1:], strict=True)]
        half = max(_LEAST_ENLARGED_MM, *(1.5 * (stop - start) for start, stop in sides)) / 2
        (top, bottom), (left, right) = ((sum(side) / 2 - half, sum(side) / 2 + half) for side in sides)
        axes.set(xlim=(left, right), ylim=(bottom, top))

    def _window(self, shown: _OnCanonical) -> int:
        """Return the window that clips fewest of the lesions' voxels; of several, the one in which they vary most.

        Ground glass is black in a soft-tissue window, and effusion and heart are one grey in a lung window.
        """
        if len(self.windows) == 1:
            return 0
        lesions = shown.truth if shown.truth.any() else shown.prediction
        inside = resample_mask(np.ascontiguousarray(lesions), self.canonical, self.image_geometry) > 0
        if not inside.any():
            return 0
        values = self.windows[:, inside]
        clipped = ((values == 0) | (values == 255)).mean(axis=1)
        spread = np.where(clipped <= clipped.min() + _CLIPPED_ALIKE, values.std(axis=1), -1.0)
        return int(spread.argmax())


def _predicted_style(colour: str) -> dict[str, Any]:
    return {"color": colour, "linewidth": 1.3, "solid_joinstyle": "miter"}


def _true_style() -> dict[str, Any]:
    from matplotlib.patheffects import Normal, Stroke

    # Without a dark rim, white is lost on bone and consolidated lung.
    rim = [Stroke(linewidth=1.9, foreground="black", alpha=0.8), Normal()]
    return {"color": "white", "linewidth": 0.9, "linestyle": (0, (3, 2)), "path_effects": rim}


def _write_letters(axes: Any, letters: str) -> None:
    places = (
        (0.015, 0.5, "left", "center"),
        (0.985, 0.5, "right", "center"),
        (0.5, 0.985, "center", "top"),
        (0.5, 0.015, "center", "bottom"),
    )
    for letter, (x, y, horizontal, vertical) in zip(letters, places, strict=True):
        _write(axes, x, y, letter, horizontal, vertical)


def _write(axes: Any, x: float, y: float, text: str, horizontal: str, vertical: str, fontsize: float = 7) -> None:
    from matplotlib.patheffects import withStroke

    rim = [withStroke(linewidth=1.6, foreground="black")]
    place = {"transform": axes.transAxes, "ha": horizontal, "va": vertical}
    axes.text(x, y, text, fontsize=fontsize, color="white", path_effects=rim, **place)


def _add_legend(figure: Any, rows: Sequence[_OnCanonical]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=f"{row.row.name}, predicted", **_predicted_style(row.row.colour)) for row in rows]
    if any(row.row.truth is not None for row in rows):
        handles.insert(0, Line2D([], [], label="true", **_true_style()))
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, facecolor="0.35")
    for text in legend.get_texts():
        text.set_color("white")
