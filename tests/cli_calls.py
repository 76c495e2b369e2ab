# SPDX-License-Identifier: Apache-2.0
"""Commands of `gru-fast`, called in this process."""

from click.testing import CliRunner

from gru_fast.cli import cli


def call(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result
