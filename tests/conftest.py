"""What all test processes share: one server of tests/forks.py, which imports the library once for all of them."""
import json
import os

import forks
import pytest


def pytest_configure(config: pytest.Config) -> None:
    "Start the server before the workers, which inherit its address; without workers, the first test that needs it starts it."
    if config.getoption("numprocesses", None): os.environ[forks.SHARED] = json.dumps(forks.server())
