"""Slow: with LoRA on a CPU vLLM never compiles the model, and all between the matrix products (norms, rotary
embeddings, activations, residuals) is hundreds of small operators a step.

Faster: compiled, as vLLM does without LoRA. What depends on the adapters of a batch stays out of the compiled graph:
traced, the question "which adapters are in this step" would be answered once, when it is compiled, and never again. So
a layer with LoRA becomes one operator that the compiler does not look into.

`--enforce-eager` turns it off, as everywhere in vLLM. Models with experts stay as they are: theirs ask that question
in other places. So does every model where the processor has no bf16 instructions: compiled for AVX2, it answered NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from server.vllm_plugin import direct_layers
from server.vllm_plugin.patches import Patch

if TYPE_CHECKING:
    import torch

_layers: list[Any] = []
"""The layers with LoRA of this process: an operator takes numbers and tensors, so it is given a layer's place here."""


def check_and_update_config(stock: Any) -> Any:
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        from adapters.processor import multiplies_bf16

        lora = vllm_config.lora_config
        if vllm_config.model_config is not None and not vllm_config.model_config.is_moe and multiplies_bf16():
            vllm_config.lora_config = None  # asked for here only to turn compilation off
        try:
            stock.__func__(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora

    return classmethod(check_and_update_config)


def set_mapping(stock: Callable[..., None]) -> Callable[..., None]:
    """Called once for every layer that gets LoRA, when the model is loaded: in the process that computes, and there
    before anything is compiled."""

    def set_mapping(self: Any, punica_wrapper: Any) -> None:
        stock(self, punica_wrapper)
        operators()
        self.place = len(_layers)
        _layers.append(self)

    return set_mapping


def apply(stock: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        import torch

        if torch.compiler.is_compiling():
            return torch.ops.loraplex.linear_with_lora(x, bias, self.place, sum(self.output_slices))
        return direct_layers.call(self, x, bias)

    return apply


def apply_lora_to_output(stock: Callable[..., Any]) -> Callable[..., Any]:
    """For the layers whose base product is not the plain one."""

    def _apply_lora_to_output(self: Any, x: torch.Tensor, output: torch.Tensor) -> Any:
        import torch

        if torch.compiler.is_compiling():
            torch.ops.loraplex.add_lora(x, output, self.place)
            return output
        return stock(self, x, output)

    return _apply_lora_to_output


def embed(stock: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, x: torch.Tensor) -> Any:
        import torch

        if torch.compiler.is_compiling():
            return torch.ops.loraplex.embedding_with_lora(x, self.base_layer.weight, self.place)
        return stock(self, x)

    return forward


@cache
def operators() -> Any:
    """Register `loraplex::linear_with_lora` and its kin. They live as long as the library returned."""
    import torch

    library = torch.library.Library("loraplex", "DEF")
    library.define("linear_with_lora(Tensor x, Tensor? bias, int place, int out) -> Tensor")
    library.impl("linear_with_lora", lambda x, bias, place, _: direct_layers.call(_layers[place], x, bias), "CPU")
    library._register_fake("linear_with_lora", lambda x, _, __, out: x.new_empty((*x.shape[:-1], out)))
    library.define("add_lora(Tensor x, Tensor(a!) y, int place) -> ()")
    library.impl("add_lora", _add, "CPU")
    library._register_fake("add_lora", lambda *_: None)
    library.define("embedding_with_lora(Tensor x, Tensor weight, int place) -> Tensor")
    library.impl("embedding_with_lora", lambda x, _, place: _layers[place].forward(x), "CPU")
    library._register_fake("embedding_with_lora", lambda x, weight, _: weight.new_empty((*x.shape, weight.shape[1])))
    return library


def _add(x: torch.Tensor, y: torch.Tensor, place: int) -> None:
    _layers[place]._apply_lora_to_output(x, y)


LINEAR = "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA"
EMBEDDING = "vllm.lora.layers.vocab_parallel_embedding:VocabParallelEmbeddingWithLoRA"

PATCHES = (
    Patch("vllm.platforms.cpu:CpuPlatform", "check_and_update_config", ("cls", "vllm_config"), check_and_update_config),
    Patch("vllm.lora.layers.base:BaseLayerWithLoRA", "set_mapping", ("self", "punica_wrapper"), set_mapping),
    Patch(LINEAR, "apply", ("self", "x", "bias"), apply),
    Patch(LINEAR, "_apply_lora_to_output", ("self", "x", "output"), apply_lora_to_output),
    Patch(EMBEDDING, "forward", ("self", "x"), embed),
)
