# SPDX-License-Identifier: Apache-2.0
"""The language model: teacher forcing, the token table, gradients, options."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gru_fast
from gru_fast import GRULanguageModel, ops
from gru_fast.sampling import PADDING
from helpers import assert_parity

V, H = 7, 13
TOKENS = torch.tensor([[3, 1, 6, 0], [5, 0, PADDING, PADDING], [2, 2, 4, 1]])


def model(embedding_size=None, num_layers=1, **options):
    return GRULanguageModel(V, embedding_size, H, num_layers, **options)


def plain_loss(lm, tokens):
    """Vectors written out one by one, gru_fast.GRU's ordinary forward, the mean by hand."""
    E = lm.gru.input_size
    vectors = torch.eye(V) if lm.embedding is None else lm.embedding.weight
    vectors = vectors.to(lm.head.weight.dtype)
    x = torch.zeros(tokens.shape[1], len(tokens), E, dtype=vectors.dtype)
    for b, row in enumerate(tokens.tolist()):
        for t, token in enumerate(row[:-1]):
            if token != PADDING:
                x[t + 1, b] = vectors[token]
    logits = lm.head(lm.gru(x)[0])
    terms = [
        torch.logsumexp(logits[t, b], 0) - logits[t, b, token]
        for b, row in enumerate(tokens.tolist())
        for t, token in enumerate(row)
        if token != PADDING
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("cell", ["reset_after", "reset_before", "no_reset"])
@pytest.mark.parametrize("embedding_size", [None, 5])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_teacher_forcing_and_its_gradients(cell, embedding_size, num_layers, bias):
    results = {}
    for _ in range(8):
        ours = model(embedding_size, num_layers, cell=cell, bias=bias)
        theirs = model(embedding_size, num_layers, cell=cell, bias=bias, backend="reference")
        theirs.load_state_dict(ours.state_dict())
        truth = copy.deepcopy(theirs).double()
        losses = [ours.loss(TOKENS), plain_loss(theirs, TOKENS), plain_loss(truth, TOKENS)]
        for loss in losses:
            loss.backward()
        results.setdefault("loss", []).append([loss.detach() for loss in losses])
        for name, _ in ours.named_parameters():
            grads = [lm.get_parameter(name).grad for lm in (ours, theirs, truth)]
            results.setdefault(name, []).append(grads)
    for name, draws in results.items():
        assert_parity(name, *map(list, zip(*draws, strict=True)))


def test_fewer_tokens_than_words_go_without_the_table():
    lm = GRULanguageModel(50, 5, H)
    tokens = torch.tensor([[3, 49, 0]])
    direct = lm.run(lm.teacher_forcing(tokens))[0]
    through_table = lm.run(lm.teacher_forcing(tokens), table=lm.token_table())[0]
    torch.testing.assert_close(direct, through_table)
    lm.run(lm.teacher_forcing(tokens))[0].square().sum().backward()
    grads = [p.grad.clone() for p in (lm.embedding.weight, lm.gru.weight_ih_l0)]
    lm.zero_grad()
    lm.run(lm.teacher_forcing(tokens), table=lm.token_table())[0].square().sum().backward()
    torch.testing.assert_close(grads, [lm.embedding.weight.grad, lm.gru.weight_ih_l0.grad])
    with pytest.raises(IndexError):
        lm.run(torch.tensor([[51]]))


def test_the_input_product_is_the_table(monkeypatch):
    """The kernel behind layer 0 is `scan`, and it gets rows of the table."""
    seen = []

    def spy(gates_x, *args, **kwargs):
        seen.append(gates_x)
        return original(gates_x, *args, **kwargs)

    original = gru_fast.functional.scan
    monkeypatch.setattr(gru_fast.functional, "scan", spy)
    lm = model(5)
    with torch.no_grad():
        lm.loss(TOKENS)
    table = lm.token_table()
    assert table.shape == (V + 1, 3 * H)
    assert torch.equal(table[V], lm.gru.bias_ih_l0)
    assert seen[0].shape == (4, 3, 1, 3 * H)
    assert torch.equal(seen[0][0, :, 0], table[V].expand(3, -1))
    assert torch.equal(seen[0][1:, 0, 0], table[[3, 1, 6]])


@pytest.mark.skipif(not ops.HAS_CPU_KERNELS, reason="no compiled kernels")
@pytest.mark.parametrize("embedding_size", [None, 5])
def test_gradients_have_the_same_bits_each_time(embedding_size):
    lm = model(embedding_size, 2)
    tokens = torch.randint(V, (40, 30))
    runs = []
    for _ in range(4):
        lm.zero_grad()
        lm.loss(tokens).backward()
        runs.append([p.grad.clone() for p in lm.parameters()])
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


def test_no_memory_is_read_before_it_is_written(poisoned_memory):
    """Nor is an operation used that torch knows as nondeterministic."""
    lm = model(5, 2, tie_weights=False)
    lm.loss(TOKENS).backward()
    assert all(p.grad.isfinite().all() for p in lm.parameters())
    out = lm.generate([[1], []], max_new_tokens=9, seed=1, return_dict_in_generate=True)
    assert out.log_probs.isfinite().all() and out.hidden.isfinite().all()
    assert lm.score(out.sequences).isfinite().all()


def test_chunks_with_the_state_carried_are_the_whole():
    lm = model(5, 2)
    inputs = lm.teacher_forcing(torch.randint(V, (3, 11)))
    whole, last = lm(inputs)
    assert whole.shape == (3, 11, V)
    first, hidden = lm(inputs[:, :4])
    second, hidden = lm(inputs[:, 4:], hidden)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(hidden, last)


def test_dropout_after_every_layer_in_training_mode_only():
    lm = model(None, 2, dropout=0.5)
    masks = [lm.run(lm.teacher_forcing(TOKENS), dropout=0.5)[0] == 0 for _ in range(2)]
    assert 0.2 < masks[0].float().mean() < 0.8 and not torch.equal(*masks)
    assert not torch.equal(lm.loss(TOKENS), lm.loss(TOKENS))
    scores = lm.score(TOKENS)
    lm.eval()
    assert torch.equal(lm.loss(TOKENS), lm.loss(TOKENS))
    torch.testing.assert_close(lm.score(TOKENS), scores)
    torch.testing.assert_close(lm.loss(TOKENS), -scores.sum() / (TOKENS != PADDING).sum())


def test_dropout_between_layers_is_that_of_the_gru():
    lm = model(None, 3, dropout=0.4)
    one_hot = F.one_hot(torch.randint(V, (9, 2)), V).float()
    with torch.no_grad():
        torch.manual_seed(3)
        output, h_n = lm.run(one_hot.argmax(-1).T, dropout=0.4)
        torch.manual_seed(3)
        params = list(lm.gru.parameters())
        expected, expected_h = gru_fast.functional.gru(
            one_hot, None, params, num_layers=3, dropout=0.4, training=True
        )
        expected = F.dropout(expected, 0.4)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(h_n, expected_h)


def test_tied_weights_are_one_parameter():
    lm = GRULanguageModel(V, H, H, tie_weights=True)
    assert lm.head.weight is lm.embedding.weight
    assert len(list(lm.parameters())) == 6
    again = GRULanguageModel(**lm.config)
    again.load_state_dict(lm.state_dict())
    assert again.head.weight is again.embedding.weight
    assert torch.equal(again.loss(TOKENS), lm.loss(TOKENS))
    assert copy.deepcopy(lm).to(torch.float64).head.weight.dtype == torch.float64
    lm.loss(TOKENS).backward()
    numeric = GRULanguageModel(V, H, H).double()
    numeric.load_state_dict(lm.state_dict())
    plain_loss(numeric, TOKENS).backward()
    expected = numeric.head.weight.grad + numeric.embedding.weight.grad
    torch.testing.assert_close(lm.head.weight.grad.double(), expected)


def test_state_dict_is_that_of_plain_modules():
    lm = model(5, 2)
    plain = nn.ModuleDict(
        {"embedding": nn.Embedding(V, 5), "gru": nn.GRU(5, H, 2), "head": nn.Linear(H, V)}
    )
    plain.load_state_dict(lm.state_dict())
    x = torch.cat([torch.zeros(1, 3, 5), plain["embedding"](TOKENS.clamp(min=0).T[:-1])])
    logits = plain["head"](plain["gru"](x)[0])
    torch.testing.assert_close(lm(lm.teacher_forcing(TOKENS))[0], logits.transpose(0, 1))


def test_compiles_in_one_graph(fresh_compiler):
    lm = model(5, 2)
    expected = lm.loss(TOKENS)
    compiled = torch.compile(lm.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS), expected)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 5, 3), {}, "vocab_size: expected >= 1, got 0"),
        ((7, 0, 3), {}, "embedding_size: expected >= 1, got 0"),
        ((7, 5, 3), {"dropout": 1.5}, r"dropout: expected a number in \[0, 1\], got 1.5"),
        ((7, 5, 3), {"tie_weights": True}, "embedding_size=5, hidden_size=3"),
        ((7, None, 3), {"tie_weights": True}, "embedding_size=None, hidden_size=3"),
        ((7, 5, 3), {"cell": "lstm"}, "cell: expected"),
    ],
)
def test_bad_options(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        GRULanguageModel(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("7", 5, 3), "vocab_size should be of type int, got: str"),
     ((None, 5, 3), "vocab_size should be of type int, got: NoneType"),
     ((7, 5.0, 3), "embedding_size should be of type int, got: float"),
     ((7, 5, 3.0), "hidden_size should be of type int, got: float")],
)  # fmt: skip
def test_sizes_of_other_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        GRULanguageModel(*arguments)


