"""Open a diffusers pipeline from a folder or a hub id, and say in one line what is missing when it cannot be opened.

A folder is looked through before anything is loaded: a model that was copied half-way must not fail after minutes.
"""

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import genattn
from genattn.errors import GenAttnError, first_line, kind_and_line
from genattn.reading import whole

WEIGHTS = (".safetensors", ".gguf")
MODULAR_INDEX = "modular_model_index.json"
_INDEXES = ("model_index.json", MODULAR_INDEX)


def shipped_model(name: str = "tiny-wan") -> Path:
    """Folder of a tiny pipeline that comes with the package.

    Raises GenAttnError if this installation has none of that name.
    """
    for root in genattn.__path__:
        folder = Path(root) / "assets" / name
        if (folder / "model_index.json").is_file():
            return folder
    raise GenAttnError(f"this installation has no shipped model {name!r}; give --model PATH_OR_ID")


def check_folder(folder: Path) -> None:
    """Raise GenAttnError if `folder` is not a whole diffusers pipeline: what is missing, by name."""
    index = folder / "model_index.json"
    if not index.is_file() and (folder / MODULAR_INDEX).is_file():
        _check_modular(folder)
        return
    if not index.is_file():
        raise GenAttnError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    components = {k: v for k, v in _config(index).items() if isinstance(v, list) and len(v) == 2 and v[1] is not None}
    for name, (_, cls) in components.items():
        part = folder / name
        if not part.is_dir() or not any(part.iterdir()):
            raise GenAttnError(f"{folder} is incomplete: component {name!r} ({cls}) has no folder; copy the model again")
        for config in part.glob("*config.json"):
            _config(config)
        if (part / "config.json").is_file():  # models have it; tokenizers, schedulers and processors name theirs otherwise
            _check_weights(part)
        elif not any(part.glob("*.json")):
            raise GenAttnError(f"{part} is incomplete: component {name!r} ({cls}) has no config; copy the model again")


def _check_modular(folder: Path) -> None:
    """A modular folder may take components from elsewhere; those that lie in it must be whole."""
    for name in _modular_components(folder):
        if (folder / name / "config.json").is_file():
            _check_weights(folder / name)


def _modular_components(folder: Path) -> list[str]:
    """Components that modular_model_index.json names, with those that are taken from elsewhere."""
    return [name for name, entry in _config(folder / MODULAR_INDEX).items() if isinstance(entry, list) and len(entry) == 3]


def _check_weights(part: Path) -> None:
    for index in part.glob("*.safetensors.index*.json"):
        with whole(str(index)):
            missing = sorted({f for f in _config(index)["weight_map"].values() if not (part / f).is_file()})
        if missing:
            raise GenAttnError(f"{part} is incomplete: {', '.join(missing)} missing; copy the model again")
    weights = [f for f in part.iterdir() if f.suffix in WEIGHTS]
    if not weights:
        raise GenAttnError(f"{part} has no weights in safetensors form; other formats are not loaded, convert them first")
    for file in weights:
        if file.suffix == ".safetensors":
            _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    """The header promises a length; a file that was cut off on the way is shorter."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise GenAttnError(f"{file} is damaged ({error}); copy the model again") from None


def _config(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise GenAttnError(f"{file} cannot be read as JSON ({error}); copy the model again") from None
    if not isinstance(content, dict):
        raise GenAttnError(f"{file} must hold a JSON object, got {type(content).__name__}; copy the model again")
    return content


def load_pipeline(
    model: str | Path | None, dtype: str = "auto", device: str | None = None, cpu_offload: str | None = None
) -> Any:
    """A pipeline on its device, from a folder, a hub id or (None) the shipped tiny-wan.

    Args:
        model: folder or hub id. Only safetensors weights are read and no remote code is run.
        dtype: "auto" (float32 on a CPU, bfloat16 elsewhere), "float32", "float16" or "bfloat16".
        device: "cpu", "cuda", "cuda:1", "mps"; None takes the accelerator if there is one.
        cpu_offload: "model" or "group" keeps the weights on the CPU between uses; they are never on the device as a whole.

    Raises:
        GenAttnError: the folder is not whole, the id cannot be reached, or the dtype or device is not there, or there is
            nothing to offload from.
    """
    import diffusers
    import torch

    place = pick_device(device)
    _check_offload(cpu_offload, place)
    source = str(shipped_model() if model is None else model)
    if Path(source).is_dir():
        check_folder(Path(source))
    elif source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise GenAttnError(_why_no_source(source))
    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype != "auto" and dtype not in kinds:
        raise GenAttnError(f"dtype must be auto, {', '.join(kinds)}, got {dtype!r}")
    kind = kinds.get(dtype, torch.float32 if place == "cpu" else torch.bfloat16)
    where = {} if Path(source).is_dir() else reach(source)
    try:
        with _bars_for_terminals():
            if names_modular(source, **where):
                pipe = _load_modular(source, kind, **where)
            else:
                pipe = diffusers.DiffusionPipeline.from_pretrained(source, use_safetensors=True, **_precision(kind), **where)
    except (GenAttnError, MemoryError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError) as error:
        raise GenAttnError(f"{source!r} cannot be loaded: {first_line(error)}") from None
    except Exception as error:  # whatever a class does with a setting that nobody foresaw
        reason = f"{kind_and_line(error)}; a config of it is damaged or of another version, copy the model again"
        raise GenAttnError(f"{source!r} cannot be loaded: {reason}") from error
    return _placed(pipe, place, cpu_offload)


def _why_no_source(source: str) -> str:
    from genattn.planning.presets import PRESETS

    if source in PRESETS:  # plan and scale take the name
        return f"{source!r} is the name of a shape, which has no weights; give --model the folder or hub id of a pipeline of it"
    return f"there is no folder {source!r}, and a hub id has the form owner/name; check --model"


def _precision(kind: Any) -> dict[str, Any]:
    """The argument by which diffusers is told it: `dtype` from 0.40 on, `torch_dtype` before, which 1.0 takes no more."""
    import diffusers

    numbers = [int(part) for part in diffusers.__version__.split(".")[:2]]
    return {"dtype" if numbers >= [0, 40] else "torch_dtype": kind}


@contextlib.contextmanager
def _bars_for_terminals() -> Iterator[None]:
    """While entered, diffusers' and transformers' bars for the loading of files are off where nobody watches them."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    on = [each for each in (of_diffusers, of_transformers) if each.is_progress_bar_enabled() and not sys.stderr.isatty()]
    for each in on:
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each in on:
            each.enable_progress_bar()


