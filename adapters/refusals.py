"""Every reason why an adapter is refused: one table of code → what to do, for messages, README and tests.

It knows words only; the modules that check say what they got and what they expected.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapters.errors import InvalidAdapter

_RETRAIN = "train or convert it to a plain LoRA"

REFUSALS: Mapping[str, str] = {
    "bad_name": "Choose another name.",
    "bad_description": "Shorten it.",
    "bad_tags": "Correct or leave out these tags.",
    "bad_lineage": "Correct this part of the lineage or leave it out.",
    "missing_file": "Upload adapter_config.json and adapter_model.safetensors, as PEFT's save_pretrained writes them.",
    "pickle": "Pickle files can run code and are not read; save again with safe_serialization=True.",
    "extra_weights": "Only adapter_model.safetensors is served; merge the shards into it or leave the others out.",
    "bad_json": "Save the adapter again with PEFT.",
    "bad_config": "Save the adapter again with PEFT, or correct this field.",
    "bad_provenance": "Correct loraplex.json or leave it out.",
    "bad_safetensors": "Upload the file again, or save it again: it is damaged.",
    "not_mergeable": "Train it without that part.",
    "not_lora": f"Neither served nor merged; {_RETRAIN}.",
    "changes_prompt": "It puts vectors before the prompt and leaves the weights as they are; train a LoRA.",
    "dora": "Configuration and weights are not of the same adapter; upload the two that belong together.",
    "lora_bias": f"Biases are not served; {_RETRAIN} with bias='none' and lora_bias=False.",
    "modules_to_save": "Train without this one in modules_to_save.",
    "modified_base": (
        "This initialisation changed the base's weights: upload the adapter as PEFT saved it before training, too, as "
        "initial_adapter_model.safetensors; or save it with path_initial_model_for_weight_conversion."
    ),
    "alora": f"Activated LoRA is not served; {_RETRAIN}.",
    "layer_replication": "The served base has its own layers; train without layer_replication.",
    "trainable_tokens": (
        "The trained embeddings are not in the file, or beside what they cannot be merged with; save it again with "
        "PEFT, or train without trainable_token_indices."
    ),
    "target_parameters": "Only linear modules are served; train with target_modules.",
    "unsupported_variant": f"This LoRA variant computes something else than B·A; {_RETRAIN}.",
    "unsupported_pattern": "Name the modules plainly; brackets that repeat and look-arounds are not read.",
    "unsupported_module": "Linear layers, the embedding and the head take a LoRA; train without the others.",
    "unsupported_tensor": "Expected only <module>.lora_A.weight and <module>.lora_B.weight; save it again with PEFT.",
    "unsupported_dtype": "Save the weights as float32, float16 or bfloat16.",
    "unknown_module": "It was trained on another base model, or its names were changed.",
    "shape_mismatch": "It was trained on another base model.",
    "wrong_base": "Serve the base it was trained on, or train it again on this one.",
    "no_modules": "The file carries no LoRA weights; check that the right adapter was saved.",
    "unpaired": "Each module needs both lora_A and lora_B; save it again with PEFT.",
    "rank_mismatch": "Configuration and weights are not of the same adapter; upload the two that belong together.",
    "rank_too_large": "Or train with a smaller r, or start the server with a larger max_lora_rank.",
    "non_finite": "Training diverged or the file is damaged; use an earlier checkpoint.",
    "bad_scaling": "Correct lora_alpha and r.",
    "probe_failed": "The engine tried it before it could serve; check that training did not diverge.",
    "adds_tokens": "The base's tokenizer is what is served; train without adding tokens.",
    "other_tokenizer": "The base's tokenizer is what is served, and this one numbers its tokens differently.",
}


def refuse(code: str, problem: str) -> InvalidAdapter:
    """The error to raise: `problem` says what was got and expected, the table what to do."""
    return InvalidAdapter(f"{problem}. {REFUSALS[code]}", code=code)