@pytest.mark.parametrize("embedding_size", [None, 5])
@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_ih_l0", "bias_hh_l1"])
def test_a_weight_that_is_missing_is_named(name, embedding_size):
    lm, tokens = model(embedding_size, 2), TOKENS.relu()
    delattr(lm.gru, name)
    for call in (
        lambda: lm(tokens), lambda: lm.loss(tokens), lambda: lm.score(tokens), lm.token_table,
        lambda: lm.generate(max_new_tokens=3),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"^{name} should be a Tensor, got: NoneType"):
            call()


def test_narrow_integers_are_tokens():
    lm, tokens = model(), torch.tensor([[1, 2, PADDING], [0, 1, 2]])
    assert torch.equal(lm.loss(tokens.int()), lm.loss(tokens))


def test_bad_calls():
    lm = model()
    for tokens in ([[V + 1]], [[-1]]):
        with pytest.raises(IndexError):
            lm(torch.tensor(tokens))
    with pytest.raises(IndexError):
        lm.loss(torch.tensor([[1, V]]))
    for tokens in ([[1, PADDING, 2]], [[PADDING, 2]], [[1, -1, PADDING]]):
        with pytest.raises(IndexError):
            lm.loss(torch.tensor(tokens))
    with pytest.raises(TypeError, match=r"tokens: expected integers, got torch.float32"):
        lm.loss(torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"tokens should be a Tensor, got: list"):
        lm.loss([[1, 2]])
    with pytest.raises(ValueError, match=r"tokens: expected 2 dimensions \(B, T\), got 1"):
        lm.loss(torch.zeros(3, dtype=torch.long))
    with pytest.raises(
        RuntimeError, match=r"hidden: expected shape \(1, 2, 13\), got \(1, 3, 13\)"
    ):
        lm(torch.zeros(2, 1, dtype=torch.long), torch.zeros(1, 3, H))
