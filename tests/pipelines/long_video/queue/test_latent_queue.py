"""The queue's bookkeeping against a slow twin that moves labelled frames one by one."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.queue.frame_noise import frame_noise, frame_seed
from genattn.pipelines.long_video.queue.latent_queue import CLEAN, LatentQueue, QueueShape


@st.composite
def shapes(draw):
    window = draw(st.integers(1, 9))
    lookahead = draw(st.booleans()) if window > 1 else False
    return QueueShape(draw(st.integers(1, 23)), window, draw(st.integers(1, window)), lookahead)


@given(shapes())
def test_windows_write_every_working_slot_once_and_nothing_else(shape):
    written = torch.zeros(shape.slots, dtype=torch.long)
    for window in shape.windows:
        assert window.read_stop - window.read_start == shape.window
        assert window.read_start >= 0
        assert window.read_stop == window.write_stop
        written[window.write] += 1
        assert torch.equal(torch.arange(shape.slots)[window.read][window.keep], torch.arange(shape.slots)[window.write])
    assert written[: shape.head].sum() == 0
    assert (written[shape.head :] == 1).all()


@given(shapes())
def test_levels_rise_by_at_most_one_and_the_head_is_clean(shape):
    levels = shape.levels
    assert len(levels) == shape.slots == shape.head + shape.num_levels * shape.latents_per_level
    assert (levels[: shape.head] == CLEAN).all()
    assert levels[-1] == shape.num_levels - 1
    assert ((levels[1:] - levels[:-1]) >= 0).all()
    assert ((levels[1:] - levels[:-1]) <= 1).all()
    assert all((levels == i).sum() == shape.latents_per_level for i in range(shape.num_levels))
    assert 0 <= shape.head < shape.window


@given(shapes())
def test_with_lookahead_every_latent_sees_cleaner_ones(shape):
    ahead = shape.window // 2 if shape.lookahead else 0
    for window in shape.windows:
        assert window.write_start - window.read_start >= ahead


@given(shapes())
def test_noisiest_first_in_place_never_reads_what_it_wrote(shape):
    done: set[int] = set()
    for window in shape.windows:
        assert not done & set(range(window.read_start, window.read_stop))
        done |= set(range(window.write_start, window.write_stop))


@given(st.integers(1, 8), st.integers(2, 9), st.booleans())
def test_partitions_count_windows_as_the_papers_do(partitions, window, lookahead):
    shape = QueueShape.from_partitions(partitions, window, 1, lookahead)
    assert shape.num_levels == partitions * window
    assert shape.partitions == partitions
    if not lookahead:
        assert len(shape.windows) == partitions
        assert shape.head == 0
    elif window % 2 == 0:
        assert len(shape.windows) == 2 * partitions
        assert shape.head == window // 2


def identity_noise(clean, levels, numbers):
    return clean


def tag(numbers) -> torch.Tensor:
    return torch.tensor(list(numbers), dtype=torch.float32).reshape(1, 1, -1, 1, 1)


@settings(max_examples=60)
@given(shapes(), st.integers(1, 40), st.data())
def test_frames_leave_in_order_after_exactly_one_step_per_level(shape, ticks, data):
    length = data.draw(st.integers(1, shape.working))
    queue = LatentQueue.start(shape, tag(range(length)), identity_noise, lambda x: {"steps": torch.zeros_like(x)})
    # slow twin: a list of [number, level, steps taken]
    first = length - shape.working
    twin = [[first + i, i // shape.latents_per_level, 0] for i in range(shape.working)]
    left = []
    for _ in range(ticks):
        stepped = queue.latents.clone()
        steps = queue.state["steps"].clone()
        steps[:, :, queue.working] += 1
        leaving_steps = steps[:, :, queue.leaving].flatten().tolist()
        tail = tag(range(queue.next_number, queue.next_number + shape.latents_per_level))
        emitted, numbers = queue.advance(stepped, {"steps": steps}, tail)
        for entry in twin:
            entry[1] -= 1
            entry[2] += 1
        gone = [entry for entry in twin if entry[1] < 0]
        twin = [entry for entry in twin if entry[1] >= 0]
        start = first + shape.working + (queue.tick - 1) * shape.latents_per_level
        twin += [[start + i, shape.num_levels - 1, 0] for i in range(shape.latents_per_level)]
        assert leaving_steps == [entry[2] for entry in gone]
        assert numbers == [entry[0] for entry in gone if entry[0] >= 0]
        assert emitted.flatten().tolist() == numbers
        left += numbers
        assert queue.numbers[queue.working].tolist() == [entry[0] for entry in twin]
        assert queue.shape.levels[queue.working].tolist() == [entry[1] for entry in twin]
        assert queue.state["steps"][:, :, queue.working].flatten().tolist() == [entry[2] for entry in twin]
    assert left == list(range(len(left)))
    if queue.tick > shape.warm_up_ticks(length):
        assert left


@settings(max_examples=40)
@given(shapes(), st.integers(0, 12), st.data())
def test_head_holds_the_latents_that_left_last(shape, ticks, data):
    queue = LatentQueue.start(shape, tag(range(shape.working)), identity_noise)
    for _ in range(ticks):
        tail = tag(range(queue.next_number, queue.next_number + shape.latents_per_level))
        queue.advance(queue.latents.clone(), {}, tail)
    want = [max(0, int(n)) for n in queue.numbers]
    assert queue.latents.flatten().tolist() == want


def test_a_short_clip_is_repeated_towards_the_clean_end():
    shape = QueueShape(8, 4, 1, True)
    queue = LatentQueue.start(shape, tag([5, 6, 7]), identity_noise)
    assert queue.latents.flatten().tolist() == [5] * 8 + [6, 7]
    assert queue.numbers.tolist() == list(range(-7, 3))
    assert shape.warm_up_ticks(3) == 5


def test_latents_per_level_equal_to_the_window_is_an_ordinary_clip():
    shape = QueueShape(5, 4, 4, False)
    assert shape.head == 0
    assert [set(shape.levels[w.read].tolist()) for w in shape.windows] == [{4}, {3}, {2}, {1}, {0}]


def test_checkpoint_round_trip_is_exact():
    shape = QueueShape(6, 4, 2, True)
    queue = LatentQueue.start(
        shape, torch.randn(1, 2, 4, 3, 3), lambda c, lv, n: c + 1e-7, lambda x: {"last": torch.randn_like(x)}
    )
    queue.advance(queue.latents * 1.1, queue.state, torch.randn(1, 2, 2, 3, 3))
    back = LatentQueue.from_checkpoint(shape, queue.to_tensors(), queue.to_numbers())
    assert torch.equal(back.latents, queue.latents)
    assert torch.equal(back.state["last"], queue.state["last"])
    assert (back.first_number, back.tick) == (queue.first_number, queue.tick)
    assert QueueShape(**shape.settings()) == shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "num_levels must be >= 1"),
        ((4, 0), "window must be >= 1"),
        ((4, 4, 5), "latents_per_level must be 1 to window = 4"),
        ((4, 1, 1, True), "lookahead needs a window"),
    ],
)
def test_impossible_shapes_are_refused(arguments, message):
    with pytest.raises(GenAttnError, match=message):
        QueueShape(*arguments)


def test_impossible_partitions_are_refused():
    with pytest.raises(GenAttnError, match="partitions must be >= 1"):
        QueueShape.from_partitions(0, 4)
    with pytest.raises(GenAttnError, match="latents_per_level must be 1"):
        QueueShape.from_partitions(2, 4, 0)


def test_tensors_of_the_wrong_size_are_refused():
    shape = QueueShape(4, 4, 1, False)
    queue = LatentQueue.start(shape, torch.zeros(1, 1, 2, 2, 2), identity_noise)
    with pytest.raises(GenAttnError, match="starting clip must hold 1 to 4"):
        LatentQueue.start(shape, torch.zeros(1, 1, 5, 2, 2), identity_noise)
    with pytest.raises(GenAttnError, match="tail must hold 1"):
        queue.advance(queue.latents, {}, torch.zeros(1, 1, 2, 2, 2))
    with pytest.raises(GenAttnError, match="stepped must be"):
        queue.advance(queue.latents[:, :, :2], {}, torch.zeros(1, 1, 1, 2, 2))
    with pytest.raises(GenAttnError, match=r"latents must be \[B, C, 4"):
        LatentQueue(shape, torch.zeros(1, 1, 3, 2, 2), 0)
    with pytest.raises(GenAttnError, match="state 'm' must have 4 slots"):
        LatentQueue(shape, queue.latents, 0, 0, {"m": torch.zeros(1, 1, 3, 1, 1)})
    with pytest.raises(GenAttnError, match=r"holds no queue\.latents"):
        LatentQueue.from_checkpoint(shape, {}, {})


@settings(max_examples=50)
@given(st.integers(-(10**6), 10**12), st.lists(st.integers(-50, 10**7), min_size=1, max_size=5), st.data())
def test_noise_of_a_frame_does_not_depend_on_its_neighbours(seed, frames, data):
    like = torch.zeros(1, 2, 1, 3, 3)
    variants = [data.draw(st.integers(0, 99)) for _ in frames]
    together = frame_noise(seed, frames, like, purpose="step", variants=variants)
    for i, frame in enumerate(frames):
        alone = frame_noise(seed, [frame], like, purpose="step", variants=variants[i : i + 1])
        assert torch.equal(together[:, :, i : i + 1], alone)


def test_noise_differs_by_seed_frame_purpose_and_level_and_is_normal():
    seeds = {frame_seed(s, f, p, v) for s in (0, 1) for f in (-1, 0, 1) for p in ("tail", "step") for v in (0, 1)}
    assert len(seeds) == 24
    assert all(0 <= s < 2**63 for s in seeds)
    x = frame_noise(3, range(40), torch.zeros(1, 4, 1, 16, 16), purpose="tail")
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02
    assert abs(float((x[:, :, 1:] * x[:, :, :-1]).mean())) < 0.02


def test_wrong_noise_requests_are_refused():
    with pytest.raises(GenAttnError, match="purpose must be one of"):
        frame_seed(0, 0, "mood")
    with pytest.raises(GenAttnError, match="one number per frame"):
        frame_noise(0, [1, 2], torch.zeros(1, 1, 1, 1, 1), purpose="tail", variants=[1])
