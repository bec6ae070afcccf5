"""What all test processes share: one server of tests/forks.py, which imports the library once for all of them."""
import json
import os

import forks
import pytest


def pytest_configure(config: pytest.Config) -> None:
    "Start the server before the workers, which inherit its address; without workers, the first test that needs it starts it."
    if config.getoption("numprocesses", None): os.environ[forks.SHARED] = json.dumps(forks.server())


@pytest.fixture
def without_classifier(monkeypatch):
    "A metadata classifier that learns nothing, to save time; tests/test_evaluate.py has a real one."
    from sklearn.dummy import DummyClassifier
    monkeypatch.setattr("imaginet_nb.audit.shortcuts.HistGradientBoostingClassifier", lambda **_: DummyClassifier())


@pytest.fixture
def without_figures(without_classifier, monkeypatch):
    "Reports without figures, and without that classifier; tests/test_evaluate.py has both."
    for place in ("apps.evaluate", "audit.report"): monkeypatch.setattr(f"imaginet_nb.{place}.save_figure", lambda *_: None)
