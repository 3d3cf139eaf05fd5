import math

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch import nn

from tests.handlers.tiny_trainer import make_trainer
from vlm3d_ext.handlers.gradient_clipping import GradientClipping


class Recorder:
    """Remembers the total gradient norm that the optimizer sees, and the weights after every iteration."""

    def __init__(self):
        self.norms, self.weights, self.reported = [], [], []

    def attach(self, engine):
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.after_backward)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.after_iteration)

    def after_backward(self, engine):
        self.norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in engine.network.parameters())))
        self.reported.append(getattr(engine.state, "gradient_norm", None))

    def after_iteration(self, engine):
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in engine.network.parameters()]))


def _run(*handlers, **options):
    recorder = Recorder()
    trainer = make_trainer(*handlers, recorder, **options)
    trainer.run()
    return trainer, recorder


def test_a_step_is_never_longer_than_learning_rate_times_max_norm():
    _, free = _run()
    assert max(free.norms) > 0.5  # otherwise there would be nothing to clip
    _, clipped = _run(GradientClipping(0.05))
    assert max(clipped.norms) == pytest.approx(0.05, rel=1e-4)
    steps = [float((b - a).norm()) for a, b in zip(clipped.weights, clipped.weights[1:], strict=False)]
    assert max(steps) == pytest.approx(0.1 * 0.05, rel=1e-3)


@pytest.mark.parametrize("max_norm", [1e6, float("inf")])
def test_a_large_limit_changes_nothing_and_still_measures(max_norm):
    _, free = _run()
    measured, with_limit = _run(GradientClipping(max_norm))
    assert all(torch.equal(a, b) for a, b in zip(free.weights, with_limit.weights, strict=True))
    assert with_limit.reported == pytest.approx(free.norms, rel=1e-6)
    assert measured.state.gradient_norm == pytest.approx(free.norms[-1], rel=1e-6)
    assert measured.state.metrics["gradient_norm"] == pytest.approx(sum(free.norms[4:]) / 4, rel=1e-6)


def test_with_accumulation_only_the_sum_is_clipped():
    """Five batches in steps of 2, 2 and 1: clipping happens in iterations 2, 4 and 5, as MONAI steps there."""
    options = {"accumulation_steps": 2, "num_batches": 5, "epochs": 2}
    _, free = _run(**options)
    _, clipped = _run(GradientClipping(0.05), **options)
    stepping = [1, 3, 4, 6, 8, 9]
    assert [clipped.norms[i] for i in stepping] == pytest.approx([0.05] * 6, rel=1e-4)
    assert clipped.norms[0] == pytest.approx(free.norms[0])  # half-way the gradient is left alone
    assert clipped.reported[0] is None and clipped.reported[1] == pytest.approx(free.norms[1])
    moved = [i for i in range(1, 10) if not torch.equal(clipped.weights[i], clipped.weights[i - 1])]
    assert moved == stepping


class CpuLossScaling:
    """Puts a scaler that works on the CPU in the place of the CUDA one, which MONAI makes when the run starts."""

    def attach(self, engine):
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine):
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


SCALED = {"amp": True, "amp_kwargs": {"enabled": False}}  # scaled losses, but no autocast, which is for CUDA


def test_with_a_loss_scaler_the_true_gradient_is_clipped():
    _, plain = _run(GradientClipping(0.05))
    trainer, unclipped = _run(CpuLossScaling(), **SCALED)
    assert min(unclipped.norms) > 100 and trainer.scaler.get_scale() == 1024.0  # the gradients are really scaled
    _, scaled = _run(CpuLossScaling(), GradientClipping(0.05), **SCALED)
    assert scaled.reported == pytest.approx(plain.reported, rel=1e-5)
    assert max(scaled.norms) == pytest.approx(0.05, rel=1e-4)
    torch.testing.assert_close(scaled.weights[-1], plain.weights[-1], rtol=1e-5, atol=1e-7)


class Exploding(nn.Linear):
    def forward(self, x):
        return super().forward(x) * float("inf")


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_are_spoilt():
    trainer = make_trainer(GradientClipping(1.0), network=Exploding(3, 1))
    with pytest.raises(RuntimeError, match=r"gradient norm is nan at iteration 1 \(epoch 1\); lower the learning rate"):
        trainer.run()
    assert all(torch.isfinite(p).all() for p in trainer.network.parameters())


def test_a_loss_scaler_skips_a_gradient_that_is_not_finite():
    trainer = make_trainer(CpuLossScaling(), GradientClipping(1.0), network=Exploding(3, 1), epochs=1, **SCALED)
    before = [p.detach().clone() for p in trainer.network.parameters()]
    trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.network.parameters(), strict=True))
    assert math.isnan(trainer.state.gradient_norm) and "gradient_norm" not in trainer.state.metrics
    assert trainer.scaler.get_scale() == 1024.0 / 2**4  # halved in each of the four iterations


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan")])
def test_bad_limits(max_norm):
    with pytest.raises(ValueError, match="max_norm must be greater than 0"):
        GradientClipping(max_norm)


def test_only_trainers_have_gradients():
    with pytest.raises(TypeError, match="goes to a MONAI Trainer, got Engine"):
        GradientClipping(1.0).attach(Engine(lambda engine, batch: None))
