import json
import subprocess
import sys

import onnxruntime
import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks import convert_to_onnx
from monai.networks.nets import AttentionUnet
from torch.utils.flop_counter import FlopCounterMode

from tests.bundles.bundle_runs import REPOSITORY, config_files
from tests.networks.tiny_localizer import DISEASES, PATCH, tiny_localizer, tiny_stages
from vlm3d_ext.engines.torch_export import export_network
from vlm3d_ext.networks.blocks import DenoisedFeatures
from vlm3d_ext.networks.nets import LesionLocalizationModule, LesionProbabilities, PlainLocalizer
from vlm3d_ext.networks.nets.lesion_localization import cut_crops
from vlm3d_ext.text.disease_set import load_disease_set

PASSES = ("shared", "per_disease")
SIZE = (8, 16, 24)
SPACING_MM = torch.tensor([[5.0, 1.0, 1.0], [2.0, 0.7, 0.7]])


def _images(size=SIZE, batch=2):
    return torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(1))


def _draw(network, *arguments, **keywords):
    with torch.no_grad():
        return network(*arguments, **keywords)["logits"]


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("size", [(1, 3, 5), (2, 4, 4), (7, 13, 18)])
def test_any_size_is_drawn(passes, size):
    network = tiny_localizer(passes=passes)
    with torch.no_grad():
        output = network(_images(size), SPACING_MM)
    assert output["probabilities"].shape == (2, DISEASES, *size)
    assert torch.isfinite(output["logits"]).all()
    assert tuple(output["masks"]) == load_disease_set("chest_ct_5").keys
    for index, mask in enumerate(output["masks"].values()):
        torch.testing.assert_close(mask, output["logits"][:, index].sigmoid())


def test_cut_crops():
    volumes = torch.arange(2 * 3 * 4 * 5).view(2, 1, 3, 4, 5)
    crops = cut_crops(volumes, torch.tensor([[[0, 0, 0], [1, 2, 3]], [[2, 3, 4], [0, 1, 0]]])[:, :, :], (1, 1, 1))
    assert crops.flatten().tolist() == [0, 20 + 10 + 3, 60 + 40 + 15 + 4, 60 + 5]
    with pytest.raises(ValueError, match=r"crop of \(2, 1, 1\) at \(2, 0, 0\) does not lie in \(3, 4, 5\)"):
        cut_crops(volumes, torch.tensor([[[2, 0, 0]], [[0, 0, 0]]]), (2, 1, 1))


