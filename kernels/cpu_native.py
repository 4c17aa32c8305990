"""Block-sparse attention on the CPU by the C++ kernel: the host side of `block_sparse.cpp`.

Partial tiles of a GridRule (also one per head) are decided inside the kernel from the rule's tables; any other rule is
evaluated once per plan into packed bits, equal tiles stored once.
"""

import ctypes

import torch

from genattn.kernels.block_plan import BlockPlan
from genattn.kernels.element_rule import ElementRule, GridRule, PerHeadRule
from genattn.kernels.native_build import native_library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WORKSPACE = 256 << 20
_BITS_LIMIT = 2 << 30
_TILES_AT_ONCE = 64


class _Rule(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("coords", "frame_class", "low", "width")),
        *((name, ctypes.c_int32) for name in ("heads", "frames", "classes", "longest")),
        *((name, ctypes.c_int32 * 2) for name in ("extent", "dilation", "circular")),
    )


class _Call(ctypes.Structure):
    _tensors = ("query", "key", "value", "out", "lse", "key_mask")
    _lists = ("query_tiles", "key_tiles", "row_ptr", "columns", "num_full", "rules", "rule_of_head", "slots", "bits")
    _shape = ("batch", "heads", "kv_heads", "dim", "seqlen_q", "seqlen_k")
    _tiles = ("tiles_q", "tiles_k", "block_q", "block_k", "lists", "mask_heads")
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _tensors + _lists),
        ("stride", ctypes.c_int64 * 3 * 4),
        ("nnz", ctypes.c_int64),
        ("workspace", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in (*_shape, *_tiles, "dtype", "threads")),
        ("scale", ctypes.c_float),
    )


def why_not_native(query: torch.Tensor, plan: BlockPlan) -> str | None:
    """The reason why the C++ kernel cannot serve this call, or None. Builds the library on first use."""
    if query.device.type != "cpu":
        return f"it is for CPU tensors, got {query.device.type}"
    if query.dtype not in _DTYPES:
        return f"the dtype must be float32, bfloat16 or float16, got {query.dtype}"
    if plan.rule is not None and _grid_rules(plan.rule) is None:
        partial = plan.columns.numel() - int(plan.num_full.sum())
        size = partial * plan.block_q * -(-plan.block_k // 16) * 2 * max(1, plan.rule.num_heads // plan.num_heads)
        if size > _BITS_LIMIT:
            return f"the packed masks of its partial tiles must stay under {_BITS_LIMIT >> 20} MiB, got {size >> 20} MiB"
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
    alive = _point_at_plan(call, plan, query.shape[2])
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


def _point_at_plan(call: _Call, plan: BlockPlan, heads: int) -> list[object]:
    """Fill in the plan's lists and its masks; returns what must stay alive during the call."""
    lists = {name: getattr(plan, name) for name in ("query_tiles", "key_tiles", "row_ptr", "columns", "num_full")}
    alive: list[object] = []
    for name, tensor in lists.items():
        tensor = tensor.to(torch.int32).contiguous()
        alive.append(tensor)
        setattr(call, name, tensor.data_ptr())
    call.tiles_q, call.block_q = plan.query_tiles.shape
    call.tiles_k, call.block_k = plan.key_tiles.shape
    call.lists, call.nnz, call.mask_heads = plan.num_heads, plan.columns.numel(), 1
    if plan.rule is None:
        return alive
    grids = _grid_rules(plan.rule)
    if grids is None:
        slots, bits = _packed_masks(plan)
        call.slots, call.bits, call.mask_heads = slots.data_ptr(), bits.data_ptr(), slots.shape[0]
        return [*alive, slots, bits]
    rules, choice = grids
    table = (_Rule * len(rules))(*(_rule_struct(rule, alive) for rule in rules))
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


def _packed_masks(plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots int32 [mask heads, nnz], bits int16 [unique tiles, BQ, words]); kept in the plan."""
    if "packed" not in plan.cache:
        plan.cache["packed"] = _pack_masks(plan)
    return plan.cache["packed"]  # type: ignore[return-value]


def _pack_masks(plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor]:
    assert plan.rule is not None
    words = -(-plan.block_k // 16)
    weights = 1 << torch.arange(16, dtype=torch.int32)
    slots = torch.full((plan.mask_heads, plan.columns.numel()), -1, dtype=torch.int32)
    known: dict[bytes, int] = {}
    rows: list[torch.Tensor] = []
    tile_of_entry, partial = plan.entries
    for chunk in torch.nonzero(partial).flatten().split(_TILES_AT_ONCE):
        queries = plan.query_tiles[tile_of_entry[chunk] % plan.query_tiles.shape[0]].long()
        keys = plan.key_tiles[plan.columns[chunk].long()].long()
        seen = plan.rule(queries.clamp_min(0)[:, :, None], keys.clamp_min(0)[:, None, :])
        seen = seen & (keys >= 0)[:, None, :] & (queries >= 0)[:, :, None]
        seen = torch.nn.functional.pad(seen, (0, words * 16 - plan.block_k)).unflatten(-1, (words, 16))
        packed = (seen.int() * weights).sum(-1).to(torch.int16)
        for i, entry in enumerate(chunk.tolist()):
            list_head = int(tile_of_entry[entry]) // plan.query_tiles.shape[0]
            for head in range(slots.shape[0]):
                if plan.num_heads > 1 and head != list_head:
                    continue
                bits = packed[head if packed.shape[0] > 1 else 0, i]
                slot = known.setdefault(bits.numpy().tobytes(), len(rows))
                if slot == len(rows):
                    rows.append(bits)
                slots[head, entry] = slot
    return slots, torch.stack(rows) if rows else torch.zeros(1, plan.block_q, words, dtype=torch.int16)
