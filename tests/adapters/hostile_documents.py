"""Configurations, provenance and tokenizer files that lie, and uploads that are no adapter at all."""

from __future__ import annotations

import json
from typing import Any

from tests.adapters.factories import VOCABULARY, AdapterFiles, lora_config, lora_tensors, tar
from tests.adapters.hostile import CONFIG, TRAVERSALS, WEIGHTS, Cases, Files, family, good

REAL = json.dumps(lora_config()).encode()
WRONG: dict[str, Any] = {
    "null": None, "true": True, "0": 0, "-1": -1, "4.5": 4.5, "2^70": 2**70, "10^400": 10**400, "text": "x",
    "empty": "", "list": [], "numbers": [1, 2], "nested": [[[]]], "object": {}, "objects": {"q_proj": {"q_proj": 4}},
}  # fmt: skip
"""Values of every kind. Each field below says which of them it can do with."""
FINE: dict[str, tuple[str, ...]] = {
    "r": (),
    "lora_alpha": ("0", "-1", "4.5"),
    "target_modules": ("text", "empty", "list"),
    "use_rslora": ("null", "true"),
    "rank_pattern": ("null", "0", "empty", "list", "object"),
    "alpha_pattern": ("null", "0", "empty", "list", "object"),
    "base_model_name_or_path": ("null", "text", "empty"),
    "bias": (),
    "lora_bias": ("null", "true"),
    "peft_type": (),
    "use_dora": ("null",),
    "modules_to_save": ("null", "0", "empty", "list", "object"),
    "layer_replication": ("null", "0", "empty", "list", "object"),
    "target_parameters": ("null", "0", "empty", "list", "object"),
}


def configured(**changes: Any) -> Files:
    return AdapterFiles(config=lora_config(**changes)).files()


def written(config: bytes) -> Files:
    return {**good(), CONFIG: config}


def provenance(content: Any) -> Files:
    return {**good(), "loraplex.json": content if isinstance(content, bytes) else json.dumps(content).encode()}


@family(
    *("bad_config", "bad_scaling", "not_lora", "dora", "modules_to_save", "lora_bias", "layer_replication"),
    *("target_parameters", "rank_mismatch", "rank_too_large", "unsupported_pattern", "bad_json"),
)
def fields_of_the_wrong_type() -> Cases:
    for field, fine in FINE.items():
        for label, value in WRONG.items():
            if label not in fine:
                yield f"{field} {label}", configured(**{field: value})


@family("bad_json")
def documents_that_are_no_json() -> Cases:
    texts: dict[str, bytes] = {
        "empty": b"",
        "null": b"null",
        "list": b"[]",
        "text": b'"x"',
        "number": b"7",
        "NUL": bytes(99),
    }
    texts |= {
        "BOM": b"\xef\xbb\xbf" + REAL,
        "UTF-16": REAL.decode().encode("utf-16"),
        "UTF-32": REAL.decode().encode("utf-32"),
    }
    texts |= {"latin-1": b'{"r":"\xe9"}', "cut off": REAL[:-1], "two": REAL + REAL, "comma": REAL[:-1] + b",}"}
    texts |= {"comment": b"// x\n" + REAL, "python": str(lora_config()).encode(), "yaml": b"r: 4\nlora_alpha: 8\n"}
    more = {
        "deep": b"[" * 65 + b"]" * 65,
        "deeper": b"[" * 90_000 + b"]" * 90_000,
        "open": b"[" * 90_000,
        "NaN": b"NaN",
    }
    more |= {
        "infinity": b"-Infinity",
        "1e400": b"1e400",
        "-1e999": b"-1e999",
        "5000 digits": b"9" * 5000,
        "hex": b"0x4",
    }
    more |= {
        "surrogate": b'"\\ud800"',
        "low surrogate": b'"\\udc00"',
        "control": b'"\n"',
        "escape": b'"\\x41"',
        "01": b"01",
    }
    more |= {"many": b"[" + b"[]," * 300_000 + b"1]", "long": b'"' + b"x" * (1 << 20) + b'"'}
    more |= {"twice": b'{"a":1,"a":1}', "deep objects": b'{"a":' * 65 + b"1" + b"}" * 65}
    for label, text in more.items():
        texts[f"a value {label}"] = REAL[:-1] + b', "lora_dropout": ' + text + b"}"
    texts |= {"rank twice": REAL[:-1] + b', "r": 4}', "rank twice, another": b'{"r": 8, ' + REAL[1:]}
    for label, text in texts.items():
        yield label, written(text)
        if label not in ("rank twice", "rank twice, another"):
            yield f"provenance {label}", provenance(text.replace(b"lora_dropout", b"lineage"))


@family("unsupported_pattern", "bad_config", "rank_too_large", "bad_scaling", "non_finite", "rank_mismatch")
def patterns_and_ranks_that_explode() -> Cases:
    patterns = ["(a+)+$", "(a|a)*$", "(.*)*x", "(?=a)", "(a)\\1", ".*.*.*x", "(.|.)" * 30 + "z", "((.|.)(.|.))" * 20]
    patterns += [
        "a{1,99999}{1,99999}",
        "(x{0,60000}){0,60000}",
        "[",
        "(",
        "*",
        "\\",
        "[[:alpha:]]",
        "(?i)q",
        "(?P<n>q)",
    ]
    patterns += [
        "q" * 513,
        "q proj",
        "q\n",
        "ｑ",
        "\\d++",
        "a**",
        "x{2}{3}",
        "(|||||||||)" * 12,
        "(?#x)",
        "$^" * 9 + "(",
    ]
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in patterns:
            yield f"{field} {pattern[:30]!r}", configured(**{field: {pattern: 4}})
    yield "5,000 patterns", configured(rank_pattern={f"q{number}": 4 for number in range(5000)})
    yield "65 patterns that repeat", configured(rank_pattern={f".*{number}": 4 for number in range(65)})
    for value in (0, -1, 17, 4.0, True, "4", None, [4], 2**40, 8):
        yield f"a rank of {value!r}", configured(rank_pattern={"q_proj": value})
    for value in ("8", None, True, [8], 10**400, 1e10, -1e300):
        yield f"an alpha of {value!r}"[:60], configured(alpha_pattern={"q_proj": value})
    for value in (8, 3, 16, 1):
        yield f"r {value} of 4", configured(r=value)


