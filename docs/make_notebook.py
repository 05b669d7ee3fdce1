"""Make from_bigram_to_gpt.ipynb: the page from_bigram_to_gpt.md as a Jupyter notebook, with its outputs.

python docs/make_notebook.py
"""

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)
SETUP = """import sys

sys.path.append("..")  # this repo's folder, for model.py
"""


def notebook(page: str) -> dict[str, Any]:
    """Convert a Markdown page to a notebook (nbformat 4.4): a code cell for each Python block, with the output below it.

    Nothing is run: tests/test_docs.py checks that the blocks print what the page shows.
    """
    intro, rest = page.split("\n## ", 1)
    texts = [intro, *BLOCK.split("## " + rest)]  # intro, then text, code and output in turn, and text at the end
    cells = [_text(texts[0]), _code(SETUP, None)]
    for text, code, output in zip(texts[1:-1:3], texts[2::3], texts[3::3], strict=True):
        cells += [_text(text), _code(code, output)]
    cells = [cell for cell in [*cells, _text(texts[-1])] if cell["source"]]
    codes = (cell for cell in cells if cell["cell_type"] == "code")
    for count, cell in enumerate(codes, 1):
        cell["execution_count"] = count
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}


def _text(text: str) -> dict[str, Any]:
    text = text.strip().replace("](#", "](from_bigram_to_gpt.md#")  # Jupyter names its headings in another way
    return {"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)}


def _code(code: str, output: str | None) -> dict[str, Any]:
    outputs = [] if output is None else [{"name": "stdout", "output_type": "stream", "text": output.splitlines(keepends=True)}]
    source = code.strip().splitlines(keepends=True)
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": outputs, "source": source}


def main() -> None:
    page = (DOCS / "from_bigram_to_gpt.md").read_text(encoding="utf-8")
    path = DOCS / "from_bigram_to_gpt.ipynb"
    path.write_text(json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
