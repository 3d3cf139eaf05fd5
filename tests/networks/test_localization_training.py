import ignite.distributed as idist
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.networks.tiny_localizer import DISEASES, tiny_localizer
from vlm3d_ext.data.lesion_cases import UNKNOWN
from vlm3d_ext.losses import PartialDiceCrossEntropy
from vlm3d_ext.networks.layers import SynchronizedBatchNorm
from vlm3d_ext.networks.nets import LocalizationTraining, PlainLocalizer

CROP = (4, 8, 8)
UNUSED = ("mask_token", "region_classifier", "region_attention", "region_norm", "structure_encoder")


def _training(train_encoder=False, **options):
    return LocalizationTraining(tiny_localizer(**options), PartialDiceCrossEntropy(), train_encoder).train()


def _batch(num=2):
    """Scans whose bright voxels are lesions of the first disease, the others absent or unknown; two crops each."""
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(num, 1, 8, 16, 12, generator=generator)
    target = torch.zeros(num, DISEASES, 8, 16, 12, dtype=torch.uint8)
    target[:, 0] = image[:, 0] > 0.7
    target[:, 3] = UNKNOWN
    starts = torch.tensor([[[0, 0, 0], [4, 8, 4]], [[2, 4, 0], [4, 0, 4]]]).repeat(num // 2, 1, 1)
    crops = [
        [target[row, :, z : z + 4, y : y + 8, x : x + 8] for z, y, x in starts[row].tolist()] for row in range(num)
    ]
    return {
        "image": image,
        "target": torch.stack([torch.stack(row) for row in crops]),
        "spacing_mm": torch.tensor([[5.0, 1.0, 1.0], [2.0, 0.7, 0.7]]).repeat(num // 2, 1),
        "crop_start": starts,
    }, target


def _total(output):
    return output["losses"]["masks"] + 0.1 * output["losses"]["denoising"]


def test_losses_are_those_of_the_crops():
    training = _training()
    training.eval()
    batch, target = _batch()
    with torch.no_grad():
        output = training(**batch)
        logits, _ = training.network.logits_and_denoising(
            batch["image"], batch["spacing_mm"], None, batch["crop_start"], CROP
        )
    assert output["logits"].shape == output["target"].shape == (4, DISEASES, *CROP)
    torch.testing.assert_close(output["logits"], logits)
    torch.testing.assert_close(output["probabilities"], logits.sigmoid())
    assert torch.equal(output["target"][1], target[0, :, 4:, 8:, 4:])
    assert torch.equal(output["target"][2], target[1, :, 2:6, 4:12, :8])
    by_crop = [training.loss(logits[row, None], output["target"][row, None]) for row in range(4)]
    torch.testing.assert_close(output["losses"]["masks"], torch.stack(by_crop).mean())
    assert output["losses"]["denoising"] == 0


def test_whole_scans_are_measured_as_they_are_drawn():
    training = _training()
    training.eval()
    batch, target = _batch()
    with torch.no_grad():
        output = training(batch["image"], target, batch["spacing_mm"])
        drawn = training.network(batch["image"], batch["spacing_mm"])
    torch.testing.assert_close(output["probabilities"], drawn["probabilities"])
    torch.testing.assert_close(output["losses"]["masks"], training.loss(drawn["logits"], target))


def test_what_is_unknown_is_not_learnt():
    """Disease 3 is known nowhere: the weights that make its head from its text hear nothing of its logits."""
    training = _training()
    output = training(**_batch()[0])
    output["logits"].retain_grad()
    output["losses"]["masks"].backward()
    gradient = output["logits"].grad.abs().amax((0, 2, 3, 4))
    assert gradient[3] == 0 and (gradient[[0, 1, 2, 4]] > 0).all()


def test_noise_is_undone_in_training_only():
    training = _training(max_noise=0.5)
    assert training(**_batch()[0])["losses"]["denoising"] > 0
    assert training.eval()(**_batch()[0])["losses"]["denoising"] == 0


@pytest.mark.parametrize("passes", ["shared", "per_disease"])
@pytest.mark.parametrize("train_encoder", [False, True])
@pytest.mark.parametrize("max_noise", [0.0, 0.5])
def test_a_gradient_reaches_every_trainable_weight(train_encoder, max_noise, passes):
    """Data-parallel training would wait for those it does not reach."""
    training = _training(train_encoder, max_noise=max_noise, passes=passes)
    _total(training(**_batch()[0])).backward()
    before_norms = {
        f"network.unet.{name[: -len('1')]}0.bias"
        for name, module in training.network.unet.named_modules()
        if isinstance(module, SynchronizedBatchNorm)  # takes away what a bias before it adds
    }
    for name, parameter in training.named_parameters():
        if not parameter.requires_grad:
            frozen_encoder = name.startswith("network.encoder.") and (not train_encoder or name.split(".")[2] in UNUSED)
            assert frozen_encoder or (max_noise == 0 and ".reconstruction." in name), name
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        if name not in before_norms:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("train_encoder", [False, True])
def test_a_step_changes_the_encoder_only_if_it_is_to_learn(train_encoder):
    training = _training(train_encoder, max_noise=0.5)
    assert training.network.unet.training and training.network.encoder.training == train_encoder
    before = {name: value.clone() for name, value in training.network.state_dict().items()}
    optimizer = torch.optim.AdamW(training.parameters(), lr=1e-2, weight_decay=0.1)
    _total(training(**_batch()[0])).backward()
    optimizer.step()
    changed = {name for name, value in training.network.state_dict().items() if not torch.equal(value, before[name])}
    of_encoder = {name for name in changed if name.startswith("encoder.")}
    trunk = {name for name, _ in training.network.encoder.named_parameters() if name.split(".")[0] not in UNUSED}
    assert of_encoder == ({f"encoder.{name}" for name in trunk} if train_encoder else set())
    assert "unet.head.controller.0.weight" in changed and "text_embedder.embeddings" not in changed


def test_loss_falls_and_the_lesions_are_found():
    training = _training(max_noise=0.2)
    batch, _ = _batch()
    optimizer = torch.optim.Adam([p for p in training.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        torch.manual_seed(len(losses))
        loss = _total(training(**batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    training.eval()
    with torch.no_grad():
        probabilities = training(**batch)["probabilities"]
    truth = batch["target"].flatten(0, 1)[:, 0] == 1
    assert probabilities[:, 0][truth].mean() > 0.5 + probabilities[:, 0][~truth].mean()


def test_a_plain_network_is_trained_alike():
    network = PlainLocalizer(nn.Conv3d(1, DISEASES, 3, padding=1))
    training = LocalizationTraining(network, PartialDiceCrossEntropy()).train()
    output = training(**_batch()[0])
    _total(output).backward()
    assert output["logits"].shape == (4, DISEASES, *CROP)
    assert network.network.weight.grad[0].abs().max() > 0
    assert network.network.weight.grad[3].abs().max() == 0  # unknown


def _steps(training, batch):
    """Return the losses of two steps of gradient descent, and the weights that come of them."""
    optimizer = torch.optim.SGD([p for p in training.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(2):
        loss = _total(training(**batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, getattr(training, "module", training).network.state_dict()


def _rank(local_rank, start, expected, rendezvous):
    """What each of two processes checks; an error here ends the parent's spawn with an error."""
    batch, _ = _batch(4)
    half = slice(2 * idist.get_rank(), 2 * idist.get_rank() + 2)
    for train_encoder, (whole_losses, whole) in expected.items():
        training = _training(train_encoder)
        training.network.load_state_dict(start)
        training = DistributedDataParallel(training, broadcast_buffers=False)
        losses, weights = _steps(training, {name: value[half] for name, value in batch.items()})
        both = idist.all_reduce(torch.tensor(losses)) / 2
        torch.testing.assert_close(both, torch.tensor(whole_losses), rtol=1e-4, atol=1e-5)
        assert weights.keys() == whole.keys()
        for name, value in whole.items():
            value, begin, found = (part.double() for part in (value, start[name], weights[name]))
            assert (found - value).norm() <= 1e-3 * (value - begin).norm() + 1e-6 * value.norm(), name
    rendezvous.put(idist.get_rank())


def test_two_processes_are_one_with_both_batches(tmp_path):
    """Losses, weights and running statistics, with the encoder frozen and learning."""
    # here and not in the ranks, where the normalisation sums over both of them
    start = _training().network.state_dict()
    expected = {train_encoder: _steps(_training(train_encoder), _batch(4)[0]) for train_encoder in (False, True)}
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    arguments = (start, expected, queue)
    idist.spawn("gloo", _rank, args=arguments, nproc_per_node=2, init_method=f"file://{tmp_path}/rendezvous")
    assert sorted([queue.get(), queue.get()]) == [0, 1]
