"""Progress of long work on standard error: how far, how fast, how long still."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(unit: str) -> Iterator[Callable[..., None]]:
    """A bar that begins with the first call of what it gives: `tell(done, total)`; further arguments are ignored.

    Shows the time left; its total may change from call to call, as stages come and go.
    """
    from tqdm import tqdm

    bar = tqdm(unit=f" {unit}", leave=False, disable=None, delay=0.2)

    def tell(done: int, total: int, *_: object) -> None:
        if done < bar.n:
            bar.reset()
        bar.total = total
        bar.update(done - bar.n)

    with bar:
        yield tell
