"""What a run says of itself before it starts, and what it leaves: pictures, the best weights, weights for the hub."""

import dataclasses
import json

import pytest

from ref.runs import Run, asked, described, plan
from ref.train import main, run

from .small import SMALL
from .tools import exit_code, refusal


def test_the_plan_counts_what_an_iteration_does(capsys):
    """SD3.5 for 80 GB: with guidance each step is two passes, and the last of ten steps is not trained."""
    given = ["--preset", "sd35_medium", "--memory", "80", "--method", "pec", "--output-dir", "out"]
    given += ["--groups", "4", "--group-size", "6", "--steps", "10", "--window", "2"]
    said = planned(given, {"save_every": 20, "evaluate_every": 50, "log_with": "tensorboard"})
    assert "a LoRA of rank 32 of sd35_medium, 512 x 512 pixels, by pec, 1 process" in said["trained"]
    assert "4 prompts x 6 = 24 images; at most 480 passes of the model to draw them, 96 to train" in said["iteration"]
    assert "micro-batch 12, computed for 80 GB" in said["memory"]
    assert said["written"].endswith("out: metrics.json, images/, best/, weights/, logs/")
    # without guidance, two samples of each group, no evaluations between, no tracker
    given += ["--guidance-scale", "1", "--best-and-worst", "2"]
    said = planned(given, {"save_every": 20, "evaluate_every": 0, "log_with": "none"})
    assert "at most 240 passes of the model to draw them, 16 to train" in said["iteration"]
    assert said["written"].endswith("out: metrics.json, images/, weights/") and "before and after" in said["run"]


def planned(arguments: list[str], habits: dict) -> dict[str, str]:
    r = asked(Run, "ref.train", arguments)
    description = described(r.preset, r.method, r.weight, r.space, r.encoder, r.settings, r.options)
    return {line.split()[0]: line for line in plan(description, habits, r.output_dir).splitlines()}


def test_a_run_shows_a_plan_and_a_quiet_one_its_result_alone(tmp_path, capsys):
    for quiet in ([], ["--quiet"]):
        arguments = ["--preset", "mixture", "--method", "flow_grpo", "--iterations", "2", *quiet]
        assert main([*arguments, "--output-dir", str(tmp_path / f"run{len(quiet)}")]) == 0
        said = capsys.readouterr()
        assert ("2 iterations, a checkpoint every 20, evaluations before and after" in said.out) == (not quiet)
        assert ("flow_grpo: 100%" in said.err) == (not quiet)
        assert ("the first iteration took" in said.err) == (not quiet)
        assert not quiet or not said.err.strip()
        assert "results in" in said.out


def test_the_best_weights_are_those_of_the_best_evaluation(tmp_path, capsys):
    """The evaluations' rewards are given here, by one's own reward that knows them by their number of images.

    Nothing is evaluated twice: there are no more of them than one a time.
    """

    def rewards(*of_evaluations):
        left = iter(of_evaluations)

        def reward(images, prompts):
            return (
                [next_one] * len(images)
                if len(images) > 100 and (next_one := next(left))
                else images.flatten(1).mean(1)
            )

        return reward

    settings = dataclasses.replace(SMALL, iterations=3, lr=1e-3, clip=0.2)
    given = dict(progress=False, evaluate_every=1)
    result = run("mixture", "flow_grpo", tmp_path / "a", settings=settings, reward=rewards(0.1, 0.5, 0.9, 0.3), **given)
    assert result["best"] == {"iteration": 2, "reward": pytest.approx(0.9)}
    assert json.loads((tmp_path / "a" / "evaluation.json").read_text())["best"]["iteration"] == 2
    two = dataclasses.replace(settings, iterations=2)
    run("mixture", "flow_grpo", tmp_path / "b", settings=two, reward=rewards(0.1, 0.5, 0.9), **given)
    files = [path.name for path in (tmp_path / "a" / "best").iterdir()]
    assert files
    for name in files:
        best = (tmp_path / "a" / "best" / name).read_bytes()
        assert (
            best == (tmp_path / "b" / "weights" / name).read_bytes() != (tmp_path / "a" / "weights" / name).read_bytes()
        )
    # continued in Python, where its reward is; a worse one follows, and what was best stays so
    line = refusal(main, ["--output-dir", tmp_path / "a", "--resume"], capsys)
    assert "holds a run with a reward from Python; continue it there: run(..., resume=True)" in line
    more = dataclasses.replace(settings, iterations=4)
    again = run("mixture", "flow_grpo", tmp_path / "a", settings=more, reward=rewards(0.1, 0.4), resume=True, **given)
    assert again["best"]["iteration"] == 2 and (tmp_path / "a" / "best" / name).read_bytes() == best


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--preset", "sd35_medium", "--push-to-hub", "me/weights"], "not logged in to the hub; run `hf auth login`"),
        (["--preset", "sd35_medium", "--push-to-hub", "weights"], "--push-to-hub wants OWNER/NAME, got 'weights'"),
        (["--preset", "letters", "--push-to-hub", "me/weights"], "preset letters has nothing for the hub"),
        (["--preset", "letters", "--device", "mps"], "there is no mps device here; choose --device "),
        (
            ["--preset", "sd35_medium", "--per-reward"],
            "per_reward needs a sum of rewards, as in --reward pickscore:0.7+ocr",
        ),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    line = refusal(main, [*arguments, "--method", "pec", "--output-dir", tmp_path / "out"], capsys)
    assert message in line and not (tmp_path / "out").exists()


def test_a_directory_without_a_run_is_not_resumed(tmp_path, capsys):
    line = refusal(main, ["--output-dir", tmp_path / "out", "--resume"], capsys)
    assert "there is no run to continue in" in line and not (tmp_path / "out").exists()


def test_every_command_tells_its_version(capsys):
    assert exit_code(main, ["--version"]) == 0
    assert capsys.readouterr().out.startswith("ref 0.1.0, torch ")
