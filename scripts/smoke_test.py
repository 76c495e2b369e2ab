# SPDX-License-Identifier: Apache-2.0
"""Try an installed gru_fast: the C++ kernels agree with nn.GRU, gradients included."""

import shutil

import torch

import gru_fast
from gru_fast import _C


def main() -> None:
    """Run the check; raises AssertionError where something is wrong."""
    compilers = [name for name in ("c++", "g++", "gcc", "cc", "clang") if shutil.which(name)]
    theirs = torch.nn.GRU(7, 13, num_layers=2, bidirectional=True)
    ours = gru_fast.GRU(7, 13, num_layers=2, bidirectional=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(11, 3, 7)
    before = _C.launches()
    results = [model(x) for model in (ours, theirs)]
    torch.testing.assert_close(results[0], results[1])
    for output, _ in results:
        output.square().sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    launches = _C.launches() - before
    assert launches > 0, "the C++ kernels took no call"
    print(
        f"gru_fast {gru_fast.__version__} on torch {torch.__version__}: isa {_C.cpu_isa()}, "
        f"{launches} calls served by C++, compilers in PATH: {compilers or 'none'}"
    )


if __name__ == "__main__":
    main()
