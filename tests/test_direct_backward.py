# SPDX-License-Identifier: Apache-2.0
"""The native backward pass as a function: what it refuses, and what it has allocated by then."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import gru_fast

_C = pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")

I, H = 5, 19  # noqa: E741


def test_the_native_function_checks_what_it_is_given() -> None:
    weights = gru_fast.GRUCell(I, H)._own_weights()
    x, h = torch.zeros(2, I), torch.zeros(2, H)
    grad, workspace = torch.ones(2, H), torch.zeros(1, 2, 1, 4 * H)
    wanted = [True] * 6
    run = _C.run_direct_backward
    good = [grad, None, x, h, weights, h, workspace, *[None] * 3, 1, True, "reset_after", wanted]
    found = run(*good)
    assert found is not None
    assert [t.shape for t in found] == [t.shape for t in (x, h, *weights)]
    some = run(*good[:-1], [False, True, False, False, True, False])
    assert some is not None and [t is None for t in some] == [True, False, True, True, False, True]
    for place, bad in (
        (0, grad[:1]), (0, grad[:, 1:]), (0, grad.double()), (0, grad.t().contiguous().t()),
        (0, torch.ones(3, H)), (3, torch.zeros(3, H)),
        (0, 3), (1, grad[:1]), (2, x[:1]), (2, x[None]), (2, x[:, 1:]), (2, None), (2, x.double()),
        (3, h[:1]), (3, h[:, 1:]), (3, None), (4, weights[:3]), (4, {}), (4, [None] * 4),
        (4, [weights[1], weights[0], *weights[2:]]), (5, h[:1]), (5, None), (6, None),
        (6, workspace[..., 1:]), (6, workspace[:, :1]), (11, False), (12, "gru"), (12, None),
        (13, wanted[1:]), (13, None), (10, 2), (10, 0), (10, -1), (10, 65),
        (8, torch.tensor([2, 2])), (7, torch.tensor([2])), (7, 3),
        (9, torch.tensor([[True, False]])),
    ):  # fmt: skip
        assert run(*good[:place], bad, *good[place + 1 :]) is None
    with pytest.raises(TypeError, match="expected 14 arguments, got 1"):
        run(x)  # type: ignore[call-arg]
    both = gru_fast.GRU(I, H, bidirectional=True)._flat_weights
    states, steps, grad = torch.zeros(2, 2, H), x[None], torch.ones(1, 2, 2 * H)
    saved = torch.zeros(1, 2, 2, 4 * H)
    good = [
        grad,
        None,
        steps,
        states,
        both,
        grad,
        saved,
        None,
        None,
        None,
        1,
        False,
        "reset_after",
        [True] * 10,
    ]
    found = run(*good)
    assert found is not None
    assert [t.shape for t in found] == [t.shape for t in (steps, states, *both)]
    for place, bad in (
        (0, grad[..., :H].contiguous()), (1, states[:1]), (3, states[:1]), (4, both[:7]),
        (4, both[:4]), (4, [*both[:6], None, None]), (4, [*both, None]),
        (5, grad[..., :H].contiguous()), (6, saved[:, :, :1].contiguous()), (11, True),
        (13, wanted), (3, states.view(1, 4, H)), (2, torch.zeros(1, 4, I)),
        (9, torch.tensor([True, False])), (9, torch.ones(1, 3, dtype=torch.bool)),
        (9, torch.ones(1, 2)),
    ):  # fmt: skip
        assert run(*good[:place], bad, *good[place + 1 :]) is None
    bare = [*both[:2], None, None, *both[4:6], None, None]
    assert run(*good[:4], bare, *good[5:]) is not None
    assert run(*good[:12], "no_reset", good[13]) is None  # weights of another cell

    class Undecided:
        def __bool__(self) -> bool:
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        run(*good[:11], Undecided(), "gru", wanted)


def test_packed_rows_are_checked() -> None:
    weights = gru_fast.GRU(I, H)._flat_weights
    sizes = torch.tensor([3, 2, 2])
    x, h, output = torch.zeros(7, I), torch.zeros(1, 3, H), torch.zeros(7, H)
    grad, saved, wanted = torch.ones(7, H), torch.zeros(7, 1, 4 * H), [True] * 6
    good = [
        grad,
        None,
        x,
        h,
        weights,
        output,
        saved,
        sizes,
        None,
        None,
        1,
        False,
        "reset_after",
        wanted,
    ]
    found = _C.run_direct_backward(*good)
    assert found is not None
    assert [t.shape for t in found] == [t.shape for t in (x, h, *weights)]
    large = 2**62
    for place, bad in (
        (7, None), (7, [3, 2, 2]), (7, sizes.int()), (7, sizes.float()), (7, sizes[:2]),
        (7, torch.tensor([2, 3, 2])), (7, torch.tensor([4, 3, 0])), (7, torch.tensor([4, 4, -1])),
        (7, torch.tensor([large, large, large])), (7, torch.tensor([7])), (7, sizes[None]),
        (7, torch.tensor(7)), (7, torch.tensor([3, 9, 2, 9, 2, 9])[::2]), (7, sizes[:0]),
        (2, x[:6]), (2, x[None]), (3, h[:, :2]), (3, h[0]), (0, grad[:6]), (5, output[:6]),
        (6, saved[:6]), (11, True), (10, 2), (8, torch.tensor([3, 2, 2])),
        (9, torch.ones(3, 3, dtype=torch.bool)),
    ):  # fmt: skip
        assert _C.run_direct_backward(*good[:place], bad, *good[place + 1 :]) is None
    call = [x, h, weights, 1, True, False, False, sizes, None, None, 1, "reset_after", False]
    results = _C.run_direct(*call)
    assert results is not None and [t.shape for t in results] == [output.shape, h.shape]
    for place, bad in (
        (0, x[:6]), (0, x[None]), (1, h[:, :2]), (1, h[0]), (3, None), (7, sizes[:2]),
        (7, torch.tensor([2, 3, 2])), (7, torch.tensor([large, large, large])),
        (7, torch.tensor([4, 3, 0])), (7, sizes.int()), (7, 3),
        (9, torch.ones(3, 3, dtype=torch.bool)),
    ):  # fmt: skip
        assert _C.run_direct(*call[:place], bad, *call[place + 1 :]) is None


def test_nothing_is_allocated_for_a_gradient_that_is_not_plain() -> None:
    weights = gru_fast.GRU(I, H)._flat_weights
    x, h, output = torch.zeros(3, 2, I), torch.zeros(1, 2, H), torch.zeros(3, 2, H)
    workspace = torch.zeros(3, 2, 1, 4 * H)
    made: list[Any] = []

    class Watches(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func in (Tensor.new_empty, torch.empty_like):
                made.append(func)
            return func(*args, **(kwargs or {}))

    plain = (torch.ones_like(output), torch.ones_like(h))
    strided = torch.ones(2, 3, H).transpose(0, 1)
    spread = torch.ones(1, 1, 1).expand(3, 2, H)
    rest = (x, h, weights, output, workspace, *[None] * 3, 1, False, "reset_after", [True] * 6)
    for grads in (
        (strided, None),
        (spread, plain[1]),
        (plain[0], torch.ones(1, 2, 1).expand(h.shape)),
    ):
        with Watches():
            assert _C.run_direct_backward(*grads, *rest) is None
        assert made == []
    with Watches():
        assert _C.run_direct_backward(*plain, *rest) is not None
    assert len(made) == 6


def test_what_grows_while_gradients_are_allocated_is_refused() -> None:
    weights = gru_fast.GRU(1, 1)._flat_weights
    h = torch.zeros(1, 1, 1)
    x, grad, output, workspace = (torch.zeros(2, 1, 1) for _ in range(4))
    workspace.data = torch.zeros(2, 1, 1, 4)

    class Grows(TorchFunctionMode):
        """Stands for another thread."""

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is Tensor.new_empty:
                for tensor in (x, grad, output, workspace):
                    tensor.data = torch.zeros(3, *tensor.shape[1:])
            return result

    call = (
        grad,
        None,
        x,
        h,
        weights,
        output,
        workspace,
        None,
        None,
        None,
        1,
        False,
        "reset_after",
        [True] * 6,
    )
    with Grows():
        assert _C.run_direct_backward(*call) is None
    assert _C.run_direct_backward(*call) is not None
