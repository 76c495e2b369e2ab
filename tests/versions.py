# SPDX-License-Identifier: Apache-2.0
"""What older versions of other packages cannot do, whoever asks them."""

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from torch.torch_version import TorchVersion

# torch.compile of torch.func.jacfwd: "Could not extract specialized integer".
COMPILES_JACFWD = torch.__version__ >= (2, 13)
# torch.export with free sizes takes `min(4 * B, 12 * B) == 4 * B` for a condition on B.
EXPORTS_FREE_HEADS = torch.__version__ >= (2, 13)
# A view of a distributed tensor that torch's own GRU makes as well: "Attempted to flatten".
VIEWS_DISTRIBUTED = torch.__version__ >= (2, 12)


def _interprets() -> bool:
    try:
        return TorchVersion(version("triton")) >= (3, 7) or TorchVersion(version("numpy")) < (2, 4)
    except PackageNotFoundError:
        return False


needs_triton_interpreter = pytest.mark.skipif(
    not _interprets(),
    reason="Triton's interpreter: not installed, or that of 3.6, which needs NumPy below 2.4",
)
