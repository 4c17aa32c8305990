"""Block-sparse attention on the CPU by the C++ kernel: the host side of `block_sparse.cpp`.

Partial tiles become packed bits, one per score, once per plan: grid rules (also one per head) are evaluated in C++ from their
tables, any other rule by calling it. From the bits the kernel also knows which part of a tile anything is visible in and
skips the rest. Where the bits of a grid rule would take too much memory, they are made anew for each tile visited.
"""

import ctypes

import torch

from genattn.kernels.cpu.native_build import native_library
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import ElementRule, GridRule, PerHeadRule
from genattn.kernels.plan.lasting import lasting
from genattn.kernels.plan.packed_masks import empty_masks, fill_masks, mask_bytes, mask_slots, owned_slots

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WORKSPACE = 256 << 20
_BITS_LIMIT = 1 << 30


class _Rule(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("coords", "frame_class", "low", "width")),
        *((name, ctypes.c_int32) for name in ("heads", "frames", "classes", "longest")),
        *((name, ctypes.c_int32 * 2) for name in ("extent", "dilation", "circular")),
    )


class _Call(ctypes.Structure):
    _tensors = ("query", "key", "value", "out", "lse", "key_mask")
    _lists = ("query_tiles", "key_tiles", "row_ptr", "columns", "num_full", "rules", "rule_of_head", "slots", "bits", "spans")
    _tail = ("tail_tokens", "tail_skipped", "tail_counted")
    _fade = ("fade_window", "fade_span")
    _tail_shape = ("pseudo", "tail_lanes", "tail_parts")
    _shape = ("batch", "heads", "kv_heads", "dim", "seqlen_q", "seqlen_k")
    _tiles = ("tiles_q", "tiles_k", "block_q", "block_k", "lists", "slot_rows")
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _tensors + _lists + _tail + _fade),
        ("stride", ctypes.c_int64 * 3 * 4),
        ("nnz", ctypes.c_int64),
        ("workspace", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in (*_shape, *_tiles, *_tail_shape, "dtype", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "fade_factor", "fade_penalty")),
    )


def why_not_native(query: torch.Tensor, plan: BlockPlan) -> str | None:
    """The reason why the C++ kernel cannot serve this call, or None. Builds the library on first use."""
    if query.device.type != "cpu":
        return f"it is for CPU tensors, got {query.device.type}"
    if query.dtype not in _DTYPES:
        return f"the dtype must be float32, bfloat16 or float16, got {query.dtype}"
    if plan.rule is not None and _grid_rules(plan.rule) is None and mask_bytes(plan) > _BITS_LIMIT:
        limit, size = _BITS_LIMIT >> 20, mask_bytes(plan) >> 20
        return f"the packed masks of its partial tiles must stay under {limit} MiB, got {size} MiB"
    library = native_library()
    return library if isinstance(library, str) else None


def native_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward only; shapes and meaning as in `reference_attention`, arithmetic in float32. Call `why_not_native` first."""
    library = native_library()
    if isinstance(library, str):
        raise ValueError(f"the C++ kernel is not available: {library}; use impl='grouped'")
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype)
    lse = torch.empty(query.shape[:3], dtype=torch.float32)
    if not plan.covers_queries:
        out.zero_()
        lse.fill_(float("-inf"))
    mask = None if key_mask is None else key_mask.contiguous()
    call = _Call()
    alive = [*_point_at_plan(call, plan, query.shape[2]), *_point_at_tail(call, plan), *_point_at_fade(call, plan)]
    for name, tensor in (("query", query), ("key", key), ("value", value), ("out", out), ("lse", lse), ("key_mask", mask)):
        setattr(call, name, None if tensor is None else tensor.data_ptr())
    for row, tensor in zip(call.stride, (query, key, value, out)):
        row[:] = tensor.stride()[:3]
    call.batch, call.seqlen_q, call.heads, call.dim = query.shape
    call.seqlen_k, call.kv_heads = key.shape[1:3]
    call.dtype, call.threads, call.workspace = _DTYPES[query.dtype], torch.get_num_threads(), _WORKSPACE
    call.scale = query.shape[-1] ** -0.5 if scale is None else scale
    status = library.genattn_block_sparse_forward(ctypes.byref(call))
    del alive
    if status:
        raise MemoryError(f"the C++ attention kernel could not allocate its workspace for {tuple(key.shape)} keys")
    return out, lse


def _point_at_lists(call: _Call, plan: BlockPlan) -> list[object]:
    alive: list[object] = []
    for name in ("query_tiles", "key_tiles", "row_ptr", "columns", "num_full"):
        tensor = getattr(plan, name).to(torch.int32).contiguous()
        alive.append(tensor)
        setattr(call, name, tensor.data_ptr())
    call.tiles_q, call.block_q = plan.query_tiles.shape
    call.tiles_k, call.block_k = plan.key_tiles.shape
    call.lists, call.nnz, call.slot_rows = plan.num_heads, plan.columns.numel(), 1
    return alive


def _point_at_plan(call: _Call, plan: BlockPlan, heads: int) -> list[object]:
    """Fill in the plan's lists and its masks; returns what must stay alive during the call."""
    alive = _point_at_lists(call, plan)
    if plan.rule is None:
        return alive
    alive += _point_at_rules(call, plan.rule, heads)
    masks = _masks(plan)
    if masks is not None:
        call.slots, call.bits, call.spans = (tensor.data_ptr() for tensor in masks)
        call.slot_rows = masks[0].shape[0]
    return alive


