"""Faults really produced: a full disk, a read-only folder, damaged files by the hundred, dead workers, Ctrl-C, two runs at once."""
import io
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image

from imaginet_nb.core import repo_root
from imaginet_nb.data.images import ImageError, decode, save

ROOT, PROGRAM = repo_root(), Path(sys.executable).with_name("imaginet")
QUIET = {**os.environ, "TQDM_DISABLE": "1"}


def start(*words, limit: int | None = None, cwd: Path = ROOT) -> subprocess.Popen:
    "The program in a process group of its own; `limit` is the largest file that it may write, in bytes."
    def restrict() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's background jobs, these tests perhaps, ignore Ctrl-C
        if limit is not None: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.Popen([PROGRAM, *map(str, words)], cwd=cwd, env=QUIET, text=True, start_new_session=True, preexec_fn=restrict,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str]:
    try: _, words = process.communicate(timeout=seconds)
    finally: process.poll() is None and os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, words


def wait_for(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def pictures(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    for i in range(6): save(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8), tmp_path/"pictures"/("real", "fake")[i % 2]/f"{i}.png")
    return tmp_path/"pictures"


# --- a disk that is full, a folder that cannot be written

def test_a_full_disk_leaves_no_half_written_table(pictures, tmp_path):
    code, words = finish(start("audit", pictures, "--out", tmp_path/"audit", limit=300))
    assert code == 1 and "File too large" in words and "Traceback" not in words
    assert all(p.stat().st_size < 300 and p.suffix != ".tmp" for p in (tmp_path/"audit").rglob("*") if p.is_file())
    assert not [p for p in (tmp_path/"audit").rglob("*.csv") if pd.read_csv(p).empty]


def test_a_full_disk_leaves_no_half_made_data_set(tmp_path):
    code, words = finish(start("data", "sandbox", "--out", tmp_path/"made", "--profile", "smoke", limit=2000))
    assert code == 1 and "File too large" in words and "Traceback" not in words
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("data", "sandbox", "--profile", "smoke", "--out", "/proc/imaginet/made"),
                                   ("audit", "pictures", "--out", "/proc/imaginet/audit")])
def test_a_folder_that_cannot_be_written_is_named(words, pictures, tmp_path):
    code, said = finish(start(*words, cwd=tmp_path))
    assert code == 1 and "/proc/imaginet" in said and "Traceback" not in said


# --- files damaged at random

SEEDS = {"PNG": {}, "JPEG": {"quality": 80}, "WEBP": {"quality": 80}, "GIF": {}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"}, "AVIF": {}}


@pytest.mark.parametrize("kind", [k for k in SEEDS if k in Image.SAVE or (Image.init(), k in Image.SAVE)[1]])
def test_a_file_damaged_anywhere_gives_pixels_or_one_kind_of_error(kind):
    noise = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(noise.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(buffer, kind, **SEEDS[kind])
    whole, refused = buffer.getvalue(), 0
    for n in range(120):
        generator = np.random.default_rng(n)
        content = bytearray(whole[:generator.integers(1, len(whole))] if n % 3 == 0 else whole)
        for place in generator.integers(0, len(content), n % 3*4): content[place] = generator.integers(256)
        if n % 5 == 0: content[generator.integers(len(content)):0] = generator.bytes(7)
        try: assert decode(bytes(content), max_pixels=1_000_000).dtype == np.uint8
        except ImageError: refused += 1
    assert 10 < refused # and not one other exception, crash or hang


# --- processes that die, are stopped, or meet each other

def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    "Processes of joblib that compute."
    try: return [p for p in psutil.Process(process.pid).children(recursive=True) if "popen_loky" in " ".join(p.cmdline())]
    except psutil.NoSuchProcess: return []


def test_a_worker_that_dies_is_reported_and_nothing_half_made_is_left(tmp_path):
    process = start("data", "sandbox", "--out", tmp_path/"made", "--profile", "smoke")
    wait_for(lambda: workers_of(process))[0].kill()
    code, words = finish(process)
    assert code == 1 and "Traceback" not in words and ("worker" in words or "process" in words), words
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_no_process_and_says_how_to_go_on(tmp_path):
    process = start("data", "sandbox", "--out", tmp_path/"made", "--profile", "smoke")
    family = [psutil.Process(process.pid), *wait_for(lambda: workers_of(process))]
    os.killpg(process.pid, signal.SIGINT)
    code, words = finish(process, 30)
    assert code == 130 and "run the same command again" in words # a worker that was just starting may complain as well
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert not list(tmp_path.iterdir())


def test_of_two_runs_at_once_in_one_folder_one_is_refused(tmp_path):
    first, second = (start("data", "sandbox", "--out", tmp_path/"made", "--profile", "smoke", "--images", 40) for _ in range(2))
    codes, words = zip(finish(first), finish(second), strict=True)
    assert sorted(codes) == [0, 1] and "another run" in "".join(words)
