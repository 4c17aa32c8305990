"""Commands about ComfyUI: install and remove the node pack, write its help pages and example workflows."""

from pathlib import Path
from typing import Annotated

import typer

from genattn.apps.cli import options
from genattn.apps.cli.printing import print_json, print_lines

comfyui_app = typer.Typer(no_args_is_help=True, help="Nodes for ComfyUI: install, remove, write help pages and workflows.")
Directory = Annotated[Path, typer.Argument(help="Folder of ComfyUI (with main.py), or its --base-directory.")]


@comfyui_app.command("install")
def install_command(
    directory: Directory,
    link: Annotated[bool, typer.Option(help="Link to this installation instead of copying.")] = False,
    as_json: options.Json = False,
) -> None:
    """Put the nodes into a ComfyUI; run it again after an update.

    Example: genattn comfyui install ~/ComfyUI
    """
    from genattn.apps.comfyui.install import install, installed_for

    place, hint = install(directory, link), installed_for(directory)
    if as_json:
        print_json({"installed": place, "hint": hint or None})
    else:
        print_lines(f"installed {place}; restart ComfyUI", *([hint] if hint else []))


@comfyui_app.command("remove")
def remove_command(directory: Directory, as_json: options.Json = False) -> None:
    """Take the nodes out of a ComfyUI.

    Example: genattn comfyui remove ~/ComfyUI
    """
    from genattn.apps.comfyui.install import remove

    gone = remove(directory)
    if as_json:
        print_json({"removed": gone})
    else:
        print_lines("removed; restart ComfyUI" if gone else "there was nothing to remove")


@comfyui_app.command("workflows")
def workflows_command(
    url: Annotated[str, typer.Option(help="A running ComfyUI with the nodes installed.")] = "http://127.0.0.1:8188",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default: the pack's example_workflows.")] = None,
    as_json: options.Json = False,
) -> None:
    """Rewrite the example workflows with the node definitions of a running ComfyUI.

    Example: genattn comfyui workflows --url http://127.0.0.1:8188 --out out
    """
    from genattn.apps.comfyui.install import pack_folder
    from genattn.apps.comfyui.workflows import write_workflows
    from genattn.apps.sampling.output_files import check_folder

    target = out or pack_folder() / "example_workflows"
    check_folder(target, "--out")
    _tell(write_workflows(url, pack_folder() / "api", target), as_json)


@comfyui_app.command("help-pages")
def help_pages_command(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default: the pack's web/docs.")] = None,
    as_json: options.Json = False,
) -> None:
    """Write the nodes' help pages from their definitions.

    Example: genattn comfyui help-pages --out out
    """
    from genattn.apps.comfyui.help import write_pages
    from genattn.apps.comfyui.install import pack_folder
    from genattn.apps.sampling.output_files import check_folder

    target = out or pack_folder() / "web" / "docs"
    check_folder(target, "--out")
    _tell(write_pages(target), as_json)


def _tell(written: list[Path], as_json: bool) -> None:
    if as_json:
        print_json({"files": written})
    else:
        print_lines(*(f"wrote {path}" for path in written))
