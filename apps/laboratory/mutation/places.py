"""Where a file can be changed by a small mistake, and into what."""

import ast
import re
from dataclasses import dataclass

_COMPARE = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
}
_COMPARE |= {ast.In: "not in", ast.NotIn: "in"}
_BINARY = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "/", ast.Mod: "//"}
_CALLS = {"min": "max", "max": "min", "all": "any", "any": "all", "amin": "amax", "amax": "amin", "sum": "mean", "mean": "sum"}


@dataclass(frozen=True)
class Mutant:
    """One change: bytes `start` to `end` of a file become `new`."""

    file: str
    line: int
    start: int
    end: int
    old: str
    new: str
    kind: str

    def apply(self, source: bytes) -> bytes:
        """The file's content with the change in it."""
        return source[: self.start] + self.new.encode() + source[self.end :]


class Places(ast.NodeVisitor):
    """Collects every place of one file that can be changed."""

    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source = file, source
        self.starts = [0]
        for line in source.split(b"\n"):
            self.starts.append(self.starts[-1] + len(line) + 1)
        self.found: list[Mutant] = []

    def span(self, node: ast.AST) -> tuple[int, int]:
        begin = self.starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        return begin, self.starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def text(self, node: ast.AST) -> str:
        begin, end = self.span(node)
        return self.source[begin:end].decode()

    def add(self, node: ast.AST, span: tuple[int, int], new: str, kind: str) -> None:
        old = self.source[span[0] : span[1]].decode()
        if old != new:
            self.found.append(Mutant(self.file, node.lineno, *span, old, new, kind))  # type: ignore[attr-defined]

    def between(self, node: ast.AST, left: ast.AST, right: ast.AST, new: str, kind: str) -> None:
        """Replaces the operator that stands between two operands."""
        begin, end = self.span(left)[1], self.span(right)[0]
        gap = self.source[begin:end].decode()
        operator = re.search(r"not\s+in|is\s+not|and|or|is|in|[<>=!]=|//|\*\*|[-+*/%<>]", gap)
        if operator and "#" not in gap:
            self.add(node, (begin + operator.start(), begin + operator.end()), new, kind)

    def visit_Compare(self, node: ast.Compare) -> None:
        new = _COMPARE.get(type(node.ops[0]))
        if new:
            self.between(node, node.left, node.comparators[0], new, "comparison")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        new = _BINARY.get(type(node.op))
        literal = isinstance(node.left, (ast.JoinedStr, ast.Constant)) and not self.text(node.left)[0].isdigit()
        if new and not literal:
            self.between(node, node.left, node.right, new, "arithmetic")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.between(node, node.values[0], node.values[1], "or" if isinstance(node.op, ast.And) else "and", "and/or")
        dropped = (self.span(node.values[0])[0], self.span(node.values[1])[0])
        self.add(node, dropped, "", "condition dropped")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        begin, _ = self.span(node)
        self.add(node, (begin, self.span(node.operand)[0]), "", "sign or not dropped")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.add(node, self.span(node), str(not node.value), "constant")
        elif isinstance(node.value, int):
            self.add(node, self.span(node), str(node.value + 1), "constant")
        elif isinstance(node.value, float):
            self.add(node, self.span(node), repr(node.value * 2 + 0.125), "constant")

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.slice, ast.Slice) and isinstance(node.ctx, ast.Load):
            self.add(node, (self.span(node.value)[1], self.span(node)[1]), "[:]", "slice dropped")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in _CALLS:
            end = self.span(node.func)[1]
            self.add(node, (end - len(name), end), _CALLS[name], "function")
        if len(node.args) == 2 and not any(isinstance(arg, ast.Starred) for arg in node.args) and name != "isinstance":
            first, second = node.args
            both = (self.span(first)[0], self.span(second)[1])
            self.add(node, both, f"{self.text(second)}, {self.text(first)}", "arguments swapped")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.add(node, self.span(node), f"({self.text(node.body)})", "branch taken always")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.add(node, self.span(node), "pass", "call dropped")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.targets[0], (ast.Attribute, ast.Subscript)):
            self.add(node, self.span(node), "pass", "assignment dropped")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add(node, self.span(node), "pass", "assignment dropped")
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        """The words of an error are no behaviour; that it is raised is."""
        self.add(node, self.span(node), "pass", "refusal dropped")

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_arg(self, node: ast.arg) -> None:
        """Annotations are no behaviour."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in [*node.args.defaults, *(value for value in node.args.kw_defaults if value), *node.body]:
            self.visit(part)

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]
