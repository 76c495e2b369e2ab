# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks gpu`: everything a GPU can tell, in order of worth, safe at any cut-off."""
