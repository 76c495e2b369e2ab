# SPDX-License-Identifier: Apache-2.0
"""The error of what a user hands over: a file, a text, an option."""


class InputError(ValueError):
    """What a user gave cannot be used; the text is one line that says what to do."""
