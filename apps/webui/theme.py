"""How the app looks: system fonts (nothing is fetched), one accent colour, results larger than controls."""

import gradio as gr

from genattn.apps.webui.tabs.player import CSS as PLAYER_CSS

SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Noto Sans", "Arial", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]

CSS = (
    PLAYER_CSS
    + """
.gradio-container { max-width: 1320px !important; width: 100% !important; margin: 0 auto !important; }
.gradio-container main, .gradio-container .tabs, .gradio-container .tabitem { width: 100%; }
#title { margin: 6px 0 0 0; }
#title h1 { font-size: 1.5rem; letter-spacing: -0.01em; margin: 0; }
#title p { margin: 2px 0 6px 0; color: var(--body-text-color-subdued); }
.status { min-height: 1.7rem; font-variant-numeric: tabular-nums; color: var(--body-text-color-subdued); }
.status code { letter-spacing: -1px; background: none; border: 0; padding: 0; color: var(--color-accent); }
.hint p { color: var(--body-text-color-subdued); font-size: 0.9rem; margin: 0; }
.notice { padding: 14px 18px; border: 1px solid var(--border-color-primary); border-left: 4px solid var(--color-accent);
          border-radius: 8px; }
.tight { align-items: end; }
.cards { display: flex; flex-wrap: wrap; gap: 10px; }
.card { flex: 1 1 110px; padding: 10px 14px; border: 1px solid var(--border-color-primary); border-radius: 10px;
        background: var(--background-fill-secondary); }
.card b { display: block; white-space: nowrap; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.card span { font-size: 0.8rem; color: var(--body-text-color-subdued); }
/* models of 64 pixels: show pixels, not blur */
.small img, .small video { image-rendering: pixelated; }
.clickable img { cursor: pointer; }
.caption { margin-top: 4px; }
/* labels and buttons of a picture or a clip stand on a line above it, where they hide nothing */
.icon-button-wrapper:not(:has(button)) { display: none !important; }
.drawn .icon-button-wrapper { position: static !important; width: fit-content; margin: 0 0 4px auto; }
.drawn .image-container { display: flex; flex-direction: column; }
.drawn .image-container > button { flex: 1; min-height: 0; }
label[data-testid=block-label].float:not(.hide) { position: static !important; width: fit-content; margin-bottom: 6px; }
.block:has(> label.float:not(.hide)) { height: auto !important; }
.block:has(> label.float:not(.hide)) .image-container { position: static; }
.block:has(> label.float:not(.hide)) video { max-height: 320px; }
/* a list of files to take along: whole names, and nothing to press that only takes a line off the list */
.downloads td:has(> .label-clear-button) { display: none; }
.downloads .filename, .downloads .filename .stem { overflow: visible; max-width: none; }
footer .divider { display: none !important; }
/* six tabs side by side on a phone; nothing is cut */
.gradio-container { min-width: 0 !important; }
@media (max-width: 640px) {
  .gradio-container { padding: 8px !important; }
  .tab-container button { padding: 0 5px !important; font-size: 0.82rem !important; min-width: 0 !important; }
  .gradio-container main.app { padding: 8px 6px !important; }
  .tabitem { padding: 8px !important; }
  .gradio-container .row { flex-wrap: wrap; }
  .gradio-container .column { min-width: 0 !important; }
  .gradio-container table { font-size: 0.8rem; }
  [id$=-examples] :is(th, td):nth-child(n+3) { display: none; }
  .run-row { position: sticky; bottom: 0; z-index: 5; background: var(--body-background-fill); }
}
.caption p { font-size: 0.85rem; font-weight: 600; color: var(--body-text-color-subdued); margin: 0; }
"""
)


def theme() -> gr.themes.Base:
    """The app's theme."""
    return gr.themes.Soft(primary_hue="amber", secondary_hue="slate", neutral_hue="slate", font=SANS, font_mono=MONO).set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        block_title_background_fill="none",
        block_title_text_color="*neutral_600",
        block_title_text_weight="600",
        block_title_padding="0",
        block_label_background_fill="*neutral_100",
        block_label_text_color="*neutral_600",
        block_shadow="none",
        input_border_width="1px",
        input_border_color="*neutral_300",
        checkbox_border_color="*neutral_400",
        input_shadow="none",
    )
