# SPDX-License-Identifier: Apache-2.0
"""Tokens drawn one after the other, by us and by loops over peers, and what else samplers promise.

A call draws T tokens for each of B sequences from a character model: table or embedding, GRU, head,
softmax, draw, feed back. Every provider gets the same weights.
"""