def _point_at_tail(call: _Call, plan: BlockPlan) -> list[object]:
    tail = plan.tail
    if tail is None:
        return []
    tables = {"tail_tokens": tail.tokens.contiguous(), "tail_skipped": tail.skipped.contiguous()}
    if tail.counted is not None:
        tables["tail_counted"] = tail.counted.contiguous()
    for name, tensor in tables.items():
        setattr(call, name, tensor.data_ptr())
    call.pseudo, call.tail_lanes = tail.tokens.shape
    call.tail_parts = tail.parts
    return list(tables.values())


def _point_at_fade(call: _Call, plan: BlockPlan) -> list[object]:
    if plan.fade is None:
        return []
    tables = [plan.fade.window.contiguous(), plan.fade.span.contiguous()]
    for name, tensor in zip(_Call._fade, tables):
        setattr(call, name, tensor.data_ptr())
    call.fade_factor, call.fade_penalty = plan.fade.kernel_factor, plan.fade.penalty
    return list(tables)


def _point_at_rules(call: _Call, rule: ElementRule, heads: int) -> list[object]:
    grids = _grid_rules(rule)
    if grids is None:
        return []
    rules, choice = grids
    alive: list[object] = []
    table = (_Rule * len(rules))(*(_rule_struct(grid, alive) for grid in rules))
    of_head = torch.tensor(choice * heads if len(choice) == 1 else choice, dtype=torch.int32)
    call.rules, call.rule_of_head = ctypes.addressof(table), of_head.data_ptr()
    return [*alive, table, of_head]


def _grid_rules(rule: ElementRule) -> tuple[tuple[GridRule, ...], list[int]] | None:
    """(grid rules, which of them each head follows), or None when some rule is of another kind."""
    if isinstance(rule, GridRule):
        return (rule,), [0]
    if isinstance(rule, PerHeadRule):
        grids = tuple(r for r in rule.rules if isinstance(r, GridRule))
        if len(grids) == len(rule.rules):
            return grids, list(rule.choice)
    return None


def _rule_struct(rule: GridRule, alive: list[object]) -> _Rule:
    struct = _Rule(heads=rule.num_heads, frames=rule.frame_class.shape[1], classes=rule.low.shape[1])
    struct.longest = rule.low.shape[3]
    for name in ("coords", "frame_class", "low", "width"):
        tensor = getattr(rule, name).to(torch.int32).contiguous()
        alive.append(tensor)
        setattr(struct, name, tensor.data_ptr())
    struct.extent[:], struct.dilation[:] = rule.extent, rule.dilation
    struct.circular[:] = [int(c) for c in rule.circular]
    return struct


def _masks(plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(slots int32 [1 or heads, nnz], bits int16 [slots, BQ, words], spans int16 [slots, 4]); kept in the plan.

    None when they would be too large to keep: grid rules are then evaluated again in every call.
    """
    if "masks" not in plan.cache:
        plan.cache["masks"] = None if mask_bytes(plan) > _BITS_LIMIT else _build_masks(plan)
    return plan.cache["masks"]  # type: ignore[return-value]


@lasting
def _build_masks(plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    library = native_library()
    assert plan.rule is not None
    assert not isinstance(library, str)
    slots = mask_slots(plan)
    count = int(slots.max()) + 1 if slots.numel() else 0
    bits = empty_masks(plan, count)
    spans = torch.zeros(count, 4, dtype=torch.int16)
    mine = owned_slots(plan, slots)
    call = _Call(slots=mine.data_ptr(), bits=bits.data_ptr(), spans=spans.data_ptr())
    alive = [*_point_at_lists(call, plan), *_point_at_rules(call, plan.rule, plan.mask_heads)]
    call.slot_rows, call.heads, call.threads = slots.shape[0], plan.mask_heads, torch.get_num_threads()
    if call.rules:
        library.genattn_evaluate_rules(ctypes.byref(call))
    else:
        fill_masks(plan, slots, bits)
    library.genattn_measure_spans(ctypes.byref(call), ctypes.c_int64(count))
    del alive, mine
    return slots, bits, spans
