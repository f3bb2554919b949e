"""The two ways a user meets a failure: what was asked cannot be done, or the work itself failed."""


class RequestError(ValueError):
    """What was asked is wrong (a recipe, a file, an argument); the command line exits with status 2."""


class WorkError(RuntimeError):
    """The work was well asked and failed on the way; the command line exits with status 1."""
