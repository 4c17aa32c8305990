"""What stands in every field of the page before a visitor touches it, and how far its numbers go."""

import gc
import json
import urllib.request
from pathlib import Path

import pytest
from gradio_session import random_session, served

pytest.importorskip("gradio", reason="the app needs gradio")
NOISE = ("DeprecationWarning", "FutureWarning", "ResourceWarning", "UserWarning", "pytest.PytestUnraisableExceptionWarning")
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in NOISE]

SHOWN = {"number", "slider", "checkbox", "dropdown", "radio", "textbox"}
# a field: its value, the least and the most, the step of a slider, decimals of a number
FIELDS = r"""
# Image
Model = 'random-sd3'
Prompt = 'a large red circle stays still on a dark background'
Heads to disturb = ''
How much (u) = 0.5 from 0 to 1 by 0.05
Guidance strength = 3.0 from -2 to 8 by 0.25
Seed = 0 from 0 whole
New seed each time = False
Target = 'identity'
Negative prompt (through NAG if the guidance scale is 1) = ''
Height = 16 whole
Width = 16 whole
Steps = 2 whole
CFG scale = 3.0
# Video
Model = 'random-wan'
Prompt = 'a red circle moves right on a dark background'
Sparse attention = 'radial'
Keep first steps dense = 0.25 from 0
Keep first layers dense = 1 from 0 whole
Seed = 0 from 0 whole
New seed each time = False
Pattern settings (JSON) = ''
Negative prompt (through NAG if the guidance scale is 1) = ''
Height = 32 whole
Width = 32 whole
Frames = 9 whole
Steps = 2 whole
CFG scale = 3.0
# Long
Model = 'random-wan'
Prompt, or prompts by frame = '0:"a red circle moves right on a dark background" 60:"a blue circle moves right on a dark background"'
Frames = 125 from 1 whole
Cross-fade = 16 from 0 whole
Seed = 0 from 0 whole
New seed each time = False
Partitions: windows in the queue; the papers use 4, which is slower = 1 from 1 to 8 by 1
Drift correction = 0 from 0 to 1 by 0.05
Lookahead (twice the work, as in the papers) = False
Ouroboros: coherent tail, memory = False
Negative prompt = ''
Height = 32 whole
Width = 32 whole
CFG scale = 3.0
Run = None
New length = 0 whole
# Masks
Pattern = 'radial'
Shape of = 'own grid'
Tokens: frames x height x width = '12x24x32'
Text tokens before = 0 from 0 whole
Text tokens after = 0 from 0 whole
Tile = 64
Token: frame x row x column = ''
Pattern settings (JSON) = ''
# Heads
Model = 'random-sd3'
Prompts, one per line = 'a large red circle stays still on a dark background\na small blue square stays still on a light background'
What to look for (maximised) = ['unclipped', 'contrast']
Rounds = 1 from 1 whole
Heads per round = 2 from 1 whole
Guidance strength = 3.0
Heads to choose from = ''
How strongly heads are disturbed (u) = 1.0 from 0 to 1 by 0.05
Target = 'identity'
Candidates per model call = 4 from 1 to 16 by 1
Draw every head's picture: the contact sheet = True
Height = 16 whole
Width = 16 whole
Steps = 2 whole
CFG scale = 3.0
Save the set as = 'my-heads'
Best heads only = 0 whole
# Report
Run = None
"""  # noqa: E501 -- a field a line


def _field(kind: str, props: dict[str, object]) -> str:
    least, most = props.get("minimum"), props.get("maximum")
    parts = [f"{props['label']} = {props.get('value')!r}"]
    parts += [f"from {least}"] * (least is not None) + [f"to {most}"] * (most is not None)
    parts += [f"by {props.get('step')}"] * (kind == "slider") + ["whole"] * (kind == "number" and props.get("precision") == 0)
    return " ".join(parts)


def test_fields_begin_as_promised(tmp_path: Path) -> None:
    with served(random_session(tmp_path)) as url, urllib.request.urlopen(f"{url}config") as answer:
        components = json.load(answer)["components"]
    found = []
    for component in components:
        kind, props = component["type"], component["props"]
        if kind == "tabitem":
            found.append(f"# {props['label']}")
        elif kind in SHOWN and props.get("label") and props.get("interactive") is not False:
            found.append(_field(kind, props))
    assert found == FIELDS.strip().splitlines()
    gc.collect()  # loops and sockets end here, where their warnings are let through
