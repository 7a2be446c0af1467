"""A trace that cannot be written ends, and the run goes on."""

import errno
import json
import os

import pytest
from helpers.engine_cases import WORK
from helpers.engines import finish, serve
from helpers.failures import Fault, failing
from helpers.full_engines import build
from helpers.naive import assert_naive

from microvllm.trace import Replay, current_trace, read

pytestmark = pytest.mark.usefixtures("one_thread")
both_loops = pytest.mark.parametrize("overlap", [False, True])


class FullDisk:
    """A file that takes `room` characters, and of the write that is too long only a part."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def write(self, text: str) -> None:
        self.file.write(text[: self.room])
        self.room -= len(text)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@both_loops
@pytest.mark.parametrize("room", [0, 900, 2500])
def test_a_full_disk_ends_the_trace_and_not_the_run(room, overlap, tmp_path, caplog):
    # every step failed from then on, and each wrote the same events once more
    path = tmp_path / "run.jsonl"
    with build(overlap=overlap, trace=path) as llm:
        log = current_trace(llm).log
        log.file = FullDisk(log.file, room)
        assert_naive(serve(llm, WORK), WORK)
        assert current_trace(llm) is None
        (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert str(path) in warning and "No space left" in warning
    if room:
        Replay(read(path))  # what there is of it is a trace
    assert len(path.read_text()) <= room


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device here")
def test_a_disk_that_is_full_from_the_beginning(caplog):
    with build(trace="/dev/full") as llm:
        assert_naive(serve(llm, WORK[:2]), WORK[:2])
    assert "/dev/full" in caplog.text


def test_a_second_trace_to_the_same_file_is_refused_and_the_first_stays(tmp_path):
    # it was emptied before it was refused
    path = tmp_path / "run.jsonl"
    with build(trace=path) as llm:
        serve(llm, WORK[:1])
        before = path.read_text()
        with pytest.raises(ValueError, match="already"), llm.tracing(path):
            pass
        assert path.read_text() == before
    assert json.loads(path.read_text().splitlines()[0])["e"] == "pool"


def test_a_trace_that_begins_while_a_step_is_lost_leaves_no_request_behind():
    # the token that was on its way never came, and its request waited for it for ever
    with build(overlap=True) as llm:
        request = llm.add_request(*WORK[3])
        for _ in range(3):
            llm.step()
        with failing(llm, "update", 0), pytest.raises(Fault), llm.tracing():
            pass
        assert current_trace(llm) is None
        assert_naive([finish(llm)[request]], [WORK[3]])
