"""Safetensors files that lie about themselves, and weights that no base should compute with."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.adapters.factories import (
    MODULES,
    AdapterFiles,
    Tensor,
    lora_config,
    lora_tensors,
    safetensors,
    tar,
    tensor,
    with_header,
)
from tests.adapters.hostile import CANARY, CONFIG, WEIGHTS, Cases, Files, family, good

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{PREFIX}.lora_A.weight", f"{PREFIX}.lora_B.weight"
SHORT = (1 << 20) - 100
"""Bytes of a header that are still read for the tiny base."""
Shapes = dict[str, tuple[int, ...]]


def with_weights(content: bytes) -> Files:
    return {**good(), WEIGHTS: content}


def with_json(header: Any, data: bytes = b"1234") -> Files:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return with_weights(with_header(raw, data))


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def real_header() -> tuple[dict[str, Any], bytes]:
    whole = good()[WEIGHTS]
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def edited(edit: Callable[[dict[str, Any]], Any]) -> Files:
    """The real header with one thing changed."""
    header, data = real_header()
    edit(header)
    return with_json(header, data)


def with_tensors(changes: Mapping[str, Tensor | None], **config: Any) -> Files:
    tensors = {name: item for name, item in {**lora_tensors(), **changes}.items() if item is not None}
    return AdapterFiles(config=lora_config(**config), tensors=tensors).files()


@family("bad_safetensors")
def header_lengths_that_lie() -> Cases:
    whole = good()[WEIGHTS]
    length = int.from_bytes(whole[:8], "little")
    lengths = {
        "0": 0,
        "1": 1,
        "one less": length - 1,
        "one more": length + 1,
        "all": len(whole) - 8,
        "beyond": len(whole),
    }
    lengths |= {"100 MB": 100_000_000, "2^31": 2**31, "2^63": 2**63, "2^64 - 1": 2**64 - 1}
    for label, said in lengths.items():
        yield label, with_weights(said.to_bytes(8, "little") + whole[8:])
    yield "big end first", with_weights(length.to_bytes(8, "big") + whole[8:])
    for label, content in {
        "empty": b"",
        "7 bytes": bytes(7),
        "8 zeros": bytes(8),
        "a megabyte of zeros": bytes(1 << 20),
    }.items():
        yield label, with_weights(content)
    yield "padded with spaces", with_json(b"{}" + b" " * (2 << 20), b"")


@family("bad_safetensors")
def headers_that_are_no_json() -> Cases:
    real = json.dumps(real_header()[0]).encode()
    texts = {
        "array": b"[]",
        "null": b"null",
        "string": b'"x"',
        "a space first": b" {}",
        "nothing": b"",
        "NUL": b"\0" * 9,
    }
    texts |= {"comma": b'{"a":1,}', "comment": b"/**/{}", "two": b"{}{}", "cut off": real[:-1], "bracket": real + b"}"}
    texts |= {"BOM": b"\xef\xbb\xbf" + real, "UTF-16": real.decode().encode("utf-16"), "invalid UTF-8": b'{"\xff":1}'}
    texts |= {
        "NaN": b'{"a":NaN}',
        "Infinity": b'{"a":[-Infinity]}',
        "quotes": b"{'a':1}",
        "surrogate": b'{"\\ud800":1}',
    }
    texts |= {
        "deep": b'{"a":' * 9999 + b"1" + b"}" * 9999,
        "deeper": b"{" + b'"a":[' * 99_999,
        "brackets": b"[" * SHORT,
    }
    texts |= {
        "empty arrays": b'{"a":[' + b"[]," * (SHORT // 3 - 9) + b"1]}",
        "long number": b'{"a":' + b"9" * 9999 + b"}",
    }
    twice = json.dumps(entry()).encode()
    texts |= {
        "a name twice": b'{"a":' + twice + b',"a":' + twice + b"}",
        "a field twice": b'{"a":{"dtype":"F32","dtype":"F16"}}',
    }
    for label, text in texts.items():
        yield label, with_json(text)
    metadatas: dict[str, Any] = {
        "number": {"a": 1},
        "list": [],
        "null": None,
        "deep": {"a": {"b": "c"}},
        "text": "x",
    }
    for label, metadata in metadatas.items():
        yield f"metadata {label}", edited(lambda header, value=metadata: header.update(__metadata__=value))  # type: ignore[misc]


@family("bad_safetensors")
def entries_that_lie() -> Cases:
    shapes: list[Any] = [
        [-1],
        [2**31],
        [2**62, 2**62],
        [2**62] * 8,
        [1] * 200_000,
        [1.0],
        ["1"],
        [True],
        [None],
        [[1]],
        {},
        5,
    ]
    shapes += [None, "4", [0], [2**63], [10**400], [3, 8], [4, 8, 2]]
    for shape in shapes:
        yield f"shape {str(shape)[:30]}", edited(lambda header, shape=shape: header[A].update(shape=shape))  # type: ignore[misc]
    dtypes: list[Any] = [
        "F31",
        "f32",
        "",
        None,
        5,
        [],
        {},
        "x" * 100_000,
        "F16",
        "F64",
        "BF16",
        "I8",
        "U64",
        "F4",
        "C64",
        "\0",
    ]
    for dtype in dtypes:
        yield f"dtype {str(dtype)[:30]}", edited(lambda header, dtype=dtype: header[A].update(dtype=dtype))  # type: ignore[misc]
    offsets: list[Any] = [
        [0],
        [],
        [0, 128, 256],
        [128, 0],
        [0, -128],
        [-128, 0],
        [0, 2**63],
        [2**62, 2**62 + 128],
        [0, 127],
        [0, 129],
    ]
    offsets += [
        [0.0, 128.0],
        ["0", "128"],
        [True, 128],
        None,
        {},
        [64, 192],
        [128, 256],
        [2**64, 2**64 + 128],
        [10**400, 10**400 + 128],
    ]
    for given in offsets:
        label = f"offsets {str(given)[:30]}"
        yield label, edited(lambda header, given=given: header[A].update(data_offsets=given))  # type: ignore[misc]
    yield "minus zero", with_json(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}')
    yield "zero times too much", with_json({"a": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}, b"")
    for field in ("dtype", "shape", "data_offsets"):
        yield f"without {field}", edited(lambda header, field=field: header[A].pop(field))  # type: ignore[misc]
    yield "another field", edited(lambda header: header[A].update(code="x"))
    yield "an entry too few", edited(lambda header: header.pop(A))
    yield "an entry that is a list", edited(lambda header: header.update({A: []}))
    yield "the same bytes twice", edited(lambda header: header.update({"x.lora_A.weight": header[A]}))
    yield "all the same bytes", edited(lambda header: [item.update(header[A]) for item in header.values()])


@family(
    *("unpaired", "shape_mismatch", "rank_mismatch", "unknown_module", "unsupported_tensor", "unsupported_dtype"),
    *("non_finite", "bad_config", "trainable_tokens", "not_mergeable", "no_modules", "unsupported_module"),
)
def ends_of_the_base() -> Cases:
    """Embedding, head and single tokens: kept for a merge where they fit, and refused where they do not."""
    head, embedding = "base_model.model.lm_head", "base_model.model.model.embed_tokens"
    tokens = f"{embedding}.token_adapter.trainable_tokens_delta"

    def zeros(*shape: int, dtype: str = "F32") -> Tensor:
        return tensor(np.zeros(shape), dtype)

    on_head = {f"{head}.lora_A.weight": zeros(4, 8), f"{head}.lora_B.weight": zeros(4, 4)}
    on_embedding = {f"{embedding}.lora_embedding_A": zeros(4, 4), f"{embedding}.lora_embedding_B": zeros(8, 4)}
    for name in on_head:
        for label, item in (("away", None), ("wide", zeros(4, 9)), ("bytes", zeros(4, 8, dtype="U8"))):
            yield f"{name} {label}", with_tensors({**on_head, name: item})
        yield f"{name} NaN", with_tensors({**on_head, name: tensor(np.full(on_head[name].shape, np.nan))})
        yield f"{name} infinite", with_tensors({**on_head, name: tensor(np.full(on_head[name].shape, np.inf))})
    for name in on_embedding:
        for label, item in (("away", None), ("other rank", zeros(3, 4)), ("a cube", zeros(4, 4, 4))):
            yield f"{name} {label}", with_tensors({**on_embedding, name: item})
        yield f"{name} NaN", with_tensors({**on_embedding, name: tensor(np.full(on_embedding[name].shape, np.nan))})
    for other in ("model.wte", "embed_tokens", "model.embed_tokens.embed_tokens"):
        renamed = {name.replace("model.embed_tokens", other): item for name, item in on_embedding.items()}
        yield f"embedding {other}", with_tensors(renamed)
    for own, shape in ((head, (4, 8)), (embedding, (4, 8))):
        beside = on_head if own == head else on_embedding
        yield f"another {own}", with_tensors({**beside, f"{own}.base_layer.weight": zeros(*shape)})
        yield f"a longer {own}", with_tensors({**beside, f"{own}.base_layer.weight": zeros(5, 8)})
    yield "a layer's copy", with_tensors({**on_head, f"{PREFIX}.base_layer.weight": zeros(8, 8)})
    yield "a stray beside the head", with_tensors({**on_head, "base_model.model.lm_head.lora_C.weight": zeros(4, 8)})
    yield "a broken layer beside the head", with_tensors({**on_head, A: zeros(4, 9)})
    wrong: list[Any] = [None, [], [1], [1, 1], [1, 4], [-1, 0], [True, 0], ["0", "1"], "all", {"lm_head": [0, 1]}]
    wrong += [[2**63, 0], {"x": {"y": 1}}, 5, list(range(1000))]
    for indices in wrong:
        yield f"tokens {str(indices)[:30]}", with_tensors({tokens: zeros(2, 8)}, trainable_token_indices=indices)
    yield "tokens too wide", with_tensors({tokens: zeros(2, 9)}, trainable_token_indices=[0, 1])
    yield "tokens NaN", with_tensors({tokens: tensor(np.full((2, 8), np.nan))}, trainable_token_indices=[0, 1])
    yield (
        "tokens of a layer",
        with_tensors({f"{PREFIX}.token_adapter.trainable_tokens_delta": zeros(2, 8)}, trainable_token_indices=[0, 1]),
    )
    yield "tokens and no list", with_tensors({tokens: zeros(2, 8)})
    yield "a list and no tokens", with_tensors({}, trainable_token_indices=[0, 1])
    yield (
        "tokens and a LoRA on them",
        with_tensors({tokens: zeros(2, 8), **on_embedding}, trainable_token_indices=[0, 1]),
    )


@family("bad_safetensors", "unknown_module", "unsupported_tensor", "unsupported_module", "no_modules")
def names_of_tensors() -> Cases:
    names: tuple[str, ...] = (
        "../../x.lora_A.weight",
        "/etc/passwd",
        "..\\x.lora_A.weight",
        "",
        "\0",
        f"{A}\0",
        "x" * 100_000,
        "́" * 99,
    )
    names += (
        f"{A}.exe",
        "бета.lora_A.weight",
        "lora_A.weight",
        ".lora_A.weight",
        "\u202egnp.lora_A.weight",
        "__class__",
    )
    names += (
        f"{PREFIX}.lora_A.weight\n",
        "%s%s%n.lora_A.weight",
        "{0.__class__}.lora_B.weight",
        "$(reboot).lora_A.weight",
    )
    names += tuple(f"base_model.model.{name}.lora_A.weight" for name in ("model.norm", "model.layers.-1.x", "*"))
    names += (
        A.replace("layers.0", "layers.00"),
        A.replace("layers.0", "layers.99"),
        A.upper(),
        A.replace("q_proj", "q＿proj"),
    )
    for name in names:
        yield repr(name)[:60], with_tensors({A: None, name: lora_tensors()[A]})
    yield "none at all", with_tensors(dict.fromkeys(lora_tensors()))
    yield "metadata only", with_json({"__metadata__": {"format": "pt"}}, b"")


NOT_FINITE = {
    "F32": {"NaN": 0x7FC00000, "signalling NaN": 0x7F800001, "-NaN": 0xFFFFFFFF, "Inf": 0x7F800000, "-Inf": 0xFF800000}
}
NOT_FINITE["F16"] = {"NaN": 0x7E00, "-NaN": 0xFFFF, "Inf": 0x7C00, "-Inf": 0xFC00}
NOT_FINITE["BF16"] = {"NaN": 0x7FC0, "-NaN": 0xFFFF, "Inf": 0x7F80, "-Inf": 0xFF80}


@family("non_finite")
def values_that_are_none() -> Cases:
    for dtype, words in NOT_FINITE.items():
        for label, word in words.items():
            for side, place in ((A, 0), (B, -1)):
                tensors = lora_tensors(dtype=dtype)
                values = np.frombuffer(tensors[side].data, "<u4" if dtype == "F32" else "<u2").copy()
                values[place] = word
                changed = Tensor(dtype, tensors[side].shape, values.tobytes())
                yield f"{label} in {side[-8]} of {dtype}", with_tensors({**tensors, side: changed})
    yield "too large for bf16", with_tensors({A: tensor(np.full((4, 8), 3.4e38))})
    yield "too large times the scaling", with_tensors({B: tensor(np.full((8, 4), 2.5e38))})
    yield (
        "too large times the alpha of one",
        with_tensors({B: tensor(np.full((8, 4), 1e32))}, alpha_pattern={"q_proj": 1e9}),
    )


@family(
    "shape_mismatch",
    "rank_mismatch",
    "unpaired",
    "unsupported_dtype",
    "unsupported_tensor",
    "unknown_module",
    "rank_too_large",
)
def tensors_that_do_not_fit() -> Cases:
    shapes = {"narrow": (4, 7), "wide": (4, 9), "rank 3": (3, 8), "rank 0": (0, 8), "no width": (4, 0), "vector": (32,)}
    shapes |= {"three": (4, 8, 1), "number": (), "transposed": (8, 4), "one": (1, 1), "none": (0,)}
    for label, shape in shapes.items():
        yield label, with_tensors({A: tensor(np.zeros(shape))})
    yield "another base", with_tensors({A: tensor(np.zeros((4, 4096))), B: tensor(np.zeros((4096, 4)))})
    yield "A and B swapped", with_tensors({A: lora_tensors()[B], B: lora_tensors()[A]})
    yield "A alone", with_tensors({B: None})
    yield "B alone", with_tensors({A: None})
    for dtype in ("I32", "U32", "F8_E4M3", "F8_E5M2", "BOOL", "I8", "U8", "I64", "F64"):
        yield f"of {dtype}", with_tensors({A: Tensor(dtype, (4, 8), bytes(32 * _bytes_of(dtype)))})
    yield "twice, by two names", with_tensors({A.removeprefix("base_model.model."): lora_tensors()[A]})
    yield "name of an adapter inside", with_tensors({A.replace("lora_A", "lora_A.default"): lora_tensors()[A]})
    yield "an optimizer's", with_tensors({"state.0.exp_avg": tensor([1.0])})
    ranks = {name: item for name, item in lora_tensors(rank=8).items() if "layers.1" in name}
    yield "ranks that nothing tells", with_tensors(dict(ranks))
    yield "rank that the configuration hides", AdapterFiles(tensors=lora_tensors(rank=64)).files()


def _bytes_of(dtype: str) -> int:
    return {"I32": 4, "U32": 4, "I64": 8, "F64": 8}.get(dtype, 1)


@family("bad_safetensors", "missing_file", "pickle", "extra_weights")
def weights_that_are_something_else() -> Cases:
    whole = good()[WEIGHTS]
    for label, content in {
        "pickle": code_in_a_pickle(),
        "tar": tar(good(), "w"),
        "json": b"{}",
        "text": b"hello",
    }.items():
        yield label, with_weights(content)
    for label, content in {
        "a byte behind": whole + b"\0",
        "itself behind": whole * 2,
        "a pickle behind": whole + code_in_a_pickle(),
    }.items():
        yield label, with_weights(content)
    yield "a byte in front", with_weights(b"\0" + whole)
    for cut in range(1, len(whole), len(whole) // 12):
        yield f"cut off at {cut}", with_weights(whole[:cut])
    yield "missing", {CONFIG: good()[CONFIG]}
    for name in ("adapter_model-00001-of-00002.safetensors", "model.safetensors", "x.SafeTensors", "sub/x.safetensors"):
        yield f"beside {name}", {**good(), name: whole}
    for name in ("adapter_model.bin", "pytorch_model.pt", "X.PKL", "weights.ckpt", "a.Pickle", "sub/adapter_model.pth"):
        yield f"pickle {name}", {**good(), name: code_in_a_pickle()}
        yield f"only {name}", {CONFIG: good()[CONFIG], name: code_in_a_pickle()}


def code_in_a_pickle() -> bytes:
    """Makes the canary when it is loaded."""

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return CANARY.write_text, ("pickles run code",)

    return pickle.dumps(Payload())


def adalora(changes: dict[str, Tensor | None], **config: Any) -> Files:
    random = np.random.default_rng(0)
    tensors: dict[str, Tensor] = {}
    for module, (height, width) in MODULES.items():
        for part, shape in {"A": (4, width), "B": (height, 4), "E": (4, 1)}.items():
            tensors[f"base_model.model.{module}.lora_{part}"] = tensor(random.normal(size=shape))
    chosen = {name: item for name, item in {**tensors, **changes}.items() if item is not None}
    settings = {**lora_config(), "peft_type": "ADALORA", "init_r": 4, "target_r": 2, **config}
    return {CONFIG: json.dumps(settings).encode(), WEIGHTS: safetensors(chosen)}


@family(
    *(
        "shape_mismatch",
        "rank_mismatch",
        "unpaired",
        "unsupported_tensor",
        "non_finite",
        "rank_too_large",
        "no_modules",
    ),
    *("bad_config", "bad_scaling", "unknown_module", "unsupported_dtype", "dora", "lora_bias", "bad_safetensors"),
)
def other_kinds_that_lie() -> Cases:
    e = f"{PREFIX}.lora_E"
    vectors = {"longer": (5, 1), "shorter": (3, 1), "flat": (4,), "row": (1, 4), "wide": (4, 2), "empty": (0, 1)}
    for label, shape in vectors.items():
        yield f"AdaLoRA, E {label}", adalora({e: tensor(np.ones(shape))})
    yield "AdaLoRA without E", adalora({e: None})
    yield "AdaLoRA, only E", adalora({f"{PREFIX}.lora_A": None, f"{PREFIX}.lora_B": None})
    for value in ("nan", "inf", "-inf"):
        yield f"AdaLoRA, E {value}", adalora({e: tensor(np.full((4, 1), float(value)))})
    huge = {f"{PREFIX}.lora_{part}": tensor(np.full(shape, 3e38)) for part, shape in {"A": (4, 8), "B": (8, 4)}.items()}
    yield "AdaLoRA, overflow", adalora({**huge, e: tensor(np.full((4, 1), 3e38))})
    none = {f"base_model.model.{module}.lora_A": tensor(np.ones((0, shape[1]))) for module, shape in MODULES.items()}
    none |= {f"base_model.model.{module}.lora_B": tensor(np.ones((shape[0], 0))) for module, shape in MODULES.items()}
    none |= {f"base_model.model.{module}.lora_E": tensor(np.ones((0, 1))) for module in MODULES}
    yield "AdaLoRA, no rank at all", adalora(dict(none))
    yield "AdaLoRA, a stranger", adalora({"base_model.model.x.lora_E": tensor(np.ones((4, 1)))})
    yield "AdaLoRA, surrogate", {**adalora({}), WEIGHTS: with_header(b'{"base_model.model.\\ud800.lora_A":{}}', b"")}
    fields: dict[str, Any] = {
        "init_r": (0, -1, "4", None, 1e9, 10**9),
        "lora_alpha": (0, -1, "x", None, 1e300, True),
    }
    for field, values in fields.items():
        for value in values:
            yield f"AdaLoRA, {field} {value!r}", adalora({}, **{field: value})
    for length in (0, 1, 7, 9, 64):
        magnitudes = {f"{PREFIX}.lora_magnitude_vector": tensor(np.ones(length))}
        yield f"DoRA, {length} magnitudes of 8", with_tensors(dict(magnitudes), use_dora=True)
    bias = {f"{PREFIX}.lora_B.bias": tensor(np.ones(3))}
    yield "a bias of another length", with_tensors(dict(bias), lora_bias=True)


def of_kind(kind: str, tensors: Shapes, value: float = 1.0, **config: Any) -> Files:
    """One module's tensors of other kinds, by part → shape, all of one value."""
    settings = {"peft_type": kind, "r": 4, "alpha": 8, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    named = {f"{PREFIX}.{part}": tensor(np.full(shape, value)) for part, shape in tensors.items()}
    return {CONFIG: json.dumps(settings).encode(), WEIGHTS: safetensors(named)}


@family("non_finite", "shape_mismatch", "rank_mismatch", "unpaired", "unsupported_tensor", "bad_config", "dora")
def conversions_that_explode() -> Cases:
    """Few bytes that become many, and numbers that become none."""
    kron: Shapes = {
        "lokr_w1_a": (1, 20_000),
        "lokr_w1_b": (20_000, 1),
        "lokr_w2_a": (8, 20_000),
        "lokr_w2_b": (20_000, 8),
    }
    yield "LoKr, inner ranks of 20,000", of_kind("LOKR", kron, value=1e30)
    loha: Shapes = {"hada_w1_a": (8, 4), "hada_w1_b": (4, 8), "hada_w2_a": (8, 4), "hada_w2_b": (4, 8)}
    dora: Shapes = {"lora_A.weight": (4, 8), "lora_B.weight": (8, 4), "lora_magnitude_vector": (8,)}
    plain: Shapes = {"lora_A.weight": (40, 8), "lora_B.weight": (8, 40)}
    for value in (3e38, 1e30, float("nan"), float("inf")):
        yield f"LoHa of {value}", of_kind("LOHA", loha, value)
        yield f"DoRA of {value}", of_kind("LORA", dora, value, use_dora=True)
        yield f"over the rank, of {value}", of_kind("LORA", plain, value, r=40)
    for value in (float("nan"), float("inf")):
        yield f"IA3 of {value}", of_kind("IA3", {"ia3_l": (8, 1)}, value)
    lokr: Shapes = {"lokr_w1": (2, 2), "lokr_w2": (4, 4)}
    wrong: list[tuple[int, ...]] = [(3, 5), (0, 0), (9,), (1,), (64, 1)]
    for label, shapes in {"LoHa": loha, "LoKr": lokr, "DoRA": dora}.items():
        for part in shapes:
            kind = {"DoRA": "LORA"}.get(label, label.upper())
            for shape in wrong:
                yield f"{label}, {part} {shape}", of_kind(kind, {**shapes, part: shape}, use_dora=label == "DoRA")
            rest = {name: shape for name, shape in shapes.items() if name != part}
            yield f"{label} without {part}", of_kind(kind, rest, use_dora=label == "DoRA")
    vectors: list[tuple[int, ...]] = [(7, 1), (8,), (1, 7), (0, 1), (8, 8), (1, 1, 8)]
    for shape in vectors:
        yield f"IA3 {shape}", of_kind("IA3", {"ia3_l": shape})
    yield "IA3 of a stranger", of_kind("IA3", {"ia3_x": (8, 8)})
