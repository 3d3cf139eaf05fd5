"""The page in a real browser: Chromium without a screen, where it and its driver are installed."""

import base64
import io
import json
import re
import shutil
import time

import numpy as np
import pytest
from PIL import Image, ImageColor

from tests.engines.page_phantom import (
    CONSOLIDATION,
    CONSOLIDATION_SLICES,
    GEOMETRY,
    NODULE,
    NODULE_SLICES,
    embedded_data,
    page_content,
    phantom_hu,
)
from vlm3d_ext.engines.localization_montage import DISEASE_COLOURS
from vlm3d_ext.engines.scan_page import scan_page, write_scan_page
from vlm3d_ext.engines.scan_page_volume import decode_bands, encode_mask

PLANES = {"axial": 0, "coronal": 1, "sagittal": 2}
NODULE_COLOUR, CONSOLIDATION_COLOUR = (np.array(ImageColor.getrgb(colour)) for colour in DISEASE_COLOURS[:2])
CROSSHAIR_COLOUR = np.array([130, 220, 255])


@pytest.fixture(scope="module")
def browser():
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install -e .[dev])")
    from selenium.webdriver.chrome.service import Service

    with pytest.MonkeyPatch.context() as patch:
        # Were a driver missing, selenium would fetch one.
        patch.setenv("SE_OFFLINE", "true")
        patch.setenv("SE_AVOID_STATS", "true")
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(service=Service(chromedriver), options=options)
        yield driver
        driver.quit()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_scan_page(path, page_content())
    return path


@pytest.fixture
def opened(browser, path):
    """Return the browser with the page decoded, its logs emptied before."""
    return open_page(browser, path)


def open_page(browser, path, width=1400, height=900, mobile=False, state="ready"):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if mobile else 1, "mobile": mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for name in ("browser", "performance"):
        browser.get_log(name)
    browser.get(path.as_uri())
    deadline = time.monotonic() + 20
    while browser.execute_script("return document.body.dataset.state") == "loading" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert browser.execute_script("return document.body.dataset.state") == state
    settle(browser)
    return browser


def settle(browser):
    """Wait until the browser has laid out and drawn twice."""
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(() => arguments[0]()))")


def find(browser, selector):
    return browser.find_element("css selector", selector)


def canvas(browser, plane):
    """Return the pixels of a view, (H, W, 3)."""
    script = f"return document.querySelector('[data-plane={plane}] canvas').toDataURL('image/png')"
    content = browser.execute_script(script).split(",", 1)[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")).astype(int)


def sliders(browser):
    script = "return ['axial','coronal','sagittal'].map(p => +document.querySelector(`[data-plane=${p}] input`).value)"
    return tuple(browser.execute_script(script))


def click(browser, selector):
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)
    settle(browser)


def move_slider(browser, plane, value):
    script = (
        "const s = document.querySelector(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('input'))"
    )
    browser.execute_script(script, f"[data-plane={plane}] input", value)
    settle(browser)


def show_only(browser, contours=False, crosshair=False):
    for selector, wanted in (("#overlays input:enabled", contours), ("#crosshair", crosshair)):
        for box in browser.find_elements("css selector", selector):
            if box.is_selected() != wanted:
                browser.execute_script("arguments[0].click()", box)
    settle(browser)


def in_plane(volume, plane, slices):
    """Return a slice of a volume as radiologists look at it: right on the left, front or head on top."""
    return {
        "axial": lambda: volume[slices[0]],
        "coronal": lambda: volume[::-1, slices[1]],
        "sagittal": lambda: volume[::-1, :, slices[2]],
    }[plane]()


def pixel_of(pixels, plane, row, column):
    """Return where a place of a slice, in voxels from its upper left corner, lies on the canvas: (y, x)."""
    down_mm, right_mm = {"axial": (1.5, 1.5), "coronal": (3.0, 1.5), "sagittal": (3.0, 1.5)}[plane]
    num_rows, num_columns = in_plane(np.empty(GEOMETRY.shape), plane, (0, 0, 0)).shape
    height, width = pixels.shape[:2]
    scale = min(width / (num_columns * right_mm), height / (num_rows * down_mm))
    top, left = (height - num_rows * down_mm * scale) / 2, (width - num_columns * right_mm * scale) / 2
    return int(top + row * down_mm * scale), int(left + column * right_mm * scale)


def millimetre(plane, pixels):
    """Return how many pixels a millimetre has, down and to the right."""
    y, x = (np.array(pixel_of(pixels, plane, *place)) for place in ((10, 0), (0, 10)))
    first = np.array(pixel_of(pixels, plane, 0, 0))
    return (y - first)[0] / (15 if plane == "axial" else 30), (x - first)[1] / 15


def is_near(pixels, colour, tolerance=60):
    return np.abs(pixels - colour).sum(axis=-1) <= tolerance


