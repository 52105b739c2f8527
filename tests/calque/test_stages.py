from __future__ import annotations

import mmap
import time
from pathlib import Path

import pytest

from calque import stages
from calque.stages import Stages, peak_rss

MIB = 1 << 20


def ignore(_: str) -> None:
    pass


def test_stages_are_announced_as_they_begin_and_kept_in_order() -> None:
    told: list[str] = []
    measured = Stages(told.append)
    with measured("first"):
        assert told == ["first"]
        assert measured.done == []
    with measured("second"):
        pass
    assert told == ["first", "second"]
    assert [stage.name for stage in measured.done] == ["first", "second"]


def test_seconds_are_those_of_the_block() -> None:
    measured = Stages(ignore)
    with measured("sleep"):
        time.sleep(0.05)
    assert measured.done[0].seconds >= 0.05


def test_peak_is_that_of_its_own_stage() -> None:
    measured = Stages(ignore)
    # Pages of its own: what an allocator gives may be resident already. Freed at once, yet it was the peak.
    with measured("large"), mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.write(bytes(1) * len(block))
    with measured("small"):
        pass
    large, small = (stage.peak_rss_bytes for stage in measured.done)
    assert large - small > 48 * MIB


def test_stage_that_fails_is_not_among_the_done() -> None:
    measured = Stages(ignore)
    with pytest.raises(ValueError, match="inside"), measured("broken"):
        raise ValueError("inside")
    assert measured.done == []


def test_peak_of_the_whole_run_stands_in_where_the_system_keeps_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stages, "STATUS", tmp_path / "absent")
    monkeypatch.setattr(stages, "CLEAR", tmp_path / "absent" / "clear_refs")
    measured = Stages(ignore)
    with measured("anywhere"):
        pass
    assert measured.done[0].peak_rss_bytes == peak_rss() > 10 * MIB
