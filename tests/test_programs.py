# SPDX-License-Identifier: Apache-2.0
"""What people write around a GRU: with our layer in place of torch's, the same comes out."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_, parametrizations, prune
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

import gru_fast

PROGRAMS = []


def program(function):
    """Collect a function from a class, torch.nn.GRU or ours, to tensors."""
    PROGRAMS.append(function)
    return function


def grads(module):
    return [torch.zeros(()) if p.grad is None else p.grad for p in module.parameters()]


def data():
    return torch.randn(5, 2, 3)


class Encoder(nn.Module):
    def __init__(self, gru):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.gru = gru(8, 16, bidirectional=True, batch_first=True)
        self.bridge = nn.Linear(32, 16)

    def forward(self, tokens):
        output, h_n = self.gru(self.embedding(tokens))
        return output, torch.tanh(self.bridge(torch.cat([h_n[-2], h_n[-1]], 1)))


class Decoder(nn.Module):
    def __init__(self, gru):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.score = nn.Linear(48, 1)
        self.gru = gru(40, 16)
        self.head = nn.Linear(16, 20)

    def forward(self, token, hidden, memory):
        queries = hidden[:, None].expand(-1, memory.shape[1], -1)
        weights = torch.softmax(self.score(torch.cat([memory, queries], -1)), 1)
        context = (weights * memory).sum(1)
        step = torch.cat([self.embedding(token), context], -1)
        output, hidden = self.gru(step[None], hidden[None])
        return self.head(output[0]), hidden[0]


@program
def sequence_to_sequence_with_attention(gru):
    encoder, decoder = Encoder(gru), Decoder(gru)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimiser = torch.optim.Adam(parameters, 1e-2)
    tokens, losses = torch.randint(20, (5, 7)), []
    for _ in range(4):
        memory, hidden = encoder(tokens)
        token, loss = tokens[:, 0], torch.zeros(())
        for target in tokens.T:
            logits, hidden = decoder(token, hidden, memory)
            loss, token = loss + cross_entropy(logits, target), target
        optimiser.zero_grad()
        loss.backward()
        clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(loss.detach())
    return losses


@program
def gradients_are_accumulated(gru):
    rnn = gru(3, 4)
    for _ in range(3):
        rnn(data())[0].sum().backward()
    return grads(rnn)


@program
def a_state_is_detached_in_place_between_chunks(gru):
    rnn, h = gru(3, 4, 2), torch.zeros(2, 2, 4)
    for _ in range(4):
        output, h = rnn(data(), h)
        output.square().sum().backward()
        h.detach_()
    return grads(rnn)


@program
def a_graph_is_kept_over_several_losses(gru):
    rnn, h = gru(3, 4), None
    for _ in range(3):
        output, h = rnn(data(), h)
        output.sum().backward(retain_graph=True)
    return grads(rnn)


@program
def rows_of_a_state_are_zeroed_in_place(gru):
    rnn, h, loss = gru(3, 4), torch.zeros(1, 2, 4), torch.zeros(())
    for _ in range(3):
        output, h = rnn(data(), h)
        h[:, 0] = 0
        loss = loss + output.sum()
    loss.backward()
    return grads(rnn)


@program
def a_packed_state_is_carried(gru):
    rnn = gru(3, 4, bidirectional=True)
    batch = pack_sequence([torch.randn(2, 3), torch.randn(4, 3)], enforce_sorted=False)
    _, h = rnn(batch)
    output, h = rnn(batch, h)
    h.sum().backward()
    return [pad_packed_sequence(output)[0], h, *grads(rnn)]


@program
def some_weights_are_frozen(gru):
    results = []
    for name in ("weight_hh_l0", "bias_ih_l1", "weight_ih_l0"):
        rnn = gru(3, 4, 2)
        rnn.get_parameter(name).requires_grad_(False)
        rnn(data())[0].sum().backward()
        assert rnn.get_parameter(name).grad is None
        results += grads(rnn)
    return results


@program
def all_weights_are_frozen(gru):
    rnn, x = gru(3, 4).requires_grad_(False), data().requires_grad_()
    rnn(x)[0].sum().backward()
    assert not rnn(x.detach())[0].requires_grad
    return [x.grad]


@program
def layers_share_their_weights(gru):
    rnn = gru(4, 4, 3)
    for name in [n for n, _ in rnn.named_parameters() if n.endswith("_l0")]:
        for layer in (1, 2):
            setattr(rnn, f"{name[:-1]}{layer}", rnn.get_parameter(name))
    assert len(list(rnn.parameters())) == 4
    rnn(torch.randn(5, 2, 4))[0].sum().backward()
    return grads(rnn)


OPTIMISERS = [
    lambda p: torch.optim.Adam(p, 1e-2, foreach=True),
    lambda p: torch.optim.Adam(p, 1e-2, fused=True),
    lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, fused=True),
    lambda p: torch.optim.RMSprop(p, 1e-2),
    lambda p: torch.optim.LBFGS(p, max_iter=4),
]


@program
def any_optimiser(gru):
    results = []
    for make in OPTIMISERS:
        rnn, x = gru(3, 4), data()
        optimiser = make(rnn.parameters())

        def closure(rnn=rnn, x=x, optimiser=optimiser):
            optimiser.zero_grad()
            loss = rnn(x)[0].square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimiser.step(closure)
        results += [p.detach() for p in rnn.parameters()]
    return results


@program
def weights_are_put_back_after_a_search_for_a_learning_rate(gru):
    rnn, x = gru(3, 4), data()
    before, output = copy.deepcopy(rnn.state_dict()), rnn(x)[0].detach()
    optimiser = torch.optim.SGD(rnn.parameters(), 1.0)
    rnn(x)[0].sum().backward()
    optimiser.step()
    moved = rnn(x)[0].detach()
    rnn.load_state_dict(before)
    assert torch.equal(rnn(x)[0], output)
    assert not torch.equal(moved, output)
    return [output, moved]


@program
def weights_are_averaged(gru):
    results = []
    for average in (None, swa_utils.get_ema_multi_avg_fn(0.9)):
        rnn = gru(3, 4)
        averaged = swa_utils.AveragedModel(rnn, multi_avg_fn=average)
        for _ in range(3):
            with torch.no_grad():
                for p in rnn.parameters():
                    p.add_(0.1)
            averaged.update_parameters(rnn)
        results += [averaged(data())[0], *averaged.module.state_dict().values()]
    return results


@program
def weights_as_one_vector(gru):
    rnn = gru(3, 4)
    vector = nn.utils.parameters_to_vector(rnn.parameters())
    nn.utils.vector_to_parameters(vector * 2, rnn.parameters())
    return [vector, rnn(data())[0]]


@program
def spectral_norm(gru):
    rnn, x = gru(3, 4), data()
    # Converged: torch's layer reads its weights, which iterates, several times a call.
    parametrizations.spectral_norm(rnn, "weight_hh_l0", n_power_iterations=100)
    output = rnn(x)[0]
    output.sum().backward()
    return [output, *grads(rnn), rnn.eval()(x)[0]]


@program
def pruned_weights_are_trained_and_made_plain(gru):
    rnn, x = gru(3, 4), data()
    prune.random_unstructured(rnn, "weight_hh_l0", 0.3)
    rnn(x)[0].sum().backward()
    found = grads(rnn)
    with torch.no_grad():
        output = rnn(x)[0]
    prune.remove(rnn, "weight_hh_l0")
    return [*found, output, rnn(x)[0]]


@program
def recurrent_weights_are_dropped_as_in_awd_lstm(gru):
    rnn = gru(3, 4)
    raw = nn.Parameter(rnn.weight_hh_l0.detach())
    del rnn._parameters["weight_hh_l0"]
    rnn.register_parameter("weight_hh_l0_raw", raw)
    rnn.weight_hh_l0 = nn.functional.dropout(raw, 0.5)
    output = rnn(data())[0]
    output.sum().backward()
    return [output, raw.grad]


@program
def activations_are_checkpointed(gru):
    results = []
    for reentrant in (True, False):
        rnn, x = gru(3, 4, 2, dropout=0.5), data().requires_grad_()
        h = torch.randn(2, 2, 4, requires_grad=True)
        output, h_n = checkpoint(rnn, x, h, use_reentrant=reentrant)
        (output.sum() + h_n.square().sum()).backward()
        results += [x.grad, h.grad, *grads(rnn)]
    return results


@program
def saved_tensors_go_elsewhere(gru):
    rnn = gru(3, 4)
    with torch.autograd.graph.save_on_cpu():
        output = rnn(data())[0]
    output.sum().backward()
    return grads(rnn)


@program
def hooks_of_modules_see_and_change_the_call(gru):
    rnn, seen = gru(3, 4), []
    rnn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "hx": torch.ones(1, 2, 4)}), with_kwargs=True
    )
    rnn.register_forward_hook(lambda _, args, output: (output[0] * 2, output[1]))
    rnn.register_full_backward_pre_hook(lambda _, given: seen.extend(given))
    rnn.register_full_backward_hook(lambda _, given, __: seen.extend(given))
    x = data().requires_grad_()
    output, h_n = rnn(x, hx=torch.zeros(1, 2, 4))
    (output.sum() + h_n.sum()).backward()
    return [output, h_n, x.grad, *(s for s in seen if s is not None)]


@program
def gradient_penalty(gru):
    rnn, x = gru(3, 4), data().requires_grad_()
    (gradient,) = torch.autograd.grad(rnn(x)[0].sum(), x, create_graph=True)
    gradient.norm().backward()
    return grads(rnn)


@program
def anomalies_are_searched(gru):
    rnn = gru(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: that it is on
        with torch.autograd.set_detect_anomaly(True):
            rnn(data())[0].sum().backward()
    return grads(rnn)


@program
def mixed_precision_with_a_scaler(gru):
    rnn, head = gru(3, 4), nn.Linear(4, 2)
    parameters = [*rnn.parameters(), *head.parameters()]
    optimiser, scaler = torch.optim.SGD(parameters, 0.1), torch.amp.GradScaler("cpu")
    for _ in range(3):
        with torch.autocast("cpu", torch.float16):
            loss = head(rnn(data())[0].float()).float().square().mean()
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        clip_grad_norm_(parameters, 1.0)
        scaler.step(optimiser)
        scaler.update()
    return list(rnn.parameters())


@program
def a_view_of_the_last_states(gru):
    rnn = gru(3, 4, 2, bidirectional=True, batch_first=True)
    output, h_n = rnn(torch.randn(2, 5, 3))
    return [output, h_n.view(2, 2, 2, 4)[-1].transpose(0, 1).reshape(2, -1), h_n[-1].view(-1)]


@program
def options_are_changed_afterwards(gru):
    rnn = gru(3, 4, 2)
    rnn.batch_first, rnn.dropout = True, 0.5
    return [rnn(data())[0]]


@pytest.mark.parametrize("function", PROGRAMS, ids=lambda f: f.__name__)
def test_the_same_comes_out(function):
    results = []
    for gru in (nn.GRU, gru_fast.GRU):
        torch.manual_seed(0)
        results.append(function(gru))
    theirs, ours = results
    assert len(theirs) > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("swap", ["set_swap_module_params_on_conversion",
                                  "set_overwrite_module_params_on_conversion"])  # fmt: skip
def test_ways_in_which_torch_converts_parameters(swap):
    getattr(torch.__future__, swap)(True)
    try:
        rnn = gru_fast.GRU(3, 4)
        rnn.double()
        assert rnn(data().double())[0].dtype is torch.float64
    finally:
        getattr(torch.__future__, swap)(False)
