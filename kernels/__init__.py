# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, installed as ``gru_fast.kernels``; none yet, a CUDA call runs on the reference.

Modules here import torch and triton only, and each other by relative imports: never ``gru_fast``.
Nothing here is imported before the first call with CUDA tensors: `gru_fast` works without triton.
"""
