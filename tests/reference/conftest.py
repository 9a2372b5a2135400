import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """The models are too small to share: threads that wait for each other are slow on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
