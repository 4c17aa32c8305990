"""A search killed at any moment and resumed ends as the unbroken one, and loses no finished score."""

import json
import random
import threading
from pathlib import Path

import pytest
from damage import scrambled

from genattn.errors import GenAttnError
from genattn.guidance.headhunter.search import HeadSearch, SearchSettings, Trial
from genattn.guidance.headhunter.search_log import SearchLog, form_chunks

POOL = [(0, h) for h in range(5)]
SETTINGS = SearchSettings({"good": 1.0}, prompts=2, rounds=2, top_k=1, held_out=1, u_grid=(0.5, 1.0))


class Killed(BaseException):
    pass


def score(chunk: tuple[Trial, ...]) -> list[dict[str, float]]:
    # the size of the chunk enters, as batching does on real hardware
    return [{"good": sum(10 * a + b for a, b in t.heads) + t.prompt + 1e-7 * len(chunk) * (t.u or 0.3)} for t in chunk]


def run(path: Path, evaluate: object = score, **settings: object) -> tuple[object, SearchLog]:
    log = SearchLog(path, {"seed": 0, **settings}, 2, evaluate)
    return HeadSearch(SETTINGS, POOL, log).run(), log


def test_resumes_after_a_kill_at_every_moment(tmp_path: Path) -> None:
    expected, log = run(tmp_path / "whole.jsonl")
    chunks = len((tmp_path / "whole.jsonl").read_text().splitlines()) - 1
    assert chunks > 10
    for moment in range(chunks):
        path, left = tmp_path / f"killed{moment}.jsonl", iter(range(moment))

        def dying(chunk: tuple[Trial, ...], left: object = left) -> list[dict[str, float]]:
            if next(left, None) is None:
                raise Killed
            return score(chunk)

        with pytest.raises(Killed):
            run(path, dying)
        result, resumed = run(path)
        assert result == expected
        assert path.read_text() == (tmp_path / "whole.jsonl").read_text()
        assert resumed.evaluated < log.evaluated or moment == 0


def test_resumes_after_a_kill_while_writing(tmp_path: Path) -> None:
    expected, _ = run(tmp_path / "whole.jsonl")
    content = (tmp_path / "whole.jsonl").read_bytes()
    for cut in [3, 20, *range(len(content) // 2, len(content) // 2 + 90, 7), len(content) - 1]:
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:cut])
        result, _ = run(path)
        assert result == expected


def test_a_failing_scorer_loses_no_finished_score(tmp_path: Path) -> None:
    path, calls = tmp_path / "log.jsonl", []

    def failing(chunk: tuple[Trial, ...]) -> list[dict[str, float]]:
        calls.append(chunk)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return score(chunk)

    with pytest.raises(RuntimeError, match="out of memory"):
        run(path, failing)
    assert len(path.read_text().splitlines()) == 1 + 4
    _, resumed = run(path)
    assert resumed.evaluated + sum(map(len, calls[:4])) == run(tmp_path / "other.jsonl")[1].evaluated


def test_refuses_other_settings(tmp_path: Path) -> None:
    run(tmp_path / "log.jsonl")
    with pytest.raises(GenAttnError, match="begun with, got other seed than in"):
        SearchLog(tmp_path / "log.jsonl", {"seed": 1}, 2, score)
    with pytest.raises(GenAttnError, match="chunk_size must be >= 1"):
        SearchLog(tmp_path / "log.jsonl", {"seed": 0}, 0, score)
    with pytest.raises(GenAttnError, match="one set of scores per trial"):
        SearchLog(tmp_path / "new.jsonl", {}, 2, lambda chunk: [])([Trial((), 0)])


def test_chunks() -> None:
    trials = [Trial(heads, p) for p in (1, 0) for heads in [(), ((0, 1),), ((0, 0),), ((0, 2),)]]
    chunks = form_chunks(trials, {"full": 2})
    assert [[(t.prompt, t.heads) for t in chunk] for chunk in chunks] == [
        [(p, heads) for heads in group] for p in (0, 1) for group in ([()], [((0, 0),), ((0, 1),)], [((0, 2),)])
    ]