def reach(source: str) -> dict[str, bool]:
    """How diffusers shall load a hub id: from the hub, or from the local cache alone where the hub cannot be reached.

    One question with a time limit; the hub's client would ask again for a minute, with a line each time.

    Raises GenAttnError: it is no id, the hub does not know it, or it cannot be reached and the model is not in the cache.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(source, timeout=10)
    except HFValidationError as error:
        raise GenAttnError(f"{source!r} is neither a folder nor a hub id ({first_line(error)}); check --model") from None
    except RepositoryNotFoundError:
        raise GenAttnError(
            f"the hub has no model {source!r}, or shows it to its members only (then: hf auth login); check --model"
        ) from None
    except HfHubHTTPError:  # a mirror that answers for files alone
        return {}
    except Exception as error:  # the client's network errors have no base class of their own that stayed
        reason = first_line(error).rstrip(".")
        if any(isinstance(try_to_load_from_cache(source, index), str) for index in _INDEXES):
            return {"local_files_only": True}
        raise GenAttnError(
            f"the hub cannot be reached ({reason}) and {source!r} is not in the local cache; where "
            f"there is a network, run: hf download {source} --local-dir FOLDER, and give --model FOLDER"
        ) from None
    return {}


def names_modular(source: str, **where: bool) -> bool:
    """Whether a folder or a hub id has an index of a modular pipeline and none of a stock one. where: as from `reach`."""
    import diffusers

    if Path(source).is_dir():
        return not (Path(source) / "model_index.json").is_file()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # diffusers passes arguments that the hub's client no longer knows
        for kind, modular in ((diffusers.DiffusionPipeline, False), (diffusers.ModularPipeline, True)):
            with contextlib.suppress(OSError):  # this index is not there; nor is any when the hub cannot be reached
                kind.load_config(source, **where)
                return modular
    return False


def _load_modular(source: str, kind: Any, **where: bool) -> Any:
    """A modular pipeline with its components loaded; those of a folder from the folder, wherever it was saved.

    Raises GenAttnError for components that cannot be loaded, and for blocks that are code of the folder's own.
    """
    from diffusers import ModularPipeline

    pipe = ModularPipeline.from_pretrained(source, trust_remote_code=False, **where)
    wanted = []
    for name, spec in pipe._component_specs.items():
        if Path(source).is_dir() and (Path(source) / name).is_dir():
            spec.pretrained_model_name_or_path, spec.subfolder = source, name
        if spec.default_creation_method == "from_pretrained" and spec.pretrained_model_name_or_path:
            wanted.append(name)
    pipe.load_components(wanted, **_precision(kind), **where)
    missing = [name for name in wanted if getattr(pipe, name, None) is None]
    if missing:
        raise GenAttnError(f"{source} is incomplete: {', '.join(missing)} cannot be loaded; copy the model again")
    return pipe


def _check_offload(cpu_offload: str | None, place: str) -> None:
    if cpu_offload not in (None, "model", "group"):
        raise GenAttnError(f"--cpu-offload must be model or group, got {cpu_offload!r}")
    if cpu_offload is not None and place.split(":")[0] == "cpu":
        raise GenAttnError(
            f"--cpu-offload {cpu_offload} needs an accelerator to offload from, and the device is the CPU; leave it out"
        )


def _placed(pipe: Any, place: str, cpu_offload: str | None) -> Any:
    """The pipeline on its device. Offloading comes instead of the move: who asks for it has no room for the whole model."""
    import torch

    if cpu_offload == "model":
        pipe.enable_model_cpu_offload(device=place)
    elif cpu_offload == "group":
        pipe.enable_group_offload(onload_device=torch.device(place), offload_type="leaf_level")
    else:
        pipe.to(place)
    return pipe


def pick_device(device: str | None) -> str:
    """`device` if this machine has it, or the best one there is.

    Raises GenAttnError naming the devices that are there.
    """
    import torch

    there = ["cpu"]
    if torch.accelerator.is_available():
        there.insert(0, str(torch.accelerator.current_accelerator()))
    if device is None:
        return there[0]
    if device.split(":")[0] not in {d.split(":")[0] for d in there}:
        raise GenAttnError(f"device must be one of {', '.join(there)} on this machine, got {device!r}")
    return device
