"""The tab Report: every run of this visitor with its figures, and what the machine and the server allow."""

from typing import Any

import gradio as gr

from genattn.apps.webui.tabs.parts import QUIET, downloads, in_decibels, refusing
from genattn.apps.webui.verbs.session import Session

COLUMNS = ("date", "verb", "model", "seconds", "outcome", "run")
KEPT = 50


def report_tab(session: Session) -> dict[str, Any]:
    """Build the tab; returns the visitor's list and what must be called with each new report."""
    kept = gr.State([], time_to_live=24 * 3600)
    gr.Markdown(
        "The runs of this page, newest first. Click on a row for its full report. Files stay on the server for a while."
    )
    table = gr.Dataframe(headers=list(COLUMNS), interactive=False, elem_id="report-rows", wrap=True)
    with gr.Row():
        with gr.Column():
            with gr.Row(elem_classes="tight"):
                name = gr.Textbox(label="Run", placeholder="name of a run", scale=3, elem_id="report-run")
                show = gr.Button("Show", scale=1, min_width=90, elem_id="report-show")
            report = gr.JSON(label="Report", elem_id="report-json", max_height=520)
            taken, files = downloads(session, "report-files")
        with gr.Column():
            ask = gr.Button("What can this machine and this server do?", elem_id="machine-go")
            machine = gr.JSON(label="Machine and limits", elem_id="machine-json", max_height=520)

    def show_report(run: str) -> dict[str, Any]:
        """The full report of a run: settings, seed, seconds, densities, what ran and why not, files."""
        with refusing():
            return session.report(run)

    def describe_machine() -> dict[str, Any]:
        """Backends of this machine with the reason where one cannot run; models and limits of this server."""
        from genattn.apps.bench.doctor import doctor

        found = {name: fact for name, fact in doctor().items() if name != "cache"}
        return {"models": session.names(), "limits": vars(session.limits), "machine": found}

    def remember(kept: list[dict[str, Any]], report: dict[str, Any] | None) -> tuple[Any, Any]:
        if not report or report.get("run") in {old.get("run") for old in kept if old.get("frames") == report.get("frames")}:
            return kept, gr.skip()
        # rows for the table alone: reports lie on disk
        kept = [_brief(report), *kept][:KEPT]
        return kept, [[row[column] for column in COLUMNS] for row in kept]

    def pick(kept: list[dict[str, Any]], event: gr.SelectData) -> tuple[str, Any]:
        run = kept[event.index[0]]["run"]
        return run, show_report(run)

    light: dict[str, Any] = {"concurrency_id": "cpu", "concurrency_limit": 2, "show_progress": "minimal"}
    show.click(show_report, name, report, api_name="report", **light)
    ask.click(describe_machine, None, machine, api_name="machine", **light)
    table.select(pick, kept, [name, report], api_visibility="private", show_progress="hidden")
    report.change(lambda found: files(found) if found else None, report, taken, **QUIET)
    return {"remember": (remember, kept, table)}


def _brief(report: dict[str, Any]) -> dict[str, Any]:
    runs = report.get("runs") or []
    seconds = report.get("seconds") or sum(run["seconds"] for run in runs) or None
    if report["verb"] == "video":
        nearness = in_decibels(runs[1]["psnr"])
        outcome = f"density {runs[1]['density']:.2f}, {nearness}, {runs[1]['speedup']:.2f}x"
    elif report["verb"] == "image":
        outcome = f"heads {report['heads']}"
    elif report["verb"] == "hunt":
        outcome = report["heads"]
    else:
        outcome = f"{report['frames']} frames, {report['frames_per_second']} a second"
    brief = {"date": report["date"][:19].replace("T", " "), "verb": report["verb"], "model": report["model"]}
    shown = "-" if seconds is None else f"{seconds:.1f}"
    return {**brief, "seconds": shown, "outcome": outcome, "run": report["run"], "frames": report.get("frames")}
