import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for trees.py


@pytest.fixture(autouse=True)
def one_thread():
    """As in a loader's worker. More only makes tiny pictures slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
