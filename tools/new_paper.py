"""Make the folder of a new paper: a small reproduction that passes every repo rule, to be replaced piece by piece.

uv run tools/new_paper.py my_paper --title "Title of the Paper"
"""

from __future__ import annotations

import argparse
import keyword
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared.errors import UserError
from tools.common import ROOT, arguments, tool

FILES = ("README.md", "paper.toml", "model.py", "data.py", "train.py")


def make(slug: str, title: str, root: Path = ROOT) -> Path:
    """Write ``papers/<slug>`` and ``tests/papers/test_<slug>.py``.

    Returns:
        the new folder.

    Raises:
        UserError: the slug is no lower-case identifier, or one of the places is taken.
    """
    if not slug.isidentifier() or keyword.iskeyword(slug) or slug != slug.lower():
        raise UserError(f"slug {slug!r} is not a lower-case Python identifier, expected something like my_paper")
    if not title.strip() or any(character in title for character in '"\\\n'):
        raise UserError("--title must be one line without quotes or backslashes")
    folder, test = root / "papers" / slug, root / "tests" / "papers" / f"test_{slug}.py"
    for path in (folder, test):
        if path.exists():
            raise UserError(f"{path} is already there, expected a new slug")
    template = Path(__file__).resolve().parent / "template"

    def filled(name: str) -> str:
        text = (template / name).read_text(encoding="utf-8")
        return text.replace("__SLUG__", slug).replace("__TITLE__", title)

    (folder / "results").mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text(filled(name), encoding="utf-8")
    test.parent.mkdir(parents=True, exist_ok=True)
    test.write_text(filled("test_paper.py"), encoding="utf-8")
    return folder


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = arguments(__doc__)
    parser.add_argument("slug", help="folder name, a lower-case Python identifier")
    parser.add_argument("--title", default="Title of the paper", help="the paper's title")

    def body(options: argparse.Namespace) -> int:
        folder = make(options.slug, options.title)
        print(f"{folder.relative_to(ROOT)} is made; next: uv run tools/reproduce.py {options.slug}")
        return 0

    return tool(parser, body, argv)


if __name__ == "__main__":
    sys.exit(main())
