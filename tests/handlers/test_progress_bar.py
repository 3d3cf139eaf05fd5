import io
import re

import pytest
import torch
from ignite.engine import Engine, Events

from tests.handlers.tiny_trainer import make_trainer
from vlm3d_ext.handlers.progress_bar import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("decollate", [True, False])
def test_without_a_terminal_one_line_per_epoch_with_the_mean_loss(decollate):
    stream, losses = io.StringIO(), []
    trainer = make_trainer(ProgressBar(stream=stream), epochs=3, decollate=decollate)

    @trainer.on(Events.ITERATION_COMPLETED)
    def _collect(engine):
        output = engine.state.output[0] if decollate else engine.state.output
        losses.append(torch.as_tensor(output["loss"]).item())

    trainer.run()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    for epoch, line in enumerate(lines, start=1):
        mean = sum(losses[4 * epoch - 4 : 4 * epoch]) / 4
        assert re.fullmatch(rf"epoch {epoch}/3: 4 iterations in \d+\.\d s, loss {mean:.4g}", line)


def test_every_third_epoch_and_the_last():
    stream = io.StringIO()
    make_trainer(ProgressBar("train", stream=stream, every=3), epochs=7).run()
    assert [line.split(":")[0] for line in stream.getvalue().splitlines()] == ["train 3/7", "train 6/7", "train 7/7"]


def test_on_a_terminal_a_bar_is_drawn_and_each_epoch_leaves_a_line():
    stream = Terminal()
    make_trainer(ProgressBar(stream=stream), epochs=2).run()
    text = stream.getvalue()
    assert "0/4" in text and "\r" in text
    assert re.findall(r"epoch (\d)/2: 4 iterations", text) == ["1", "2"]


def test_an_engine_without_a_loss():
    stream = io.StringIO()
    engine = Engine(lambda engine, batch: batch)
    ProgressBar(stream=stream).attach(engine)
    engine.run([1, 2], max_epochs=1)
    assert re.fullmatch(r"iterations: 2 iterations in \d+\.\d s\n", stream.getvalue())


def test_an_error_in_the_run_is_not_hidden():
    def fail(engine, batch):
        raise KeyError("broken batch")

    engine = Engine(fail)
    ProgressBar(stream=Terminal()).attach(engine)
    with pytest.raises(KeyError, match="broken batch"):
        engine.run([1], max_epochs=1)


def test_other_ranks_are_silent(monkeypatch):
    monkeypatch.setattr("vlm3d_ext.handlers.progress_bar.idist.get_rank", lambda: 1)
    stream = io.StringIO()
    make_trainer(ProgressBar(stream=stream)).run()
    assert stream.getvalue() == ""


def test_a_bad_interval_is_refused():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        ProgressBar(every=0)
