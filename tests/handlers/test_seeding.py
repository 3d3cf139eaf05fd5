import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from tests.handlers.tiny_trainer import make_trainer
from vlm3d_ext.handlers.seeding import IterationSeed


def _dropout_network():
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))


def _train(*handlers, epochs, start_from=None):
    torch.manual_seed(3)
    network, losses = _dropout_network(), []
    trainer = make_trainer(*handlers, network=network, epochs=epochs)
    if start_from is not None:
        network.load_state_dict(start_from)

        @trainer.on(Events.STARTED)
        def _resume(engine):
            engine.state.epoch, engine.state.iteration = 1, 4

    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(float(e.state.output[0]["loss"])))
    trainer.run()
    return losses, network.state_dict()


def test_a_resumed_run_with_dropout_has_the_curve_of_an_uninterrupted_one():
    whole, _ = _train(IterationSeed(5), epochs=3)
    first, state = _train(IterationSeed(5), epochs=1)
    torch.rand(100)  # whatever else the new process draws
    rest, _ = _train(IterationSeed(5), epochs=3, start_from=state)
    assert first + rest == whole
    without_seed, _ = _train(epochs=3, start_from=state)
    assert without_seed != rest


def test_iterations_and_seeds_draw_differently_and_the_rank_counts(monkeypatch):
    drawn = {}

    def step(engine, batch):
        drawn[engine.state.iteration] = torch.rand(2).tolist()

    def run(seed):
        drawn.clear()
        engine = Engine(step)
        IterationSeed(seed).attach(engine)
        engine.run([0, 1, 2], max_epochs=2)
        return dict(drawn)

    one = run(7)
    assert len({tuple(values) for values in one.values()}) == 6 and run(7) == one
    torch.manual_seed(7 + 3)
    assert one[3] == torch.rand(2).tolist()
    assert run(8)[1] != one[1]
    monkeypatch.setattr("vlm3d_ext.handlers.seeding.idist.get_world_size", lambda: 2)
    ranks = []
    for rank in (0, 1):
        monkeypatch.setattr("vlm3d_ext.handlers.seeding.idist.get_rank", lambda rank=rank: rank)
        ranks.append(run(7))
    drawn_by_both = [tuple(values) for rank in ranks for values in rank.values()]
    assert len(set(drawn_by_both)) == 12


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        IterationSeed(-1)
