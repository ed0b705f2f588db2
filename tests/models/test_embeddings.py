"""Prompt embeddings are the pipeline's own, computed once, keyed by all that decides them."""

import shutil
import weakref

import pytest
import torch
from transformers import T5EncoderModel

from ref.models import embeddings, hub, tiny
from ref.models.sd3 import SD3

from .tools import KINDS, PROMPTS, TOKENS, fresh, stock


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
        encoder, report = original(*arguments, **options)
        loads.append(weakref.ref(encoder))
        return encoder, report

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
        return embeddings.PromptEmbeddings(source, SD3.encode_text, tokens, dtype, "cpu", tmp_path).key(prompt)

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
