"""Runs and their directories: what is stored is trusted no further than it deserves, what is begun is not lost."""

import ast
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import ref
from ref import compare, presets, runs, train
from ref.__main__ import RUNS
from ref.__main__ import main as story
from ref.benchmark.__main__ import main as benchmark
from ref.options import Pipeline, command
from ref.presets import PRESETS
from ref.scale import checkpoint, directory, processes, signals
from ref.worlds.letters.base import main as letters_base

from ..small import same
from ..tools import exit_code, refusal

TINY = ["--groups", "2", "--group-size", "4", "--updates", "1", "--steps", "4", "--save-every", "1"]
PEC = ["--preset", "mixture", "--method", "pec", *TINY]


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C as a command has it: who runs the tests may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(folder, *extra, of=PEC) -> int:
    return exit_code(train.main, [*of, "--output-dir", folder, *extra])


def resume(folder, *extra) -> list:
    return ["--output-dir", folder, "--resume", *extra]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A finished run of three iterations."""
    folder = tmp_path_factory.mktemp("three")
    assert start(folder, "--iterations", "3") == 0
    return folder


@pytest.fixture
def copy(three, tmp_path):
    return Path(shutil.copytree(three, tmp_path / "copy"))


# stored results, and the length of a run


@pytest.mark.parametrize(
    "preset, runs, words",
    [
        ("mixture", ["flow_grpo", "flow_grpo"], "flow_grpo is given twice"),
        ("mixture", ["pec", "pec:0.05"], "pec and pec:0.05 are the same run"),
        ("mixture", ["pec:1", "pcvae", "pec:1.0"], "pec:1 and pec:1.0 are the same run"),
        ("mixture", ["pec@perceptual:5e-2", "pec/direction"], "are the same run"),
        ("letters", ["pec/contrastive", "pec@perceptual"], "are the same run"),
        ("letters", ["pec/direction"], "letters has contrastive, preference, faces, sharp"),
    ],
)
def test_a_run_counts_once_whatever_its_name(preset, runs, words, tmp_path, capsys):
    arguments = ["--preset", preset, "--output-dir", tmp_path / "x", "--runs", *runs]
    assert words in refusal(compare.main, arguments, capsys)
    assert not names(tmp_path)


def test_the_presets_encoders_are_those_that_a_runs_name_knows():
    for preset, encoders in compare.ENCODERS.items():
        with pytest.raises(ValueError, match=f"this preset has {', '.join(encoders)}$"):
            PRESETS[preset].task("nobody")


@pytest.fixture
def small_mixture(monkeypatch):
    small = dict(groups=2, group_size=4, steps=4)
    settings = dataclasses.replace(PRESETS["mixture"].settings, **small)
    monkeypatch.setitem(PRESETS, "mixture", dataclasses.replace(PRESETS["mixture"], settings=settings))


def mixture(iterations: int) -> runs.Work:
    return runs.Work(preset="mixture", settings=dataclasses.replace(PRESETS["mixture"].settings, iterations=iterations))


def test_a_stored_result_is_served_to_those_settings_only(small_mixture, tmp_path, capsys, monkeypatch):
    def one(name, iterations):
        row = compare.one(mixture(iterations), "pec", 0, tmp_path / name)["row"]
        return {key: value for key, value in row.items() if key != "seconds"}

    short = one("a", 1)
    longer = one("a", 3)  # the learning rate is constant: the same run, continued
    assert longer == one("b", 3) != short
    arguments = ["--preset", "mixture", "--runs", "pec", "--seeds", "1", "--output-dir", tmp_path / "a"]
    assert "has reached iteration 3, more than 2" in refusal(compare.main, [*arguments, "--iterations", "2"], capsys)
    changed = dataclasses.replace(PRESETS["mixture"].settings, lr=0.5)
    monkeypatch.setitem(PRESETS, "mixture", dataclasses.replace(PRESETS["mixture"], settings=changed))
    assert "lr = 0.001, not 0.5" in refusal(compare.main, [*arguments, "--iterations", "3"], capsys)
    assert "preset = mixture, not letters" in refusal(compare.main, [*arguments, "--preset", "letters"], capsys)


@pytest.mark.parametrize("summary", ["half a fi", "[]", '{"row": {}, "base": {}}', '{"made_by": {"format": 0}}', None])
def test_a_summary_that_cannot_be_used_is_made_again(summary, small_mixture, tmp_path):
    first = compare.one(mixture(1), "pec", 0, tmp_path)
    file = tmp_path / "pec_seed0" / "summary.json"
    file.write_text(summary if summary is not None else file.read_text().replace('"seed": 0', '"seed": 1'))
    assert compare.one(mixture(1), "pec", 0, tmp_path) == first == json.loads(file.read_text())


@pytest.mark.parametrize(
    "change, words", [(["--seed", "1"], "seed = 2, not 1"), (["--iterations", "60"], "iterations = 1 ")]
)
def test_the_story_refuses_a_folder_of_other_settings_before_it_trains(change, words, tmp_path, monkeypatch, capsys):
    """At a rate that falls to 0 at the last iteration: one that stays lets more iterations go on."""
    falling = dataclasses.replace(PRESETS["letters"].settings, lr_schedule="cosine")
    monkeypatch.setitem(PRESETS, "letters", dataclasses.replace(PRESETS["letters"], settings=falling))
    settings = dataclasses.replace(falling, iterations=1, seed=2)
    for method, weight in RUNS.items():
        directory.write_json(
            tmp_path / method / "run.json", runs.described("letters", method, weight, None, None, settings)
        )
    (tmp_path / "pec" / "checkpoint-00000001.pt").touch()  # the last of the three
    assert words in refusal(story, ["--output-dir", tmp_path, "--iterations", "1", *change], capsys)
    assert names(tmp_path) == sorted(RUNS)


def test_more_iterations_are_one_long_run_or_refused(three, copy, tmp_path, capsys):
    assert exit_code(train.main, resume(copy, "--iterations", "5")) == 0
    assert start(tmp_path / "long", "--iterations", "5") == 0
    assert same(checkpoint.load_latest(copy), checkpoint.load_latest(tmp_path / "long"))
    assert json.loads((copy / "run.json").read_text())["settings"]["iterations"] == 5
    assert json.loads((copy / "evaluation.json").read_text())["iterations"] == 5
    assert "has reached iteration 5, more than 4" in refusal(train.main, resume(copy, "--iterations", "4"), capsys)
    assert exit_code(train.main, resume(copy)) == 0  # as long as run.json says now

    cosine = tmp_path / "cosine"
    assert start(cosine, "--iterations", "2", "--lr-schedule", "cosine") == 0
    before = (cosine / "run.json").read_text()
    for n in (1, 3, 100):
        line = refusal(train.main, resume(cosine, "--iterations", n), capsys)
        assert f"iterations = 2 and a learning rate that falls until then, not {n}" in line and "--output-dir" in line
    assert (cosine / "run.json").read_text() == before


# checkpoints


def rewrite(folder: Path, change) -> Path:
    newest = checkpoint.checkpoints(folder)[0]
    state = torch.load(newest, weights_only=True)
    changed = change(state)
    torch.save(state if changed is None else changed, newest)
    return newest


def other_shape(state):
    name = next(iter(state["weights"]))
    state["weights"][name] = state["weights"][name][:1]


def other_type(state):
    name = next(iter(state["weights"]))
    state["weights"][name] = state["weights"][name].double()


def other_name(state):
    state["weights"] = {f"model.{name}": weight for name, weight in state["weights"].items()}


INCOMPATIBLE = {
    "a shape that broadcasts": (other_shape, r"residual\S+ is \[1, \d+\] float32 there, \[\d+, \d+\] float32 in the model"),
    "another type": (other_type, r"float64 there, \[\d+, \d+\] float32 in the model"),
    "other names": (other_name, r"is missing there, \[\d+, \d+\] float32 in the model"),
    "a moment": (lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)), r"the exp_avg of \S+ is \[3\] float32"),
    "a list": (lambda s: [s], "not a checkpoint of this project .it holds a list"),
    "a tensor": (lambda s: torch.zeros(3), "not a checkpoint of this project .it holds a Tensor"),
    "no weights": (lambda s: {k: v for k, v in s.items() if k != "weights"}, "it lacks 'weights'"),
    "no optimiser": (lambda s: s.update(optimizer={}), "not a checkpoint of this project"),
    "no history": (lambda s: {k: v for k, v in s.items() if k != "history"}, "not a checkpoint of this project"),
    "another iteration": (lambda s: s.update(iteration=7), "it is of iteration 7"),
    "words for numbers": (lambda s: s.update(bandwidth="1"), "its bandwidth is a str"),
    "a number for the multiplier": (lambda s: s.update(multiplier=1.0), "its multiplier is a float"),
    "another run": (lambda s: s["run"].update(seed=5), "holds a run with seed = 5, not 0"),
    "other prompts": (lambda s: s.update(prompts=["a cat"]), "other prompts"),
}  # fmt: skip


@pytest.mark.parametrize("case", INCOMPATIBLE)
def test_a_checkpoint_of_something_else_is_refused(case, copy, capsys):
    change, words = INCOMPATIBLE[case]
    newest, before = rewrite(copy, change), names(copy)
    line = refusal(train.main, resume(copy, "--iterations", "4"), capsys)
    assert re.search(words, line) and str(newest) in line or case == "other prompts" and words in line
    assert "delete" not in line and names(copy) == before


@pytest.mark.parametrize("damage", ["a bit", "half", "empty"])
def test_damage_costs_one_interval(damage, copy, tmp_path, capsys):
    """One flipped bit in the weights: torch.load alone would not see it."""
    newest = checkpoint.checkpoints(copy)[0]
    content = bytearray(newest.read_bytes())
    weights = torch.load(newest, weights_only=True)["weights"]
    longest = max(weights.values(), key=torch.numel).numpy().tobytes()
    content[content.index(longest) + 10] ^= 1
    newest.write_bytes({"a bit": content, "half": content[: len(content) // 2], "empty": b""}[damage])
    capsys.readouterr()
    assert exit_code(train.main, resume(copy)) == 0
    [warning] = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert str(newest) in warning
    assert start(tmp_path / "whole", "--iterations", "3") == 0
    assert same(checkpoint.load_latest(copy), checkpoint.load_latest(tmp_path / "whole"))
    for file in checkpoint.checkpoints(copy):
        file.write_bytes(b"half a file")
    capsys.readouterr()
    assert exit_code(train.main, resume(copy)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: no readable checkpoint") and str(copy) in line and "delete" not in line


@pytest.fixture
def measured(monkeypatch):
    """The mixture with a measure, or a reward, of one's own."""

    def change(**changes):
        build = presets.mixture

        def changed(encoder=None):
            task = build(encoder)
            return dataclasses.replace(task, **{name: make(getattr(task, name)) for name, make in changes.items()})

        monkeypatch.setitem(PRESETS, "mixture", dataclasses.replace(PRESETS["mixture"], build=changed))

    return change


