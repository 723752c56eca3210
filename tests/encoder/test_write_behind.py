"""Writing behind: in order, one table at a time, and no error is lost."""

import threading

import pyarrow as pa
import pytest

from encoder.write_behind import WriteBehind


def numbered(number: int) -> pa.Table:
    return pa.table({"number": [number]})


def test_everything_is_written_in_order_by_another_thread() -> None:
    written: list[int] = []
    threads: set[int] = set()

    def write(table: pa.Table) -> None:
        threads.add(threading.get_ident())
        written.append(table["number"][0].as_py())

    with WriteBehind(write) as behind:
        for number in range(20):
            behind(numbered(number))
    assert written == list(range(20))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_the_next_is_not_taken_before_the_last_is_written() -> None:
    gate = threading.Event()

    def write(table: pa.Table) -> None:
        gate.wait(10)

    behind = WriteBehind(write)
    behind(numbered(0))
    second = threading.Thread(target=lambda: behind(numbered(1)))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    gate.set()
    second.join(10)
    assert not second.is_alive()
    behind.__exit__(None, None, None)


def fail(table: pa.Table) -> None:
    raise OSError(f"no space for {table['number'][0].as_py()}")


def test_an_error_is_raised_by_the_next_call_or_at_the_end() -> None:
    with pytest.raises(OSError, match="no space for 0"), WriteBehind(fail) as behind:
        behind(numbered(0))
        behind(numbered(1))
    with pytest.raises(OSError, match="no space for 7"), WriteBehind(fail) as behind:
        behind(numbered(7))


def test_the_body_s_own_error_comes_first() -> None:
    with pytest.raises(ValueError, match="the body's"), WriteBehind(fail) as behind:
        behind(numbered(0))
        raise ValueError("the body's")
