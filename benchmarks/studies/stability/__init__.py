"""Whether SAPO is steadier than other losses: ``docs/stability.md``."""