def outline_places(mask):
    """Return the middles of a rectangle's four sides a fifth away from its axes, and its corners' extent."""
    rows, columns = np.nonzero(mask)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    down, across = top + 0.2 * (bottom - top), left + 0.2 * (right - left)
    return [(top, across), (bottom, across), (down, left), (down, right)]


def test_all_parts_are_there_and_nothing_complains_or_leaves(opened):
    assert opened.title == "valid_1_a_1 · VLM3D"
    assert find(opened, ".banner").text == "Research software. Not a medical device, not for clinical use."
    for selector in (
        "#report-title",
        "#findings-title",
        "#lesions-title",
        "#lineage-title",
        "#notes-title",
        "#readout",
    ):
        assert find(opened, selector).is_displayed(), selector
    assert sliders(opened) == NODULE_SLICES
    assert [int(find(opened, f"[data-plane={plane}] input").get_attribute("max")) for plane in PLANES] == [19, 35, 43]
    for plane in PLANES:
        label = find(opened, f"[data-plane={plane}] canvas").get_attribute("aria-label")
        assert label.startswith(f"{plane.capitalize()} slice {NODULE_SLICES[PLANES[plane]] + 1} / ")
    # x = -30 + 32 * 1.5, y = 12 + 25 * 1.5, z = -200 + 6 * 3
    assert find(opened, "#position").text.split() == ["L", "18.0", "P", "49.5", "I", "182.0"]
    density = int(find(opened, "#density").text.removesuffix(" HU"))
    assert density == pytest.approx(40, abs=12)

    click(opened, "button[data-slices]")
    assert opened.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    addresses = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert addresses and all(address.startswith(("file:", "data:", "blob:")) for address in addresses)


def test_markup_in_texts_is_shown_and_not_run(opened):
    assert opened.execute_script("return window.attacked === undefined && document.querySelector('img') === null")
    assert "<script>window.attacked = 1</script>" in find(opened, ".prose").text
    assert "<img src=x" in find(opened, ".notes").text


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize(("preset", "level", "width"), [(0, -600, 1500), (1, 40, 400), (2, 400, 1800)])
def test_each_plane_shows_the_scan_the_right_way_round_in_its_window(opened, plane, preset, level, width):
    opened.execute_script("document.querySelectorAll('.presets button')[arguments[0]].click()", preset)
    show_only(opened)
    # Through the bone at the right front top, and other things: nothing here is symmetrical.
    for name, value in zip(PLANES, (16, 7, 30), strict=True):
        move_slider(opened, name, value)
    shown = in_plane(phantom_hu().astype(float), plane, (16, 7, 30))
    pixels = canvas(opened, plane)
    expected = np.clip((shown - (level - width / 2)) / width * 255, 0, 255)
    bottom, _ = pixel_of(pixels, plane, shown.shape[0], 0)
    compared = 0
    for row in range(1, shown.shape[0] - 1):
        for column in range(1, shown.shape[1] - 1):
            y, x = pixel_of(pixels, plane, row + 0.5, column + 0.5)
            # JPEG rings and the canvas interpolates at edges; the scale bar is at the bottom.
            if np.ptp(shown[row - 1 : row + 2, column - 1 : column + 2]) == 0 and bottom - y > 40:
                grey = pixels[y, x]
                assert grey == pytest.approx(expected[row, column], abs=30), (row, column)
                compared += 1
    assert compared > 200
    letters = opened.find_elements("css selector", f"[data-plane={plane}] .letter")
    assert "".join(letter.text for letter in letters) == {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}[plane]


