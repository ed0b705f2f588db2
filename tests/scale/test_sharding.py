"""All weights in parts on two processes: launched for real, on the CPU with gloo, on tiny pipelines of the real classes."""

import dataclasses
import functools
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from ref.grpo import calibrate_on, start, train
from ref.methods import METHODS
from ref.models import tiny
from ref.models.load import load
from ref.options import Pipeline
from ref.presets import PRESETS
from ref.sampling import pick_prompts
from ref.scale import checkpoint
from ref.scale.processes import rank
from ref.scale.weights import trainable
from ref.settings import Settings
from ref.train import run

from .tools import PROMPTS, gradients, launch, order_of_sums


def options(world: Path, kind: str, **changes) -> Pipeline:
    return Pipeline(
        model=str(world / kind), reward=f"pickscore={world / 'clip'}", prompts=str(world / "train.txt"),
        evaluation_prompts=str(world / "train.txt"), evaluation_steps=2, height=32, width=32,
        max_sequence_length=16, lora_rank=0, decode_batch=16, cache_dir=world / "cache", **changes,
    )  # fmt: skip


def small(preset: str, **changes):
    """The gradient is clipped, its mean is over four micro-batches and two steps, and there are averages.

    Every network sees batches of one size however many processes there are (16 samples, 16 images to decode, 32 to
    encode): the same kernels on the same shapes, so that only the order in which gradients are added up differs.
    """
    values = dict(
        groups=4,
        group_size=16,
        updates=1,
        micro_batch=16,
        images_per_prompt=16,
        steps=3,
        grad_clip=0.05,
        ema=0.5,
        ema_every=1,
        iterations=2,
    )
    return dataclasses.replace(PRESETS[preset].settings, **values | changes)


def fine_tune(world: Path, name: str, resume: bool = False, **changes) -> None:
    """Full fine-tuning of SD3 in float32, with a KL to the frozen copy of the base."""
    run("sd35_medium", "flow_grpo_kl", world / name, settings=small("sd35_medium", **changes), resume=resume,
        save_every=1, progress=False, encoder=f"pickscore={world / 'clip'}", options=options(world, "sd3"))  # fmt: skip


def on_a_gpu(world: Path):
    """As on a GPU: FLUX in bfloat16 with gradient checkpointing. Its state after an iteration."""
    settings = small("flux_dev", grad_clip=1e9)
    with mock.patch("ref.models.load.load", functools.partial(load, dtype=torch.bfloat16)):
        build = options(world, "flux", gradient_checkpointing=True)
        task = PRESETS["flux_dev"].task(f"pickscore={world / 'clip'}", build)
    assert task.model.dtype == torch.bfloat16 and task.model.transformer.is_gradient_checkpointing
    state = start(task.model, settings)
    return next(train(task.model, task.prompts, task.reward, task.encoder, METHODS["flow_grpo_kl"](), settings, state))


def from_one_start(same_noise: bool = True) -> tuple[torch.Tensor, dict]:
    """The mixture's first gradient, groups walking as one until their window, the last two of four groups flat; and metrics.

    Two groups of four walk at once however many processes there are, as two samples of a micro-batch: the same shapes.
    """
    task, prompts = PRESETS["mixture"].task(), list("abcd")
    settings = Settings(groups=4, group_size=4, updates=1, micro_batch=2, steps=6, window=2, same_noise=same_noise, seed=1,
                        grad_clip=1e9, iterations=1)  # fmt: skip
    told_apart = pick_prompts(prompts, settings, 0)[:2]
    reward = lambda x, asked: x[:, 0] * torch.tensor([float(p in told_apart) for p in asked])  # noqa: E731
    state = next(train(task.model, prompts, reward, task.encoder, METHODS["gardo"](clip=0.1), settings))
    assert state.samples.trajectory.steps[0] > 0  # what is walked together
    return torch.cat([w.grad.flatten() for w in trainable(task.model).values()]), state.metrics


