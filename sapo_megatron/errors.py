"""What a user sees when something is wrong."""


class UserError(ValueError):
    """The user's input is wrong: what, expected, got, how to fix it; exit status 2."""


class RunFailed(RuntimeError):
    """The work itself failed (a diverged run, a plan that does not fit); exit status 1."""
