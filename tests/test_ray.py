"""`imaginet predict --engine ray` with two actors on the CPU: the local rows, though an actor is killed, or the run was stopped."""
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from network_guard import build_guard, noted
from typer.testing import CliRunner

from imaginet_nb.apps.cli import app
from imaginet_nb.apps.predict import read_scores
from imaginet_nb.apps.ray_engine import parts_of
from imaginet_nb.data.images import save

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0" # read at import: a cluster of one machine, on the loopback
ray = pytest.importorskip("ray")

DETECTOR = """
import os, signal, time
class Meter:
    name, input_size = "Meter", 16
    def score(self, images):
        if (images == 77).all() and os.path.exists("kill"):
            os.unlink("kill")
            os.kill(os.getpid(), signal.SIGKILL)
        if os.path.exists("slow"): time.sleep(0.5)
        return images.float().mean((1, 2, 3)) - 128
"""
PICTURES = 30
# what Ray's server asks for when it starts, usage statistics or not: is this machine in a cloud?
OF_A_CLOUD = {"connect 169.254.169.254", "getaddrinfo metadata.google.internal"}


def predict(*words) -> str:
    result = CliRunner().invoke(app, ["predict", *map(str, words), "--detector", "ray_meter:Meter", "--no-views", "--device", "cpu"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return f"{result.exit_code} {result.output}"


def rows(out: str | Path) -> list[dict]:
    return sorted((row for part in parts_of(str(out)) for row in read_scores(part)), key=lambda row: row["path"])


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[Path | None]:
    "What all processes that Ray starts try to reach is refused and noted in this file; None where there is no guard."
    folder = tmp_path_factory.mktemp("guard")
    guard, log = build_guard(folder), folder/"network.log"
    with pytest.MonkeyPatch.context() as environment:
        if guard: environment.setenv("LD_PRELOAD", str(guard))
        environment.setenv("NETWORK_LOG", str(log))
        yield log if guard else None


@pytest.fixture(scope="module")
def here(tmp_path_factory, guarded):
    "Pictures, one of them corrupt, in ten row groups of a list; a cluster of two cores."
    folder, before = tmp_path_factory.mktemp("ray"), Path.cwd()
    os.chdir(folder)
    (folder/"ray_meter.py").write_text(DETECTOR)
    for k in range(PICTURES): save(np.full((20, 20, 3), 70 + k, np.uint8), folder/"set"/f"{k:02d}.png")
    (folder/"set"/"03.png").write_bytes(b"no picture")
    pd.DataFrame({"path": [f"set/{k:02d}.png" for k in range(PICTURES)]}).to_parquet("list.parquet", row_group_size=3)
    os.environ["RAY_worker_niceness"] = "0" # otherwise the other tests leave Ray's processes no core
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=80_000_000)
    yield folder
    ray.shutdown()
    os.chdir(before)


@pytest.fixture(scope="module")
def local(here) -> list[dict]:
    predict("set", "--out", "local.csv")
    return sorted(read_scores("local.csv"), key=lambda row: row["path"])


@pytest.fixture(scope="module")
def whole(here) -> str:
    "What the command says of a run in which an actor is killed, which leaves `parts`."
    (here/"kill").touch()
    return predict("list.parquet", "--engine", "ray", "--out", "parts")


def test_ray_gives_the_rows_of_the_local_engine_and_outlives_an_actor(here, local, whole):
    assert whole.startswith("0 ") and f"{PICTURES - 1} scored" in whole and "1 with an error" in whole, whole
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


@pytest.fixture(scope="module")
def tars(here) -> str:
    "Ten WebDataset tars at an address."
    (here/"tars").mkdir()
    for k in range(10):
        with tarfile.open(here/"tars"/f"{k}.tar", "w") as archive:
            for path in sorted((here/"set").iterdir())[3*k:3*k + 3]: archive.add(path, path.name)
    return f"file://{here}/tars"


def killed(words: list[str], out: str) -> None:
    "The run as `kill -9` leaves it after two units: a process of its own on the same cluster."
    program = [Path(sys.executable).with_name("imaginet"), "predict", *words, "--out", out, "--detector", "ray_meter:Meter", "--no-views",
               "--device", "cpu", "--address", ray.get_runtime_context().gcs_address]
    process, end = subprocess.Popen(program, stderr=subprocess.DEVNULL), time.monotonic() + 180
    while len(parts_of(out)) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < end: time.sleep(0.1) # until Ray has ended the actors


def test_a_driver_that_is_killed_and_started_again_scores_only_what_has_no_part(here, local, tars):
    "What such a run leaves: some parts, and perhaps a temporary file."
    out, words = "cut", [f"{tars}/*.tar", "--engine", "ray"]
    (here/"slow").touch()
    killed(words, out)
    (here/"slow").unlink()
    (here/out/".part-0.0a1b2c3d.parquet").write_bytes(b"PAR1")
    kept = {part: os.stat(part).st_mtime_ns for part in parts_of(out)}
    missing = PICTURES - len(rows(out))
    assert 2 <= len(kept) < 10, "the run was over, or had not begun, when it was stopped"
    output = predict(*words, "--out", out, "--resume")
    done = sum(map(int, re.search(r"(\d+) scored in this run.*; (\d+) with an error", output).groups()))
    assert output.startswith("0 ") and done == missing, output
    assert {part: os.stat(part).st_mtime_ns for part in kept} == kept
    tar = re.compile(rf"{re.escape(tars)}/\d\.tar/")
    def renamed(row): return {key: tar.sub("set/", value) if isinstance(value, str) else value for key, value in row.items()}
    assert sorted(map(renamed, rows(out)), key=lambda row: row["path"]) == local


def test_neither_ray_nor_its_actors_send_anything(here, guarded, whole):
    "The last of these tests, so that what a library sends after a while is noted, too."
    if guarded is None: pytest.skip("the guard needs Linux and a C compiler")
    probe = ray.remote(lambda: subprocess.run([sys.executable, "-c", "import socket; socket.create_connection(('192.0.2.1', 9))"],
                                              stderr=subprocess.DEVNULL).returncode)
    assert ray.get(probe.remote()) == 1
    assert set(noted(guarded)) <= {"connect 192.0.2.1"} | OF_A_CLOUD and "connect 192.0.2.1" in noted(guarded)
