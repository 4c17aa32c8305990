"""Video of any length at constant memory."""

from genattn.pipelines.long_video.generate import long_video, resume_video

__all__ = ["long_video", "resume_video"]
