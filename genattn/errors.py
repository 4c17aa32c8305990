"""The one error of the package: what must hold, what came, what to do."""


class GenAttnError(ValueError):
    """Raised for every request that cannot be served, before work starts."""


class RunFailed(GenAttnError):
    """The request was fine and the work went wrong: values that are not finite, a check that does not hold."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type where it was raised without one."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def kind_and_line(error: BaseException) -> str:
    """`ValueError: the first line of its message`, for tables and logs of what failed."""
    return f"{type(error).__name__}: {first_line(error) if str(error).strip() else 'no message'}"
