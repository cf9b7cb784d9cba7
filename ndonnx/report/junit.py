"""Verdicts as JUnit XML, which continuous integration shows as test cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as Xml

from ndonnx.errors import UsageError
from ndonnx.metrics.verdict import Verdict
from ndonnx.runtime.atomic import atomic_write

_SUITE = "ndonnx.evaluate"


def check_junit(path: Path) -> None:
    """Refuse, before any work is done, a file that cannot be written.

    Raises:
        UsageError: it is a folder, or its folder is not there.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{path}: cannot write JUnit XML there; expected a file name in a folder that exists")


def write_junit(path: Path, model: str, verdicts: Sequence[Verdict], seconds: float) -> None:
    """Write a test case for each requirement, whole or not at all.

    Args:
        path: of the file.
        model: the name of the model that was evaluated.
        verdicts: one for each requirement.
        seconds: wall time of the whole evaluation.

    Raises:
        RunDirError: the system refused.
    """
    atomic_write(path, junit(model, verdicts, seconds))


def junit(model: str, verdicts: Sequence[Verdict], seconds: float) -> bytes:
    """The document in UTF-8, see `write_junit`."""
    totals = {
        "tests": str(len(verdicts)),
        "failures": str(sum(not verdict.kept for verdict in verdicts)),
        "errors": "0",
        "time": f"{seconds:.3f}",
    }
    whole = Xml.Element("testsuites", totals)
    suite = Xml.SubElement(whole, "testsuite", {"name": _plain(f"{_SUITE} {model}")} | totals)
    for verdict in verdicts:
        case = Xml.SubElement(suite, "testcase", {"classname": _SUITE, "name": _plain(verdict.requirement)})
        told = f"required {verdict.measure} {verdict.sign} {verdict.required:.6g}, found {verdict.found:.6g}"
        if verdict.output is not None:
            told += f" of output '{verdict.output}'"
        if not verdict.kept:
            Xml.SubElement(case, "failure", {"message": _plain(told), "type": verdict.measure}).text = _plain(told)
        else:
            Xml.SubElement(case, "system-out").text = _plain(told)
    Xml.indent(whole)
    return bytes(Xml.tostring(whole, encoding="utf-8", xml_declaration=True)) + b"\n"


def _plain(text: str) -> str:
    """Without control characters and lone surrogates, which XML does not know."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
