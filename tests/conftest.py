import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(scope="module")
def one_thread():
    """Tiny models are faster without threads that wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    """The slowest file first: two processes take a file each, and what comes last would run alone."""
    items.sort(key=lambda item: item.path.name != "test_slurm.py")
