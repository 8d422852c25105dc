"Package metadata, read from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {cfg['audience']}",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: GIS",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["spectralmoe", "spectralmoe.*"]),
    include_package_data=True,
    package_data={"spectralmoe": ["assets/*.js", "assets/*/*.json", "assets/*/*.md", "assets/*/*.safetensors", "tables/*.csv", "tables/*.json"]},
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("dev", "convert", "cluster", "onnx", "docs")},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
