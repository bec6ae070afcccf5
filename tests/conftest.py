"""What all test processes share: one server of tests/forks.py, which imports the library once for all of them."""
import gc
import json
import os
from collections.abc import Generator

import forks
import pytest


def pytest_configure(config: pytest.Config) -> None:
    "Start the server before the workers, which inherit its address; without workers, the first test that needs it starts it."
    if config.getoption("numprocesses", None): os.environ[forks.SHARED] = json.dumps(forks.server())


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    "The imports of all files make a million objects, and none of them goes: the collector need not look at them, now or in a test."
    gc.disable()
    try: return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None: gc.unfreeze() # some libraries complain of objects that are left at the end


@pytest.fixture
def without_classifier(monkeypatch):
    "A metadata classifier that learns nothing, to save time; tests/test_evaluate.py has a real one."
    from sklearn.dummy import DummyClassifier
    monkeypatch.setattr("imaginet_nb.audit.shortcuts.HistGradientBoostingClassifier", lambda **_: DummyClassifier())


@pytest.fixture
def without_figures(without_classifier, monkeypatch):
    "Reports without figures, and without that classifier; tests/test_evaluate.py has both."
    for place in ("apps.evaluate", "audit.report"): monkeypatch.setattr(f"imaginet_nb.{place}.save_figure", lambda *_: None)
