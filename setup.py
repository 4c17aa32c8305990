"""What pyproject.toml cannot say: README.md as a package index shows it, and the project's links, from one address."""

import re
from pathlib import Path

from setuptools import setup

# where the repository can be read, for example "https://host/owner/genattn"; empty until there is such a place
ADDRESS = ""
PAGES = {
    "Documentation": "docs/README.md",
    "Source": "",
    "Changelog": "CHANGELOG.md",
}


def index_page(readme: str, address: str = ADDRESS) -> str:
    """README.md without links that lead nowhere: relative ones become absolute, or plain words where there is no address."""

    def picture(match: "re.Match[str]") -> str:
        return f"![{match[1]}]({address}/raw/HEAD/{match[2]})" if address else ""

    def link(match: "re.Match[str]") -> str:
        return f"[{match[1]}]({address}/blob/HEAD/{match[2]})" if address else match[1]

    readme = re.sub(r"!\[([^\]]*)\]\((?!https?:)([^)]+)\)", picture, readme)
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)", link, readme)


def links(address: str = ADDRESS) -> "dict[str, str]":
    """The links beside the page; none where there is no address."""
    return {name: f"{address}/blob/HEAD/{page}" if page else address for name, page in PAGES.items()} if address else {}


if __name__ == "__main__":
    setup(
        long_description=index_page((Path(__file__).parent / "README.md").read_text(encoding="utf-8")),
        long_description_content_type="text/markdown",
        project_urls=links(),
    )
