"""The one error of the package: what must hold, what came, what to do."""


class GenAttnError(ValueError):
    """Raised for every request that cannot be served, before work starts."""


class RunFailed(GenAttnError):
    """The request was fine and the work went wrong: values that are not finite, a check that does not hold."""
