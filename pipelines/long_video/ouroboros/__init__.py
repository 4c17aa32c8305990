"""The parts of Ouroboros on top of FIFO."""

from genattn.pipelines.long_video.ouroboros.ouroboros import Ouroboros

__all__ = ["Ouroboros"]
