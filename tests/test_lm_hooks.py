# SPDX-License-Identifier: Apache-2.0
"""Hooks and other `forward`s of a language model's parts: they run, no sampler skips them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from gru_fast import GRU, GRULanguageModel, Sampler, Stream, explain_generate, ops, sampling
from test_module_uses import Counted

V, H = 7, 16
TOKENS = torch.tensor([[3, 1, 6, 0], [5, 0, -100, -100], [2, 2, 4, 1]])
PARTS = ("embedding", "gru", "head")

needs_kernels = pytest.mark.skipif(not ops.HAS_CPU_KERNELS, reason="no compiled kernels")
old_weight_norm = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")


def language_model(embedding_size: int | None = 5, layers: int = 2, **options: Any) -> Any:
    return GRULanguageModel(V, embedding_size, H, layers, **options)


def train(model: nn.Module, steps: int = 3) -> list[float]:
    optimiser, losses = torch.optim.SGD(model.parameters(), 1.0), []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = model.loss(TOKENS)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


class Masked(nn.Module):
    """What pruning computes, as a parametrization."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


@pytest.mark.parametrize(
    ("part", "name"), [("gru", "weight_ih_l0"), ("gru", "weight_hh_l1"), ("embedding", "weight")]
)
@pytest.mark.parametrize("embedding_size", [None, 5])
def test_a_pruned_layer_trains_as_its_parametrization(
    part: str, name: str, embedding_size: int | None
) -> None:
    if part == "embedding" and embedding_size is None:
        pytest.skip("there is none")
    pruned = language_model(embedding_size)
    other = language_model(embedding_size)
    other.load_state_dict(pruned.state_dict())
    module = getattr(pruned, part)
    prune.random_unstructured(module, name, 0.5)
    mask = getattr(module, name + "_mask")
    parametrize.register_parametrization(getattr(other, part), name, Masked(mask))
    assert train(pruned) == pytest.approx(train(other), rel=1e-5)
    theirs = getattr(other, part).parametrizations[name].original
    torch.testing.assert_close(getattr(module, name + "_orig"), theirs)
    prune.remove(module, name)
    torch.testing.assert_close(pruned(TOKENS.clamp(min=0)), other(TOKENS.clamp(min=0)))


@old_weight_norm
@pytest.mark.parametrize("part", PARTS)
def test_a_change_behind_an_old_weight_norm_is_seen(part: str) -> None:
    model = language_model()
    name = "weight_hh_l0" if part == "gru" else "weight"
    nn.utils.weight_norm(getattr(model, part), name)
    train(model, 2)
    before = model.score(TOKENS), model.generate(max_new_tokens=20, seed=1)
    with torch.no_grad():
        getattr(getattr(model, part), name + "_g").mul_(30)
    after = model.score(TOKENS), model.generate(max_new_tokens=20, seed=1)
    assert not torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def scaled(result: Any) -> Any:
    return (result[0] * 3, result[1]) if isinstance(result, tuple) else result * 3


def by_hook(model: nn.Module, part: str) -> None:
    getattr(model, part).register_forward_hook(lambda _module, _args, result: scaled(result))


def by_pre_hook(model: nn.Module, part: str) -> None:
    module = getattr(model, part)
    if part == "embedding":  # another token
        module.register_forward_pre_hook(lambda _module, args: ((args[0] + 1) % V,))
    else:
        module.register_forward_pre_hook(lambda _module, args: (args[0] * 3, *args[1:]))


def by_instance(model: nn.Module, part: str) -> None:
    module = getattr(model, part)
    before = module.forward
    module.forward = lambda *args, **options: scaled(before(*args, **options))


def by_class(model: nn.Module, part: str) -> None:
    module = getattr(model, part)

    class Other(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any, **options: Any) -> Any:
            return scaled(super().forward(*args, **options))

    module.__class__ = Other


WAYS = (by_hook, by_pre_hook, by_instance, by_class)


def reason(change: Callable[..., None], part: str) -> str:
    nouns = {"gru": "a gru_fast.GRU", "embedding": "an nn.Embedding", "head": "an nn.Linear"}
    return {
        by_instance: f"the {part} has a forward of its own",
        by_class: f"the {part} is a Other, not {nouns[part]}",
    }.get(change, f"the {part} has forward hooks, which only a call of it runs (prune.remove")


