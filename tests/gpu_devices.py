# SPDX-License-Identifier: Apache-2.0
"""Devices and sizes by which kernels are chosen."""

import torch

from gru_fast.kernels.tiling import Device, Sizes

KIB = 1024
HOPPER = Device(90, 227 * KIB, 132)
DEVICES = (
    Device(75, 64 * KIB, 40), Device(80, 163 * KIB, 108), Device(86, 99 * KIB, 82),
    Device(89, 99 * KIB, 128), HOPPER, Device(100, 227 * KIB, 148), Device(120, 99 * KIB, 170),
)  # fmt: skip


def sizes(T=512, B=64, G=1, H=128, numbers="16", plain=True) -> Sizes:
    dtype = torch.bfloat16 if numbers == "16" else torch.float32
    precision = "tf32" if numbers == "16" else numbers
    return Sizes(T, B, G, H, "reset_after", dtype, precision, plain)
