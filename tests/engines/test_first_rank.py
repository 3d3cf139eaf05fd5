"""What processes say to each other; with two real ones over gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vlm3d_ext.engines.first_rank import join_ranks, on_first_rank, wait_for_ranks

PROGRAM = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from vlm3d_ext.data.rank_share import rank_and_world_size
from vlm3d_ext.engines.first_rank import join_ranks, on_first_rank, wait_for_ranks

folder, (rank, _) = Path(sys.argv[1]), rank_and_world_size()

def work(name):
    time.sleep(0.5)
    (folder / f"{name}_{rank}").touch()
    return {"by": rank}

def fail():
    raise ValueError("of its own")

def alone():
    return sorted(path.name for path in folder.iterdir())

join_ranks()
if rank == 1:
    work("early")
assert on_first_rank(alone) == ["early_1"]  # it waited for the other
assert on_first_rank(work, "done") == {"by": 0} and (folder / "done_0").exists()
assert join_ranks() and dist.get_backend() == "gloo"
if rank == 1:
    work("late")
wait_for_ranks()
assert (folder / "late_1").exists()
try:
    on_first_rank(fail)
except (ValueError, RuntimeError) as error:
    (folder / f"error_{rank}").write_text(f"{type(error).__name__}: {error}")
dist.destroy_process_group()
"""


def test_alone_there_is_nobody_to_wait_for(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    wait_for_ranks()
    assert not join_ranks() and on_first_rank(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        on_first_rank(divmod, 7, 0)


def test_one_does_it_and_all_know_what_came_of_it(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    arguments = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    processes = [subprocess.Popen(arguments, env={**environment, "RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done_0", "early_1", "error_0", "error_1", "late_1"]
    assert (tmp_path / "error_0").read_text() == "ValueError: of its own"
    expected = "RuntimeError: the first process could not do its part (ValueError); its own message says more."
    assert (tmp_path / "error_1").read_text() == expected