# At 1010 pixels the views are higher than wide, so that the other side limits the picture.
@pytest.mark.parametrize("width", [1400, 1010])
@pytest.mark.parametrize("plane", PLANES)
def test_the_scale_bar_is_five_centimetres_long_where_lengths_are_to_scale(browser, path, plane, width):
    opened = open_page(browser, path, width=width)
    show_only(opened)
    click(opened, ".presets button:nth-child(3)")
    for name in PLANES:
        move_slider(opened, name, 0)  # air, which is black
    pixels = canvas(opened, plane)
    white = np.nonzero((pixels > 250).all(axis=-1))
    bar = white[1][white[0] == np.bincount(white[0]).argmax()]
    down, right = millimetre(plane, pixels)
    assert down == pytest.approx(right, rel=0.02)
    assert np.ptp(bar) + 1 == pytest.approx(50 * right, rel=0.02)


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize(
    ("box", "slices", "colour"),
    [(NODULE, NODULE_SLICES, NODULE_COLOUR), (CONSOLIDATION, CONSOLIDATION_SLICES, CONSOLIDATION_COLOUR)],
    ids=["nodule", "consolidation"],
)
def test_contours_lie_on_the_masks_edges_and_can_be_switched_off(opened, plane, box, slices, colour):
    show_only(opened, contours=True)
    for name, value in zip(PLANES, slices, strict=True):
        move_slider(opened, name, value)
    mask = np.zeros(GEOMETRY.shape, dtype=bool)
    mask[box] = True
    places = outline_places(in_plane(mask, plane, slices))
    pixels = canvas(opened, plane)
    on_outline = is_near(pixels, colour)
    for place in places:
        y, x = pixel_of(pixels, plane, *place)
        assert on_outline[y - 2 : y + 3, x - 2 : x + 3].any(), place
    # Nowhere outside the mask's rectangle.
    ys, xs = np.nonzero(on_outline)
    (top, left), (bottom, right) = (
        pixel_of(pixels, plane, places[0][0], places[2][1]),
        pixel_of(pixels, plane, places[1][0], places[3][1]),
    )
    extent = [ys.min(), ys.max(), xs.min(), xs.max()]
    assert extent == pytest.approx([top, bottom, left, right], abs=2)

    key = "lung_nodule" if box is NODULE else "consolidation"
    click(opened, f"#overlays input[data-disease={key}]")
    assert not is_near(canvas(opened, plane), colour).any()
    click(opened, f"#overlays input[data-disease={key}]")
    np.testing.assert_array_equal(canvas(opened, plane), pixels)


def test_masks_and_grey_values_are_decoded_as_they_were_encoded(opened, path):
    """Lengths of runs at the limits of one and two bytes; HU as Pillow's decoder has them."""
    lengths = [0, 128, 16384, 1, 127, 129, 16383, 16385, 3]
    mask = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    decoded = opened.execute_script("return [...decodeMask(arguments[0], arguments[1])]", encode_mask(mask), mask.size)
    assert decoded == mask.astype(int).tolist()

    script = """
        const data = JSON.parse(document.getElementById("scan-data").textContent);
        decodeVolume(data, () => {}).then((hu) => arguments[0]([...hu]));
    """
    in_browser = np.array(opened.execute_async_script(script)).reshape(GEOMETRY.shape)
    data = embedded_data(path.read_text(encoding="utf-8"))
    sheets = [[base64.b64decode(sheet) for sheet in band] for band in data["sheets"]]
    in_python = decode_bands(sheets, data["rows_per_slice"])[:, : GEOMETRY.shape[1]]
    # Decoders may differ by a level in each band; above 310 HU a level has 14 HU.
    assert np.abs(in_browser - in_python)[in_python < 250].max() < 8
    assert np.abs(in_browser - in_python).max() < 19


def test_a_disease_without_a_lesion_has_a_switch_that_is_off(opened):
    box = find(opened, "#overlays input[data-disease=pleural_effusion]")
    assert not box.is_selected() and not box.is_enabled()
    assert [label.text.split("\n")[-1] for label in opened.find_elements("css selector", "#overlays label")] == [
        "1 lesion",
        "1 lesion",
        "none",
    ]


