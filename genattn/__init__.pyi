"""The names that `genattn` hands on, for type checkers and editors."""

from genattn.errors import GenAttnError as GenAttnError
from genattn.functional.dispatch import attention as attention
from genattn.geometry.token_layout import TokenLayout as TokenLayout
from genattn.patterns.dense import DensePattern as DensePattern
from genattn.patterns.neighborhood import NeighborhoodPattern as NeighborhoodPattern
from genattn.patterns.pattern import Pattern as Pattern
from genattn.patterns.radial import RadialPattern as RadialPattern
from genattn.pipelines.long_video.generate import long_video as long_video
from genattn.pipelines.long_video.output.save_video import save_video as save_video
from genattn.seam.handle import apply as apply, remove as remove
from genattn.seam.schedule import Schedule as Schedule

__version__: str
__all__: list[str]
