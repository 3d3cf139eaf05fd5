import pytest
import torch
from ignite.engine import Engine, Events

from vlm3d_ext.handlers import OutOfMemoryAdvice
from vlm3d_ext.handlers.out_of_memory_advice import is_out_of_memory

KNOBS = {"batch_size": 8, "max_report_tokens": 512, "gradient_checkpointing": False}


def engine_that_raises(error, *handlers):
    def process(engine, batch):
        raise error

    engine = Engine(process)
    for handler in handlers:
        handler.attach(engine)
    return engine


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")],
)
def test_an_out_of_memory_error_says_what_uses_less(error):
    with pytest.raises(type(error)) as raised:
        engine_that_raises(error, OutOfMemoryAdvice(KNOBS)).run([0])
    (note,) = raised.value.__notes__
    for knob in ("--batch_size (now 8)", "--max_report_tokens (now 512)", "--gradient_checkpointing (now False)"):
        assert knob in note


def test_other_errors_go_on_as_they_are():
    with pytest.raises(ValueError, match="something else") as raised:
        engine_that_raises(ValueError("something else"), OutOfMemoryAdvice(KNOBS)).run([0])
    assert not hasattr(raised.value, "__notes__")


def test_handlers_after_it_still_see_the_error():
    seen = []

    class Tracker:
        def attach(self, engine):
            engine.add_event_handler(Events.EXCEPTION_RAISED, self)

        def __call__(self, engine, error):
            seen.append(error)
            raise error

    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        engine_that_raises(error, OutOfMemoryAdvice(KNOBS), Tracker()).run([0])
    assert seen and all(one is error for one in seen) and len(error.__notes__) == 1


def test_the_allocator_of_this_machine_is_known():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
