import pytest
from pool import Pool


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("KINEMA_TEST_STORES", str(tmp_path_factory.mktemp("stores")))
    pool = Pool()
    yield pool
    pool.close()
    patch.undo()
