"""Two clips in one frame: a divider to move, a view of the difference, or side by side; both play in step.

All of it runs in the browser, on the two files that the server has anyway.
"""

from urllib.parse import quote

from genattn.apps.webui.tabs.parts import plain

# one script for all players of a page: the page's own, nothing is fetched
HEAD = """
<script>
window.genattnPlayer = {
  parts(node) {
    const box = node.closest('.ab');
    return {box, films: [...box.querySelectorAll('video')], seek: box.querySelector('.ab-seek')};
  },
  // what a range or a button of the player asks for
  act(node, what) {
    const {box, films, seek} = this.parts(node);
    if (what === 'divide') box.style.setProperty('--cut', node.value + '%');
    if (what === 'view') box.dataset.view = node.value;
    if (what === 'seek') films.forEach(f => { f.pause(); f.currentTime = (f.duration || 0) * node.value / 1000; });
    if (what === 'play') {
      const on = films[0].paused;
      films.forEach(f => { f.currentTime = films[0].currentTime; on ? f.play() : f.pause(); });
    }
    box.querySelector('.ab-play').textContent = films[0].paused ? 'Play both' : 'Pause';
  },
  // the first film leads: the second is set right when it is a frame away
  tick(first) {
    const {films, seek} = this.parts(first);
    const apart = Math.abs(films[1].currentTime - first.currentTime);
    if (apart > 0.04 && !first.seeking) films[1].currentTime = first.currentTime;
    if (first.duration && document.activeElement !== seek) seek.value = 1000 * first.currentTime / first.duration;
  },
};
</script>
"""

CSS = """
.ab { --cut: 50%; }
.ab-stage { position: relative; display: grid; background: #0f172a; border-radius: 8px; overflow: hidden; max-width: 100%; }
.ab-stage video { grid-area: 1 / 1; width: 100%; max-height: 420px; object-fit: contain; min-width: 0; display: block; }
.ab-stage .ab-sparse { clip-path: inset(0 0 0 var(--cut)); }
.ab-line { grid-area: 1 / 1; position: absolute; top: 0; bottom: 0; left: var(--cut); width: 2px;
           background: #fff; opacity: .9; }
.ab-name { position: absolute; top: 6px; padding: 1px 8px; border-radius: 6px; background: rgba(15, 23, 42, .75); color: #fff;
           font-size: .8rem; z-index: 2; }
.ab-name.ab-left { left: 6px; } .ab-name.ab-right { right: 6px; }
.ab[data-view=difference] .ab-sparse { clip-path: none; mix-blend-mode: difference; }
.ab[data-view=difference] .ab-stage { filter: brightness(4); }
.ab[data-view=difference] .ab-line, .ab[data-view=difference] .ab-name { display: none; }
.ab[data-view=beside] .ab-stage { grid-template-columns: 1fr 1fr; }
.ab[data-view=beside] .ab-sparse { clip-path: none; grid-area: 1 / 2; }
.ab[data-view=beside] .ab-line { display: none; }
.ab-bar { display: flex; flex-wrap: wrap; gap: 6px 12px; align-items: center; margin-top: 8px; font-size: .85rem; }
.ab-bar label { display: flex; align-items: center; gap: 6px; flex: 1 1 150px; min-width: 0; }
.ab-bar input[type=range] { flex: 1; min-width: 60px; accent-color: var(--color-accent); }
.ab-bar select, .ab-bar button { padding: 4px 10px; border: 1px solid var(--border-color-primary); border-radius: 6px;
                                 background: var(--background-fill-secondary); color: var(--body-text-color);
                                 min-height: 32px; }
"""

EMPTY = (
    "<div class='notice'>Nothing made yet. <b>Make both clips</b> runs the prompt twice from the same noise, dense and sparse. "
    "Here they play in step, with a divider between them, or as their difference.</div>"
)


def player(dense: str, sparse: str, name: str, pixels: bool = False) -> str:
    """HTML of the player. dense, sparse: paths of films that the server may show. pixels: show them, do not blur."""
    call = "window.genattnPlayer"
    look = "muted loop playsinline autoplay preload='auto'"
    small = " small" if pixels else ""
    # no empty line first: Gradio keeps examples in a table, where it takes that for a formula and puts a ' before it
    return f"""<div class='ab{small}' id='ab-player' data-view='slider'>
  <div class='ab-stage'>
    <video class='ab-dense' {look} src='{_address(dense)}' ontimeupdate='{call}.tick(this)'></video>
    <video class='ab-sparse' {look} src='{_address(sparse)}'></video>
    <span class='ab-line'></span>
    <span class='ab-name ab-left'>dense</span><span class='ab-name ab-right'>{plain(name)}</span>
  </div>
  <div class='ab-bar'>
    <button type='button' class='ab-play' onclick="{call}.act(this, 'play')">Pause</button>
    <select aria-label='View' class='ab-view' onchange="{call}.act(this, 'view')">
      <option value='slider'>dense | sparse</option><option value='beside'>side by side</option>
      <option value='difference'>difference x4</option></select>
    <label>Divider <input type='range' class='ab-cut' min='0' max='100' value='50' aria-label='Divider'
      oninput="{call}.act(this, 'divide')"></label>
    <label>Time <input type='range' class='ab-seek' min='0' max='1000' value='0' aria-label='Time'
      oninput="{call}.act(this, 'seek')"></label>
  </div>
</div>"""


def _address(path: str) -> str:
    """Where the page gets a file of the session; relative, so that a proxy may put the app under another root."""
    return f"gradio_api/file={quote(path)}"
