"""How a stock processor comes to say for which module it works, and how everything is put back.

A mark hangs on the attention module. The class of its processor is swapped in place for a subclass whose `__call__` makes the
mark current for the time of the call; the processor stays the same object with the same attributes. What has no class to swap
(a plain function) gets a wrapper in its place. What a current mark does is in `seam/cores.py`.
"""

import functools
import inspect
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._guards import CompileContext

from genattn.errors import GenAttnError
from genattn.holding import may_hold
from genattn.seam.cores import CURRENT, MARK, close_namespace, has_seam, open_namespace
from genattn.seam.plugin import Plugin

# a class that may hold objects of the user's goes with its processors; others stay, so that compiled graphs fit again
_SUBCLASSES: "weakref.WeakValueDictionary[int, type]" = weakref.WeakValueDictionary()
_KEPT: dict[type, type] = {}
_SIGNATURES: "weakref.WeakKeyDictionary[type, inspect.Signature]" = weakref.WeakKeyDictionary()
_CLAIMS: dict[int, "Claim"] = {}
_ENDED: deque[Any] = deque()  # claims of models that went, and keys of processors that went
_LOCK = threading.Lock()
_EMPTY_CELL = types.CellType()


def _marking_call(cls: Any) -> Callable[..., Any]:
    """The call of `cls` with the module's mark current. functools.wraps carries the signature `Attention.forward` filters by.

    `cls.__call__` is looked up in every call, because other packages patch it, and bound as Python binds it: what stands there
    may be a static method or an object that is called without the processor.
    """
    under = _called_by_name(cls) if inspect.isfunction(inspect.getattr_static(cls, "__call__")) else _called_as_bound(cls)

    @functools.wraps(cls.__call__)
    def __call__(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        mark = attn.__dict__.get(MARK)
        if mark is None or not _comes_along(mark):
            return under(self, attn, *args, **kwargs)
        before, CURRENT.held[0] = CURRENT.held[0], mark
        try:
            return under(self, attn, *args, **kwargs)
        finally:
            CURRENT.held[0] = before

    # Dynamo measures the length of __defaults__ when it traces inspect.signature, and stumbles over None
    __call__.__defaults__ = ()  # type: ignore[attr-defined]
    return __call__


def _called_by_name(cls: Any) -> Callable[..., Any]:
    def under(instance: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.__call__(instance, attn, *args, **kwargs)

    return under


def _called_as_bound(cls: Any) -> Callable[..., Any]:
    def under(instance: Any, *args: Any, **kwargs: Any) -> Any:
        found = inspect.getattr_static(cls, "__call__")
        bind = getattr(type(found), "__get__", None)
        return (found if bind is None else bind(found, instance, cls))(*args, **kwargs)

    return under


def _comes_along(mark: Any) -> bool:
    """Whether calls go to the mark's owner: a compiled graph takes every mark along, plugins may come to it later; an exported
    program takes none."""
    if is_exporting():
        return not refuse_export(mark.owner)
    return torch.compiler.is_compiling() or bool(mark.chain)


class FunctionProcessor:
    """A function in a processor's place: what stock lets through to it, it gets, with the module's mark current."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mark = args[0].__dict__.get(MARK) if args else None
        if mark is None or not _comes_along(mark):
            return self.function(*args, **kwargs)
        before, CURRENT.held[0] = CURRENT.held[0], mark
        try:
            return self.function(*args, **kwargs)
        finally:
            CURRENT.held[0] = before


def swapped_class(stock: type, members: dict[str, Any]) -> type:
    """A subclass that passes for `stock`: same names, same `__class__`, and copies or pickles as a plain `stock`."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        reduced = list(stock.__reduce_ex__(self, protocol))  # type: ignore[call-arg]
        reduced[1] = tuple(stock if part is type(self) else part for part in reduced[1])
        return tuple(reduced)

    spoof = {
        "__reduce_ex__": __reduce_ex__,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "__slots__": (),
        "__class__": property(lambda self: stock, set_class),
        "_genattn_stock": stock,
    }
    return type(stock.__name__, (stock,), {**spoof, **members})


def set_class(instance: Any, cls: type) -> None:
    """Assign the true class, past the `__class__` property of a swapped one."""
    object.__dict__["__class__"].__set__(instance, cls)


def stock_class(instance: Any) -> type:
    """The class that diffusers or the user gave it."""
    return type(instance).__dict__.get("_genattn_stock", type(instance))


def _subclass(stock: Any) -> type:
    """The marking subclass of `stock`, with the signature that its call has now."""
    made: Any = _SUBCLASSES.get(id(stock))  # by identity: made holds stock, and goes before it
    if made is None:
        try:
            made = _SUBCLASSES[id(stock)] = swapped_class(stock, {})
        except Exception as error:  # its own __init_subclass__ or metaclass may raise anything
            raise TypeError(f"{stock.__name__} cannot have a subclass: {error}") from error
    if "<locals>" in stock.__qualname__ or may_hold(inspect.getattr_static(stock, "__call__")):
        _KEPT.pop(stock, None)
    else:
        _KEPT[stock] = made
    if made.__dict__.get("_genattn_call") is not stock.__call__:
        made._genattn_call = stock.__call__
        made.__call__ = _marking_call(stock)
    return made  # type: ignore[no-any-return]


class Claim:
    """One processor whose class is swapped and whose modules are open, for as long as somebody needs it or it lives."""

    def __init__(self, processor: Any) -> None:
        self.key, self.users = id(processor), 0
        self.namespaces: list[dict[str, Any]] = []
        try:
            self.processor: Callable[[], Any] = weakref.ref(processor, functools.partial(_died, self.key))
        except TypeError:  # a class with slots and no place for weak references
            self.processor = lambda: processor

    @property
    def stale(self) -> bool:
        """Whether the class or its call is another one than the seam was opened for."""
        processor = self.processor()
        if processor is None or isinstance(processor, FunctionProcessor):
            return False
        cls: Any = type(processor)
        return cls.__dict__.get("_genattn_call") is not cls.__dict__.get("_genattn_stock", cls).__call__

    def refresh(self) -> None:
        """Follow what became of the class and of its call since."""
        processor = self.processor()
        if processor is None:
            return
        if not isinstance(processor, FunctionProcessor):
            made = _subclass(stock_class(processor))
            if type(processor) is not made:
                set_class(processor, made)
        wanted = _namespaces(processor)
        for namespace in wanted:
            if not any(namespace is known for known in self.namespaces):
                open_namespace(namespace)
                self.namespaces.append(namespace)

    def end(self) -> None:
        """Give the class back and close the modules."""
        processor = self.processor()
        if processor is not None and "_genattn_stock" in type(processor).__dict__:
            set_class(processor, stock_class(processor))
        for namespace in self.namespaces:
            close_namespace(namespace)
        self.namespaces.clear()


def abandon_processors(claims: dict[int, Claim]) -> None:
    """`release_processors` from a finalizer: it may come at any moment, also while this thread holds the lock."""
    _ENDED.extend(claims.values())
    _sweep_if_free()


def _died(key: int, reference: Any) -> None:
    _ENDED.append(key)
    _sweep_if_free()


def _sweep_if_free() -> None:
    # a compiler that traces looks up the names that a sweep puts back, and fails where they change under it
    if CompileContext.current_compile_id() is None and _LOCK.acquire(blocking=False):
        try:
            _sweep()
        finally:
            _LOCK.release()


def _sweep() -> None:
    """What ended while the lock was held, or a compiler was tracing."""
    while _ENDED:
        ended = _ENDED.popleft()
        if isinstance(ended, Claim):
            _end_one_use(ended)
        elif ended in _CLAIMS and _CLAIMS[ended].processor() is None:
            _CLAIMS.pop(ended).end()


def _end_one_use(claim: Claim) -> None:
    claim.users -= 1
    if not claim.users and _CLAIMS.get(claim.key) is claim:
        del _CLAIMS[claim.key]
        claim.end()


def acquire_processor(processor: Any) -> Claim | None:
    """Swap its class (once, however many users) and open the seam in the modules that define it; None where it has no class
    that can be swapped, as a function has not."""
    with _LOCK:
        _sweep()
        claim = _CLAIMS.get(id(processor))
        if claim is None:
            claim = Claim(processor)
            try:
                claim.refresh()
            except TypeError:
                return None
            _CLAIMS[claim.key] = claim
        else:
            claim.refresh()
        claim.users += 1
        return claim


def refresh_processor(claim: Claim) -> None:
    """See `Claim.refresh`."""
    if claim.stale:
        with _LOCK:
            claim.refresh()


def release_processors(claims: dict[int, Claim]) -> None:
    """Undo one `acquire_processor` each; empties the dict."""
    with _LOCK:
        _sweep()
        while claims:
            _end_one_use(claims.popitem()[1])


def _namespaces(processor: Any) -> list[dict[str, Any]]:
    """The module dicts in which the code of a processor, and of what it hands its work to, looks up its names, as far as there
    is something to open."""
    unique = {id(names): names for item in _workers(processor) for names in _names_of(item)}
    plain = [names for names in unique.values() if not str(names.get("__name__")).startswith("torch.")]
    return [names for names in plain if has_seam(names)]


def _names_of(item: Any) -> Iterator[dict[str, Any]]:
    function = _plain(item)
    if not inspect.isfunction(function):
        cls: Any = item if isinstance(item, type) else stock_class(item)
        yield from (vars(sys.modules[base.__module__]) for base in cls.__mro__ if base.__module__ in sys.modules)
        function = _plain(cls.__call__)
    if hasattr(function, "__globals__"):
        yield function.__globals__


def _workers(processor: Any) -> Iterator[Any]:
    """A processor and, where it wraps others, those: in its attributes, in a function's closure, defaults and module."""
    waiting, seen = [processor], set()
    while waiting:
        item = waiting.pop()
        if id(item) not in seen:
            seen.add(id(item))
            yield item
            waiting += [held for held in _held(item) if _may_work(held)]


def _held(item: Any) -> Iterator[Any]:
    if isinstance(item, functools.partial):
        yield from (item.func, *item.args, *item.keywords.values())
    elif inspect.ismethod(item):
        yield from (item.__func__, item.__self__)
    elif inspect.isfunction(item):
        yield from (cell.cell_contents for cell in item.__closure__ or () if cell != _EMPTY_CELL)
        yield from (*(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values())
        yield from (held for held in _named(item) if not inspect.isfunction(held))
    else:
        own = {} if isinstance(item, type) else getattr(item, "__dict__", {})
        yield from (*own.values(), *own.get("_modules", {}).values(), _plain(_call_of(item)))


def _named(function: Any) -> Iterator[Any]:
    """What the names in a function's code stand for, in its module and in modules that it names."""
    names = function.__code__.co_names
    found = [function.__globals__.get(name) for name in names]
    yield from found
    for module in found:
        if inspect.ismodule(module):
            yield from (vars(module)[name] for name in names if isinstance(vars(module).get(name), type))


def _may_work(held: Any) -> bool:
    """Whether it may be a processor, or a class of processors: a function, or what is called with an attention module."""
    if isinstance(held, functools.partial) or inspect.ismethod(held) or inspect.isfunction(held):
        return True
    code = getattr(_plain(_call_of(held)), "__code__", None)
    return code is not None and "attn" in code.co_varnames[1:2]


def _call_of(held: Any) -> Any:
    """What runs when an object, or one of a class, is called."""
    cls = held if isinstance(held, type) else stock_class(held)
    name = "forward" if issubclass(cls, torch.nn.Module) else "__call__"
    return next((base.__dict__[name] for base in cls.__mro__ if name in base.__dict__), None)


def _plain(function: Any) -> Any:
    """The function inside of partials, bound methods, decorators and callable objects."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif inspect.ismethod(function):
            function = function.__func__
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            return function


def signature_of(stock: type) -> inspect.Signature:
    """Signature of the denoiser's forward, decorators looked through."""
    if stock not in _SIGNATURES:
        _SIGNATURES[stock] = inspect.signature(inspect.unwrap(stock.forward))  # type: ignore[attr-defined]
    return _SIGNATURES[stock]


# ---- torch.export

# An exported program outlives its process, the marks of our operator do not: it holds stock attention alone. Plugins that do
# nothing (a dense pattern, one that is switched off) are exported so; with any other, exporting is refused.
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # not in PyTorch 2.6


class ExportRefused(GenAttnError, AssertionError):
    """A GenAttnError that strict export lets through: Dynamo wraps what it does not know, and knows AssertionError."""


@torch.compiler.assume_constant_result  # strict export traces with Dynamo, which is to call this and not to look inside
def refuse_export(injection: Any) -> bool:
    """Raise GenAttnError when a plugin of `injection` would have to be part of an exported program; else True."""
    plugins = [plugin for handle in injection.handles for plugin in handle.plugins if _acts(plugin, handle)]
    acting = dict.fromkeys(type(getattr(plugin, "pattern", plugin)).__name__ for plugin in plugins)
    if acting:
        raise ExportRefused(
            f"torch.export of {type(injection.model).__name__} must find no plugin that acts: an exported program keeps no "
            f"plugins, and {' + '.join(acting)} would be left out of it; export before genattn.apply or after "
            "genattn.remove(model), or inside `with handle.options(enabled=False)`"
        )
    return True


def _acts(plugin: Plugin, handle: Any) -> bool:
    idle = not plugin.touches_attention and type(plugin).forward is Plugin.forward
    return not idle and bool(handle.current_options.get("enabled", True))
