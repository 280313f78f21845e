"""Folders that appear whole or not at all."""

import multiprocessing
import os
import stat
import time
from pathlib import Path

import pytest

from peftserve.model.publish import publish_folder


def _write(folder: Path) -> None:
    (folder / "file").write_text("whole")


def test_the_folder_appears_once_written(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"

    def write(folder: Path) -> None:
        assert not target.exists()
        (folder / "private").touch(mode=0o600)
        _write(folder)

    assert publish_folder(target, write) == target
    assert (target / "file").read_text() == "whole"
    assert stat.S_IMODE((target / "private").stat().st_mode) == 0o644
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == ["target"]


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    publish_folder(tmp_path / "target", _write)
    publish_folder(tmp_path / "target", lambda folder: pytest.fail("made again"))


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        _write(folder)
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        publish_folder(tmp_path / "target", fail)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    publish_folder(tmp_path / "target", _write)


def _die_half_way(target: Path) -> None:
    def die(folder: Path) -> None:
        (folder / "half").write_text("torn")
        os._exit(9)

    publish_folder(target, die)


def test_a_crash_leaves_no_target_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_die_half_way, args=(tmp_path / "target",))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert not (tmp_path / "target").exists()
    assert len(list(tmp_path.glob(".target.tmp-*"))) == 1
    publish_folder(tmp_path / "target", _write)
    assert list(tmp_path.glob(".target.tmp-*")) == []
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["file"]


def _write_slowly(target: Path, log: Path) -> None:
    def write(folder: Path) -> None:
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(0.3)
        _write(folder)

    publish_folder(target, write)


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    processes = [context.Process(target=_write_slowly, args=(tmp_path / "target", log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "made\n"
