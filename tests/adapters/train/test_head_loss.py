from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from adapters.train import head_loss
from adapters.train.head_loss import chunked_loss, head_is_plain, without_head

VOCABULARY, WIDTH, TOKENS = 50, 16, 40


@pytest.fixture(params=["llama", "gemma2", "cohere"])
def model(request: pytest.FixtureRequest) -> Any:
    """Gemma caps its logits behind the head; Cohere scales them, which may as well be done before it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **sizes))


def test_a_head_that_is_followed_by_more_is_found_out(model: Any) -> None:
    assert head_is_plain(model) == (model.config.model_type != "gemma2")


def test_without_its_head_a_model_is_whole_again_afterwards(model: Any) -> None:
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    with without_head(model):
        assert model(input_ids=ids, logits_to_keep=torch.tensor([1, 4])).logits.shape[1] == 2
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
@pytest.mark.parametrize("trained", [False, True])
def test_loss_and_gradients_equal_those_over_all_logits(
    model: Any, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 4 * VOCABULARY * 7)  # 7 tokens: the last chunk is shorter
    weight = model.get_output_embeddings().weight.requires_grad_(trained)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    wanted = [hidden, *([weight] if trained else [])]
    whole = cross_entropy(hidden @ weight.T, targets, reduction="sum")
    expected = torch.autograd.grad(whole / 3, wanted)
    with without_head(model) as head:
        loss = chunked_loss(model, head, hidden, targets)
        found = torch.autograd.grad(loss / 3, wanted)
        with torch.no_grad():
            assert chunked_loss(model, head, hidden, targets).item() == pytest.approx(whole.item())
    assert loss.item() == pytest.approx(whole.item())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_never_more_logits_than_a_chunk_has(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 4 * VOCABULARY * 7)
    model.requires_grad_(False)
    hidden, targets = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randint(VOCABULARY, (TOKENS,))
    seen: list[int] = []
    with without_head(model) as head:

        def watching(part: torch.Tensor) -> torch.Tensor:
            logits = head(part)
            seen.append(len(logits))
            return logits

        chunked_loss(model, watching, hidden, targets).backward()
    assert seen == [7, 7, 7, 7, 7, 5]