@pytest.mark.parametrize("change", WAYS)
@pytest.mark.parametrize("part", PARTS)
def test_whatever_changes_a_part_changes_all_ways_alike(
    part: str, change: Callable[..., None]
) -> None:
    model = language_model()
    plain, many = model(TOKENS.clamp(min=0))[0], model.score(TOKENS)
    change(model, part)
    assert not torch.allclose(model(TOKENS.clamp(min=0))[0], plain, atol=1e-3)
    assert not torch.allclose(model.score(TOKENS), many, atol=1e-3)
    for prompts in (None, [[1, 2, 5], [3], []]):
        out = model.generate(
            prompts, max_new_tokens=30, num_return_sequences=2, seed=1, return_dict_in_generate=True
        )
        scores = model.score(out.sequences, prompt_lengths=out.prompt_lengths)
        torch.testing.assert_close(scores, out.log_probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", WAYS)
@pytest.mark.parametrize("part", PARTS)
def test_samplers_that_read_weights_refuse(part: str, change: Callable[..., None]) -> None:
    model = language_model()
    change(model, part)
    loop = sampling.mixed_loop if ops.HAS_CPU_KERNELS else sampling.generate_loop
    assert sampling.choose_loop(model) is loop
    told = explain_generate(model, max_new_tokens=3)
    assert told.backend == "reference"
    assert ("draws in C++" in told.kernel) is ops.HAS_CPU_KERNELS
    if not ops.HAS_CPU_KERNELS:
        return
    assert told.why_not["cpu"].startswith(reason(change, part))
    refused = [lambda: Sampler(model), lambda: Stream(model)]
    if part == "gru":
        refused.append(lambda: Stream(model.gru))
    for make in refused:
        with pytest.raises(RuntimeError) as error:
            make()
        assert f"cannot take this model: {reason(change, part)}" in str(error.value)


def sequential(model: Any) -> Any:
    model.head = nn.Sequential(nn.Linear(H, 8), nn.ReLU(), nn.Linear(8, V))
    return model


def quantized(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, torch.qint8)


# How each rounds: dynamic quantisation has one scale for all that a call is given.
HEADS = {
    sequential: ("Sequential", 1e-5),
    quantized: ("torch.ao.nn.quantized.dynamic.modules.linear.Linear", 0.02),
}


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*other quantized tensor creation functions:UserWarning")
@pytest.mark.parametrize("embedding_size", [None, 5])
@pytest.mark.parametrize("replace", HEADS)
def test_a_head_may_be_any_module(replace: Callable[..., Any], embedding_size: int | None) -> None:
    """Without a weight, or with a method of that name."""
    name, rounding = HEADS[replace]
    model = replace(language_model(embedding_size))
    assert "tie_weights=False" in repr(model)
    loop = sampling.mixed_loop if ops.HAS_CPU_KERNELS else sampling.generate_loop
    assert sampling.choose_loop(model) is loop
    for prompts in (None, [[1, 2], [3, 0]]):
        asked = {"max_new_tokens": 9, "num_return_sequences": 2, "seed": 1}
        found = model.generate(prompts, return_dict_in_generate=True, **asked)
        assert found.sequences.shape == ((4, 11) if prompts else (2, 9))
        assert found.hidden.shape == (2, len(found.sequences), H)
        scores = model.score(found.sequences, prompt_lengths=found.prompt_lengths)
        torch.testing.assert_close(scores, found.log_probs, rtol=0, atol=rounding)
        seen: list[Tensor] = []
        streamer = SimpleNamespace(put=seen.append, end=lambda: None)
        again = model.generate(prompts, streamer=streamer, **asked)
        assert torch.equal(again, found.sequences)
        assert torch.equal(torch.cat([seen[0], torch.stack(seen[1:], 1)], 1), again)
        told = explain_generate(model, prompts, **asked)
        assert told.backend == "reference" and told.call.endswith("float32 cpu")
        if ops.HAS_CPU_KERNELS:
            assert told.why_not["cpu"] == f"the head is a {name}, not an nn.Linear"
            for make in (Sampler, Stream):
                with pytest.raises(RuntimeError, match=f"the head is a {name}, not an nn.Linear"):
                    make(model)


@needs_kernels
def test_what_changes_nothing_stays_on_the_native_way() -> None:
    """Hooks that were taken away, parametrizations, hooks of backward and global ones."""
    model = language_model()
    prune.random_unstructured(model.gru, "weight_hh_l0", 0.5)
    prune.random_unstructured(model.head, "weight", 0.5)
    by_loop = model.generate(max_new_tokens=30, seed=1)
    prune.remove(model.gru, "weight_hh_l0")
    prune.remove(model.head, "weight")
    for part, name in (("gru", "weight_hh_l1"), ("head", "weight"), ("embedding", "weight")):
        module = getattr(model, part)
        mask = torch.ones_like(getattr(module, name))
        parametrize.register_parametrization(module, name, Masked(mask))
        module.register_full_backward_hook(lambda *_: None)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert sampling.choose_loop(model) is sampling.native_loop
        assert torch.equal(model.generate(max_new_tokens=30, seed=1), by_loop)
        assert torch.equal(Sampler(model).generate(max_new_tokens=30, seed=1), by_loop)
        Stream(model.gru)
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing when:UserWarning")
@pytest.mark.parametrize("part", PARTS)
def test_hooks_fire_once_a_call(part: str) -> None:
    model, seen = language_model(), []
    module = getattr(model, part)
    module.register_forward_pre_hook(lambda *_: seen.append("pre"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    for call in (lambda: model(TOKENS.clamp(min=0)), lambda: model.score(TOKENS)):
        seen.clear()
        call()
        assert seen == ["pre", "after"]
    seen.clear()
    model.generate([[1, 2]], max_new_tokens=5)  # the prompt is fed at once
    assert seen == ["pre", "after"] * 5
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    module.register_full_backward_pre_hook(lambda *_: seen.append("before backward"))
    seen.clear()
    model.loss(TOKENS).backward()
    assert seen == ["pre", "after", "before backward", "backward"]


@pytest.mark.parametrize("layers", [1, 3])
def test_dropout_is_the_same_where_the_layers_are_called(layers: int) -> None:
    """The same masks of the same seed, after every layer, in training mode only."""
    plain = language_model(None, layers, dropout=0.4)
    called = language_model(None, layers, dropout=0.4)
    called.load_state_dict(plain.state_dict())
    called.gru.register_forward_hook(lambda *_: None)
    tokens = torch.randint(V, (5, 9))
    results = []
    for model in (plain, called):
        torch.manual_seed(3)
        results.append(model(tokens))
    torch.testing.assert_close(*results)
    assert not torch.equal(called(tokens)[0], called(tokens)[0])
    torch.testing.assert_close(called.score(tokens), plain.score(tokens))
    torch.testing.assert_close(called.eval()(tokens), plain.eval()(tokens))
    assert called.gru.dropout == 0


class OtherRun(GRULanguageModel):
    def run(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        output, h_n = super().run(*args, **options)
        return output * 4, h_n


class OtherTable(GRULanguageModel):
    def token_table(self) -> Tensor:
        return super().token_table() * 4


@pytest.mark.parametrize("cls", [OtherRun, OtherTable])
def test_methods_of_a_subclass_are_used_by_all(cls: type[GRULanguageModel]) -> None:
    model = cls(50, 5, H)
    for call in ({"max_new_tokens": 5}, {"max_new_tokens": 60}):
        out = model.generate(seed=1, return_dict_in_generate=True, **call)
        torch.testing.assert_close(model.score(out.sequences), out.log_probs, rtol=0, atol=1e-5)
    if cls is OtherRun and ops.HAS_CPU_KERNELS:
        with pytest.raises(RuntimeError, match="the OtherRun has a run of its own"):
            Sampler(model)


@pytest.mark.parametrize(("vocabulary", "embedding_size"), [(V, None), (V, 5), (300, None)])
def test_called_layers_refuse_what_the_others_do(
    vocabulary: int, embedding_size: int | None
) -> None:
    model = GRULanguageModel(vocabulary, embedding_size, H, 2)
    plain = copy.deepcopy(model)
    model.gru.register_forward_hook(lambda *_: None)
    for ids in ([[vocabulary + 1]], [[-1]]):
        with pytest.raises(IndexError):
            model(torch.tensor(ids))
    ids = [[0, vocabulary - 1, vocabulary, 1]]
    torch.testing.assert_close(model(torch.tensor(ids)), plain(torch.tensor(ids)))
    with pytest.raises(RuntimeError, match=r"hidden: expected shape \(2, 1, 16\)"):
        model(torch.tensor([[1]]), torch.zeros(1, 1, H))


def test_called_layers_compile_in_one_graph(fresh_compiler: None) -> None:
    model = language_model()
    by_hook(model, "gru")
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS), model.loss(TOKENS))


@needs_kernels
def test_a_stream_of_a_gru_with_hooks_is_refused() -> None:
    gru = GRU(4, 8)
    prune.random_unstructured(gru, "weight_hh_l0", 0.5)
    with pytest.raises(RuntimeError, match=r"the gru has forward hooks.*prune\.remove"):
        Stream(gru)
    prune.remove(gru, "weight_hh_l0")
    x = torch.randn(6, 4)
    torch.testing.assert_close(Stream(gru).push(x), gru(x)[0].detach())


@pytest.mark.parametrize(
    "ids",
    [[[1, 2]], [[1, 2, 3, 4, 5, 6, 1, 2]]],
    ids=["fewer than the vocabulary", "more"],
)
@pytest.mark.parametrize("embedding_size", [None, 5])
def test_a_call_evaluates_a_parametrization_once(
    embedding_size: int | None, ids: list[list[int]]
) -> None:
    model, counted = language_model(embedding_size), Counted()
    parametrize.register_parametrization(model.gru, "weight_ih_l0", counted)
    counted.calls = 0
    model(torch.tensor(ids))
    assert counted.calls == 1


@pytest.mark.parametrize(
    "options", [{"learn_h0": True}, {"num_heads": 2}, {"batch_first": True}], ids=str
)
def test_options_of_another_gru_count(options: dict[str, Any]) -> None:
    model = language_model(None)
    model.gru = GRU(V, H, 2, **options)
    if model.gru.learn_h0:
        torch.nn.init.normal_(model.gru.h0)
    inputs = model.teacher_forcing(TOKENS)
    one_hot = torch.eye(V + 1, V)[inputs]
    own = model.gru(one_hot if model.gru.batch_first else one_hot.transpose(0, 1))[0]
    output = model.run(inputs)[0]
    torch.testing.assert_close(output, own.transpose(0, 1) if model.gru.batch_first else own)
    model.loss(TOKENS.clamp(min=0)).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.gru.parameters())
    out = model.generate(max_new_tokens=20, seed=1, return_dict_in_generate=True)
    torch.testing.assert_close(model.score(out.sequences), out.log_probs, rtol=0, atol=1e-5)
    model.gru.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model.run(inputs)[0], output)


