"""README.md from nbs/index.ipynb: markdown as it is, code as code, printed and plain results below it.

    python tests/make_readme.py
"""
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- made from nbs/index.ipynb by tests/make_readme.py; edit the notebook -->\n"


def readme(notebook):
    "The README's text."
    parts = []
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        elif "#| hide" not in cell.source:
            if "#| echo: false" not in cell.source: parts.append(f"```python\n{cell.source}\n```")
            parts += [text for text in map(printed, cell.outputs) if text]
    return NOTE + "\n" + "\n\n".join(parts).rstrip().replace("](../", "](") + "\n" # links seen from the root


def printed(output):
    "What one output shows: markdown as it is, anything else as text."
    data = output.get("data", {})
    if "text/markdown" in data: return data["text/markdown"].rstrip()
    text = output.get("text") or data.get("text/plain", "")
    return f"```\n{text.rstrip()}\n```" if text.strip() else ""


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(ROOT / "nbs" / "index.ipynb"), encoding="utf-8")
