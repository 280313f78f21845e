"""The embedded model, where it has been prepared."""

import os
from pathlib import Path

import pytest

from peftserve.config import EngineConfig
from peftserve.model.prepare import find_prepared


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The prepared NF4 checkpoint in `PEFTSERVE_TEST_DATA_DIR`, else in the default data folder."""
    config = EngineConfig()
    data_dir = Path(os.environ.get("PEFTSERVE_TEST_DATA_DIR") or config.data_dir).expanduser()
    folder = find_prepared(config.model, data_dir)
    if folder is None:
        pytest.skip(f"{config.model} is not prepared in {data_dir}: run `peftserve model pull`")
    return folder
