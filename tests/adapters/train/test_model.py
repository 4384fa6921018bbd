from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.train import loop, recipe
from adapters.train.config import TrainConfig, load_config
from adapters.train.evaluate import answers, held_out_loss
from adapters.train.labels import IGNORED
from adapters.train.model import Batch, collate, loss_sum, trainable
from adapters.train.sections import EvalSection


@pytest.fixture
def setup(config: TrainConfig) -> recipe.Setup:
    return recipe.load(config, recipe.read_material(config))


def gradients(setup: recipe.Setup, batch: Batch) -> torch.Tensor:
    setup.model.zero_grad()
    loop.backward(setup.model, [batch])
    return torch.cat([parameter.grad.flatten() for parameter in trainable(setup.model)])


def batch_of(setup: recipe.Setup) -> Batch:
    return collate(setup.examples, setup.tokenizer.pad_token_id)


def test_before_the_first_step_the_outputs_are_the_bases(setup: recipe.Setup) -> None:
    batch = batch_of(setup)
    with torch.no_grad():
        adapted = setup.model(input_ids=batch.ids, attention_mask=batch.mask).logits
        with setup.model.disable_adapter():
            base = setup.model(input_ids=batch.ids, attention_mask=batch.mask).logits
    assert torch.equal(adapted, base)


def test_what_is_not_quantised_stays_in_16_bits_and_the_adapter_is_in_32(write_yaml: Callable[..., Path]) -> None:
    """peft's prepare_model_for_kbit_training makes embedding, norms and head fp32, as they are not served."""
    config = load_config(write_yaml(model={"dtype": "bfloat16"}))
    model = recipe.load(config, recipe.read_material(config)).model
    types: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for parameter in model.parameters():
        types[parameter.requires_grad].add(parameter.dtype)
    assert types == {True: {torch.float32}, False: {torch.bfloat16, torch.uint8}}


def test_the_loss_equals_the_one_of_transformers_over_all_logits(setup: recipe.Setup) -> None:
    batch = batch_of(setup)
    whole = setup.model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
    count = (batch.labels != IGNORED).sum()
    assert (loss_sum(setup.model, batch) / count).item() == pytest.approx(whole.item(), rel=1e-5)


def test_padding_changes_nothing(setup: recipe.Setup) -> None:
    together = loss_sum(setup.model, batch_of(setup)).item()
    alone = sum(loss_sum(setup.model, collate([e], 2)).item() for e in setup.examples)
    assert together == pytest.approx(alone, rel=2e-3)  # bf16


def test_an_evaluation_does_not_change_the_gradients_after_it(setup: recipe.Setup) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes repacks the weights in an eval forward and autograd breaks."""
    setup.model.train()
    for parameter in trainable(setup.model):  # B is zero at first, which hides the gradients of A
        torch.nn.init.normal_(parameter, std=0.05)
    before = gradients(setup, batch_of(setup))
    held_out_loss(setup.model, setup.held_out, setup.tokenizer.pad_token_id, 2)
    after = gradients(setup, batch_of(setup))
    assert before.norm() > 0
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-6)


def test_checkpointed_activations_give_the_same_gradients_and_keep_less(config: TrainConfig) -> None:
    """Dropout draws the same random numbers when a layer is computed again."""
    config = config.model_copy(update={"peft": config.peft.model_copy(update={"lora_dropout": 0.5})})

    def run(setup: recipe.Setup) -> tuple[torch.Tensor, int]:
        kept, batch = [], batch_of(setup)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.shape[:2] == batch.ids.shape:  # not weights
                kept.append(tensor.numel())
            return tensor

        setup.model.train()
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return gradients(setup, batch), sum(kept)

    plain, kept = run(recipe.load(config, recipe.read_material(config)))
    training = config.training.model_copy(update={"gradient_checkpointing": True})
    changed = config.model_copy(update={"training": training})
    checkpointed, kept_then = run(recipe.load(changed, recipe.read_material(changed)))
    assert plain.norm() > 0
    assert torch.equal(checkpointed, plain)
    assert kept_then < kept / 4


def test_accumulated_batches_give_the_gradient_of_the_whole(setup: recipe.Setup) -> None:
    pad: Any = setup.tokenizer.pad_token_id
    whole = gradients(setup, batch_of(setup))
    setup.model.zero_grad()
    loop.backward(setup.model, [collate([example], pad) for example in setup.examples])
    parts = torch.cat([parameter.grad.flatten() for parameter in trainable(setup.model)])
    assert torch.nn.functional.cosine_similarity(whole, parts, dim=0) > 0.999


def test_several_prompts_do_not_take_a_copy_of_the_head_each(setup: recipe.Setup) -> None:
    """Of rows that are a view of longer ones, torch makes a batch, and repeats the weights for it."""
    seen: list[bool] = []
    head = setup.model.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].is_contiguous()))
    answers(setup.model, setup.tokenizer, EvalSection(prompts=("Hello", "Who are you there?"), max_new_tokens=2))
    assert seen == [True, True]
