"""Model functions by name, and what makes a network fit for patient-level privacy."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, create_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from common.errors import StudyError
from common.features import Block, blocks
from common.messages import Array
from common.study import Model, Study


@dataclass(frozen=True)
class Shape:
    """What a model is given, and what it must give.

    Attributes:
        inputs: features of a record.
        outputs: 1 logit in binary studies, 1 number in regression, else one logit per class.
        blocks: what the features are, in their order; empty: a table.
    """

    inputs: int
    outputs: int
    blocks: tuple[Block, ...] = ()

    def only(self, *kinds: str) -> Block:
        """The one block of a model that takes nothing else.

        Raises:
            StudyError: if the study's columns are others.
        """
        if len(self.blocks) != 1 or self.blocks[0].kind not in kinds:
            have = ", ".join(f"{b.name} ({b.kind})" for b in self.blocks) or "a table"
            raise StudyError(
                f"this model takes one column of kind {' or '.join(kinds)}; the study has {have}",
                remedy="choose a model for these columns (fusion takes several kinds)",
            )
        return self.blocks[0]

    def numbers(self) -> int:
        """The features of a model that takes them all as numbers.

        Raises:
            StudyError: if some are ids of tokens, which are no quantity.
        """
        ids = [block.name for block in self.blocks if block.vocabulary]
        if ids:
            raise StudyError(
                f"this model takes numbers; {', '.join(ids)} holds ids of tokens",
                remedy="choose embedding-bag, text-gru or smiles-gru, or fusion beside other columns",
            )
        return self.inputs


Hidden = Annotated[int, Field(ge=1, le=65_536)]
ModelFunction = Callable[..., nn.Module]
_MODELS: dict[str, ModelFunction] = {}


def register(name: str) -> Callable[[ModelFunction], ModelFunction]:
    """Make a function `(shape, **parameters) -> nn.Module` available to study files as `name`.

    Its keyword parameters, with types and defaults, are what `[model.parameters]` may say. The module
    maps float32 [records, inputs] to [records, outputs].
    """

    def keep(function: ModelFunction) -> ModelFunction:
        if name in _MODELS:
            raise ValueError(f"a model named {name!r} is registered already")
        _MODELS[name] = function
        return function

    return keep


def registered() -> tuple[str, ...]:
    """Names of all models, sorted."""
    return tuple(sorted(_MODELS))


def build_model(model: Model, shape: Shape, seed: int = 0) -> nn.Module:
    """The network of a study, with initial weights drawn from `seed` (public: they protect nobody).

    Raises:
        StudyError: if the name is unknown, a parameter is wrong, or the network can't be trained under
            patient-level privacy (batch statistics, buffers that data changes), or what is to be frozen
            isn't there, or is all there is.
    """
    function = _MODELS.get(model.name)
    if function is None:
        raise StudyError(f"model.name: {model.name!r} is unknown", remedy=f"one of {', '.join(registered())}")
    parameters = _checked(function, model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = function(shape, **parameters)
    refuse_unsafe(network, model.name)
    _freeze(network, model)
    return network


def study_model(study: Study, seed: int = 0) -> nn.Module:
    """The network that a study asks for; see `build_model`."""
    parts = blocks(study)
    inputs = sum(part.width for part in parts)
    return build_model(study.model, Shape(inputs, study.outputs, parts), seed)


def parameter_count(study: Study) -> int:
    """Numbers in a study's model."""
    return sum(p.numel() for p in study_model(study).parameters())


def _freeze(network: nn.Module, model: Model) -> None:
    names = [name for name, _ in network.named_parameters()]
    for frozen in model.frozen:
        if not any(name == frozen or name.startswith(f"{frozen}.") for name in names):
            raise StudyError(
                f"model.frozen: {model.name} has no parameters {frozen!r}",
                remedy=f"it has {', '.join(names[:40])}{' …' if len(names) > 40 else ''}",
            )
    for name, parameter in network.named_parameters():
        if model.freezes(name):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in network.parameters()):
        raise StudyError("model.frozen: nothing is left to train", remedy="leave the head out of it")


def _checked(function: ModelFunction, model: Model) -> dict[str, Any]:
    signature = inspect.signature(function, eval_str=True)
    fields: dict[str, Any] = {
        name: (p.annotation, ... if p.default is p.empty else p.default)
        for name, p in signature.parameters.items()
        if name != "shape"
    }
    schema = create_model("parameters", __config__=ConfigDict(extra="forbid"), **fields)
    try:
        return dict(TypeAdapter(schema).validate_python(model.parameters))
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors(include_input=False)
        )
        raise StudyError(
            f"model.parameters of {model.name}: {found}",
            remedy=f"it takes {', '.join(fields) or 'no parameters'}",
        ) from None


def refuse_unsafe(network: nn.Module, name: str) -> None:
    """Check that only noised gradients can carry data into the network, and that no layer mixes records.

    Raises:
        StudyError: naming the first layer that normalises over records, looks at how often others use an
            entry, or rescales entries in use; or the first buffer.
    """
    for place, layer in network.named_modules():
        reason = _unsafe(layer)
        if reason is not None:
            raise StudyError(
                f"model {name}: {place or 'network'} ({type(layer).__name__}) {reason[0]}", remedy=reason[1]
            )
    for buffer, _ in network.named_buffers():
        raise StudyError(
            f"model {name}: buffer {buffer!r} would leave the site without noise",
            remedy="use layers without running statistics",
        )


def _unsafe(layer: nn.Module) -> tuple[str, str] | None:
    """Why, and the remedy."""
    if isinstance(layer, _BatchNorm):
        return "makes a record's result depend on other records", "use GroupNorm or LayerNorm"
    if isinstance(layer, _NormBase) and layer.track_running_stats:
        return "keeps statistics of records, without noise", "set track_running_stats = False"
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        if layer.max_norm is not None:
            return "rescales the entries that records use, without noise", "set max_norm = None"
        if layer.scale_grad_by_freq:
            return "scales gradients by what other records use", "set scale_grad_by_freq = False"
    return None


def parameter_arrays(network: nn.Module) -> dict[str, Array]:
    """The network's parameters, name → float32 array, copied."""
    return {n: np.array(p.detach().numpy(), dtype=np.float32) for n, p in network.named_parameters()}