@pytest.mark.parametrize("number", [np.float64(1), np.float32(0.5), np.int64(3), np.bool_(True), torch.tensor(2.0)])
def test_a_measure_may_return_any_number(number, measured, tmp_path, capsys):
    measured(measures=lambda _: {"mine": lambda images, prompts: number})
    assert start(tmp_path / "run", "--iterations", "1", "--evaluate-every", "1") == 0
    assert exit_code(train.main, resume(tmp_path / "run", "--iterations", "2")) == 0
    assert "damaged" not in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())[1]["eval_mine"] == number


# run.json


def edited(change):
    def edit(text):
        record = json.loads(text)
        change(record)
        return json.dumps(record)

    return edit


RECORDS = {
    "half": (lambda text: text[: len(text) // 2], "line"),
    "empty": (lambda text: "", "line 1"),
    "a list": (lambda text: "[]", "it holds a list"),
    "not UTF-8": (lambda text: b"\xff\xfe{}", "utf-8"),
    "an unknown name": (edited(lambda r: r.update(learning_rate=1)), "there is no option learning_rate"),
    "an unknown setting": (edited(lambda r: r["settings"].update(rate=1)), "there is no option"),
    "a directory of its own": (edited(lambda r: r.update(output_dir="/tmp")), "there is no option output_dir"),
    "no settings": (edited(lambda r: r.pop("settings")), "settings is missing"),
    "no method": (edited(lambda r: r.pop("method")), "method is missing"),
    "no weight": (edited(lambda r: r.pop("weight")), "weight is missing"),
    "no lr": (edited(lambda r: r["settings"].pop("lr")), "lr is missing"),
    "words for a number": (edited(lambda r: r["settings"].update(lr="fast")), "lr must be a valid number"),
    "a list of settings": (edited(lambda r: r.update(settings=[1])), "settings must be an object"),
    "an unknown preset": (edited(lambda r: r.update(preset="sdxl")), "preset must be"),
    "a number for the method": (edited(lambda r: r.update(method=3)), "method must be"),
    "a large preset without options": (edited(lambda r: r.update(preset="sd35_medium")), "options is missing"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_damaged_record_is_named(case, copy, capsys):
    change, words = RECORDS[case]
    record, before = copy / "run.json", names(copy)
    content = change(record.read_text())
    record.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refusal(train.main, resume(copy), capsys)
    assert str(record) in line and words in line and "--output-dir" in line
    assert names(copy) == before


@pytest.mark.parametrize("kept", ["checkpoint-00000003.pt", "metrics.json", "weights"])
@pytest.mark.parametrize("how", [[], ["--resume"]])
def test_a_directory_with_results_but_no_record_is_refused(kept, how, copy, capsys):
    for path in copy.iterdir():
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    line = refusal(train.main, [*PEC, "--output-dir", copy, *how], capsys)
    assert f"holds {kept} but no run.json" in line and "put run.json back" in line
    assert names(copy) == [kept]


def test_metrics_without_a_checkpoint_are_no_fresh_start(copy, capsys):
    for path in checkpoint.checkpoints(copy):
        path.unlink()
    assert "holds metrics.json but no checkpoint" in refusal(train.main, resume(copy), capsys)


@pytest.mark.parametrize("how", [[], ["--resume"]])
@pytest.mark.parametrize("wrong", [["--encoder", "nobody"], ["--method", "flow_grpo", "--weight", "5"]])
def test_a_refused_start_leaves_nothing(wrong, how, tmp_path, capsys):
    folder = tmp_path / "some" / "where"
    refusal(train.main, [*PEC, "--output-dir", folder, *how, *wrong], capsys)
    assert not names(tmp_path)
    assert start(folder, "--iterations", "0", *how) == 0


def test_what_fails_at_first_leaves_nothing_and_what_fails_later_is_kept(measured, tmp_path, capsys):
    calls, fails = [], [0]

    def failing(reward):
        def call(images, prompts):
            calls.append(1)
            return reward(images, prompts) * (float("nan") if len(calls) == fails[0] else 1)

        return call

    measured(reward=failing)
    fails[0] = 2  # the first is the evaluation's
    assert start(tmp_path / "a", "--log-with", "tensorboard") == 2
    assert not names(tmp_path)
    calls.clear(), fails.__setitem__(0, 4)
    assert start(tmp_path / "a", "--save-every", "100") == 2
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "a")] == ["checkpoint-00000002.pt"]
    assert "Traceback" not in capsys.readouterr().err
    assert "continue it with --resume" in refusal(train.main, [*PEC, "--output-dir", tmp_path / "a"], capsys)
    assert exit_code(train.main, resume(tmp_path / "a", "--iterations", "3")) == 0


def test_a_start_that_was_killed_hinders_nobody(tmp_path):
    """run.json, a lock, and half a file, but no checkpoint: nothing that could be lost."""
    (tmp_path / "run.json").write_text("{")
    (tmp_path / "run.lock").write_text("1")
    (tmp_path / "checkpoint-00000001.pt.tmp").write_text("half")
    assert start(tmp_path, "--iterations", "1") == 0
    assert names(tmp_path) == ["checkpoint-00000001.pt", "evaluation.json", "metrics.json", "run.json", "weights"]


def test_what_a_resumed_run_may_have_otherwise(tmp_path):
    def description(**changes):
        preset = PRESETS["sd35_medium"]
        return runs.described(
            "sd35_medium", "pec", None, None, None, preset.settings, preset.options.model_copy(update=changes)
        )

    directory.write_json(tmp_path / "run.json", description())
    (tmp_path / "checkpoint-00000001.pt").touch()
    other = dict(gradient_checkpointing=True, decode_batch=1, memory=24, tiling=True, compile_blocks=True)
    for name, value in other.items():
        directory.refuse_another(tmp_path, description(**{name: value}))
    for name in set(Pipeline.model_fields) - {*other, "cache_dir"}:
        value = getattr(PRESETS["sd35_medium"].options, name)
        value = not value if isinstance(value, bool) else value + 1 if isinstance(value, (int, float)) else "other"
        with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match=f"holds a run with {name} = "):
            directory.refuse_another(tmp_path, description(**{name: value}))


def test_habits_are_remembered_and_may_change(copy):
    (copy / "run.json").write_text((copy / "run.json").read_text().replace('"save_every": 1', '"save_every": 2'))
    assert exit_code(train.main, resume(copy, "--iterations", "5", "--log-with", "tensorboard")) == 0
    assert [checkpoint.iteration(path) for path in checkpoint.checkpoints(copy)] == [5, 4]  # and the last
    record = json.loads((copy / "run.json").read_text())
    assert (record["save_every"], record["log_with"]) == (2, "tensorboard")


# one process a directory; signals


def test_one_process_a_directory(copy, capsys):
    with directory.Alone(copy):
        line = refusal(train.main, resume(copy), capsys)
        assert str(copy) in line and f"({os.getpid()})" in line
        run = ["--preset", "mixture", "--output-dir", copy, "--runs", "pec", "--seeds", "1"]
        assert "is at work in" in refusal(compare.main, run, capsys)
        assert "is at work in" in refusal(story, ["--output-dir", copy], capsys)
    assert exit_code(train.main, resume(copy)) == 0 and "run.lock" not in names(copy)


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = "import sys, time; from ref.scale.directory import Alone; from pathlib import Path\n"
    code += "lock = Alone(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=rf"another process \({process.pid}\) is at work in"):
        directory.Alone(tmp_path)
    process.kill()
    process.communicate()
    directory.Alone(tmp_path).leave()
    assert not names(tmp_path)


def test_ctrl_c_saves_says_how_to_go_on_and_ends_with_130(measured, tmp_path, capsys):
    calls = []

    def interrupted(reward):
        def call(images, prompts):
            calls.append(1)
            if len(calls) == 4:  # the third iteration's
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)  # a launcher hands it on
                time.sleep(0.1)
            return reward(images, prompts)

        return call

    measured(reward=interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert start(tmp_path / "run", "--iterations", "4", "--save-every", "100") == 130
    assert signal.getsignal(signal.SIGINT) is before
    [line] = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    assert f"iteration 2 is saved in {tmp_path / 'run'}" in line
    assert exit_code(train.main, line.partition("python -m ref.train ")[2].split()) == 0
    assert start(tmp_path / "whole", "--iterations", "4") == 0
    assert same(*(checkpoint.load_latest(tmp_path / name) for name in ("run", "whole")))


def test_ctrl_c_before_the_first_iteration_leaves_nothing(measured, tmp_path, capsys):
    measured(encoder=lambda encoder: lambda images: os.kill(os.getpid(), signal.SIGINT) or encoder(images))
    assert start(tmp_path / "run") == 130
    assert "nothing is left behind; the same command starts again" in capsys.readouterr().err
    assert not names(tmp_path)


def test_a_second_ctrl_c_waits_for_nothing():
    began = time.monotonic()
    for seconds in (0.2, 1.5):
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), signals.stopping(lambda: time.sleep(20)):
        time.sleep(20)
    assert 1.4 < time.monotonic() - began < 10


