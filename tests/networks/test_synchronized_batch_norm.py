import ignite.distributed as idist
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vlm3d_ext.networks.layers import SynchronizedBatchNorm

CHANNELS = 3


def _batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, CHANNELS, 2, 5, 3, generator=generator) * torch.tensor([0.1, 1.0, 30.0]).view(-1, 1, 1, 1)
    return x + torch.arange(4).view(-1, 1, 1, 1, 1), torch.rand(x.shape, generator=generator)


def _network(kind):
    """Two layers, so that what is wrong in the gradient of the second shows in the first."""
    torch.manual_seed(1)
    network = nn.Sequential(
        kind(CHANNELS), nn.Conv3d(CHANNELS, CHANNELS, (1, 3, 3), padding=(0, 1, 1)), nn.LeakyReLU(), kind(CHANNELS)
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def _steps(network, x, wanted, num_steps=3):
    """Return what three steps of gradient descent give: outputs, gradients, and the state at the end."""
    outputs, gradients = [], []
    for _ in range(num_steps):
        network.zero_grad()
        x = x.detach().requires_grad_()
        output = network(x)
        (output - wanted).square().mean().backward()
        outputs.append(output.detach())
        gradients.append([x.grad, *(parameter.grad.clone() for parameter in network.parameters())])
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= 0.01 * parameter.grad
    return outputs, gradients, getattr(network, "module", network).state_dict()


def test_one_process_is_torch_batch_norm():
    x, wanted = _batch()
    expected, result = (_steps(_network(kind), x, wanted) for kind in (nn.BatchNorm3d, SynchronizedBatchNorm))
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def _rank(local_rank, rendezvous):
    """What each of two processes checks; an error here ends the parent's spawn with an error."""
    x, wanted = _batch()
    expected = _steps(_network(nn.BatchNorm3d), x, wanted)
    half = slice(2 * idist.get_rank(), 2 * idist.get_rank() + 2)
    network = DistributedDataParallel(_network(SynchronizedBatchNorm), broadcast_buffers=False)
    result = _steps(network, x[half], wanted[half])
    for step in range(3):
        torch.testing.assert_close(result[0][step], expected[0][step][half], rtol=1e-4, atol=1e-5)
        of_input, *of_weights = result[1][step]
        # each rank's loss is the mean of its half: twice the half's part of the whole batch's
        torch.testing.assert_close(of_input / 2, expected[1][step][0][half], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(of_weights, expected[1][step][1:], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(result[2], expected[2], rtol=1e-4, atol=1e-5)

    # in evaluation mode a rank may draw alone: nothing waits for the other
    if idist.get_rank() == 0:
        alone, reference = network.module.eval(), _network(nn.BatchNorm3d).eval()
        reference.load_state_dict(expected[2])
        torch.testing.assert_close(alone(x[:1]), reference(x[:1]), rtol=1e-4, atol=1e-4)
    rendezvous.put(idist.get_rank())


def test_two_processes_are_one_with_both_halves(tmp_path):
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    idist.spawn("gloo", _rank, args=(queue,), nproc_per_node=2, init_method=f"file://{tmp_path}/rendezvous")
    assert sorted([queue.get(), queue.get()]) == [0, 1]


def test_halves_alone_are_not_the_whole():
    """What the test of two processes would miss if the statistics were each rank's own."""
    x, wanted = _batch()
    whole, half = (_steps(_network(nn.BatchNorm3d), x[:n], wanted[:n])[0][0][:2] for n in (4, 2))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(half, whole, rtol=1e-2, atol=1e-2)
