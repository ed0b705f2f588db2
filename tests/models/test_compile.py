"""Compiled blocks: the ratio stays exactly 1, trials and counts compile nothing."""

import dataclasses
import shutil

import pytest
import torch

from ref.benchmark.measure import flops
from ref.grpo import train
from ref.methods import METHODS
from ref.models import tiny
from ref.models.load import load
from ref.scale.microbatch import fitted
from ref.scale.weights import trainable
from ref.settings import Settings

PROMPTS = ["a red cat", "two blue dogs on a boat"]


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture
def fresh_cache(cache_folder, monkeypatch):
    """The compiler's cache is this run's own: the user's does not tell processors' capabilities apart, nor a file that
    a killed compiler left half written."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache_folder))


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="torch's compiler writes no code for ATEN_CPU_CAPABILITY=default",
)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind, micro_batch", [("sd3", 4), ("flux", 6)])
def test_compiled_blocks_keep_the_ratio_exactly_one(kind, micro_batch, checkpointing, tmp_path, fresh_cache):
    """Rollout without and update with gradients, one size of micro-batches and two; the numbers are the plain blocks'."""
    folder = getattr(tiny, kind)(tmp_path / kind)
    options = dict(max_sequence_length=16, lora_rank=2, device="cpu", cache_dir=tmp_path / "cache")
    options |= dict(gradient_checkpointing=checkpointing)
    settings = Settings(
        iterations=2, groups=2, group_size=3, updates=1, steps=3, micro_batch=micro_batch, lr=1e-2, clip=0.1
    )
    histories = []
    for compiled in (False, True):
        model = load(folder, PROMPTS, 32, 32, compile_blocks=compiled, **options)
        run = train(model, PROMPTS, lambda images, prompts: images.mean((1, 2, 3)), lambda images: images.mean((2, 3)),
                    METHODS["flow_grpo"](clip=0.1), settings)  # fmt: skip
        histories.append([(dict(s.metrics), s.samples.latents) for s in run])
        with torch.no_grad():
            conditioning = {
                key: value[[0, 1] * (settings.micro_batch // 2)] for key, value in model.encode(PROMPTS).items()
            }
            x = torch.zeros(settings.micro_batch, *model.latent_shape)
            v = model.velocity(x, torch.tensor(0.5), conditioning)
        assert not v.requires_grad and trainable(model)
    for (plain, x), (fast, y) in zip(*histories):
        assert plain["ratio_error"] == fast["ratio_error"] == 0.0
        torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-3)
        assert fast["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-2)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert fitted(model, PROMPTS, dataclasses.replace(settings, micro_batch=0)).micro_batch == 6
    plain, one = load(folder, PROMPTS, 32, 32, **options), {key: value[:1] for key, value in conditioning.items()}
    assert flops(model, one, backward=True) == flops(plain, one, backward=True) > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # trials and counts compile nothing
    blocks = [m for m in model.transformer.modules() if type(m).__name__ in model.transformer._no_split_modules]
    assert blocks and all(m._compiled_call_impl is not None for m in blocks)