def held_diversity() -> list[float]:
    """lambda and the weight in use over three iterations of the mixture under a target (proofs/P19)."""
    task = PRESETS["mixture"].task()
    settings = Settings(
        groups=4, group_size=8, updates=1, micro_batch=8, steps=4, iterations=3, target_diversity=0.95, seed=1
    )
    state = start(task.model, settings)
    calibrate_on(state, task.prompts, task.encoder, settings)
    run = train(task.model, task.prompts, task.reward, task.encoder, METHODS["pec"](), settings, state)
    return [weight for at in run for weight in (at.weight, at.metrics["weight"])]


def share_of(tensors) -> float:
    """How much of the tensors this process holds."""
    tensors = list(tensors)
    return sum(t.to_local().numel() for t in tensors) / sum(t.numel() for t in tensors)


def in_parts(world: Path) -> None:
    """What each of two processes does for the test below."""
    torch.set_num_threads(1)
    fine_tune(world, "two")
    if rank() == 0:  # as if it had been killed after its first iteration
        (world / "half").mkdir()
        for file in ("run.json", "checkpoint-00000001.pt"):
            shutil.copy(world / "two" / file, world / "half" / file)
    torch.distributed.barrier()
    fine_tune(world, "half", resume=True)
    try:  # as on two machines that share no folder
        fine_tune(world, "two" if rank() == 0 else "nowhere", resume=True, iterations=3)
    except ValueError as error:
        (world / f"unshared-{rank()}.txt").write_text(str(error))
    gradient, metrics = from_one_start()
    torch.save((gradient, metrics), world / f"mixture-{rank()}.pt")
    (world / f"lambda-{rank()}.json").write_text(json.dumps(held_diversity()))
    state = on_a_gpu(world)
    trained, moments = state.model.transformer, state.optimizer.state.values()
    held = {
        "weights": share_of(trained.parameters()),
        "gradients": share_of(p.grad for p in trained.parameters()),
        "moments": share_of(m[key] for m in moments for key in ("exp_avg", "exp_avg_sq")),
        "averages": share_of(state.ema.values()),
        "base": share_of(state.model.base.parameters()),
        "ratio_error": state.metrics["ratio_error"],
    }
    (world / f"held-{rank()}.json").write_text(json.dumps(held))
    saved = checkpoint.snapshot(state.state_dict())
    if rank() == 0:
        checkpoint.save(world, saved)
    torch.distributed.destroy_process_group()


