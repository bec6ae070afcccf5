#!/usr/bin/env python3
"""Fetch the wheels that `tools/gpu_run.sh` installs on a machine that reaches no registry.

    python tools/gpu_wheels.py .whl --has packages.txt

The other machine: Linux on x86-64, Python 3.12, with torch and torchvision. Versions are those of `requirements.lock`.
`--has` is the output of `pip list --format=freeze` there (or one name per line): what it lists is not fetched.
"""
import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from configparser import ConfigParser
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TARGET = {"python_version": "3.12", "python_full_version": "3.12.3", "implementation_name": "cpython",
          "platform_python_implementation": "CPython", "os_name": "posix", "sys_platform": "linux", "platform_system": "Linux",
          "platform_machine": "x86_64"}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += [f"manylinux{year}_x86_64" for year in (2014, 2010, 1)]
# beside the library's own requirements: `imaginet reproduce` runs Snakemake, the benchmark compares with HDF5
ROOTS = ["snakemake", "h5py"]
# with torch, or imported by nothing that the pipeline and the benchmark run
LEFT_OUT = re.compile("torch|torchvision|triton|nvidia-.*|cuda-.*|pyarrow|onnxruntime|debugpy|pulp")


def locked() -> dict[str, str]:
    "Version by name, of all packages that `requirements.lock` has for the other machine."
    lines = [line for line in (ROOT/"requirements.lock").read_text().splitlines() if line and not line.startswith("#")]
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): str(r.specifier)[2:] for r in found if not r.marker or r.marker.evaluate(TARGET)}


def needs(wheel: Path, extras: frozenset[str]) -> list[Requirement]:
    "What the metadata of a wheel asks for on the other machine, with some of its extras."
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        lines = HeaderParser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    found = [Requirement(line) for line in lines]
    return [r for r in found if not r.marker or any(r.marker.evaluate({**TARGET, "extra": extra}) for extra in ("", *extras))]


def fetch(name: str, version: str, folder: Path) -> Path:
    "The wheel of one package; built here where there is only its source, if it has no compiled part."
    wheels = [path for path in folder.glob(f"*-{version}-*.whl") if canonicalize_name(path.name.split("-")[0]) == name]
    if wheels: return wheels[0]
    pip = [sys.executable, "-m", "pip"]
    with tempfile.TemporaryDirectory() as temporary:
        words = ["--quiet", "--no-deps", f"{name}=={version}"]
        platforms = [f"--platform={platform}" for platform in PLATFORMS]
        here = ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp", *platforms, "--dest", temporary]
        done = subprocess.run([*pip, "download", *here, *words], capture_output=True, text=True)
        if done.returncode: done = subprocess.run([*pip, "wheel", "--wheel-dir", temporary, *words], capture_output=True, text=True)
        if done.returncode: raise SystemExit(f"{name}=={version}: no wheel, and it cannot be built here:\n{done.stderr[-1000:]}")
        made = next(Path(temporary).glob("*.whl"))
        if not made.name.endswith("any.whl") and "manylinux" not in made.name:
            raise SystemExit(f"{made.name}: built for this machine alone; add {name} to what the other machine has, or leave it out")
        return Path(shutil.move(made, folder/made.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the wheels go; those of an earlier call stay if they still fit")
    parser.add_argument("--has", type=Path, help="packages that the other machine has, one per line; versions after == are ignored")
    words = parser.parse_args()
    words.folder.mkdir(parents=True, exist_ok=True)
    has = {canonicalize_name(re.split(r"[=\s@]", line)[0]) for line in words.has.read_text().splitlines()} if words.has else set()
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT/"settings.ini", encoding="utf-8")
    todo = [Requirement(text) for text in [*settings["DEFAULT"]["requirements"].split(), *ROOTS]]
    versions, wheels, seen = locked(), {}, set()
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen or name in has or LEFT_OUT.fullmatch(name): continue
        seen.add((name, extras))
        if name not in versions: raise SystemExit(f"{name}: not in requirements.lock")
        if name not in wheels: wheels[name] = fetch(name, versions[name], words.folder)
        todo += needs(wheels[name], extras)
    for old in set(words.folder.glob("*.whl")) - set(wheels.values()): old.unlink() # two versions of one package stop pip
    for path in sorted(wheels.values(), key=lambda path: -path.stat().st_size): print(f"{path.stat().st_size/1e6:6.2f} MB  {path.name}")
    print(f"{sum(path.stat().st_size for path in wheels.values())/1e6:6.2f} MB  in {len(wheels)} wheels")


if __name__ == "__main__": main()
