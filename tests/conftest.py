"""Options of the test suite."""

import os
from pathlib import Path

import pytest


def pytest_configure(config):
    """Workers share the cores: with more threads than these they wait for each other most of the time."""
    if workers := getattr(config, "workerinput", {}).get("workercount"):
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of the processes that tests start, too
        import torch

        torch.set_num_threads(threads)


def pytest_addoption(parser):
    folder = Path(__file__).parent / "golden" / "data"
    parser.addoption("--slow", action="store_true", help="also run the tests that train for minutes")
    parser.addoption("--goldens", type=Path, default=folder, help="a folder of golden families (default: %(default)s)")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="trains for minutes; ask for it with --slow"))
