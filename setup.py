"""What pyproject.toml cannot say: recipes/ travels with the package, as a folder of it."""

from setuptools import find_packages, setup

# Of its folders those that Python could import want to be named; the others are data of these.
RECIPES = ["sapo_megatron.recipes", "sapo_megatron.recipes.base", "sapo_megatron.recipes.models"]

setup(
    packages=find_packages(include=["sapo_megatron*"]) + RECIPES,
    package_dir={"sapo_megatron.recipes": "recipes"},
)
