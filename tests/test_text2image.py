"""The adapters on tiny random pipelines of the real classes; the stock pipelines are the oracle."""

import http.server
import os
import shutil
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import T5EncoderModel

from ref.benchmark import memory
from ref.models import embeddings, hub, shapes, tiny
from ref.entropy import policy_entropy
from ref.grpo import train
from ref.sampling import sample
from ref.scale.weights import trainable
from ref.settings import Settings
from ref.methods import METHODS
from ref.schedule import time_grid
from ref.models.flux import Flux
from ref.models.load import load
from ref.models.sd3 import SD3

PROMPTS = ["a red cat", "two blue dogs on a boat"]
KINDS = ["sd3", "flux"]
TOKENS = 32  # of T5; enough for these prompts
STEPS = 4
EQUAL = 4e-5  # of images in [0, 1]: float32's rounding after four steps and a VAE is 6e-6 here; a wrong grid moves 1e-3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return {"sd3": tiny.sd3(folder / "sd3"), "flux": tiny.flux(folder / "flux"), "cache": folder / "cache"}


def fresh(folders, kind, **options):
    options = dict(height=48, width=64, max_sequence_length=TOKENS, lora_rank=4, device="cpu") | options
    options = dict(cache_dir=folders["cache"]) | options
    return load(folders[kind], options.pop("prompts", PROMPTS), **options)


def stock(folders, kind):
    pipe = DiffusionPipeline.from_pretrained(folders[kind])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_images(pipe, latents, guidance_scale):
    return pipe(
        PROMPTS, height=48, width=64, latents=latents, num_inference_steps=STEPS, guidance_scale=guidance_scale,
        max_sequence_length=TOKENS, output_type="pt",
    ).images  # fmt: skip


def perturb(model, scale=0.05):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in trainable(model).values():
            weight.add_(scale * torch.randn(weight.shape, generator=generator))


def some_latents(model, seed=0):
    return torch.randn(len(PROMPTS), *model.latent_shape, generator=torch.Generator().manual_seed(seed))


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


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("kind", KINDS)
def test_computed_activations_are_those_of_a_real_pass(folders, kind):
    """Fake tensors against real ones, with and without checkpointing; the model comes back as it was."""
    model = fresh(folders, kind, max_sequence_length=None)
    before = {name: (weight, weight.clone()) for name, weight in model.named_parameters()}
    parameters = {weight.data_ptr() for weight in model.parameters()}
    conditioning, x = model.encode(PROMPTS), some_latents(model)
    sizes = []
    for checkpointing in (False, True):
        if checkpointing:
            model.transformer.enable_gradient_checkpointing()
        held = {}

        def hold(tensor):
            if tensor.untyped_storage().data_ptr() not in parameters:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            model.velocity(x, torch.tensor(0.5), conditioning)
        real = sum(storage.nbytes() for storage in held.values())
        sizes.append(memory.kept(model, batch=2))
        assert sizes[-1] == pytest.approx(real, rel=0.02)
    assert sizes[1] < 0.5 * sizes[0]
    for name, weight in model.named_parameters():
        assert weight is before[name][0] and torch.equal(weight, before[name][1])


def test_the_big_architectures_have_their_published_sizes():
    for make, billions in ((shapes.sd35_medium, 2.24), (shapes.flux_dev, 11.9), (shapes.vae, 0.0838)):
        with torch.device("meta"):
            assert sum(p.numel() for p in make().parameters()) / 1e9 == pytest.approx(billions, rel=0.003)


def test_the_wide_pipelines_are_as_wide_as_the_big_ones():
    with torch.device("meta"):
        configs = {"sd3": shapes.sd35_medium().config, "flux": shapes.flux_dev().config}
    for kind, changes in tiny.WIDE.items():
        assert changes == {key: configs[kind][key] for key in changes}


# -------------------------------------------------------------------------------------- prompt embeddings


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_the_pipeline(folders, kind):
    model, pipe = fresh(folders, kind), stock(folders, kind)
    conditioning = model.encode(PROMPTS[::-1])
    for b, prompt in enumerate(PROMPTS[::-1]):
        if kind == "sd3":
            embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
                prompt, None, None, max_sequence_length=TOKENS
            )
            assert torch.equal(conditioning["negative_prompt_embeds"][b], negative[0])
            assert torch.equal(conditioning["negative_pooled_prompt_embeds"][b], negative_pooled[0])
        else:
            embeds, pooled, _ = pipe.encode_prompt(prompt, max_sequence_length=TOKENS)
        assert torch.equal(conditioning["prompt_embeds"][b], embeds[0])
        assert torch.equal(conditioning["pooled_prompt_embeds"][b], pooled[0])


