"""The adapters on tiny random pipelines of the real classes; the stock pipelines are the oracle."""

import pytest
import torch

from ref.entropy import policy_entropy
from ref.grpo import train
from ref.methods import METHODS
from ref.models.flux import Flux
from ref.models.sd3 import SD3
from ref.sampling import sample
from ref.scale.weights import trainable
from ref.schedule import time_grid
from ref.settings import Settings
from ref.worlds import letters

from ..small import PROMPTS as CAPTIONS
from ..small import small_model
from .tools import EQUAL, KINDS, PROMPTS, STEPS, fresh, perturb, some_latents, stock, stock_images


def brightness(images, prompts):
    """A reward in (0, 1)."""
    return torch.sigmoid(10 * (images.mean((1, 2, 3)) - 0.5))


def projection(images):
    """Unit-norm features that depend on the image alone."""
    matrix = torch.randn(images[0].numel(), 8, generator=torch.Generator().manual_seed(1))
    features = torch.stack([image.flatten() @ matrix for image in images])
    return torch.nn.functional.normalize(features, dim=1)


# ---------------------------------------------------------------------------------- the stock pipeline
@pytest.mark.parametrize("kind, guidance", [("sd3", 4.5), ("sd3", 1.0), ("flux", 3.5), ("flux", 1.5)])
def test_ode_sampling_draws_the_stock_pipelines_images(folders, kind, guidance):
    """Embeddings, time grid, guidance, packing, VAE scaling: the same noise gives the same image."""
    model = fresh(folders, kind, guidance_scale=guidance)
    assert isinstance(model, {"sd3": SD3, "flux": Flux}[kind])
    drawn = sample(model, PROMPTS, 1, model.schedule(STEPS).ode(), ("stock",))
    expected = stock_images(stock(folders, kind), drawn.trajectory.x[0], guidance)
    assert expected.shape == drawn.images.shape == (2, 3, 48, 64)
    torch.testing.assert_close(drawn.images, expected, rtol=0, atol=EQUAL)
    assert expected.std() > 0.1 and (expected[0] - expected[1]).abs().mean() > 0.05  # there is something to get wrong


@pytest.mark.parametrize("kind, scale", [("sd3", 4.5), ("flux", 3.5)])
def test_the_comparison_sees_guidance_prompt_and_grid(folders, kind, scale):
    """Power of the test above: each of three changes moves the images by far more than its tolerance."""
    model = fresh(folders, kind)
    noise = some_latents(model)
    expected = stock_images(stock(folders, kind), noise, scale)

    def images(prompts=PROMPTS, shift=None, guidance_scale=scale):
        model.guidance_scale, model.shift = guidance_scale, shift
        conditioning, x = model.encode(prompts), noise
        schedule = model.schedule(STEPS).ode()
        with torch.no_grad():
            for i in range(STEPS):
                x = schedule.mean(x, model.velocity(x, schedule.sigmas[i], conditioning), i)
        return model.decode(x)

    torch.testing.assert_close(images(), expected, rtol=0, atol=EQUAL)
    for change in (dict(prompts=PROMPTS[::-1]), dict(shift=1.0), dict(guidance_scale=scale + 1)):
        assert (images(**change) - expected).abs().max() > 1e-3, change


def test_the_grid_is_the_pipelines_or_the_shifted_one_asked_for(folders):
    """FLUX shifts by image size: more tokens, more time at high noise."""
    small, large = (fresh(folders, "flux", height=side, width=side) for side in (32, 128))
    assert (large.schedule(6).sigmas[1:-1] > small.schedule(6).sigmas[1:-1]).all()
    for kind in KINDS:
        assert torch.equal(fresh(folders, kind, shift=3.0).schedule(6).sigmas, time_grid(6, 3.0))


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_in_parts_slices_or_tiles_is_the_same_image(folders, kind):
    """A 48 x 64 image is one tile, so tiling must change nothing; parts differ by rounding at most."""
    whole = fresh(folders, kind, decode_batch=None)
    x = some_latents(whole)
    for options in (dict(decode_batch=1), dict(tiling=True)):
        torch.testing.assert_close(fresh(folders, kind, **options).decode(x), whole.decode(x), rtol=0, atol=EQUAL)
    assert fresh(folders, kind, tiling=True).vae.use_tiling


