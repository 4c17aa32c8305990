"""Which option was meant by a name that a command does not have.

One that means the same comes first (`long` writes to --folder, where others have --out), then one that begins or ends alike,
then one with few other letters. click's own proposals look at letters alone, and offer --prompt for --out.
"""

import difflib
from collections.abc import Iterable

_SAME = (
    ("--out", "--output", "--folder", "--dir", "--directory", "--outdir", "--output-dir", "--log", "--save", "--to"),
    ("--steps", "--num-inference-steps", "--inference-steps", "--num-steps", "--sampling-steps"),
    ("--frames", "--num-frames", "--length"),
    ("--guidance-scale", "--guidance", "--cfg", "--cfg-scale"),
    ("--negative-prompt", "--negative"),
    ("--prompt", "--text", "--caption", "--prompts"),
    ("--prompts", "--captions", "--prompt-file"),
    ("--attention", "--pattern"),
    ("--model", "--checkpoint", "--pipeline", "--pretrained"),
    ("--data", "--dataset", "--clips"),
    ("--lora", "--loras"),
    ("--count", "--num-videos", "--num-images"),
    ("--grid", "--size", "--shape"),
    ("--learning-rate", "--lr"),
    ("--lora-rank", "--rank"),
)
_ALIKE = 0.75  # of the letters; 0.6, as click has it, takes --resume for --frames


def meant(given: str, known: Iterable[str]) -> list[str]:
    """Options among `known` that `given`, --name, may have meant; the likeliest first, at most three."""
    known = sorted(option for option in known if option.startswith("--") and option != "--help")
    same = [option for group in _SAME if given in group for option in group if option in known]
    word = given.lstrip("-")
    begun = [option for option in known if len(word) > 2 and f"{option}-".startswith(f"{given}-")]
    ended = [option for option in known if len(word) > 2 and option.endswith(f"-{word}")]
    near = difflib.get_close_matches(given, known, cutoff=_ALIKE)
    return list(dict.fromkeys([*same, *begun, *ended, *near]))[:3]