@pytest.mark.parametrize(
    "options",
    [{"max_norm": 0.1}, {"padding_idx": 3}, {"scale_grad_by_freq": True}, {"sparse": True}],
    ids=str,
)
def test_options_of_another_embedding_count(options: dict[str, Any]) -> None:
    model, tokens = language_model(5), TOKENS.clamp(min=0)
    model.embedding = nn.Embedding(V, 5, **options)
    called = language_model(5)
    called.embedding = nn.Embedding(V, 5, **options)
    called.load_state_dict(model.state_dict())
    called.embedding.register_forward_hook(lambda *_: None)
    for module in (model, called):
        module.loss(tokens).backward()
    for ours, theirs in zip(model.parameters(), called.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.grad.is_sparse == theirs.grad.is_sparse
        torch.testing.assert_close(ours.grad.to_dense(), theirs.grad.to_dense())
    out = model.generate(max_new_tokens=20, seed=1, return_dict_in_generate=True)
    torch.testing.assert_close(model.score(out.sequences), out.log_probs, rtol=0, atol=1e-5)


def test_options_of_another_gru_that_have_no_meaning_here() -> None:
    model = language_model(None)
    model.gru = GRU(V, H, 2, recurrent_dropout=0.5)
    with pytest.raises(RuntimeError, match=r"recurrent_dropout=0 in training mode, got.*=0\.5"):
        model.loss(TOKENS)
    scores = model.score(TOKENS)
    assert torch.equal(model.eval().score(TOKENS), scores)
    model.gru.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model.train().score(TOKENS), scores)
    assert model.gru.recurrent_dropout == 0.5
    model.gru = GRU(V, H // 2, bidirectional=True)
    with pytest.raises(RuntimeError, match="gru: expected one direction, got bidirectional=True"):
        model(TOKENS.clamp(min=0))


@pytest.mark.parametrize("gru", [nn.GRU(V, H, 2), nn.LSTM(V, H)], ids=["gru", "lstm"])
def test_generate_needs_a_layer_of_its_own(gru: nn.Module) -> None:
    model = language_model(None)
    model.gru = gru
    reason = f"the gru is a .*{type(gru).__name__}, not a gru_fast.GRU$"
    for call in (model.generate, partial(explain_generate, model)):
        with pytest.raises(RuntimeError, match=f"^generate cannot take this model: {reason}"):
            call([1], max_new_tokens=2)


@pytest.mark.parametrize("embedding_size", [None, 5])
@pytest.mark.parametrize("ids", [[3, 1], [V, 1], [3, V], [V, V]], ids=str)
def test_start_is_zero_wherever_it_stands(embedding_size: int | None, ids: list[int]) -> None:
    model, inputs = language_model(embedding_size), torch.tensor([ids, [0, 6]])
    expected = model.run(inputs)
    seen: list[Tensor] = []
    model.gru.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    torch.testing.assert_close(model.run(inputs), expected)
    zero = ~seen[0].any(-1).T
    assert torch.equal(zero, inputs == V)
