"""SAPO in the Megatron pipelines of others: one file per host, each a translation into objective/.

Nothing here imports a host, or Megatron, before it is asked to.
"""

HOSTS = ("megatron_rl", "slime", "miles", "nemo_rl", "verl", "ms_swift")
"""Each is a module of this package with a ``HOST``."""