# ----------------------------------------------------------------------------------------- what is trained
@pytest.mark.parametrize("kind", KINDS)
def test_lora_round_trip_into_the_stock_pipeline(folders, kind, tmp_path):
    model = fresh(folders, kind)
    pipe, noise = stock(folders, kind), some_latents(model)
    base = stock_images(pipe, noise, model.guidance_scale)
    perturb(model)
    model.save(tmp_path / "lora")
    assert [f.name for f in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe.load_lora_weights(tmp_path / "lora")
    # first the same network on the same input, to the bit
    conditioning = model.encode(PROMPTS)
    ours, trained = model.velocity(noise, torch.tensor(0.7), conditioning), model.transformer
    model.transformer = pipe.transformer
    if kind == "flux":
        pipe.transformer.time_text_embed.register_forward_pre_hook(lambda m, a: (torch.full((2,), 700.0), *a[1:]))
    assert torch.equal(model.velocity(noise, torch.tensor(0.7), conditioning), ours)
    model.transformer = trained
    if kind == "flux":
        pipe.transformer.time_text_embed._forward_pre_hooks.clear()
    # then whole images
    theirs = stock_images(pipe, noise, model.guidance_scale)
    schedule, x = model.schedule(STEPS).ode(), noise
    with torch.no_grad():
        for i in range(STEPS):
            x = schedule.mean(x, model.velocity(x, schedule.sigmas[i], conditioning), i)
    torch.testing.assert_close(model.decode(x), theirs, rtol=0, atol=EQUAL)
    assert (theirs - base).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_lora_may_sit_on_four_projections_alone(folders, kind):
    model = fresh(folders, kind, lora_targets="attention")
    layers = {name.removeprefix("transformer.").split(".lora_")[0] for name in trainable(model)}
    assert {name.split(".", 2)[2] for name in layers} == {f"attn.to_{p}" for p in ("q", "k", "v", "out.0")}
    perturb(model)
    assert all(weight.abs().max() > 0 for weight in trainable(model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_lora_sits_on_the_layers_of_flow_grpo_and_starts_at_zero(folders, kind):
    model = fresh(folders, kind)
    layers = {name.removeprefix("transformer.").split(".lora_")[0] for name in trainable(model)}
    assert all("lora" in name for name in trainable(model))
    block = "transformer_blocks.0."
    attention = {f"{block}attn.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj")}
    assert attention | {block + "attn.add_v_proj", block + "attn.to_add_out"} <= layers
    feed_forward = {f"{block}{ff}.net.{n}" for ff in ("ff", "ff_context") for n in ("0.proj", "2")}
    assert (feed_forward <= layers) == (kind == "flux") and (kind == "flux" or not feed_forward & layers)
    if kind == "flux":
        assert {f"single_transformer_blocks.0.attn.to_{p}" for p in "qkv"} <= layers
    x, conditioning, sigma = some_latents(model), model.encode(PROMPTS), torch.tensor(0.6)
    with torch.no_grad():
        v = model.velocity(x, sigma, conditioning)
        with model.reference():
            assert torch.equal(model.velocity(x, sigma, conditioning), v)
        perturb(model)
        assert (model.velocity(x, sigma, conditioning) - v).abs().max() > 1e-3
        with model.reference():
            assert torch.equal(model.velocity(x, sigma, conditioning), v)


@pytest.mark.parametrize("kind", KINDS)
def test_full_fine_tuning_round_trip_and_its_reference(folders, kind, tmp_path):
    model = fresh(folders, kind, lora_rank=None)
    assert len(trainable(model)) == len(list(model.transformer.parameters()))
    x, conditioning, sigma = some_latents(model), model.encode(PROMPTS), torch.tensor(0.6)
    with torch.no_grad():
        base = model.velocity(x, sigma, conditioning)
        perturb(model, 0.01)
        moved = model.velocity(x, sigma, conditioning)
        with model.reference():
            assert torch.equal(model.velocity(x, sigma, conditioning), base)
        assert torch.equal(model.velocity(x, sigma, conditioning), moved) and not torch.allclose(moved, base)
        model.save(tmp_path)
        again = fresh(folders, kind, lora_rank=None)
        again.transformer.load_state_dict(type(model.transformer).from_pretrained(tmp_path).state_dict())
        assert torch.equal(again.velocity(x, sigma, conditioning), moved)
    with (
        pytest.raises(ValueError, match="keep_base=True"),
        fresh(folders, kind, lora_rank=None, keep_base=False).reference(),
    ):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(folders, kind):
    gradients = []
    for checkpointing in (False, True):
        model = fresh(folders, kind, gradient_checkpointing=checkpointing)
        perturb(model)
        assert model.transformer.gradient_checkpointing == checkpointing
        model.velocity(some_latents(model), torch.tensor(0.6), model.encode(PROMPTS)).square().mean().backward()
        gradients.append({name: weight.grad for name, weight in trainable(model).items()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)
    assert any(gradient.abs().max() > 1e-6 for gradient in gradients[0].values())


# ------------------------------------------------------------------------------------------- precision
@pytest.mark.parametrize("lora_rank", [4, None])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_transformer_keeps_float32_time_latents_velocity_and_trained_weights(folders, kind, lora_rank):
    model = fresh(folders, kind, dtype=torch.bfloat16, lora_rank=lora_rank)
    times, inner = [], []
    embedding = model.transformer.time_text_embed
    embedding.time_proj.register_forward_pre_hook(lambda m, arguments: times.append(arguments[0]))
    block = model.transformer.transformer_blocks[0].attn.to_q
    block.register_forward_hook(lambda m, arguments, output: inner.append(output.dtype))
    x, sigma = some_latents(model), torch.tensor(0.9087654)
    conditioning = model.encode(PROMPTS)
    v = model.velocity(x, sigma, conditioning)
    assert times[0].dtype == torch.float32 and torch.equal(times[0], torch.full((len(times[0]),), 1000.0) * sigma)
    assert set(inner) == {torch.bfloat16}
    assert v.dtype == torch.float32 and model.decode(x).dtype == torch.float32
    assert {w.dtype for w in trainable(model).values()} == {torch.float32}
    v.square().mean().backward()
    assert all(w.grad is None or w.grad.isfinite().all() for w in trainable(model).values())
    exact = fresh(folders, kind)
    with torch.no_grad():
        expected = exact.velocity(x, sigma, exact.encode(PROMPTS))
        assert 0 < (v - expected).abs().mean() < 0.05 * expected.abs().mean()
        nearby = model.velocity(x, sigma + 3e-4, conditioning)  # bfloat16 would round both times to the same
    assert not torch.equal(nearby, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_ratio_is_exactly_one_and_policy_entropy_constant_in_training(folders, kind, dtype):
    settings = Settings(
        iterations=2, groups=2, group_size=3, updates=2, steps=STEPS, micro_batch=2, lr=3e-2, clip=1e-2, seed=3
    )
    model = fresh(folders, kind, dtype=dtype)
    before = {name: weight.clone() for name, weight in trainable(model).items()}
    states = train(model, PROMPTS, brightness, projection, METHODS["pec"](0.1, clip=0.01), settings)
    logged = [state.metrics for state in states]
    assert [m["ratio_error"] for m in logged] == [0.0, 0.0]
    assert logged[0]["policy_entropy"] == logged[1]["policy_entropy"]
    schedule = model.schedule(STEPS, noise_level=settings.noise_level)
    dim = torch.Size(model.latent_shape).numel()
    expected = policy_entropy(schedule, dim, "mean")[list(schedule.steps)].mean().item()
    assert logged[0]["policy_entropy"] == pytest.approx(expected, rel=1e-6)
    assert any(not torch.equal(weight, before[name]) for name, weight in trainable(model).items())


def test_out_of_memory_says_where_and_what_to_change(folders):
    """A real refusal by the allocator, on the CPU: 2^57 bytes of activations."""
    model = fresh(folders, "flux")
    huge = torch.empty(1, dtype=torch.float32).expand(2**35, *model.latent_shape)
    with pytest.raises(
        OSError, match="out of memory in the transformer, 12 tokens an image; give a smaller --micro-batch"
    ):
        conditioning = {name: value[:1] for name, value in model.encode(PROMPTS).items()}
        model.velocity(huge, torch.tensor(0.5), conditioning)
    with pytest.raises(OSError, match="out of memory in the VAE; give a smaller --decode-batch"):
        model.decode_batch = None
        model.decode(huge)


def test_lora_starts_at_the_base_model_and_reference_switches_it_off():
    base, _, _, _ = letters.load()
    model, _, _ = small_model()
    cond, x = (
        model.encode(CAPTIONS[:2]),
        torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0)),
    )
    sigma = torch.tensor(0.5)
    with torch.no_grad():
        v = base.velocity(x, sigma, cond)
        assert torch.equal(model.velocity(x, sigma, cond), v)
        for weight in trainable(model).values():
            weight.add_(0.05)
        assert not torch.allclose(model.velocity(x, sigma, cond), v)
        with model.reference():
            assert torch.equal(model.velocity(x, sigma, cond), v)
        assert not torch.allclose(model.velocity(x, sigma, cond), v)


def test_guidance_is_one_forward_of_both_and_reduces_to_its_parts():
    model, _, _, _ = letters.load()
    cond, x = (
        model.encode(CAPTIONS[:2]),
        torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0)),
    )
    sigma = torch.tensor(0.7)
    negative = {k.removeprefix("negative_"): v for k, v in cond.items() if k.startswith("negative_")}
    with torch.no_grad():
        positive, empty = model.velocity(x, sigma, cond), model.velocity(x, sigma, negative)
        model.guidance_scale = 2.5
        guided = model.velocity(x, sigma, cond)
    torch.testing.assert_close(guided, empty + 2.5 * (positive - empty), rtol=1e-4, atol=1e-5)
