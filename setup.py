"""Installs the package from the fields of settings.ini, the one place where they are written."""
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import urlsplit

from setuptools import find_packages, setup

settings = ConfigParser(delimiters=["="])
settings.read("settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]
detectors, hub = (cfg[f"{extra}_requirements"].split() for extra in ("detectors", "hub"))
# files of the repository that the library reads; the wheel carries them in a package of their own, under the same names (`core.shipped`)
shipped = {"profiles": "*.yaml", "data": "*.csv", "reports/published": "*.csv"}
names = {folder: "imaginet_nb.shipped." + folder.replace("/", ".") for folder in shipped}
setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown", license="Apache-2.0", author=cfg["author"], author_email=cfg["author_email"],
    # a placeholder under .example leads nowhere and is not written down (`core.published_address`)
    project_urls={} if urlsplit(cfg["git_url"]).hostname.endswith("example") else {"Source": cfg["git_url"]},
    python_requires=f">={cfg['min_python']}",
    classifiers=[f"Programming Language :: Python :: {version}" for version in cfg["pythons"].split()],
    packages=[*find_packages(include=["imaginet_nb*"]), *names.values()],
    package_dir={name: folder for folder, name in names.items()},
    package_data={names[folder]: [pattern] for folder, pattern in shipped.items()} | {"imaginet_nb.reporting": ["templates/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={"detectors": detectors, "hub": hub, "heic": cfg["heic_requirements"].split(),
                    "croissant": cfg["croissant_requirements"].split(), "provenance": cfg["provenance_requirements"].split(),
                    "ray": cfg["ray_requirements"].split(), "dev": [*cfg["dev_requirements"].split(), *detectors, *hub]},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
