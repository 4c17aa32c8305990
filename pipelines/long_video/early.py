"""What cannot become a film, told before anything of it is on the disk."""

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.bases.frame_denoisers import FrameDenoiser
from genattn.pipelines.long_video.queue.latent_queue import QueueShape
from genattn.pipelines.long_video.settings import LongVideoSettings
from genattn.pipelines.long_video.start_frames import StartFrames


def refuse(base: FrameDenoiser, settings: LongVideoSettings, start: StartFrames | None) -> None:
    """What cannot become a film, before anything of it is in the folder; every process finds the same."""
    _check_start(base, settings, start)
    shape = settings.queue_shape(base)
    if start is None:
        check_window(shape)
    base.solver(shape.num_levels, (shape.window, *base.latent_size(*settings.size(base))), settings.eta)
    if settings.num_frames is not None:
        base.decoder().latents_for(settings.num_frames)


def _check_start(base: FrameDenoiser, settings: LongVideoSettings, start: StartFrames | None) -> None:
    name = type(base.pipe).__name__
    if start is None and base.continues:
        raise GenAttnError(f"{name} continues given frames; pass start=..., a picture or the frames of a video")
    if start is None and settings.start_as is not None:
        raise GenAttnError(f"start_as={settings.start_as!r} says what to do with start, and none was given; leave it out")


def check_window(shape: QueueShape) -> None:
    """Refuse a queue that is shorter than the window that fills it."""
    if shape.window > shape.working:
        raise GenAttnError(
            f"the queue must hold a whole window of {shape.window} latents to begin with, got {shape.working} "
            "(steps x latents per level); raise num_inference_steps or latents_per_level"
        )
