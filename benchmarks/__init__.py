"""Speed and size, as ratios against what a user would take instead, measured in one run.

    python -m benchmarks                     all rows, to benchmark_run/benchmarks.md and .json
    python -m benchmarks encoder_flops ...   some of them
    python -m benchmarks --list

A row first asserts that both sides give the same result, where they can, and only then measures: counts (operations,
bytes) exactly; time as process CPU time on one thread, in interleaved pairs, each row in a process of its own. A ratio
is not printed when results differ, or when other processes kept the machine too busy to tell.
"""
