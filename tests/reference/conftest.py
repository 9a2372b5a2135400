import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The models are too small to share: threads that wait for each other are slow on a busy machine."""
    torch.set_num_threads(1)