def test_tells_progress(tmp_path: Path) -> None:
    seen = []
    log = SearchLog(tmp_path / "log.jsonl", {}, 2, score, progress=lambda done, total, seconds: seen.append((done, total)))
    log([Trial(((0, h),), 0) for h in range(5)])
    assert seen == [(1, 3), (2, 3), (3, 3)]


def two_processes(path: Path, evaluate: object, outcome: list) -> None:
    """Two threads that meet as two processes do."""
    barrier, box = threading.Barrier(2, timeout=60), [None, None]

    def work(rank: int) -> None:
        def gather(mine: object) -> list:
            box[rank] = mine
            barrier.wait()
            all_of_them = list(box)
            barrier.wait()
            return all_of_them

        try:
            log = SearchLog(path, {"seed": 0}, 2, evaluate, rank, 2, gather)
            outcome[rank] = HeadSearch(SETTINGS, POOL, log).run(), log.evaluated
        except Exception as error:
            outcome[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    expected, log = run(tmp_path / "one.jsonl")
    outcome: list = [None, None]
    two_processes(tmp_path / "two.jsonl", score, outcome)
    assert [result for result, _ in outcome] == [expected, expected]
    counts = [count for _, count in outcome]
    assert sum(counts) == log.evaluated
    assert min(counts) > 0.3 * log.evaluated
    assert (tmp_path / "two.1.jsonl").exists()
    # one process takes over what two have begun
    result, resumed = run(tmp_path / "two.jsonl")
    assert result == expected
    assert resumed.evaluated == 0


def test_a_failure_in_one_process_stops_both(tmp_path: Path) -> None:
    calls: list = []

    def failing(chunk: tuple[Trial, ...]) -> list[dict[str, float]]:
        calls.append(chunk)
        if len(calls) == 6:
            raise RuntimeError("lost the scorer")
        return score(chunk)

    outcome: list = [None, None]
    two_processes(tmp_path / "two.jsonl", failing, outcome)
    assert all(isinstance(error, Exception) for error in outcome)
    assert sorted(type(error).__name__ for error in outcome) == ["GenAttnError", "RuntimeError"]
    lines = [json.loads(line) for file in tmp_path.glob("two*.jsonl") for line in file.read_text().splitlines()]
    assert sum("trials" in line for line in lines) == len(calls) - 1


def test_damaged_lines_are_evaluated_again(tmp_path: Path) -> None:
    expected, _ = run(tmp_path / "whole.jsonl")
    lines, generator = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True), random.Random(0)
    for turn in range(60):
        place = generator.randrange(1, len(lines))
        broken = generator.choice(
            [
                scrambled(lines[place][:-1], generator),
                b"[" * 100000,
                b"3",
                b"{}",
                b'{"trials": 3, "scores": 3}',
                b'{"trials": ["a"], "scores": [3]}',
                b'{"trials": [[]], "scores": [{}]}',
                b"\xff\xfe",
            ]
        )
        path = tmp_path / f"{turn}.jsonl"
        path.write_bytes(b"".join([*lines[:place], broken + b"\n", *lines[place + 1 :]]))
        assert run(path)[0] == expected, broken[:80]


@pytest.mark.parametrize("change", [{"scores": [{"good": 99.0}]}, {"check": "00000000"}, {"check": None}])
def test_a_score_that_was_changed_by_hand_is_evaluated_again(change: dict, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    expected, _ = run(path)
    lines = path.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if line.count('"good"') == 1)
    lines[place] = json.dumps(json.loads(lines[place]) | change)
    path.write_text("\n".join(lines) + "\n")
    found, resumed = run(path)
    assert (found, resumed.evaluated) == (expected, 1)


@pytest.mark.parametrize("content", [b"a red circle\n", b"\xff\xfe\x00", b"x" * 20, b'{"other"'])
def test_a_file_of_somebody_else_is_refused_and_stays(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes(content)
    with pytest.raises(GenAttnError, match="must be the log of a search or not be there, got another file"):
        run(path)
    assert path.read_bytes() == content
