# SPDX-License-Identifier: Apache-2.0
"""Where text comes from."""

from gru_fast.corpus import read_text, split_lines


def test_marks_and_line_ends_of_windows_are_no_text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfa\r\n\r\nb\r\n")
    assert read_text(str(path)) == "a\n\nb\n"


def test_builtin_corpora():
    names = split_lines(read_text("builtin:names"))
    assert len(names) > 80_000 and {"mary", "james", "smith"} <= set(names)
    assert set("".join(names)) == set("abcdefghijklmnopqrstuvwxyz")
    topics = read_text("builtin:python")
    assert len(topics) > 400_000 and "lambda" in topics
