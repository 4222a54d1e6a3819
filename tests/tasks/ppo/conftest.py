from __future__ import annotations

import pytest

from tests.tasks.ppo.toy import Folders, make_folders


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("ppo"))
