"""Where the releases of megatron-core that this package runs on (0.16 to 0.19) differ.

Each difference is told by what the installed release has, not by its number: distributors carry
patches from later releases.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP


def grouped_mlp(linear: type) -> tuple[type, MLPSubmodules] | Callable[..., Any]:
    """What ``BackendSpecProvider.grouped_mlp_modules`` answers for experts made of ``linear``.

    Once a module and its submodules, which the caller builds; now their builder.
    """
    submodules = MLPSubmodules(linear_fc1=linear, linear_fc2=linear)
    asked = inspect.signature(BackendSpecProvider.grouped_mlp_modules).parameters
    if "moe_use_legacy_grouped_gemm" in asked:
        return TEGroupedMLP, submodules
    return functools.partial(TEGroupedMLP, submodules=submodules)
