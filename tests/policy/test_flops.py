"""The numbers of parameters that training counts its FLOPs by, beside those that plan counts."""

import pytest
from safetensors.torch import load_file

from sapo_megatron.commands.plan.step import counted
from sapo_megatron.hf.architecture import read_architecture
from sapo_megatron.hf.folder import Listed
from sapo_megatron.policy.blueprint import stages
from sapo_megatron.policy.flops import Parameters
from tests.support.families import FAMILIES, Place, can_be_made, make_model


def listing(folder):
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            yield Listed(name, tensor.dtype, tensor.shape)


@pytest.mark.parametrize("family", filter(can_be_made, FAMILIES))
def test_parameters_by_names_are_those_of_the_modules(tmp_path, family):
    make_model(family, tmp_path)
    arch = read_architecture(tmp_path)
    # Biases of routers that balance loads are no parameters, but buffers.
    tensors = [each for each in listing(tmp_path) if "correction_bias" not in each.name]
    found = Parameters.listed(arch, tensors)
    assert found == counted(arch, stages(Place(family=family).recipe, arch, 1))
    assert (found.active < found.total) == bool(arch.experts)
