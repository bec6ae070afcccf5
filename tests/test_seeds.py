"""`make reproduce SEEDS=2`: what is planned, without training anything. The table itself is tested in its notebook."""
import os
import re
import subprocess
from pathlib import Path

import pytest
from forks import server
from typer.testing import CliRunner

from imaginet_nb.apps.cli import app
from imaginet_nb.core import repo_root

ROOT = repo_root()


def planned(profile: Path, *config: str) -> dict[str, int]:
    "Notebooks that a run of a new profile would execute, and how often."
    words = ["snakemake", "--cores", "1", "--dry-run", "--quiet", "rules", "--nolock", "--config", f"profile={profile}", *config]
    result = subprocess.run(words, cwd=ROOT, env={**os.environ, **server()}, capture_output=True, text=True)
    told = result.stdout + result.stderr
    assert result.returncode == 0, told
    return {name: int(n) for name, n in re.findall(r"^(p\d\d_\w+) +(\d+)$", told, flags=re.M)}


@pytest.fixture
def profile(tmp_path):
    path = tmp_path/"never-run.yaml"
    path.write_text((ROOT/"profiles"/"smoke.yaml").read_text().replace("name: smoke", "name: never-run"))
    return path


def test_seeds_add_one_training_each_and_one_table_to_the_default_run(profile):
    default, sweep = planned(profile), planned(profile, "seeds=2")
    assert "p30_pretrain" in default and not {"p49_seed", "p64_seeds"} & set(default)
    assert sweep == default | {"p49_seed": 2, "p64_seeds": 1}


def test_one_seed_has_no_spread():
    result = CliRunner().invoke(app, ["reproduce", "--profile", "smoke", "--seeds", "1"])
    assert result.exit_code == 2 and "two seeds" in result.output
