"""Killed, stopped, damaged: a run goes on bit for bit, and files are whole or absent."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from ref.scale import checkpoint
from ref.train import main, run

from ..small import LETTERS_SETTINGS, command, same


def started(folder, *extra):
    return subprocess.Popen(
        [sys.executable, "-m", "ref.train", *command(folder, *extra)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_killed_at_random_and_resumed_ends_bit_for_bit_as_the_uninterrupted_run(finished, tmp_path):
    process = started(tmp_path, "--save-every", "1")
    deadline = time.time() + 120
    while not checkpoint.checkpoints(tmp_path) and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))  # anywhere in the next iterations, in a write, in the evaluation
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    reached = checkpoint.load_latest(tmp_path)["iteration"]
    assert 1 <= reached <= 4
    if reached == 4:  # the machine was faster than the kill: go back to an earlier checkpoint
        checkpoint.checkpoints(tmp_path)[0].unlink()
    assert main(command(tmp_path, "--resume")) == 0
    assert same(checkpoint.load_latest(tmp_path), checkpoint.load_latest(finished))
    final = [json.loads((folder / "evaluation.json").read_text())["final"] for folder in (tmp_path, finished)]
    assert final[0] == final[1]


def test_sigterm_saves_at_once_and_ends_with_exit_code_0(tmp_path):
    """Between checkpoints that are far apart; resumed, the run ends as if nothing had happened."""
    endless = ["--lr-schedule", "constant", "--save-every", "1000000", "--ema", "0.5"]
    process = started(tmp_path / "stopped", *endless, "--iterations", "1000000")
    shown = ""
    while not re.search(r" [1-9]\d*/1000000", shown):  # the progress bar counts a finished iteration
        shown += process.stderr.read(1)
    process.send_signal(signal.SIGTERM)
    process.stderr.read()
    assert process.wait() == 0
    process.stderr.close()
    [saved] = checkpoint.checkpoints(tmp_path / "stopped")
    reached = int(saved.stem.partition("-")[2])
    assert len(json.loads((tmp_path / "stopped" / "metrics.json").read_text())) == reached >= 1
    more = [*endless, "--iterations", str(reached + 2)]
    assert main(command(tmp_path / "stopped", *more, "--resume")) == 0
    assert main(command(tmp_path / "whole", *more)) == 0
    states = [checkpoint.load_latest(tmp_path / name) for name in ("stopped", "whole")]
    assert states[0]["iteration"] == reached + 2 and states[0]["ema"] and same(*states)


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_used(finished, tmp_path, capsys):
    run("letters", "pec", tmp_path, settings=LETTERS_SETTINGS, save_every=1, progress=False)
    newest = checkpoint.checkpoints(tmp_path)[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    assert main(command(tmp_path, "--resume")) == 0
    warning = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(warning) == 1 and str(newest) in warning[0]
    assert same(checkpoint.load_latest(tmp_path), checkpoint.load_latest(finished))


def test_all_checkpoints_damaged_is_an_error_not_a_fresh_start(tmp_path, capsys):
    (tmp_path / "checkpoint-00000001.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        checkpoint.load_latest(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_says_what_to_do(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def full(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="free disk space"):
        checkpoint.atomic_write(path, full)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
