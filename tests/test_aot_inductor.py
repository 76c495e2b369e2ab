# SPDX-License-Identifier: Apache-2.0
"""A package of AOTInductor, run by a process that never saw the model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gru_fast

PROGRAM = """
import sys
import torch
import gru_fast  # the operators that the package calls

run = torch._inductor.aoti_load_package(sys.argv[1])
for x, mask, truth in torch.load(sys.argv[2]):
    torch.testing.assert_close(run(x, mask), truth)
print("same")
"""


class Model(nn.Module):
    """A layer in both directions, one with heads, and plain layers around them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 5)
        self.both = gru_fast.GRU(5, 6, bidirectional=True)
        self.heads = gru_fast.GRU(12, 8, num_heads=2, cell="reset_before")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x, _ = self.both(self.embed(x), reset_mask=mask)
        return self.heads(x)[0].relu()


@pytest.mark.slow
# torch's own, in its exporter.
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_a_package_runs_in_a_fresh_process(tmp_path: Path) -> None:
    model = Model().eval()
    T, B = torch.export.Dim("T", min=2, max=4096), torch.export.Dim("B", min=2, max=4096)
    example = torch.randn(6, 3, 3), torch.rand(6, 3) < 0.3
    sizes = {"x": {0: T, 1: B}, "mask": {0: T, 1: B}}
    with torch.no_grad():
        program = torch.export.export(model, example, dynamic_shapes=sizes)
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        data = []
        for t, b in ((6, 3), (17, 2), (2, 9)):
            x, mask = torch.randn(t, b, 3), torch.rand(t, b) < 0.3
            data.append((x, mask, model(x, mask)))
    torch.save(data, tmp_path / "data.pt")
    arguments = [sys.executable, "-c", PROGRAM, package, str(tmp_path / "data.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same"]
