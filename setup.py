"""What pyproject.toml cannot say: recipes/ travels with the package, as a folder of it."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sapo_megatron*"]), "sapo_megatron.recipes"],
    package_dir={"sapo_megatron.recipes": "recipes"},
)
