import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny():
    """A configuration that trains in a second or two."""
    return {
        "model": "crossformer_tiny",
        "overrides": {"dim": 16, "depths": [1, 1, 1, 1], "heads": [1, 1, 2, 2]},
        "data": "digits",
        "limit": 100,
        "epochs": 3,
        "batch_size": 25,
        "drop_path_rate": 0.2,  # draws random numbers
        "threads": 1,
        "accelerator": "cpu",
    }


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """A finished run, for tests that only read it."""
    from vertebra.train import Config, fit

    return fit(Config(**tiny), tmp_path_factory.mktemp("runs") / "run")