def test_full_fine_tuning_in_parts_is_that_of_one_process(tmp_path):
    """Two processes hold half of everything each; the weights after a step, metrics, checkpoints are one's."""
    import diffusers

    tiny.sd3(tmp_path / "sd3")
    tiny.flux(tmp_path / "flux")
    tiny.clip(tmp_path / "clip")
    (tmp_path / "train.txt").write_text("\n".join(PROMPTS))
    fine_tune(tmp_path, "one")
    process = launch(["-m", __name__, str(tmp_path)])
    assert process.returncode == 0, process.stderr

    def saved(name: str, iteration: int) -> dict:
        return torch.load(tmp_path / name / f"checkpoint-{iteration:08d}.pt", weights_only=True)

    base = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "sd3" / "transformer").state_dict()
    one, two = saved("one", 1), saved("two", 1)
    expected, found = gradients(tmp_path / "one"), gradients(tmp_path / "two")
    tolerance = order_of_sums(4 * 2, expected.abs().max().item())  # micro-batches x trained steps
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    # AdamW's first step is lr g / (|g| + 1e-8): a gradient known to +- tolerance leaves it known to the difference below
    lr, grown = small("sd35_medium").lr, lambda g: g / (g + 1e-8)
    size, eps = expected.abs(), torch.finfo(torch.float32).eps
    unsure = (grown(size + tolerance) - grown((size - tolerance).clamp_min(0))).where(size > tolerance, 2.0)
    for kind in ("weights", "ema"):
        assert list(one[kind]) == list(two[kind])
        a, b = (torch.cat([w.flatten() for w in run[kind].values()]) for run in (one, two))
        assert ((a - b).abs() <= lr * unsure + 4 * eps * (a.abs() + lr)).all()  # and the step's own roundings
        assert (unsure < 0.01).float().mean() > 0.5  # for most weights that is a hundredth of the step at most
        moved = max((w - base[name.removeprefix("transformer.")]).abs().max() for name, w in one[kind].items())
        assert moved > 0.3 * lr
    history = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two", "half")]
    for mine, theirs in zip(*history[:2]):
        assert mine["ratio_error"] == theirs["ratio_error"] == 0
        for name in mine:
            if not name.startswith("seconds"):
                assert theirs[name] == pytest.approx(mine[name], rel=1e-6 if mine["iteration"] == 1 else 1e-3), name
    results = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")]
    assert results[1]["final"] == pytest.approx(results[0]["final"], rel=1e-3)

    # continued on two processes, bit for bit; then on one
    whole, resumed = saved("two", 2), saved("half", 2)
    for kind in ("weights", "ema"):
        assert all(torch.equal(whole[kind][name], resumed[kind][name]) for name in whole[kind])
    for n, moments in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, resumed["optimizer"]["state"][n][key]) for key, value in moments.items())
    unlike = [{k: v for k, v in h[1].items() if not k.startswith("seconds")} for h in history[1:]]
    assert unlike[0] == unlike[1]
    for n, folder in enumerate(("two", "nowhere")):  # said by both, and neither waits for the other
        said = (tmp_path / f"unshared-{n}.txt").read_text()
        assert said.startswith(
            f"not every process sees the checkpoints in {tmp_path / folder}; it must lie on a shared"
        )
    assert not (tmp_path / "nowhere").exists() and checkpoint.load_latest(tmp_path / "two")["iteration"] == 2
    fine_tune(tmp_path, "half", resume=True, iterations=3)
    assert checkpoint.load_latest(tmp_path / "half")["iteration"] == 3

    # stock diffusers reads the averages
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "two" / "weights")
    stock = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "sd3", transformer=transformer)
    for name, weight in stock.transformer.named_parameters():
        assert torch.equal(weight, whole["ema"][f"transformer.{name}"])

    # groups from one start, and a process of which no sample is trained on
    (expected, mine), (other, _) = from_one_start(), from_one_start(same_noise=False)
    tolerance = order_of_sums(4 * 2, expected.abs().max().item())  # trained micro-batches x steps
    for n in range(2):
        found, theirs = torch.load(tmp_path / f"mixture-{n}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        assert (found - other).abs().max() > 1e3 * tolerance
        for name in ("reward", "feature_variance", "diversity", "ratio_error", "clip_fraction"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-6)

    # lambda is one number, to the bit, and that of one process as far as the shares are
    first, second = (json.loads((tmp_path / f"lambda-{n}.json").read_text()) for n in range(2))
    assert first == second and len(set(first[::2])) == 3
    assert first[:2] == pytest.approx(held_diversity()[:2], rel=1e-5)  # sums of 32 in float32: 32 eps is 4e-6

    for n in range(2):
        held = json.loads((tmp_path / f"held-{n}.json").read_text())
        assert held.pop("ratio_error") == 0
        assert held == pytest.approx(dict.fromkeys(held, 0.5), abs=0.02)
    state = on_a_gpu(tmp_path)
    expected = torch.cat([p.grad.flatten() for p in state.model.transformer.parameters()])
    assert torch.cosine_similarity(gradients(tmp_path), expected, 0) > 0.99  # bfloat16 rounds in other places
    first = checkpoint.load_latest(tmp_path)
    assert {v.dtype for kind in ("weights", "ema") for v in first[kind].values()} == {torch.float32}


if __name__ == "__main__":
    in_parts(Path(sys.argv[1]))
