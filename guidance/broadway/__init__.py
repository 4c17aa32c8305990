"""BroadWay: temporal self-guidance and motion enhancement."""

from genattn.guidance.broadway.broadway import BroadWay

__all__ = ["BroadWay"]
