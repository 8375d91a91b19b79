"""The results' file: in the input's order, whole after any kill, and nobody else's."""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pdmesh.batch.input_file import InputFile
from pdmesh.batch.output_file import OutputFile
from pdmesh.batch.result_line import error_line
from pdmesh.errors import ConfigError, UnavailableError

NUM_REQUESTS = 6


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture
def source(tmp_path: Path) -> Iterator[InputFile]:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f'{{"custom_id": "{number}"}}\n' for number in range(NUM_REQUESTS)))
    with InputFile(path) as source:
        yield source


def result(source: InputFile, index: int) -> bytes:
    # Not ASCII, so that some cuts fall into a character.
    return error_line(source.digest, index, str(index), UnavailableError(f"grün {index}"))


def add(output: OutputFile, source: InputFile, index: int) -> None:
    output.add(index, result(source, index), failed=True)


def whole(source: InputFile) -> bytes:
    return b"".join(result(source, index) for index in range(NUM_REQUESTS))


def files_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {"in.jsonl"}


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (2, 0, 5, 1, 4, 3)])
def test_results_stand_in_the_inputs_order(tmp_path: Path, source: InputFile, order: Sequence[int]) -> None:
    with OutputFile(tmp_path / "out.jsonl", source) as output:
        for number, index in enumerate(order, 1):
            add(output, source, index)
            assert output.num_finished == output.num_failed == number
            assert output.has(index)
    assert (tmp_path / "out.jsonl").read_bytes() == whole(source)
    assert files_in(tmp_path) == {"out.jsonl"}


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (2, 0, 5, 1, 4, 3)])
def test_killed_at_any_byte_it_goes_on_with_nothing_lost_or_done_twice(
    tmp_path: Path, source: InputFile, order: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    budget = num_cuts = 0

    def write_until_killed(descriptor: int, data: memoryview) -> int:
        nonlocal budget
        written = write(descriptor, data[:budget]) if budget else 0
        budget -= written
        if written < len(data):
            raise Killed
        return written

    finished: list[int] = []
    while len(finished) < NUM_REQUESTS:
        budget = num_cuts
        num_cuts += 1
        finished = []
        life, next_life = tmp_path / "life", tmp_path / "next"
        life.mkdir()
        with OutputFile(life / "out.jsonl", source) as output:
            monkeypatch.setattr(os, "write", write_until_killed)
            try:
                for index in order:
                    add(output, source, index)
                    finished.append(index)
            except Killed:
                pass
            finally:
                monkeypatch.undo()
            # What a kill leaves: leaving the block would tidy up.
            shutil.copytree(life, next_life)
        with OutputFile(next_life / "out.jsonl", source) as output:
            assert all(map(output.has, finished))
            # A result that was on disk but not yet told of is kept, too.
            assert output.num_finished - len(finished) in (0, 1)
            assert output.num_failed == output.num_finished
            for index in reversed(range(NUM_REQUESTS)):
                if not output.has(index):
                    add(output, source, index)
        assert (next_life / "out.jsonl").read_bytes() == whole(source)
        assert files_in(next_life) == {"out.jsonl"}
        shutil.rmtree(life)
        shutil.rmtree(next_life)
    assert num_cuts > len(whole(source)), "every byte was the last one once"


def test_an_output_cut_at_any_byte_goes_on(tmp_path: Path, source: InputFile) -> None:
    path = tmp_path / "out.jsonl"
    ends = [sum(len(result(source, i)) for i in range(count)) for count in range(NUM_REQUESTS + 1)]
    for size in range(ends[-1] + 1):
        path.write_bytes(whole(source)[:size])
        with OutputFile(path, source) as output:
            # A line that lacks its newline only is whole.
            assert output.num_written == sum(end <= size + 1 for end in ends[1:])
            assert path.read_bytes() == whole(source)[: ends[output.num_written]]
            for index in range(output.num_written, NUM_REQUESTS):
                add(output, source, index)
        assert path.read_bytes() == whole(source)


def test_a_complete_output_is_left_as_it_is(tmp_path: Path, source: InputFile) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(whole(source))
    with OutputFile(path, source) as output:
        assert (output.num_finished, output.num_failed) == (NUM_REQUESTS, NUM_REQUESTS)
    assert path.read_bytes() == whole(source)


def test_a_changed_input_is_refused_wherever_it_changed(tmp_path: Path, source: InputFile) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(result(source, 0))
    before = source.path.read_text()
    for changed in (before.replace('"0"', '"x"'), before.replace('"5"', '"x"'), before + "{}\n", before[:-3]):
        source.path.write_text(changed)
        with InputFile(source.path) as other, pytest.raises(ConfigError, match=r"line 1 is no result of .*in\.jsonl"):
            OutputFile(path, other)
    assert path.read_bytes() == result(source, 0)


@pytest.mark.parametrize(
    "content",
    [b"my notes", b'{"mine": 1}\n', b"\n", b'{"id": "batch_req_0123456789abcdef_0", "custom_id"', b"\0" * 10_000],
)
def test_a_foreign_output_is_refused_and_left_as_it_is(tmp_path: Path, source: InputFile, content: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="line 1 is no result"):
        OutputFile(path, source)
    assert path.read_bytes() == content


def test_results_out_of_order_torn_in_the_middle_or_too_many_are_refused(tmp_path: Path, source: InputFile) -> None:
    path = tmp_path / "out.jsonl"
    first, second = result(source, 0), result(source, 1)
    for content, number in (
        (second, 1),
        (first + first, 2),
        (first[:90] + b"\n" + second, 1),
        (whole(source) + result(source, NUM_REQUESTS), NUM_REQUESTS + 1),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=f"line {number} is no result"):
            OutputFile(path, source)
        assert path.read_bytes() == content


def test_who_removes_the_output_begins_anew(tmp_path: Path, source: InputFile) -> None:
    ahead = tmp_path / "out.jsonl.ahead"
    ahead.write_bytes(result(source, 3))
    with OutputFile(tmp_path / "out.jsonl", source) as output:
        assert output.num_finished == 0


@pytest.mark.parametrize("content", ["mine\n", "mine", '{"id": "batch_req_0123456789abcdef_0", "cus'])
def test_a_foreign_file_beside_the_output_is_refused(tmp_path: Path, source: InputFile, content: str) -> None:
    ahead = tmp_path / "out.jsonl.ahead"
    ahead.write_text(content)
    (tmp_path / "out.jsonl").touch()
    with pytest.raises(ConfigError, match=r"out\.jsonl\.ahead: line 1 is no result"):
        OutputFile(tmp_path / "out.jsonl", source)
    assert ahead.read_text() == content


def test_beginning_anew_removes_no_foreign_file(tmp_path: Path, source: InputFile) -> None:
    ahead = tmp_path / "out.jsonl.ahead"
    ahead.write_text("mine\n")
    with pytest.raises(ConfigError, match="is in the way"):
        OutputFile(tmp_path / "out.jsonl", source)
    assert ahead.read_text() == "mine\n"


def test_an_output_has_one_writer(tmp_path: Path, source: InputFile) -> None:
    path = tmp_path / "out.jsonl"
    with OutputFile(path, source), pytest.raises(ConfigError, match="another process writes"):
        OutputFile(path, source)
    with OutputFile(path, source) as output:
        add(output, source, 0)


def test_places_that_hold_no_results_are_refused(tmp_path: Path, source: InputFile) -> None:
    before = source.path.read_bytes()
    for path, says in (
        (source.path, "is the input"),
        (Path(os.devnull), "no regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none" / "out.jsonl", "No such file"),
    ):
        with pytest.raises(ConfigError, match=says):
            OutputFile(path, source)
    assert source.path.read_bytes() == before


def test_a_full_disk_is_told_of(tmp_path: Path, source: InputFile, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    write = os.write
    full = False

    def write_a_part(descriptor: int, data: memoryview) -> int:
        nonlocal full
        if full:
            raise OSError(28, "No space left on device")
        full = True
        return write(descriptor, data[:50])

    with OutputFile(path, source) as output:
        add(output, source, 0)
        monkeypatch.setattr(os, "write", write_a_part)
        with pytest.raises(ConfigError, match=r"No space left on device; .* goes on"):
            add(output, source, 1)
        monkeypatch.undo()
    assert path.read_bytes() == result(source, 0) + result(source, 1)[:50]
    with OutputFile(path, source) as output:
        assert output.num_written == 1