def test_ignored_signals_stay_ignored_and_windows_has_no_sighup(monkeypatch):
    stops = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with signals.stopping(lambda: stops.append(1)):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not stops
    monkeypatch.delattr(signal, "SIGHUP")
    assert signals.ending() == [signal.SIGTERM]


def popen(module: str, *arguments) -> subprocess.Popen:
    words = [sys.executable, "-m", module, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    heeded = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, by the children too
    try:
        return subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGHUP, heeded)


def alive(session: int) -> list[str]:
    found = subprocess.run(["ps", "-o", "stat=,args=", "-s", str(session)], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if not line.startswith("Z")]


def until(condition, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def test_signals_save_and_end_at_once(tmp_path):
    """A run by SIGTERM, one by SIGHUP, and a comparison of six by Ctrl-C from a terminal, which all its processes get."""
    endless = ["--iterations", "1000000", "--save-every", "20"]
    runs = {number: popen("ref.train", *PEC, *endless, "--output-dir", tmp_path / number.name)
            for number in (signal.SIGTERM, signal.SIGHUP)}  # fmt: skip
    many = [
        "--preset",
        "mixture",
        "--runs",
        "flow_grpo",
        "pec",
        "--seeds",
        "3",
        "--iterations",
        "1000000",
        "--jobs",
        "2",
    ]
    comparison = popen("ref.compare", *many, "--output-dir", tmp_path / "compare")
    try:
        for number, process in runs.items():
            until(lambda: checkpoint.checkpoints(tmp_path / number.name))
            process.send_signal(number)
            said = process.communicate(timeout=60)[1]
            assert process.returncode == 0 and "stopped; iteration " in said and "Traceback" not in said
            saved = checkpoint.load_latest(tmp_path / number.name)
            assert f"iteration {saved['iteration']} is saved" in said
            assert "run.lock" not in names(tmp_path / number.name)
        until(lambda: len(list((tmp_path / "compare").glob("*/checkpoint-*.pt"))) >= 2)
        began = time.time()
        os.killpg(comparison.pid, signal.SIGINT)
        said = comparison.communicate(timeout=60)[1]
        assert comparison.returncode == 130 and time.time() - began < 30
        lines = [line for line in said.splitlines() if line and "runs:" not in line]
        assert lines == ["stopped; 0 of 6 runs are finished, those begun are saved; the same command goes on"]
        assert names(tmp_path / "compare") == ["flow_grpo_seed0", "pec_seed0"]
        until(lambda: not alive(comparison.pid), 20)
    finally:
        for process in (*runs.values(), comparison):
            process.kill()
            process.communicate()


# places, platforms, processes


def places(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize("where", ["file", "file/below", "folder/" + "x" * 300])
@pytest.mark.parametrize(
    "main, arguments",
    [(train.main, PEC), (compare.main, ["--preset", "mixture"]), (story, []), (letters_base, ["--scale", "1e-6"])],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(main, arguments, where, tmp_path, capsys):
    folder = places(tmp_path) / where
    assert "--output-dir" in refusal(main, [*arguments, "--output-dir", folder], capsys)
    assert names(tmp_path) == ["file", "folder"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("where", ["folder", "file/x.json", "folder/\0.json"])
def test_a_benchmark_tries_its_file_first(where, tmp_path, capsys):
    arguments = ["--preset", "mixture", "--json", places(tmp_path) / where]
    assert "cannot write --json" in refusal(benchmark, arguments, capsys)


def test_a_benchmark_makes_the_folder_of_its_file(tmp_path):
    small = ["--groups", "2", "--group-size", "4", "--steps", "3", "--repeats", "3", "--warmup", "1"]
    assert exit_code(benchmark, ["--preset", "mixture", *small, "--json", tmp_path / "new" / "x.json"]) == 0
    assert json.loads((tmp_path / "new" / "x.json").read_text())["preset"] == "mixture"


@pytest.mark.parametrize("there", ["phi.safetensors", "vae", "transformer"])
def test_base_weights_are_not_overwritten_unasked(there, tmp_path, capsys):
    (tmp_path / there).mkdir()
    line = refusal(letters_base, ["--output-dir", tmp_path, "--scale", "1e-6"], capsys)
    assert str(tmp_path / there) in line and "--overwrite" in line


def test_base_weights_do_not_go_into_the_package_by_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "ref.worlds.letters.base.make", lambda folder, *_: (tmp_path / "to").write_text(str(folder)) and {}
    )
    assert exit_code(letters_base, []) == 0
    assert (tmp_path / "to").read_text() == "outputs/letters_base"


def test_nothing_of_one_system_alone_is_imported():
    """At import; within a function it may be guarded."""
    alone = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "msvcrt", "winreg"}
    for path in Path(ref.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        tops = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        found = {getattr(node, "module", None) or alias.name for node in tops for alias in node.names}
        assert not found & alone, path
        assert "signal.SIGHUP" not in path.read_text(), path


@pytest.mark.parametrize("number", [0, 1])
def test_of_several_processes_the_first_one_speaks(number, monkeypatch, capsys):
    """Another one waits for the launcher to end it, and speaks when it does not."""
    events = []
    monkeypatch.setenv("RANK", str(number))
    monkeypatch.setattr(time, "sleep", lambda seconds: events.append(capsys.readouterr().err))
    monkeypatch.setattr(os, "_exit", lambda code: events.append(code))
    arguments = ["--preset", "mixture", "--method", "pec", "--output-dir", "x"]
    for wrong in (["--preset", "nobody"], ["--groups", "0"], ["--height", "64"]):
        events.clear()
        processes.one_voice(command, train.train_as_asked, [*arguments, *wrong])
        assert events == ([2] if number == 0 else ["", 2])
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
