"""Lines that other libraries write while they are imported, and that tell a user of `genattn` nothing.

Each is known by its logger and the words it begins with; everything else that these loggers say comes through, errors too.
A bar for the loading of files is for terminals only.
"""

import logging
import os
import sys

# logger -> beginnings, or parts, of lines that are left out
_LINES: dict[str, tuple[str, ...]] = {
    # compiled for other chips or another Python than this one; what needs them says so itself
    "torchao": ("Failed to load ",),
    # diffusers asks for a name that newer torchao has moved; only checkpoints quantised by torchao need it, and they raise
    "diffusers.quantizers.torchao.torchao_quantizer": ("Unable to import `torchao` Tensor objects",),
    # an optional kernel for 4 bits on CPUs
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward from kernels-community",),
    # the slower reader of pictures is as good; no model here needs the other
    "transformers.utils.import_utils": ("requires torchvision (not installed); falling back to",),
    # for whoever registers the enum, which is torchao
    "torch.utils._pytree": ("is an Enum subclass and is now natively supported by torch.compile",),
}


class _LeftOut(logging.Filter):
    """Stops warnings that hold one of `parts`."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = parts

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        return record.levelno > logging.WARNING or not any(part in record.getMessage() for part in self.parts)


def quieten() -> None:
    """From now on these lines are left out in this process; a second call changes nothing."""
    for name, parts in _LINES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, _LeftOut) for each in logger.filters):
            logger.addFilter(_LeftOut(parts))
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
