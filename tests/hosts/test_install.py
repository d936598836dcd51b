"""In a host's environment, the package without extras is all that is to be installed."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("asked", PROJECT["dependencies"])
def test_the_host_has_the_core(asked):
    requirement = Requirement(asked)
    assert requirement.specifier.contains(version(requirement.name), prereleases=True)
