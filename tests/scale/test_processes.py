"""Two processes are one, on one machine or on two: launched for real, on the CPU with gloo, on a tiny SD3 of the real classes."""

import json

import pytest
import torch

from ref.models import tiny
from ref.scale import checkpoint
from ref.scale.processes import Share, deal, deal_padded
from ref.train import main

from ..tools import flags
from .tools import PROMPTS, gradients, launch, order_of_sums


def test_two_processes_give_one_process_s_gradients_metrics_and_evaluation(tmp_path):
    """Clip-Cov, whose choice is over the whole batch; three evaluation prompts for two processes; resume on one.

    The two are launched as README has it for two machines, each in a folder of its own; --output-dir is common.
    """
    tiny.sd3(tmp_path / "sd3")
    tiny.clip(tmp_path / "clip")
    (tmp_path / "train.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "evaluation.txt").write_text("\n".join(PROMPTS[:3]))
    values = dict(
        preset="sd35_medium", method="clip_cov", weight=0.3, space="perceptual", model=tmp_path / "sd3",
        reward=f"pickscore={tmp_path / 'clip'}", encoder=f"pickscore={tmp_path / 'clip'}",
        prompts=tmp_path / "train.txt", evaluation_prompts=tmp_path / "evaluation.txt", evaluation_steps=2,
        images_per_prompt=32, height=32, width=32, max_sequence_length=16, lora_rank=4, cache_dir=tmp_path / "cache",
        groups=4, group_size=16, updates=1, micro_batch=16, decode_batch=16, steps=3, grad_clip=1e9, save_every=1,
        log_with="none",
    )  # fmt: skip
    # Every network sees batches of one size however many processes there are (16 samples, 16 images to decode, 32 to
    # encode): the same kernels on the same shapes, so that only the order in which gradients are added up differs.
    command = flags(values)

    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    assert main([*command, "--iterations", "2", "--output-dir", str(one)]) == 0
    machines = tmp_path / "first", tmp_path / "second"
    for folder in machines:
        folder.mkdir()
    process = launch(["-m", "ref.train", *command, "--iterations", "2", "--output-dir", str(two)], machines)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("results in") == 1  # one of them speaks
    assert not any(any(folder.iterdir()) for folder in machines)

    expected, found = gradients(one), gradients(two)
    tolerance = order_of_sums(4 * 2, expected.abs().max().item())  # micro-batches x trained steps
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert main([*command, "--iterations", "1", "--seed", "1", "--output-dir", str(other)]) == 0
    assert (gradients(other) - expected).abs().max() > max(1e3 * tolerance, 0.1 * expected.abs().max())  # a mistake

    history = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    for mine, theirs in zip(*history):
        for name in mine:
            if not name.startswith("seconds"):
                # from the second iteration on AdamW has amplified the gradients' roundings
                assert theirs[name] == pytest.approx(mine[name], rel=1e-6 if mine["iteration"] == 1 else 1e-3), name
    results = [json.loads((folder / "evaluation.json").read_text()) for folder in (one, two)]
    assert results[1]["base"] == pytest.approx(results[0]["base"], rel=1e-5)  # 96 images averaged: 96 eps = 1.1e-5 / 2
    assert results[1]["final"] == pytest.approx(results[0]["final"], rel=1e-3)

    # a checkpoint knows nothing of how many processes wrote it
    assert main([*command, "--iterations", "3", "--resume", "--output-dir", str(two)]) == 0
    assert checkpoint.load_latest(two)["iteration"] == 3


def test_groups_that_cannot_be_shared_out_are_refused_before_anything_is_trained(tmp_path):
    arguments = ["--preset", "mixture", "--method", "pec", "--groups", "3", "--output-dir", str(tmp_path)]
    process = launch(["-m", "ref.train", *arguments])
    assert process.returncode != 0
    assert "groups (3) must be a multiple of updates x processes (1 x 2)" in process.stderr
    last = process.stderr.rstrip("=\n").splitlines()[-1]  # below the launcher's own words
    assert "error: groups (3) must be a multiple" in last
    assert not checkpoint.checkpoints(tmp_path)


def test_one_process_owns_everything_and_exchanges_nothing():
    share = deal(5, 2)
    values = torch.randn(5, 2)
    assert share.mine == [0, 1, 2, 3, 4] and share.gather(values) is values
    assert deal_padded(3) == Share([[0, 1, 2]])
