"""The documents: links work, and the README stays short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "checkpoints/*.md", "kernels/*/*.md")
    for path in ROOT.glob(pattern)
)


def anchors(document):
    """GitHub's anchors of the headings."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_work(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_a_front_page():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 180
    assert "    make test " in "\n".join(lines)


def test_the_map_lists_every_module():
    design = (ROOT / "docs/design.md").read_text()
    listed = set(re.findall(r"[a-z_]+\.py\b", design))
    modules = {path.name for path in (ROOT / "dvmsr_jax").rglob("[a-z]*.py")}
    commands = {path.name for path in ROOT.glob("*.py")}
    assert modules | commands <= listed
    scans = (ROOT / "kernels/selective_scan/README.md").read_text()
    listed |= set(re.findall(r"[a-z_]+\.py\b", scans))
    assert {path.name for path in (ROOT / "kernels").rglob("[a-z]*.py")} <= listed
