"""Models for images, series, texts, molecules and mixtures: what they compute, take and refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_model import (
    EVERY_MODEL,
    FINGERPRINT,
    IMAGE,
    MOLECULE,
    NUMBERS,
    SERIES,
    TEXT,
    features_of,
    shape_of,
    study_of,
)
from small import study
from torch import nn
from torch.nn import functional

from common.errors import StudyError
from common.features import blocks
from common.models import build_model, parameter_count, study_model
from common.study import Model, Study

every_model = pytest.mark.parametrize("name", EVERY_MODEL)


def built(name: str, columns: list[dict[str, Any]], **parameters: Any) -> nn.Module:
    return study_model(study(data={"columns": columns}, model={"name": name, "parameters": parameters}))


@every_model
@pytest.mark.parametrize("task", ["binary", "multi-class", "regression"])
def test_outputs(name: str, task: str) -> None:
    wanted = study_of(name, task)
    network = study_model(wanted)
    for records in (0, 1, 5):
        found = network(features_of(wanted, records))
        assert found.shape == (records, wanted.outputs)
        assert found.isfinite().all()
    assert not list(network.buffers())


@every_model
def test_weights_are_the_seeds(name: str) -> None:
    wanted = study_of(name)
    one, same, other = (study_model(wanted, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[n], same[n]) for n in one)
    from_zero = name in ("logistic-regression", "linear-svm", "logistic-hazard")
    assert from_zero or any(not torch.equal(one[n], other[n]) for n in one)


@every_model
def test_records_do_not_mix(name: str) -> None:
    """A record's outputs have no gradient by another record's features."""
    wanted = study_of(name, "multi-class")
    network, x = study_model(wanted), features_of(wanted, 3, 1)
    other = features_of(wanted, 3, 2)
    other[1] = x[1]
    assert torch.allclose(network(x)[1], network(other)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("cnn", [NUMBERS], r"takes one column of kind image; the study has x \(table\)"),
        ("resnet-18", [IMAGE, NUMBERS], "takes one column of kind image"),
        ("gru", [TEXT], "takes one column of kind series"),
        ("temporal-cnn", [NUMBERS], "takes one column of kind series"),
        ("embedding-bag", [SERIES], "takes one column of kind text or molecule"),
        ("embedding-bag", [FINGERPRINT], "takes token ids; bits holds none"),
        ("text-gru", [MOLECULE], "takes one column of kind text"),
        ("smiles-gru", [FINGERPRINT], "takes token ids; bits holds none"),
        ("mlp", [NUMBERS, TEXT], "takes numbers; note holds ids of tokens"),
        ("logistic-regression", [MOLECULE], "takes numbers; drug holds ids of tokens"),
        ("linear-svm", [TEXT, MOLECULE], "takes numbers; note, drug holds ids of tokens"),
    ],
)
def test_columns_that_a_model_does_not_take(name: str, columns: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        built(name, columns)


def test_an_image_too_small_for_the_stages() -> None:
    for name in ("cnn", "fusion"):
        with pytest.raises(StudyError, match="4 stages halve xray, 8 wide, to nothing"):
            built(name, [IMAGE], channels=[2, 2, 2, 2])
    assert built("cnn", [IMAGE], channels=[2, 2, 2])


@pytest.mark.parametrize("name", ["mlp", "logistic-regression", "linear-svm"])
def test_flat_models_take_images_series_and_fingerprints(name: str) -> None:
    network = built(name, [IMAGE, SERIES, FINGERPRINT, NUMBERS])
    assert network(torch.zeros(2, 72 + 24 + 64 + 4)).shape == (2, 1)


@pytest.mark.parametrize("name", ["embedding-bag", "text-gru", "text-gru, last", "smiles-gru", "fusion"])
def test_padding_does_not_count(name: str) -> None:
    """The same tokens in a longer column, and whatever is learnt of "no token", give the same outputs."""
    wanted = study_of(name)
    longer = wanted.model_dump(mode="json")
    for column in longer["data"]["columns"]:
        if column.get("tokens") and column.get("representation") != "fingerprint":
            column["tokens"] += 9
    wider = Study.model_validate(longer)
    network, other = study_model(wanted), study_model(wider)
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        for layer in other.modules():
            if isinstance(layer, nn.Embedding):
                layer.weight[0] = 7.0
    x = features_of(wanted, 6, 3)
    parts = [
        functional.pad(x[:, b.start : b.start + b.width], (0, 9 if b.vocabulary else 0))
        for b in blocks(wanted)
    ]
    there = torch.cat([x[:, b.start : b.start + 1] for b in blocks(wanted) if b.vocabulary], dim=1) > 0
    found, expected = other(torch.cat(parts, dim=1)), network(x)
    assert torch.allclose(found[there.all(dim=1)], expected[there.all(dim=1)], rtol=1e-5, atol=1e-6)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_bag_is_the_mean_of_its_tokens_rows() -> None:
    network = built("embedding-bag", [TEXT], width=3, hidden=[])
    table, head = network.get_submodule("body.table"), network.get_submodule("head.0")
    x = torch.tensor([[2.0, 5.0, 2.0, 0, 0, 0, 0], [0] * 7, [11.0, 1, 2, 3, 4, 5, 6]])
    rows = [
        table.weight[[2, 5, 2]].mean(dim=0),
        torch.zeros(3),
        table.weight[[11, 1, 2, 3, 4, 5, 6]].mean(dim=0),
    ]
    assert torch.allclose(network(x), head(torch.stack(rows)), atol=1e-6)


def test_token_recurrence_ends_at_the_last_token() -> None:
    network = built("smiles-gru", [MOLECULE], width=3, hidden=4)
    table, layer = network.get_submodule("body.table"), network.get_submodule("body.layer")
    x = torch.tensor([[7.0, 99, 3, 0, 0, 0], [128.0, 1, 2, 3, 4, 5]])
    for record, length in ((0, 3), (1, 6)):
        _, end = layer(table(x[record, :length].long())[None])
        assert torch.allclose(network(x)[record], network.get_submodule("head")(end[0, 0]), atol=1e-6)


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_recurrence_reads_the_series_in_its_shape(name: str) -> None:
    network = built(name, [SERIES], hidden=4)
    layer, head = network.get_submodule("body.layer"), network.get_submodule("head")
    x = torch.randn(3, 24)
    states, _ = layer(x.view(3, 6, 4))
    assert torch.equal(network(x), head(states[:, -1]))


def test_temporal_convolutions_look_back_only() -> None:
    """Before the norms, which take the whole series: a block without them."""
    network = built("temporal-cnn", [SERIES], channels=[4, 4], kernel=3)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.GroupNorm):
            parent = network.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.Identity())
    stages = network.get_submodule("body.stages")
    x = torch.randn(1, 4, 12, requires_grad=True)
    for step in (0, 5, 11):
        (found,) = torch.autograd.grad(stages(x)[0, :, step].sum(), x)
        assert not found[:, :, step + 1 :].any()
        assert found[:, :, max(0, step - 12) : step + 1].any()


def test_resnet_has_the_papers_layers() -> None:
    """He et al. 2016, table 1: 17 convolutions in depth and a linear layer, 3 shortcuts; 11.2 million numbers
    at 64 … 512 channels for CIFAR-like images of 3 channels (torchvision's resnet18 has 11,689,512, of
    which stem 9,536 and head 513,000; its batch normalisation has as many as GroupNorm)."""
    image = {"kind": "image", "name": "xray", "size": [32, 32], "channels": 3}
    network = built("resnet-18", [image])
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 17 + 3
    assert sum(p.numel() for p in network.get_submodule("stages").parameters()) == 11_166_976
    assert sum(p.numel() for p in network.get_submodule("stem").parameters()) == 3 * 64 * 9 + 128
    assert sum(p.numel() for p in network.get_submodule("head").parameters()) == 513
    x = network.get_submodule("stem")(torch.zeros(1, 3, 32, 32))
    sizes = []
    for stage in network.get_submodule("stages").children():
        x = stage(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    large = built("resnet-18", [{**image, "size": [128, 128]}], stem="large", width=8)
    assert large.get_submodule("stem")(torch.zeros(1, 3, 128, 128)).shape == (1, 8, 32, 32)


def test_fusion_reads_each_block_by_its_own_branch() -> None:
    wanted = study_of("fusion")
    network, x = study_model(wanted), features_of(wanted, 2, 4)
    branches = network.get_submodule("branches")
    parts = []
    for block, branch in zip(blocks(wanted), branches.children(), strict=True):
        parts.append(branch(x[:, block.start : block.start + block.width]))
    assert [p.shape[1] for p in parts] == [3, 2, 4, 5, 5, 3]
    assert torch.equal(network(x), network.get_submodule("head")(torch.cat(parts, dim=1)))


def test_a_fusion_of_a_table_alone() -> None:
    assert built("fusion", [NUMBERS], table=3)(torch.zeros(2, 4)).shape == (2, 1)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("gru", {"hidden": 0}, "hidden: Input should be greater than or equal to 1"),
        ("gru", {"state": "first"}, "state: Input should be 'last' or 'mean'"),
        ("resnet-18", {"depth": 50}, "depth: Extra inputs are not permitted"),
        ("temporal-cnn", {"channels": []}, "channels: Tuple should have at least 1 item"),
        ("embedding-bag", {"width": "wide"}, "width: Input should be a valid integer"),
    ],
)
def test_parameters_that_are_wrong(name: str, parameters: dict[str, Any], message: str) -> None:
    wanted = study_of(name)
    with pytest.raises(StudyError) as told:
        build_model(Model(name=name, parameters=parameters), shape_of(wanted))
    assert message in told.value.message


def test_counts_of_the_defaults() -> None:
    image, volume = {**IMAGE, "size": [64, 64]}, {**IMAGE, "size": [28, 28, 28]}
    counts = {
        "cnn": parameter_count(study(data={"columns": [image]}, model={"name": "cnn"})),
        "cnn in 3-D": parameter_count(study(data={"columns": [volume]}, model={"name": "cnn"})),
        "gru": parameter_count(study(data={"columns": [SERIES]}, model={"name": "gru"})),
        "embedding-bag": parameter_count(study(data={"columns": [TEXT]}, model={"name": "embedding-bag"})),
    }
    assert counts == {
        "cnn": (9 * 16 + 48) + (9 * 16 * 32 + 96) + (9 * 32 * 64 + 192) + 65,
        "cnn in 3-D": (27 * 16 + 48) + (27 * 16 * 32 + 96) + (27 * 32 * 64 + 192) + 65,
        "gru": 3 * 64 * (4 + 64 + 2) + 65,
        "embedding-bag": 12 * 32 + 33 * 32 + 33,
    }
