"""Which prompt holds at which frame, with a cross-fade that noisy latents take first.

    0:"a red circle moves right" 120:"a blue circle moves right"

A prompt begins to take over `fade` frames before its frame and has taken over `fade` frames after it. Inside that stretch
the noise level
decides: structure is laid down in noisy latents, so they follow the new prompt while nearly clean ones keep the old,

    weight = clamp((frame - start) / fade + sigma_share, 0, 1),       sigma_share in [0, 1]
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from genattn.errors import GenAttnError

_ENTRY = re.compile(r'\s*(\d+)\s*:\s*("(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\')\s*[,;]?')


@dataclass(frozen=True)
class PromptSchedule:
    """Prompts by the frame at which they begin. starts: rising, the first is 0. fade: frames, >= 0 (0 switches at once)."""

    starts: tuple[int, ...]
    prompts: tuple[str, ...]
    fade: int = 0

    def __post_init__(self) -> None:
        if len(self.starts) != len(self.prompts) or not self.starts:
            raise GenAttnError(f"a schedule needs as many frames as prompts, got {len(self.starts)} and {len(self.prompts)}")
        if self.starts[0] != 0:
            raise GenAttnError(f"the first prompt of a schedule must begin at frame 0, got {self.starts[0]}")
        if any(b <= a for a, b in pairwise(self.starts)):
            raise GenAttnError(f"the frames of a schedule must rise, got {', '.join(map(str, self.starts))}; put them in order")
        if self.fade < 0:
            raise GenAttnError(f"fade must be >= 0 frames, got {self.fade}")
        gaps = [b - a for a, b in pairwise(self.starts)]
        if gaps and self.fade > min(gaps):
            raise GenAttnError(f"fade must not exceed the {min(gaps)} frames between two prompts, got {self.fade}")

    @classmethod
    def parse(cls, prompt: "str | Mapping[int, str] | PromptSchedule", fade: int = 0) -> "PromptSchedule":
        """From a plain prompt, a mapping {frame: prompt}, or the text form 0:"..." 120:"...".

        Text is a schedule when it starts like one (digits, colon, quote); it must then be one to the end.

        >>> PromptSchedule.parse('0:"a red circle" 120:"it turns blue"').prompts
        ('a red circle', 'it turns blue')
        """
        if isinstance(prompt, PromptSchedule):
            return prompt
        if isinstance(prompt, Mapping):
            return cls(tuple(int(k) for k in prompt), tuple(prompt.values()), fade)
        if not isinstance(prompt, str) or not prompt.strip():
            raise GenAttnError(f"prompt must be a text or a schedule, got {prompt!r}")
        if not re.match(r"\s*\d+\s*:\s*[\"']", prompt):
            return cls((0,), (prompt,), 0)
        entries, at = [], 0
        while at < len(prompt) and prompt[at:].strip():
            match = _ENTRY.match(prompt, at)
            if match is None:
                raise GenAttnError(f'a schedule reads 0:"..." 120:"...", got {prompt[at : at + 30]!r} at character {at}')
            entries.append((int(match[1]), re.sub(r"\\(.)", r"\1", match[2][1:-1])))
            at = match.end()
        return cls(tuple(k for k, _ in entries), tuple(v for _, v in entries), fade)

    def weights(self, frames: torch.Tensor, sigma_share: torch.Tensor) -> torch.Tensor:
        """Weight of each prompt, [..., P], summing to 1. frames: frame numbers [...]; sigma_share: 0 clean to 1 noise,
        [...]."""
        frames, share = frames.double(), sigma_share.double()
        reached = [torch.ones_like(frames)]
        for start in self.starts[1:]:
            if self.fade == 0:
                reached.append((frames >= start).double())
            else:
                reached.append(((frames - start) / self.fade + share).clamp(0, 1))
        reached.append(torch.zeros_like(frames))
        return torch.stack([a - b for a, b in pairwise(reached)], -1).clamp(min=0)

    def active(self, frame: int) -> str:
        """The prompt that has begun last at a frame."""
        return self.prompts[max(i for i, start in enumerate(self.starts) if start <= max(frame, 0))]

    def to_text(self) -> str:
        """The text form, read back by `parse`."""
        if len(self.prompts) == 1:
            return self.prompts[0]
        escaped = [p.replace("\\", "\\\\").replace('"', '\\"') for p in self.prompts]
        return " ".join(f'{start}:"{prompt}"' for start, prompt in zip(self.starts, escaped))
