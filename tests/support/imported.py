"""What the fork server has imported, and with it all that it forks: see ``forked``."""

import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch.distributed.run  # noqa: F401
import transformers.models.auto  # noqa: F401
from torch._dynamo import trace_rules

import sapo_megatron.training.loop  # noqa: F401

trace_rules.get_torch_obj_rule_map()  # a table that the first forward pass of a process makes
