"""The line that says what a run costs, before it runs."""

from pathlib import Path

import pytest
from gradio_session import random_session

from genattn import GenAttnError, RadialPattern
from genattn.apps.sampling.run import AttentionSettings
from genattn.apps.webui.verbs.cost import cost_line
from genattn.apps.webui.verbs.hunt import hunt_cost, hunted_model, search_of
from genattn.apps.webui.verbs.image import image_cost
from genattn.apps.webui.verbs.long import long, long_cost
from genattn.apps.webui.verbs.sampling import ClipForm
from genattn.apps.webui.verbs.session import Session


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return random_session(tmp_path_factory.mktemp("cost"))


def test_a_clip(session: Session) -> None:
    model = session.check_name(None, video=True)
    attention = AttentionSettings("radial", RadialPattern(decay=0.2, floor=0), 1, 0)
    line = cost_line(session, model, ClipForm(), "a cat", attention)
    assert "9x32x32" in line
    assert "2 steps" in line
    assert "50% of the calls stay dense: first dense steps" in line
    assert "of the dense scores" in line
    assert "not yet timed here" in line
    session.remember_seconds(model.name, {"num_frames": 9, "height": 32, "width": 32, "num_inference_steps": 2}, 12.34)
    assert "the last dense clip of this size took 12.3 s" in cost_line(session, model, ClipForm(), "a cat", attention)
    assert "not yet timed" in cost_line(session, model, ClipForm(steps=3), "a cat", attention)
    with pytest.raises(GenAttnError, match="at most 33 frames"):
        cost_line(session, model, ClipForm(frames=37), "a cat", attention)


def test_pictures(session: Session) -> None:
    model = session.check_name(None, video=False)
    line = image_cost(session, model, ClipForm(steps=3))
    assert line == "16x16 · 2 pictures of 3 steps; the guided one runs the model once more in each · not yet timed here"
    session.remember_seconds(model.name, {"height": 16, "width": 16, "num_inference_steps": 3}, 4.0)
    assert image_cost(session, model, ClipForm(steps=3)).endswith("the last picture without guidance of this size took 4.0 s")
    with pytest.raises(GenAttnError, match="at most 4,096 pixels"):
        image_cost(session, model, ClipForm(height=128, width=128))


def test_a_hunt(session: Session) -> None:
    model = hunted_model(session, None)
    assert not model.video
    assert hunted_model(session, "random-wan").video
    search = search_of(["sharpness"], 2, 1, 1)
    line = hunt_cost(session, model, ClipForm(steps=3), "L1H0,L1H1", search, sheet=True)
    # one plain picture and two candidates for each of two prompts, the round's best once more, the sheet
    assert "2 heads: at most" in line
    assert f"{search.trials(2)['full'] + 3} guided pictures of 3 steps" in line
    with pytest.raises(GenAttnError, match="at most 60 pictures a hunt"):
        hunt_cost(session, model, ClipForm(), None, search_of(["sharpness"], 40, 1, 1), sheet=True)


def test_a_film_costs_what_it_tells_when_it_runs(session: Session, tmp_path: Path) -> None:
    model = session.check_name(None, video=True)
    line = long_cost(session, model, ClipForm(), "a cat", frames=9)
    assert "model calls before the first frame" in line
    told = [update.values["cost"] for update in long(session, "a cat", frames=9) if "cost" in update.values]
    assert told[0] == line
    assert "model calls" in long_cost(session, model, ClipForm(), "a cat", frames=9, start_picture="start.png")
    with pytest.raises(GenAttnError, match="at most 65 frames"):
        long_cost(session, model, ClipForm(), "a cat", frames=99)
