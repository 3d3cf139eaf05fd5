import pytest

pytest.register_assert_rewrite("tests.bundles.bundle_runs")  # so that its checks say what differs
