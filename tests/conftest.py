"""Options of the test suite."""

from pathlib import Path


def pytest_addoption(parser):
    folder = Path(__file__).parent / "golden" / "data"
    parser.addoption("--goldens", type=Path, default=folder, help="a folder of golden families (default: %(default)s)")
