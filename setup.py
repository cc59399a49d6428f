"""Packages and where they lie; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lorasb", "lorasb.*"]), "lorasb.kernels"],
    package_dir={"lorasb.kernels": "kernels/fused"},
    package_data={"lorasb.kernels": ["tables/*.json"]},
)
