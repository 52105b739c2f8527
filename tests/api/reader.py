"""Which names of an API a Python file uses, read from its source: what is called `trt` is followed through the file.

What an object is follows from how it is made (`trt.Builder(…)`, then `.create_network(…)`, …), over assignments, loops, fields and
calls of the file's own functions, or from annotations (`network: trt.INetworkDefinition`). A value that could be two things has the
members of both. What is not known to come from the API is not looked at.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.api.bindings import Api, Member

MODULES = frozenset({"trt", "tensorrt", "tensorrt_rtx"})
# Of a value: "module", "class", "object", "many" of a class by its name, or "call" by its owner (none: the module) and name;
# "function" is one that was taken of the class, and takes self as well.
Kind = tuple[str, str, str]
Kinds = frozenset[Kind]
Function = (ast.FunctionDef, ast.AsyncFunctionDef)
MODULE: Kinds = frozenset({("module", "", "")})
NOTHING: Kinds = frozenset()
ANY = "*"
# Rounds over a file: each carries what is known of arguments one call further.
ROUNDS = 6


@dataclass(frozen=True, order=True)
class Use:
    """A name that a file uses: ``asked`` are those that the function asks for first, `ANY` where it takes care in another way."""

    line: int
    owner: str
    name: str
    asked: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    positional: int = 0


def uses(path: Path, apis: Sequence[Api]) -> list[Use]:
    """Every use of a name of the API in the file."""
    reader = _Reader(ast.parse(path.read_text(encoding="utf-8")), apis)
    return sorted(reader.uses)


class _Reader:
    """Reads a file until nothing more is known of its values; ``uses`` are then those of the last round."""

    def __init__(self, tree: ast.Module, apis: Sequence[Api]) -> None:
        self.apis = apis
        self.uses: set[Use] = set()
        self.known: dict[tuple[ast.AST | None, str], Kinds] = defaultdict(frozenset)
        self.fields: dict[str, Kinds] = defaultdict(frozenset)
        self.returns: dict[ast.AST, Kinds] = defaultdict(frozenset)
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        self.methods = {node.name: node for owner in classes for node in owner.body if isinstance(node, Function)}
        own = set(self.methods.values())
        self.functions = {node.name: node for node in ast.walk(tree) if isinstance(node, Function) and node not in own}
        self.records = {node.name: _field_names(node) for node in classes}
        self.scopes: list[ast.AST | None] = [None]
        self.asked: list[frozenset[str]] = [frozenset()]
        self.either = 0
        for _ in range(ROUNDS):
            self.uses.clear()
            for statement in tree.body:
                self.read(statement)

    def read(self, node: ast.AST | None) -> Kinds:
        """What the value of an expression may be; of a statement, nothing."""
        if node is None:
            return NOTHING
        reader = getattr(self, "_" + type(node).__name__.lower(), None)
        if reader is not None:
            kinds: Kinds = reader(node)
            return kinds
        for child in ast.iter_child_nodes(node):
            self.read(child)
        return NOTHING

    # Statements.

    def _functiondef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Kinds:
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in every:
            self.known[node, argument.arg] |= self._annotated(argument.annotation)
        self.returns[node] |= self._annotated(node.returns)
        for default in (*node.args.defaults, *node.args.kw_defaults):
            self.read(default)
        self.scopes.append(node)
        self.asked.append(self.asked[-1] | _asked(node))
        for statement in node.body:
            self.read(statement)
        self.scopes.pop()
        self.asked.pop()
        return NOTHING

    _asyncfunctiondef = _functiondef

    def _classdef(self, node: ast.ClassDef) -> Kinds:
        for base in node.bases:
            self.read(base)
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                self.fields[statement.target.id] |= self._annotated(statement.annotation)
            self.read(statement)
        return NOTHING

    def _return(self, node: ast.Return) -> Kinds:
        function = next((scope for scope in reversed(self.scopes) if isinstance(scope, Function)), None)
        if function is not None:
            self.returns[function] |= self.read(node.value)
        return NOTHING

    def _assign(self, node: ast.Assign) -> Kinds:
        for target in node.targets:
            self._bind(target, node.value, self.read(node.value))
        return NOTHING

    def _annassign(self, node: ast.AnnAssign) -> Kinds:
        self._bind(node.target, node.value, self._annotated(node.annotation) | self.read(node.value))
        return NOTHING

    def _for(self, node: ast.For) -> Kinds:
        self._loop(node.target, node.iter)
        for statement in (*node.body, *node.orelse):
            self.read(statement)
        return NOTHING

    def _comprehension(self, node: ast.comprehension) -> Kinds:
        self._loop(node.target, node.iter)
        for test in node.ifs:
            self.read(test)
        return NOTHING

    def _withitem(self, node: ast.withitem) -> Kinds:
        kinds = self.read(node.context_expr)
        if node.optional_vars is not None:
            self._bind(node.optional_vars, None, kinds)
        return NOTHING

    def _if(self, node: ast.If) -> Kinds:
        self.read(node.test)
        # Either side of a question which of the two packages it is may use what only one has.
        with self._in_either("rtx" in ast.unparse(node.test).lower()):
            for statement in (*node.body, *node.orelse):
                self.read(statement)
        return NOTHING

    def _try(self, node: ast.Try) -> Kinds:
        with self._in_either(any(handler.type is not None and "AttributeError" in ast.unparse(handler.type) for handler in node.handlers)):
            for statement in node.body:
                self.read(statement)
        for part in (*node.handlers, *node.orelse, *node.finalbody):
            self.read(part)
        return NOTHING

    # Expressions.

    def _name(self, node: ast.Name) -> Kinds:
        if node.id in MODULES:
            return MODULE
        return next((kinds for scope in reversed(self.scopes) if (kinds := self.known.get((scope, node.id), NOTHING))), NOTHING)

    def _attribute(self, node: ast.Attribute) -> Kinds:
        owners = self.read(node.value)
        if node.attr in MODULES:
            return MODULE
        return self._look_up(owners, node.attr, node.lineno) if _of_api(owners) else self.fields.get(node.attr, NOTHING)

    def _subscript(self, node: ast.Subscript) -> Kinds:
        self.read(node.slice)
        return _elements(self.read(node.value))

    def _ifexp(self, node: ast.IfExp) -> Kinds:
        self.read(node.test)
        with self._in_either("rtx" in ast.unparse(node.test).lower()):
            return self.read(node.body) | self.read(node.orelse)

    def _boolop(self, node: ast.BoolOp) -> Kinds:
        return frozenset().union(*(self.read(value) for value in node.values))

    def _namedexpr(self, node: ast.NamedExpr) -> Kinds:
        kinds = self.read(node.value)
        self._bind(node.target, node.value, kinds)
        return kinds

    def _list(self, node: ast.List | ast.Tuple | ast.Set) -> Kinds:
        return _many(frozenset().union(*(self.read(value) for value in node.elts)))

    _tuple = _set = _list

    def _dict(self, node: ast.Dict) -> Kinds:
        for key in node.keys:
            self.read(key)
        return _many(frozenset().union(*(self.read(value) for value in node.values)))

    def _listcomp(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp) -> Kinds:
        for generator in node.generators:
            self.read(generator)
        return _many(self.read(node.elt))

    _generatorexp = _setcomp = _listcomp

    def _dictcomp(self, node: ast.DictComp) -> Kinds:
        for generator in node.generators:
            self.read(generator)
        self.read(node.key)
        return _many(self.read(node.value))

    def _call(self, node: ast.Call) -> Kinds:
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""
        arguments = [self.read(argument) for argument in node.args]
        keywords = {keyword.arg or "": self.read(keyword.value) for keyword in node.keywords}
        if name in ("getattr", "hasattr") and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            given = self._look_up(arguments[0], str(node.args[1].value), node.lineno)
            return given if name == "getattr" else NOTHING
        if name == "getattr" and arguments:
            return frozenset(("object", owner, "") for kind, owner, _ in arguments[0] if kind == "class")
        if name == "import_module" and node.args and "tensorrt" in ast.unparse(node.args[0]):
            return MODULE
        called = self.read(node.func)
        if _of_api(called):
            return self._given(called, node)
        if name in ("list", "tuple", "sorted", "reversed", "iter", "set", "values") and (arguments or name == "values"):
            return arguments[0] if arguments else self.read(node.func.value) if isinstance(node.func, ast.Attribute) else NOTHING
        if name in ("next", "pop"):
            return _elements(arguments[0] if arguments else NOTHING)
        return self._called_here(node.func, name, arguments, keywords)

    # What they have in common.

    @contextmanager
    def _in_either(self, it_is: bool) -> Iterator[None]:
        self.either += it_is
        yield
        self.either -= it_is

    def _loop(self, target: ast.expr, iterable: ast.expr) -> None:
        kinds = self.read(iterable)
        if isinstance(iterable, ast.Call) and isinstance(iterable.func, ast.Name) and isinstance(target, (ast.Tuple, ast.List)):
            each = [self.read(argument) for argument in iterable.args]
            parts = {"zip": each, "enumerate": [NOTHING, *each[:1]]}.get(iterable.func.id)
            if parts is not None:
                for part, values in zip(target.elts, parts, strict=False):
                    self._bind(part, None, _elements(values))
                return
        if isinstance(iterable, ast.Call) and isinstance(iterable.func, ast.Attribute) and iterable.func.attr == "items":
            if isinstance(target, ast.Tuple) and len(target.elts) == 2:
                self._bind(target.elts[1], None, _elements(self.read(iterable.func.value)))
            return
        self._bind(target, None, _elements(kinds))

    def _bind(self, target: ast.expr, value: ast.expr | None, kinds: Kinds) -> None:
        if isinstance(target, ast.Name):
            self.known[self.scopes[-1], target.id] |= kinds
        elif isinstance(target, ast.Attribute):
            owners = self.read(target)
            if not _of_api(owners) and not _of_api(self.read(target.value)):
                self.fields[target.attr] |= kinds
        elif isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (ast.Tuple, ast.List)):
            for part, given in zip(target.elts, value.elts, strict=False):
                self._bind(part, given, self.read(given))
        elif isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:
                self._bind(part, None, _elements(kinds))
        else:
            self.read(target)

    def _look_up(self, owners: Kinds, name: str, line: int) -> Kinds:
        given: set[Kind] = set()
        # Every class of Python has what `type` has.
        places = {
            (kind, owner) for kind, owner, _ in owners if kind in ("module", "object") or (kind == "class" and not hasattr(type, name))
        }
        holding = {place for place in places if self._members(place[1], name)}
        asked = (*sorted(self.asked[-1]), *([ANY] if self.either else []))
        # What holds it in no release is reported of all that it may be; what holds it in some, of those alone.
        for kind, owner in holding or places:
            self.uses.add(Use(line, owner, name, asked))
            for member in self._members(owner, name):
                called = ("function" if kind == "class" else "call", owner, name)
                given |= {called} if member.kind == "call" else _given_by(member)
        return frozenset(given)

    def _members(self, owner: str, name: str) -> list[Member]:
        found = (api.classes.get(owner, {}).get(name) if owner else api.names.get(name) for api in self.apis)
        return [member for member in found if member is not None]

    def _given(self, called: Kinds, node: ast.Call) -> Kinds:
        """What a call of the API gives; how it is called is noted of its name."""
        given: set[Kind] = {("object", owner, "") for kind, owner, _ in called if kind == "class"}
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        keywords = tuple(sorted(keyword.arg for keyword in node.keywords if keyword.arg))
        for kind, owner, name in called:
            if kind == "call":
                self.uses.add(Use(node.lineno, owner, name, (ANY,), keywords, 0 if starred else len(node.args) + len(keywords)))
            if kind in ("call", "function"):
                given = given.union(*(_given_by(member) for member in self._members(owner, name)))
        return frozenset(given)

    def _called_here(self, called: ast.expr, name: str, arguments: list[Kinds], keywords: dict[str, Kinds]) -> Kinds:
        """What a function of the file gives, which now knows what it was called with; fields of a class likewise."""
        if name in self.records:
            for field, kinds in (*zip(self.records[name], arguments, strict=False), *keywords.items()):
                self.fields[field] |= kinds
            return NOTHING
        function = (self.functions if isinstance(called, ast.Name) else self.methods).get(name)
        if function is None:
            return NOTHING
        positional = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
        positional = positional[1:] if positional[:1] in (["self"], ["cls"]) else positional
        for parameter, kinds in (*zip(positional, arguments, strict=False), *keywords.items()):
            self.known[function, parameter] |= kinds
        return self.returns[function]

    def _annotated(self, annotation: ast.expr | None) -> Kinds:
        """What an annotation says in names of the API, `trt.X`; in brackets it is many of them."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        if isinstance(annotation, ast.BinOp):
            return self._annotated(annotation.left) | self._annotated(annotation.right)
        if isinstance(annotation, ast.Subscript):
            parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
            inner = frozenset().union(*(self._annotated(part) for part in parts))
            return inner if "Optional" in ast.unparse(annotation.value) else _many(inner)
        if isinstance(annotation, ast.Attribute):
            return frozenset(("object", name, "") for kind, name, _ in self.read(annotation) if kind == "class")
        return NOTHING


def _given_by(member: Member) -> set[Kind]:
    if member.gives is None:
        return set()
    return {("class" if member.kind == "class" else "many" if member.many else "object", member.gives, "")}


def _many(kinds: Kinds) -> Kinds:
    return frozenset(("many", name, "") for kind, name, _ in kinds if kind == "object")


def _elements(kinds: Kinds) -> Kinds:
    return frozenset(("object", name, "") for kind, name, _ in kinds if kind == "many")


def _of_api(kinds: Iterable[Kind]) -> bool:
    return any(kind != "many" for kind, _, _ in kinds)


def _field_names(node: ast.ClassDef) -> list[str]:
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return []
    return [each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)]


def _asked(function: ast.AST) -> frozenset[str]:
    """The names that a function asks for, with `hasattr` or a default of `getattr`: what it does with them it does where they are."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    least = {"hasattr": 2, "getattr": 3}
    asking = [node.args[1] for node in calls if len(node.args) >= least.get(getattr(node.func, "id", ""), len(node.args) + 1)]
    return frozenset(str(name.value) for name in asking if isinstance(name, ast.Constant))
