import subprocess
import sys
import time

import pytest

from benchmarks.measuring import LoadOfOthers, PairedTimes, cpu_seconds, time_pairs


def _spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_cpu_time_is_work_and_not_waiting():
    assert cpu_seconds(lambda: time.sleep(0.2)) < 0.05
    assert 0.1 <= cpu_seconds(lambda: _spin(0.1)) < 0.2


def test_cpu_time_includes_children_that_ended():
    script = "import time\nwhile time.process_time() < 0.3: pass"
    assert cpu_seconds(lambda: subprocess.run([sys.executable, "-c", script], check=True)) >= 0.3


def test_pairs_are_interleaved_and_the_first_is_not_measured():
    calls = []
    times = time_pairs(lambda n: calls.append(("ours", n)), lambda n: calls.append(("peer", n)), repeats=5)
    assert calls[:2] == [("ours", 0), ("peer", 0)]
    assert [number for _, number in calls[2:]] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [name for name, _ in calls[2:6]] == ["ours", "peer", "peer", "ours"]
    assert len(times.ours) == len(times.peer) == 5


def test_ratio_and_spread_by_hand():
    times = PairedTimes([1.0, 2.0, 3.0, 4.0, 5.0], [2.0] * 5, 0.0)
    assert times.ratio == 1.5
    assert times.spread == pytest.approx((2.0 - 1.0) / 1.5)


def test_a_ratio_of_known_work():
    times = time_pairs(lambda _: _spin(0.02), lambda _: _spin(0.08), repeats=5)
    assert times.ratio == pytest.approx(0.25, rel=0.3)


def test_others_are_seen():
    script = "import time\nend = time.time() + 1.5\nwhile time.time() < end: pass"
    load = LoadOfOthers()
    with subprocess.Popen([sys.executable, "-c", script]):
        time.sleep(1.0)
        assert load.cores() > 0.4


@pytest.mark.parametrize(
    ("options", "message"), [({"repeats": 4}, "at least 5"), ({"clock": "sun"}, "'cpu' or 'wall'")]
)
def test_refused_settings(options, message):
    with pytest.raises(ValueError, match=message):
        time_pairs(print, print, **options)