@pytest.mark.parametrize("kind", KINDS)
def test_second_load_does_without_text_encoders(folders, kind, tmp_path, monkeypatch):
    """A tripwire where T5 is loaded; it does trip for a prompt that is new."""
    loads, original = [], T5EncoderModel.from_pretrained

    def watched(*arguments, **options):
        loads.append(weakref.ref(encoder := original(*arguments, **options)))
        return encoder

    monkeypatch.setattr(T5EncoderModel, "from_pretrained", watched)
    first = fresh(folders, kind, cache_dir=tmp_path)
    expected = first.encode(PROMPTS)
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert files == {key + ".safetensors" for key in first.encode.keys.values()} and len(files) == 2 + (kind == "sd3")
    assert [encoder() for encoder in loads] == [None]  # loaded once, and freed

    second = fresh(folders, kind, cache_dir=tmp_path)
    assert len(loads) == 1
    assert all(torch.equal(value, expected[name]) for name, value in second.encode(PROMPTS).items())
    with pytest.raises(ValueError, match="'a third prompt' has no embedding.*load\\(prompts"):
        second.encode(["a third prompt"])
    second.encode.add(["a third prompt"])
    assert [encoder() for encoder in loads] == [None, None]
    assert second.encode(["a third prompt"])["prompt_embeds"].shape == expected["prompt_embeds"][:1].shape


def test_the_key_changes_with_all_that_decides_the_content(folders, tmp_path):
    def key(kind="sd3", prompt="a cat", folder=None, tokens=TOKENS, dtype=torch.float32):
        source = hub.locate(folder or folders[kind])
        return embeddings.PromptEmbeddings(source, None, tokens, dtype, "cpu", tmp_path).key(prompt)

    shutil.copytree(folders["sd3"], tmp_path / "copy")
    assert key() == key() == key(folder=tmp_path / "copy")  # a copy of the folder is the same pipeline
    retrained = tiny.sd3(tmp_path / "retrained", seed=1)
    others = [key(prompt="a dog"), key("flux"), key(tokens=77), key(dtype=torch.bfloat16), key(folder=retrained)]
    assert len({key(), *others}) == 6


def test_a_damaged_embedding_is_named(folders, tmp_path):
    model = fresh(folders, "flux", cache_dir=tmp_path)
    path = model.encode.path(PROMPTS[0])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OSError, match=f"{path.name} is damaged.*delete it"):
        model.encode(PROMPTS)


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "kind, size, message",
    [
        ("sd3", (40, 64), "height must be a multiple of 16 up to 256, got 40; the nearest is 32"),
        ("sd3", (64, 512), "width must be a multiple of 16 up to 256, got 512; the nearest is 256"),
        ("flux", (64, 63), "width must be a multiple of 16, got 63; the nearest is 64"),
        ("flux", (0, 64), "height must be a multiple of 16, got 0; the nearest is 16"),
    ],
)
def test_an_image_size_that_the_model_refuses(folders, kind, size, message):
    with pytest.raises(ValueError, match=message):
        fresh(folders, kind, height=size[0], width=size[1])


def test_bad_folders_and_classes_are_named(folders, tmp_path):
    with pytest.raises(OSError, match="there is no folder /nowhere/at/all; a model is a folder, a hub id or sd35_med"):
        load("/nowhere/at/all", PROMPTS)
    with pytest.raises(OSError, match="no model_index.json"):
        load(tmp_path, PROMPTS)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(ValueError, match="is a StableDiffusionXLPipeline; training knows StableDiffusion3Pipeline and"):
        load(tmp_path, PROMPTS)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(OSError, match="must be a whole diffusers pipeline") as caught:
        load(tmp_path, PROMPTS)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="float16 overflows"):
        fresh(folders, "flux", dtype=torch.float16)


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


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for a gated, a missing, and a forbidden model."""

    def do_GET(self):
        code, reason = (403, "GatedRepo") if "gated" in self.path else (401, "RepoNotFound")
        if "forbidden" in self.path:
            code, reason = 403, None
        self.send_response(code)
        if reason:
            self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


def test_hub_errors_are_one_line_with_the_remedy(tmp_path):
    """A server that answers with the hub's status codes, then no network; the real client in between."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = """
import sys
from ref.models.hub import locate
for model in sys.argv[1:]:
    try:
        locate(model)
    except OSError as error:
        print(error)
"""

    def lines(*models, offline=False):
        endpoint = f"http://127.0.0.1:{server.server_port}"
        environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": str(int(offline)),
        }
        run = [sys.executable, "-c", script, *models]
        return subprocess.run(run, capture_output=True, text=True, env=environment, timeout=120).stdout.splitlines()

    gated, missing, forbidden = lines("a/gated", "a/missing", "a/forbidden")
    server.shutdown()
    assert gated.startswith(
        "no access to a/gated, which is gated: accept its licence at https://huggingface.co/a/gated"
    )
    assert missing.startswith("a/missing is neither a folder nor a public model of the hub")
    assert forbidden.startswith("the hub refused a/forbidden (HTTP 403)")
    assert all("hf auth login" in line for line in (gated, missing, forbidden))
    (alone,) = lines("a/model", offline=True)
    assert "cannot be reached" in alone and "hf download a/model --local-dir" in alone
