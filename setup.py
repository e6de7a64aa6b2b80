"""Packaging: everything is read from settings.ini, so that versions stand in one place."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="MIT",
    keywords=cfg["keywords"].split(),
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=["daisy", "daisy.*"]),
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), "parquet": ["pyarrow>=14"], "zst": ["zstandard>=0.22"], "tensorboard": ["tensorboard>=2.14"], "flash": ["flash-attn-4[cu13]>=4.0.0b36"], "browser": ["playwright>=1.40"],
                    "hf": ["transformers>=5", "safetensors>=0.4"], "lm-eval": ["lm-eval>=0.4.9"]},
    entry_points={
        "nbdev": ["daisy=daisy._modidx:d"],
        "console_scripts": [
            "daisy-train=daisy.config:run_command",
            "daisy-sample=daisy.config:run_command",
            "daisy-bench=daisy.config:run_command",
            "daisy-build-shards=daisy.config:run_command",
            "daisy-build-sft-shards=daisy.config:run_command",
            "daisy-evaluate=daisy.config:run_command",
            "daisy-export=daisy.config:run_command",
            "daisy-plot=daisy.config:run_command",
            "daisy-run-lessons=daisy.lesson:main",
        ],
    },
)
