"""Memory computed from shapes, against a real pass."""

import pytest
import torch

from ref.benchmark import memory

from ..models.tools import KINDS, PROMPTS, fresh, some_latents


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
        sizes.append(memory.kept(model, batch=2, cuda=False))
        assert sizes[-1] == pytest.approx(real, rel=0.02)
    assert sizes[1] < 0.5 * sizes[0]
    for name, weight in model.named_parameters():
        assert weight is before[name][0] and torch.equal(weight, before[name][1])
