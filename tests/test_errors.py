"""How commands report errors."""

import jax
import pytest

from dvmsr_jax.errors import StoppedError, UserError, printable
from dvmsr_jax.program import one_line_errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("fix this"), "error: fix this"),
        (UserError("in\n  lines: \x1b[2J\u202e"), "error: in\n  lines: \\x1b[2J\\u202e"),
        (FileNotFoundError("no such file"), "error: no such file"),
        (MemoryError(), "error: out of memory (in main memory); try less"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes\nand more"),
            "error: out of memory (RESOURCE_EXHAUSTED: 9 bytes); try less",
        ),
        (
            RuntimeError("Unable to initialize backend 'tpu': no libtpu.so"),
            "error: Unable to initialize backend 'tpu': no libtpu.so",
        ),
        (KeyboardInterrupt(), 130),
        (StoppedError("the same command resumes"), 130),
    ],
)
def test_other_errors_are_reported_in_one_line(error, code):
    with pytest.raises(SystemExit) as exit_, one_line_errors(out_of_memory="try less"):
        raise error
    assert exit_.value.code == code


@pytest.mark.parametrize("error", [ValueError("x"), jax.errors.JaxRuntimeError("INTERNAL: x")])
def test_a_defect_keeps_its_traceback(error):
    with pytest.raises(type(error)) as found, one_line_errors(out_of_memory="try less"):
        raise error
    assert found.value is error


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        *(("Über uns 写真.png", "Über uns 写真.png"), ("at 9\u202fam.png", "at 9\u202fam.png")),
        *(("\x1b[31m\r\n\t\x9b", r"\x1b[31m\r\n\t\x9b"), ("gnp.\u202e", r"gnp.\u202e")),
        *(("undecodable\udcff", r"undecodable\udcff"), ("a\u2028b", r"a\u2028b")),
    ],
)
def test_printable(name, shown):
    assert printable(name) == shown
    shown.encode()