@pytest.mark.parametrize("passes", PASSES)
def test_a_crop_sees_the_tokens_of_the_whole_scan(passes):
    """The same as encoding and refining the scan, then cutting image and tokens by hand."""
    network = tiny_localizer(passes=passes)
    image, size = _images((7, 16, 22)), (4, 8, 12)
    starts = [[(0, 0, 0), (4, 8, 12)], [(2, 4, 8), (2, 8, 4)]]
    with torch.no_grad():
        logits, loss = network.logits_and_denoising(image, SPACING_MM, None, torch.tensor(starts), size)
        texts = network.texts()
        features = network.refine(network.local_features(image, SPACING_MM), texts).features
        filled = torch.nn.functional.pad(image, (0, 2, 0, 0, 0, 1))
        expected = []
        for row in range(2):
            for z, y, x in starts[row]:
                part = filled[row : row + 1, :, z : z + 4, y : y + 8, x : x + 12]
                tokens = features[row : row + 1, ..., z // 2 : z // 2 + 2, y // 4 : y // 4 + 2, x // 4 : x // 4 + 3, :]
                expected.append(network.draw(part, tokens, texts))
    assert loss is None
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("passes", PASSES)
def test_the_crop_that_is_the_scan_is_drawn_as_the_scan(passes):
    network = tiny_localizer(passes=passes)
    with torch.no_grad():
        crop, _ = network.logits_and_denoising(
            _images(), SPACING_MM, None, torch.zeros(2, 1, 3, dtype=torch.int64), SIZE
        )
    torch.testing.assert_close(crop, _draw(network, _images(), SPACING_MM), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("start", "size"), [([0, 2, 0], (4, 8, 12)), ([0, 0, 0], (4, 6, 12))])
def test_crops_between_patches_are_refused(start, size):
    with pytest.raises(ValueError, match=r"crops must begin and end where patches of \(2, 4, 4\) do"):
        tiny_localizer().logits_and_denoising(_images(batch=1), None, None, torch.tensor([[start]]), size)


@pytest.mark.parametrize("passes", PASSES)
def test_a_window_as_large_as_the_scan_changes_nothing(passes):
    expected = _draw(tiny_localizer(passes=passes), _images((7, 13, 18)), SPACING_MM)
    for window in ((8, 16, 20), (64, 64, 64)):
        network = tiny_localizer(passes=passes, window_size=window)
        torch.testing.assert_close(_draw(network, _images((7, 13, 18)), SPACING_MM), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
def test_windows_begin_where_tokens_begin(overlap):
    """A drawing of the tokens' own places: wherever windows lie, each voxel must find its token."""
    network = tiny_localizer(window_size=(4, 20, 24), window_overlap=overlap)
    size = (7, 61, 50)
    grid = [-(-n // p) for n, p in zip(size, PATCH, strict=True)]
    places = torch.arange(1.0, 1 + grid[0] * grid[1] * grid[2]).view(1, *grid, 1)

    def draw_places(image, tokens, texts):
        for axis, patch in enumerate(PATCH):
            tokens = tokens.repeat_interleave(patch, axis + 1)
        return tokens.movedim(-1, 1)[:, :, : image.shape[2], : image.shape[3], : image.shape[4]]

    network.draw = draw_places
    with torch.no_grad():
        result = network.draw_windows(torch.zeros(1, 1, *size), DenoisedFeatures(places, None))
    torch.testing.assert_close(result, draw_places(torch.zeros(1, 1, *size), places, None), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("passes", PASSES)
def test_windows_agree_with_the_whole_drawing(passes):
    """A window lacks what lies beyond its border; what it draws in its middle weighs most."""
    image = _images((4, 16, 160), batch=1)
    whole = _draw(tiny_localizer(passes=passes), image)
    windows = _draw(tiny_localizer(passes=passes, window_size=(4, 16, 96), window_overlap=0.5), image)
    difference = (windows - whole).abs()
    assert difference.mean() < 0.02 * whole.std()
    # what one window alone has drawn, with half a window or more between it and the window's border
    assert difference[..., :32].max() < 1e-4 and difference[..., -16:].max() < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": "both"}, r"passes must be one of .*'per_disease'.*'both'"),
        ({"window_size": (8, 16, 18)}, r"multiples of the patch \(2, 4, 4\), got \(8, 16, 18\)"),
        ({"window_size": (0, 16, 16)}, r"multiples of the patch"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_localizer(**options)


def _with_other_text(network, disease):
    texts = network.texts().detach()
    texts[disease] = texts[disease] * -2 + 1
    network.texts = lambda: texts
    return network


def test_other_text_of_one_disease_changes_its_mask_and_through_the_trunk_all():
    before = _draw(tiny_localizer().double(), _images().double(), SPACING_MM.double())
    after = _draw(_with_other_text(tiny_localizer().double(), 2), _images().double(), SPACING_MM.double())
    change = (after - before).abs().amax((0, 2, 3, 4))
    assert change[2] > 0.01 and (change > 1e-6).all()


def test_one_pass_per_disease_hears_no_other_text():
    before = _draw(tiny_localizer(passes="per_disease"), _images(), SPACING_MM)
    after = _draw(_with_other_text(tiny_localizer(passes="per_disease"), 2), _images(), SPACING_MM)
    change = (after - before).abs().amax((0, 2, 3, 4))
    assert change[2] > 0.01 and change[[0, 1, 3, 4]].max() < 1e-6


@pytest.mark.parametrize("passes", PASSES)
def test_the_order_of_diseases_is_the_order_of_masks(passes):
    order = [3, 1, 4, 0, 2]
    network = tiny_localizer(passes=passes)
    expected = _draw(network, _images(), SPACING_MM)[:, order]
    network.text_embedder.embeddings.copy_(network.text_embedder.embeddings[order])
    torch.testing.assert_close(_draw(network, _images(), SPACING_MM), expected, rtol=0, atol=1e-5)


def test_both_passes_agree_where_there_is_one_disease(tmp_path):
    path = _one_disease(tmp_path)
    logits = []
    for passes in PASSES:
        network = LesionLocalizationModule(**tiny_stages(disease_set=path), passes=passes).eval()
        assert network.thresholds.tolist() == [0.5]
        logits.append(_draw(network, _images(), SPACING_MM))
    assert logits[0].shape[1] == 1
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"passes": "per_disease"}, {"window_size": (4, 12, 12)}])
def test_a_padded_scan_is_drawn_as_alone(options):
    network = tiny_localizer(**options)
    small, large = _images((5, 13, 10), batch=1), _images((7, 18, 21), batch=1)
    padded = torch.nn.functional.pad(small, (0, 11, 0, 5, 0, 2))
    together = _draw(network, torch.cat([padded, large]), SPACING_MM, torch.tensor([[5, 13, 10], [7, 18, 21]]))
    torch.testing.assert_close(
        together[:1, :, :5, :13, :10], _draw(network, small, SPACING_MM[:1]), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(together[1:], _draw(network, large, SPACING_MM[1:]), rtol=1e-4, atol=1e-5)
    beyond = torch.ones(7, 18, 21, dtype=torch.bool)
    beyond[:5, :13, :10] = False
    assert (together[0, :, beyond].sigmoid() < 1e-9).all()


def test_scans_of_a_batch_do_not_mix():
    network = tiny_localizer()
    together = _draw(network, _images(), SPACING_MM)
    for row in range(2):
        one = slice(row, row + 1)
        torch.testing.assert_close(together[one], _draw(network, _images()[one], SPACING_MM[one]), rtol=1e-4, atol=1e-5)


def test_spacing_is_seen():
    network = tiny_localizer()
    thick, thin = (_draw(network, _images(), torch.tensor([[z, 1.0, 1.0]] * 2)) for z in (10.0, 1.0))
    assert not torch.allclose(thick, thin, atol=1e-3)


def test_plain_localizer_draws_windows_and_crops_of_its_network():
    network = PlainLocalizer(torch.nn.Conv3d(1, DISEASES, 1), window_size=(4, 8, 8))
    with torch.no_grad():
        expected = network.network(_images())
        output = network(_images())
        crops, loss = network.logits_and_denoising(
            _images(), crop_start=torch.tensor([[[0, 4, 8]], [[4, 8, 12]]]), crop_size=(4, 8, 8)
        )
    torch.testing.assert_close(output["logits"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(crops[1], expected[1, :, 4:, 8:, 12:20], rtol=1e-4, atol=1e-5)
    assert loss is None and tuple(output["masks"]) == load_disease_set("chest_ct_5").keys


# --- exports


@pytest.fixture(scope="module", params=PASSES)
def for_export(request):
    return tiny_localizer(LesionProbabilities, passes=request.param)


def test_export_network_has_the_same_weights_and_probabilities():
    network, for_export = tiny_localizer(), tiny_localizer(LesionProbabilities)
    for_export.load_state_dict(network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(for_export(_images()), network(_images())["probabilities"])


def test_torch_export_agrees_for_any_batch(for_export, tmp_path):
    export_network(for_export, _images((6, 12, 20)), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 2, 3):
        image = _images((6, 12, 20), batch)
        with torch.no_grad():
            torch.testing.assert_close(program(image), for_export(image), rtol=1e-4, atol=1e-5)


def test_torchscript_and_onnx_agree(for_export, tmp_path):
    image = _images((6, 12, 20))
    with torch.no_grad():
        expected = for_export(image)
        script = torch.jit.trace(for_export, image)
    script.save(str(tmp_path / "model.ts"))
    other = 1 - image
    with torch.no_grad():
        torch.testing.assert_close(
            torch.jit.load(tmp_path / "model.ts")(other), for_export(other), rtol=1e-4, atol=1e-5
        )
    onnx = convert_to_onnx(for_export, (image,), use_trace=True)  # as `monai.bundle onnx_export` does
    session = onnxruntime.InferenceSession(onnx.SerializeToString())
    (result,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-3, atol=1e-4)


# --- full size


def _one_disease(folder):
    content = json.loads((REPOSITORY / "vlm3d_ext/text/disease_sets/chest_ct_5.json").read_text())
    path = folder / "one.json"
    path.write_text(json.dumps({**content, "name": "one", "diseases": content["diseases"][-1:]}))
    return str(path)


def _shipped(**options):
    """Return the network of train.json, without memory for its weights."""
    config = ConfigParser.load_config_file(config_files("localization/train")[0])
    with torch.device("meta"):
        return ConfigParser({**config, **options}).get_parsed_content("network_def").eval()


def _num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def _flops(action):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result = action()
    return counter.get_total_flops(), result


def _flops_of_stages(network):
    """Count stages 1 to 3 on a full-size scan; the encoder, which other bundles share, is left out."""
    image = torch.zeros(1, 1, 64, 512, 512, device="meta")
    with torch.no_grad():
        local = network.local_features(image)

    def stages():
        texts = network.texts()
        return network.draw_windows(image, network.refine(local, texts))

    flops, logits = _flops(stages)
    assert logits.shape == (1, network.disease_set.num_diseases, 64, 512, 512)
    return flops


def test_full_size_parameters():
    """Stage 2 about 25M, stage 3 about 20M."""
    network = _shipped()
    assert _num_parameters(network.text_embedder) == 768 * 768 + 768
    assert _num_parameters(network.denoising_transformer) == 25_811_200
    assert _num_parameters(network.unet) == 20_713_500
    assert _num_parameters(network.denoising_transformer) == pytest.approx(25e6, rel=0.05)
    assert _num_parameters(network.unet) == pytest.approx(20e6, rel=0.1)


def test_full_size_flops(tmp_path):
    """Five diseases cost little more than one, five passes five times as much; all less than AttentionUnet's tenth."""
    five = _flops_of_stages(_shipped())
    assert five / _flops_of_stages(_shipped(disease_set=_one_disease(tmp_path))) <= 1.10
    assert 4.5 < _flops_of_stages(_shipped(passes="per_disease")) / five < 5.0
    with torch.device("meta"):
        reference = AttentionUnet(3, in_channels=1, out_channels=5, channels=(64, 128, 256, 512), strides=(2, 2, 2))
    full_grid, _ = _flops(lambda: reference.eval()(torch.zeros(1, 1, 64, 512, 512, device="meta")))
    assert five / full_grid <= 0.10


FULL_SIZE = """
import resource
import sys
import torch
from monai.bundle import ConfigParser

torch.manual_seed(0)
network = ConfigParser(ConfigParser.load_config_file(sys.argv[1])).get_parsed_content("network_def").eval()
network.text_embedder.embeddings.normal_()
with torch.inference_mode():
    output = network(torch.rand(1, 1, 64, 512, 512), torch.tensor([[4.7, 0.74, 0.74]]))
assert list(output["masks"]) == list(network.disease_set.keys)
for mask in output["masks"].values():
    assert mask.shape == (1, 64, 512, 512) and mask.dtype == torch.float32
    assert 0 <= mask.min() < mask.max() <= 1, "masks must be probabilities that differ"
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_full_size_forward():
    """At most 5 GiB for encoder and localizer in float32, of which 1.5 GiB are there before the forward."""
    arguments = [sys.executable, "-c", FULL_SIZE, config_files("localization/train")[0]]
    result = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    assert float(result.stdout.split()[-1]) < 5.0
