import pytest
from pool import Pool


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """Where the processes of a job find each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINEMA_TEST_STORES", str(tmp_path_factory.mktemp("stores")))
        yield


@pytest.fixture(scope="session")
def pool(stores):
    pool = Pool()
    yield pool
    pool.close()
