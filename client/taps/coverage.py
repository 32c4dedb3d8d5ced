"""Which layers the taps handle."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from client.taps import layers
from client.taps.attention import attention
from client.taps.layers import Maker
from client.taps.pooling import max_pooling
from client.taps.recurrent import recurrent

# Not tapped, but computed in any company alike
ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.LogSigmoid, nn.Mish, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Tanh,
)  # fmt: skip
# Type → how to tap it, and the parameters that it may have. A subclass may compute something else, so the
# type must be the very one.
HANDLED: dict[type[nn.Module], tuple[Maker, str]] = {
    **dict.fromkeys(ACTIVATIONS, (layers.elementwise, "")),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), (max_pooling, "")),
    nn.Linear: (layers.linear, "weight bias"),
    nn.Conv1d: (layers.convolution, "weight bias"),
    nn.Conv2d: (layers.convolution, "weight bias"),
    nn.Conv3d: (layers.convolution, "weight bias"),
    nn.GroupNorm: (layers.group_norm, "weight bias"),
    nn.LayerNorm: (layers.layer_norm, "weight bias"),
    nn.InstanceNorm1d: (layers.instance_norm, "weight bias"),
    nn.InstanceNorm2d: (layers.instance_norm, "weight bias"),
    nn.InstanceNorm3d: (layers.instance_norm, "weight bias"),
    nn.Embedding: (layers.embedding, "weight"),
    nn.EmbeddingBag: (layers.embedding_bag, "weight"),
    nn.LSTM: (recurrent, ""),
    nn.GRU: (recurrent, ""),
    nn.RNN: (recurrent, ""),
    nn.MultiheadAttention: (
        attention,
        "in_proj_weight in_proj_bias q_proj_weight k_proj_weight v_proj_weight",
    ),
}


def covers(network: nn.Module) -> str | None:
    """None if the taps handle every layer with trainable parameters; else why not: layer's name and type.

    A layer that is used twice, and weights that two layers share, are handled. What the parameters are used
    for outside of their layer's own forward function can't be seen here; `TappedGradients.sum` refuses it.
    """
    owners: dict[int, set[str]] = {}
    inner: set[nn.Module] = set()
    for name, layer in network.named_modules():
        called = f"{name or 'network'} ({type(layer).__name__})"
        if isinstance(layer, _NormBase) and (not _per_record(layer) or layer.track_running_stats):
            return f"{called}: it mixes records, or keeps statistics of them"
        own = dict(layer.named_parameters(recurse=False))
        trainable = [n for n, p in own.items() if p.requires_grad]
        for n in trainable:
            kind = type(layer).__name__ if n.startswith("in_proj") else "matrix"
            owners.setdefault(id(own[n]), set()).add(kind)
            if len(owners[id(own[n])]) > 1:
                return f"{called}: it shares {n} with a layer of another kind"
        if isinstance(layer, nn.MultiheadAttention):
            inner.add(layer.out_proj)
            trainable += [n for n, p in layer.out_proj.named_parameters() if p.requires_grad]
        if layer in inner or not trainable:
            continue
        reason = _reason(layer, own)
        if reason:
            return f"{called}: {reason}"
    return None


def maker(layer: nn.Module) -> Maker | None:
    """How to tap a layer that is handled, frozen or not: else what it computes may depend on others."""
    handled = HANDLED.get(type(layer))
    own = dict(layer.named_parameters(recurse=False))
    return None if handled is None or _reason(layer, own) is not None else handled[0]


def _per_record(layer: _NormBase) -> bool:
    return isinstance(layer, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)


def _reason(layer: nn.Module, own: dict[str, nn.Parameter]) -> str | None:
    handled = HANDLED.get(type(layer))
    if handled is None:
        return "this type of layer isn't tapped"
    if handled[1] and not own.keys() <= set(handled[1].split()):
        return "it has parameters of its own"
    if any(p.is_complex() for p in own.values()):
        return "its parameters are complex"
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and (
        layer.max_norm is not None or layer.scale_grad_by_freq
    ):
        return "max_norm and scale_grad_by_freq depend on other records"
    if isinstance(layer, nn.EmbeddingBag) and layer.mode == "max":
        return "mode max isn't tapped"
    if isinstance(layer, nn.RNNBase) and layer.proj_size:
        return "proj_size isn't tapped"
    if isinstance(layer, nn.MultiheadAttention) and (layer.bias_k is not None or layer.add_zero_attn):
        return "add_bias_kv and add_zero_attn aren't tapped"
    return None