def test_slider_wheel_arrows_and_pointer_move_through_the_scan(opened):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    before = canvas(opened, "axial")
    move_slider(opened, "axial", 16)
    assert (canvas(opened, "axial") != before).mean() > 0.01
    for plane, axis in PLANES.items():
        element = find(opened, f"[data-plane={plane}] canvas")
        place = list(sliders(opened))
        ActionChains(opened).scroll_from_origin(ScrollOrigin.from_element(element), 0, 120).perform()
        settle(opened)
        place[axis] -= 1
        assert sliders(opened) == tuple(place), "a notch of the wheel is one slice"
        element.send_keys(Keys.ARROW_UP, Keys.ARROW_UP, Keys.ARROW_LEFT)
        settle(opened)
        place[axis] += 1
        assert sliders(opened) == tuple(place)
        before = canvas(opened, plane)
        find(opened, f"[data-plane={plane}] input").send_keys(Keys.ARROW_RIGHT)
        settle(opened)
        place[axis] += 1
        assert sliders(opened) == tuple(place)
        assert (canvas(opened, plane) != before).any()
        element.send_keys(Keys.END)
        assert sliders(opened)[axis] == GEOMETRY.shape[axis] - 1, "it stops at the end"
        move_slider(opened, plane, place[axis])

    pixels = canvas(opened, "coronal")
    y, x = pixel_of(pixels, "coronal", 4.5, 11.5)
    height, width = pixels.shape[:2]
    element = find(opened, "[data-plane=coronal] canvas")
    ActionChains(opened).move_to_element_with_offset(element, x - width // 2, y - height // 2).click().perform()
    settle(opened)
    # Row 4 from the top of 20 slices is slice 15; a click leaves the plane's own slice.
    assert sliders(opened) == (15, place[1], 11)


@pytest.mark.parametrize(
    ("selector", "slices"),
    [
        (".findings li:nth-child(2) button", CONSOLIDATION_SLICES),
        (".findings li:nth-child(4) button", (3, 7, 10)),
        (".prose a.sentence", NODULE_SLICES),
        ("tbody tr:nth-child(2) button", CONSOLIDATION_SLICES),
    ],
)
def test_a_click_shows_the_place_in_all_views_with_crosshair_and_flash(opened, selector, slices):
    show_only(opened, crosshair=True)
    for name, value in zip(PLANES, (0, 0, 0), strict=True):
        move_slider(opened, name, value)
    click(opened, selector)
    assert sliders(opened) == slices
    volume = np.zeros(GEOMETRY.shape, dtype=bool)
    volume[slices] = True
    for plane in PLANES:
        assert "flash" in find(opened, f"[data-plane={plane}] .ping").get_attribute("class")
        ((row, column),) = np.argwhere(in_plane(volume, plane, slices))
        with_crosshair = canvas(opened, plane)
        click(opened, "#crosshair")
        drawn = (canvas(opened, plane) != with_crosshair).any(axis=-1)
        click(opened, "#crosshair")
        y, x = pixel_of(with_crosshair, plane, row + 0.5, column + 0.5)
        # The lines run along the whole picture, and leave the place itself free.
        assert np.bincount(np.nonzero(drawn)[0]).argmax() == pytest.approx(y, abs=1)
        assert np.bincount(np.nonzero(drawn)[1]).argmax() == pytest.approx(x, abs=1)
        assert not drawn[y - 5 : y + 6, x - 5 : x + 6].any()


def test_a_view_can_fill_the_place_of_all(opened):
    small = canvas(opened, "coronal").shape
    click(opened, "[data-plane=coronal] .enlarge")
    assert canvas(opened, "coronal").shape > small
    assert not find(opened, "[data-plane=axial]").is_displayed()
    click(opened, "[data-plane=coronal] .enlarge")
    assert canvas(opened, "coronal").shape == small and find(opened, "[data-plane=axial]").is_displayed()


def test_a_phone_shows_one_column_without_scrolling_sideways(browser, path):
    open_page(browser, path, 390, 844, mobile=True)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    left, width = browser.execute_script(
        "const r = document.querySelector('#reading').getBoundingClientRect(); return [r.left, r.width]"
    )
    assert left < 20 and width > 350
    pixels = canvas(browser, "axial")
    assert pixels.shape[1] > 600, "drawn with the screen's own pixels"
    # The banner stays when scrolled, and a finding brings its view back.
    browser.execute_script("document.querySelector('.findings').scrollIntoView()")
    settle(browser)
    assert browser.execute_script("return document.querySelector('.banner').getBoundingClientRect().top") == 0
    click(browser, ".findings button")
    place = "return document.querySelector('[data-plane=axial] canvas').getBoundingClientRect().top"
    deadline = time.monotonic() + 5
    while not 0 <= browser.execute_script(place) < 700 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert 0 <= browser.execute_script(place) < 700


def test_on_a_desktop_scan_and_report_stand_side_by_side(opened):
    viewer, reading = (find(opened, selector).rect for selector in ("#viewer", "#reading"))
    assert viewer["x"] < 30 and reading["x"] >= viewer["x"] + viewer["width"] and viewer["width"] > 700
    assert abs(viewer["y"] - reading["y"]) < 5
    assert (
        opened.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    )


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r'"sheets":\[\["[^"]{40}', '"sheets":[["AAAA', "cannot be shown"),
        (r'"means":\[\[[\d.]+', '"means":[[3.0', "does not hand out a picture's pixels"),
        (r'"rows_per_slice":\d+', '"rows_per_slice":48', "pixels instead of"),
        (r'"runs":"\w{4}', '"runs":"', "a mask has"),
        (r'id="scan-data">\{', 'id="scan-data">[', "cannot be shown"),
    ],
    ids=["jpeg", "other pixels", "sheet size", "mask", "json"],
)
def test_a_damaged_file_says_so_and_keeps_the_report(browser, tmp_path, pattern, replacement, message):
    page, num_changes = re.subn(pattern, replacement, scan_page(page_content()), count=1)
    assert num_changes == 1
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    open_page(browser, tmp_path / "page.html", state="failed")
    status = find(browser, "#status")
    assert status.is_displayed() and message in status.text and status.get_attribute("role") == "alert"
    assert "A nodule is seen" in " ".join(find(browser, ".prose").text.split())


def test_without_scripts_the_page_is_read_and_says_why_it_has_no_pictures(browser, path):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(path.as_uri())
        assert "JavaScript, which is switched off" in find(browser, ".failure").text
        assert find(browser, ".findings").is_displayed() and find(browser, "table").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
