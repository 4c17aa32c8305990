"""What is on a film's models and changes its frames: read when the run begins and again when it goes on."""

import json
from collections.abc import Mapping
from typing import Any

from genattn.errors import GenAttnError
from genattn.seam.denoiser import INJECTION


def plugins_on(models: Mapping[str, Any]) -> dict[str, Any]:
    """{model: its plugins, outermost first, each with its settings where it has a saved form}, JSON-ready; models without any
    are left out."""
    found = {}
    for name, model in models.items():
        injection = getattr(model, "__dict__", {}).get(INJECTION)
        if injection is not None:
            found[name] = [_told(plugin, handle) for handle in injection.handles for plugin in handle.plugins]
    return {"plugins": found} if found else {}


def _told(plugin: Any, handle: Any) -> list[Any]:
    try:
        settings: Any = json.loads(json.dumps(plugin.settings()))
    except (GenAttnError, TypeError, ValueError):  # it has no saved form
        settings = None
    return [type(plugin).__name__, settings, {name: repr(value) for name, value in handle.current_options.items()}]
