"""`imaginet predict --engine ray` with two actors on the CPU: the local rows, though an actor or the driver is killed."""
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from imaginet_nb.apps.cli import app
from imaginet_nb.apps.predict import read_scores
from imaginet_nb.apps.ray_engine import parts_of
from imaginet_nb.data.images import save

ray = pytest.importorskip("ray")

DETECTOR = """
import os, signal, time
class Meter:
    name, input_size = "Meter", 16
    def score(self, images):
        time.sleep(float(os.environ.get("SLOW", 0)))
        if (images == 77).all() and os.path.exists("kill"):
            os.unlink("kill")
            os.kill(os.getpid(), signal.SIGKILL)
        return images.float().mean((1, 2, 3)) - 128
"""
PICTURES = 30


def predict(*words) -> str:
    result = CliRunner().invoke(app, ["predict", *map(str, words), "--detector", "ray_meter:Meter", "--no-views", "--device", "cpu"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return f"{result.exit_code} {result.output}"


def rows(out: str | Path) -> list[dict]:
    return sorted((row for part in parts_of(str(out)) for row in read_scores(part)), key=lambda row: row["path"])


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "Pictures, one of them corrupt, in ten row groups of a list; a cluster of two cores."
    folder, before = tmp_path_factory.mktemp("ray"), Path.cwd()
    os.chdir(folder)
    (folder/"ray_meter.py").write_text(DETECTOR)
    for k in range(PICTURES): save(np.full((20, 20, 3), 70 + k, np.uint8), folder/"set"/f"{k:02d}.png")
    (folder/"set"/"03.png").write_bytes(b"no picture")
    pd.DataFrame({"path": [f"set/{k:02d}.png" for k in range(PICTURES)]}).to_parquet("list.parquet", row_group_size=3)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=80_000_000)
    yield folder
    ray.shutdown()
    os.chdir(before)


@pytest.fixture(scope="module")
def local(here) -> list[dict]:
    predict("set", "--out", "local.csv")
    return sorted(read_scores("local.csv"), key=lambda row: row["path"])


def test_ray_gives_the_rows_of_the_local_engine_and_outlives_an_actor(here, local):
    (here/"kill").touch()
    output = predict("list.parquet", "--engine", "ray", "--out", "parts")
    assert output.startswith("0 ") and f"{PICTURES - 1} scored" in output and "1 with an error" in output, output
    assert not (here/"kill").exists(), "no actor was killed"
    assert rows("parts") == local and len(parts_of("parts")) == 10
    again = predict("list.parquet", "--engine", "ray", "--out", "parts")
    assert again.startswith("1 ") and "--resume keeps them" in again
    assert "parts: 0 scored in this run; 0 with an error" in predict("list.parquet", "--engine", "ray", "--out", "parts", "--resume")


def test_what_ray_does_not_do_is_said_before_it_starts(here):
    for words, told in ((["set", "set"], "one source"), (["set", "--html", "a.html"], "--html"),
                        (["set", "--out", "a.csv"], "name a folder"), (["set/none*.png"], "set/none*.png: no such file")):
        output = predict(*words, "--engine", "ray", *([] if "--out" in words else ["--out", "other"]))
        assert output.startswith("1 ") and told in output, output
    assert predict("set", "--engine", "spark").startswith("2 ")


def test_a_driver_that_is_killed_and_started_again_scores_only_what_is_missing(here, local):
    program = textwrap.dedent("""
        import sys, ray
        from imaginet_nb.apps.cli import main
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=80_000_000)
        sys.argv = ["imaginet", "predict", "list.parquet", "--engine", "ray", "--out", "cut", "--detector", "ray_meter:Meter",
                    "--no-views", "--device", "cpu"]
        main()""")
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "SLOW": "0.4"}, start_new_session=True)
    end = time.monotonic() + 120
    while not parts_of("cut"):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(3) # its cluster ends with it
    kept = {part: os.stat(part).st_mtime_ns for part in parts_of("cut")}
    assert 1 <= len(kept) < 10
    missing = PICTURES - sum(1 for part in kept for _ in read_scores(part))
    output = predict("list.parquet", "--engine", "ray", "--out", "cut", "--resume")
    done = sum(map(int, re.search(r"(\d+) scored in this run.*; (\d+) with an error", output).groups()))
    assert output.startswith("0 ") and done == missing, output
    assert rows("cut") == local and {part: os.stat(part).st_mtime_ns for part in kept} == kept
