"""The blocks of docs/frameworks.md, by the heading above them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

DOCUMENT = Path(__file__).parents[2] / "docs" / "frameworks.md"


def block(heading: str, language: str) -> str:
    """The one block of that language in that section."""
    section = re.split(r"^#+ ", DOCUMENT.read_text(), flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(heading + "\n")]
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return str(found)


def module_of(heading: str, directory: Path) -> ModuleType:
    """The section's Python block, imported under a name of its own."""
    name = f"recipe_{heading.lower()}"
    path = directory / f"{name}.py"
    path.write_text(block(heading, "python"))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