@family("wrong_base", "bad_provenance", "bad_config", "unknown_module", "shape_mismatch", "bad_json")
def adapters_of_another_base() -> Cases:
    for given in ("sha256:" + "0" * 64, "", "x", "sha256:", "x" * 9999):
        yield f"fingerprint {given[:20]!r}", provenance({"base_fingerprint": given})
    fingerprints: list[Any] = [5, True, [], {}, ["sha256"]]
    for value in fingerprints:
        yield f"fingerprint {value!r}", provenance({"base_fingerprint": value})
    objects: list[Any] = [5, "x", [1], True]
    for value in objects:
        yield f"lineage {value!r}", provenance({"lineage": value})
        yield f"scores {value!r}", provenance({"scores": value})
    scores: list[Any] = ["low", None, True, [], 10**400, -(10**400), {"a": 1}]
    for value in scores:
        yield f"a score {str(value)[:20]!r}", provenance({"scores": {"loss": value}})
    yield "template", provenance({"chat_template_sha256": 7})
    for named in ("a\0b", "a\nb", "\x1b[2J", "x" * 1025):
        yield f"a base called {named[:9]!r}", configured(base_model_name_or_path=named)
    for old, new in {"q_proj": "c_attn", "model.layers": "transformer.h", "mlp": "block_sparse_moe.experts.0"}.items():
        tensors = {name.replace(old, new): item for name, item in lora_tensors().items()}
        yield f"{new} for {old}", AdapterFiles(tensors=tensors).files()


@family("adds_tokens", "other_tokenizer", "bad_json")
def tokenizers_that_lie() -> Cases:
    new, moved = {**VOCABULARY, "evil": 4}, {**VOCABULARY, "a": 2, "b": 1}
    for label, words in {
        "more": new,
        "others": moved,
        "one": {"evil": 0},
        "negative": {"evil": -1},
        "huge": {"evil": 10**400},
    }.items():
        yield (
            f"{label} in tokenizer.json",
            {**good(), "tokenizer.json": json.dumps({"model": {"vocab": words}}).encode()},
        )
        yield f"{label} in vocab.json", {**good(), "vocab.json": json.dumps(words).encode()}
        yield f"{label} in added_tokens.json", {**good(), "added_tokens.json": json.dumps(words).encode()}
    for number in ("4", "1", "000000004"):
        decoder = {"added_tokens_decoder": {number: {"content": "evil"}}}
        yield f"decoder {number}", {**good(), "tokenizer_config.json": json.dumps(decoder).encode()}
    unigram = {"model": {"vocab": [["<pad>", 0], [["evil"], 1]]}}
    yield "a list for a token", {**good(), "tokenizer.json": json.dumps(unigram).encode()}
    bombs = {"lists": b'{"model":{"vocab":[' + b"[]," * 2_000_000 + b"[]]}}", "spaces": b"{}" + b" " * (2 << 20)}
    bombs |= {
        "deep": b'{"model":' * 999 + b"1" + b"}" * 999,
        "not JSON": b"tokens",
        "a name twice": b'{"model":1,"model":2}',
    }
    bombs |= {"a list": b"[]", "surrogate": b'{"model":{"vocab":{"\\ud800":0}}}'}
    for label, content in bombs.items():
        yield f"{label} in tokenizer.json", {**good(), "tokenizer.json": content}


@family("bad_upload", "unsafe_archive", "missing_file", "nesting", "pickle", "extra_weights", "bad_archive")
def loose_files_that_are_no_adapter() -> Cases:
    yield "nothing", {}
    for name in TRAVERSALS:
        yield repr(name)[:60], {**good(), name: b"evil"}
    yield "NUL", {**good(), "README.md\0.txt": b""}
    yield "no name", {**good(), "": b""}
    pairs = list(good().items())
    yield "one twice", [*pairs, pairs[0]]
    yield "another twice", [*pairs, (CONFIG, b"{}")]
    yield "another case", [*pairs, ("ADAPTER_CONFIG.JSON", b"{}")]
    yield "an archive beside files", [*pairs, ("a.tar", tar(good(), "w"))]
    yield "two archives", [("a.tar", tar(good(), "w")), ("b.tar", tar(good(), "w"))]
    for missing in (CONFIG, WEIGHTS):
        yield f"no {missing}", {name: content for name, content in good().items() if name != missing}
    looks_like_it = {"аdapter_config.json": good()[CONFIG], WEIGHTS: good()[WEIGHTS]}
    yield "a Cyrillic letter", looks_like_it
    yield "a wide letter", {"ａdapter_config.json": good()[CONFIG], WEIGHTS: good()[WEIGHTS]}
    yield "a space behind", {f"{CONFIG} ": good()[CONFIG], WEIGHTS: good()[WEIGHTS]}
    yield "two directories", {f"a/{CONFIG}": good()[CONFIG], f"b/{WEIGHTS}": good()[WEIGHTS]}
    yield "an archive of another kind", {"adapter.7z": b"7z\xbc\xaf\x27\x1c"}
    yield "an archive called weights", {WEIGHTS: tar(good(), "w")}
