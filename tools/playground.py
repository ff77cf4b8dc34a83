"""Write what the site's playground computes with: every box loss and its gradient as JavaScript.

  python tools/playground.py [FILE]

Nothing is written anew: the loss and its backward are traced operator by operator (``make_fx``), on numbers, and each
operator becomes a line of JavaScript on doubles. What the page shows is what the package computes, to the last digits;
the tests compare the two.
"""

import argparse
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from detloss_plugins.loss import Loss
from detloss_plugins.registry import registered_losses

FILE = Path(__file__).parents[1] / "docs" / "playground" / "losses.js"
# Boxes to trace on; which ones does not matter, as no loss asks for values.
BOXES = (1.0, 2.0, 5.0, 7.0), (2.0, 1.0, 7.0, 6.0)

# How a scalar operator is worked out here, where all its arguments are constants, and in JavaScript.
SCALAR: dict[str, tuple[Callable, str]] = {
    "add": (lambda a, b: a + b, "{}+{}"),
    "sub": (lambda a, b: a - b, "{}-{}"),
    "mul": (lambda a, b: a * b, "{}*{}"),
    "div": (lambda a, b: a / b if b else math.copysign(math.inf, a) if a else math.nan, "{}/{}"),
    "neg": (lambda a: -a, "-{}"),
    "pow": (lambda a, b: a**b, "{}**{}"),
    "max": (max, "Math.max({},{})"),
    "min": (min, "Math.min({},{})"),
    "if": (lambda c, a, b: a if c else b, "{}?{}:{}"),
    "eq": (lambda a, b: a == b, "{}=={}"),
    "lt": (lambda a, b: a < b, "{}<{}"),
    "le": (lambda a, b: a <= b, "{}<={}"),
    "and": (lambda a, b: a and b, "{}&&{}"),
    "abs": (abs, "Math.abs({})"),
    "sign": (lambda a: math.copysign(1, a) if a else 0.0, "Math.sign({})"),
    "sqrt": (math.sqrt, "Math.sqrt({})"),
    "exp": (math.exp, "Math.exp({})"),
    "expm1": (math.expm1, "Math.expm1({})"),
    "log": (math.log, "Math.log({})"),
    "atan2": (math.atan2, "Math.atan2({},{})"),
}


# Operators of torch that are one of them on each element.
PLAIN = {
    name: name for name in ("mul", "div", "neg", "pow", "abs", "sqrt", "exp", "expm1", "log", "atan2", "eq", "lt", "le")
}
PLAIN |= {"sgn": "sign", "maximum": "max", "minimum": "min", "where": "if", "logical_and": "and"}


class Code:
    """Scalar operations, each distinct one once; values are names of results, or constants."""

    def __init__(self) -> None:
        self.lines: dict[tuple, str] = {}

    def __call__(self, op: str, *args: Any) -> Any:
        """The value of an operation."""
        work_out, _ = SCALAR[op]
        if op == "pow" and args[1] in (0.5, 1.0, 2.0):
            return {0.5: lambda x: self("sqrt", x), 1.0: lambda x: x, 2.0: lambda x: self("mul", x, x)}[args[1]](
                args[0]
            )
        if op == "mul" and 1.0 in args:  # a factor of a mask too: JavaScript's true is 1
            return args[0] if args[1] == 1.0 else args[1]
        if op == "if" and args[1] == args[2]:
            return args[1]
        if not any(isinstance(arg, str) for arg in args) or (op == "if" and not isinstance(args[0], str)):
            return work_out(*args)
        return self.lines.setdefault((op, *args), f"v{len(self.lines)}")

    def script(self, outputs: Sequence[Any]) -> str:
        """Statements for what the outputs need, and what they are."""
        needed, by_name = set(), {name: key for key, name in self.lines.items()}
        stack = [value for value in outputs if isinstance(value, str)]
        while stack:
            name = stack.pop()
            if name in by_name and name not in needed:
                needed.add(name)
                stack += [arg for arg in by_name[name][1:] if isinstance(arg, str)]
        lines = []
        for (op, *args), name in self.lines.items():
            if name in needed:
                lines.append(f"{name}={SCALAR[op][1].format(*map(literal, args))}")
        return f"const {','.join(lines)};" if lines else ""


def literal(value: Any) -> str:
    """A name, or a constant as JavaScript has it; negative ones in brackets, as -2**2 is an error there."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(int(value))
    words = {math.inf: "Infinity", -math.inf: "(-Infinity)"}
    return words.get(value) or ("NaN" if math.isnan(value) else f"({value!r})" if value < 0 else repr(value))


class Lowering:
    """From operators on tensors to scalar ones: tensors are arrays of values, views of one another as in torch."""

    def __init__(self) -> None:
        self.code = Code()

    def each(self, op: str, *args: Any) -> np.ndarray:
        """A scalar operation on the elements of arrays, broadcast."""
        args = [np.asarray(arg, dtype=object) for arg in args]
        return np.asarray(np.frompyfunc(lambda *x: self.code(op, *x), len(args), 1)(*args), dtype=object)

    def run(self, graph: torch.fx.GraphModule, inputs: Sequence[np.ndarray]) -> Any:
        """The outputs of a traced graph."""
        found, inputs = {}, list(inputs)
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                found[node] = inputs.pop(0)
            elif node.op == "get_attr":
                found[node] = np.asarray(getattr(graph, node.target).tolist(), dtype=object)
            elif node.op == "output":
                return torch.fx.node.map_arg(node.args[0], found.__getitem__)
            else:
                args, options = torch.fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
                found[node] = self.call(node.target, args, options)
        raise ValueError("a graph without an output")

    def call(self, target: Any, args: Sequence[Any], options: dict) -> Any:
        """What one operator gives. One that works in place changes its array, and so what is a view of it."""
        name = getattr(target, "__name__", str(target)).split(".")[0]
        if name == "getitem":
            return args[0][args[1]]
        in_place = name.endswith("_")
        name = name.removesuffix("_")
        operator = partial(self.each, PLAIN[name]) if name in PLAIN else getattr(self, f"_{name}", None)
        if operator is None:
            raise NotImplementedError(f"the playground has no JavaScript for {target}")
        options = {k: v for k, v in options.items() if k not in ("dtype", "device", "layout", "pin_memory")}
        result = operator(*args, **{k: v for k, v in options.items() if k != "memory_format"})
        if in_place:
            args[0][...] = result
            return args[0]
        return result

    # Arithmetic.

    def _add(self, a, b, alpha=1):
        return self.each("add", a, self.each("mul", b, alpha))

    def _sub(self, a, b, alpha=1):
        return self.each("sub", a, self.each("mul", b, alpha))

    def _rsub(self, a, b, alpha=1):
        return self._sub(b, a, alpha)

    def _reciprocal(self, a):
        return self.each("div", 1.0, a)

    def _sigmoid(self, a):
        return self._reciprocal(self.each("add", 1.0, self.each("exp", self.each("neg", a))))

    def _lerp(self, a, b, weight):
        span = self.each("sub", b, a)
        near, far = (
            self._add(a, self.each("mul", weight, span)),
            self._sub(b, self.each("mul", span, self._rsub(weight, 1.0))),
        )
        return self.each("if", self.each("lt", weight, 0.5), near, far)

    # Choices.

    def _relu(self, a):
        return self.each("max", a, 0.0)

    def _threshold_backward(self, gradient, a, threshold):
        return self.each("if", self.each("le", a, threshold), 0.0, gradient)

    def _clamp(self, a, min=None, max=None):
        a = a if min is None else self.each("max", a, min)
        return a if max is None else self.each("min", a, max)

    def _masked_fill(self, a, mask, value):
        return self.each("if", mask, value, a)

    def _gt(self, a, b):
        return self.each("lt", b, a)

    def _ge(self, a, b):
        return self.each("le", b, a)

    def _smooth_l1_loss(self, a, b, reduction, beta):
        gap = self.each("abs", self._sub(a, b))
        square = self.each("div", self.each("mul", 0.5, self.each("mul", gap, gap)), beta)
        return self.each("if", self.each("lt", gap, beta), square, self._sub(gap, 0.5 * beta))

    def _smooth_l1_loss_backward(self, gradient, a, b, reduction, beta):
        gap = self._sub(a, b)
        slope = self.each(
            "if", self.each("lt", self.each("abs", gap), beta), self.each("div", gap, beta), self.each("sign", gap)
        )
        return self.each("mul", gradient, slope)

    # Shapes; numpy's are views where torch's are.

    def _detach(self, a):
        return a

    def _lift_fresh_copy(self, a):
        return a.copy()

    def _clone(self, a):
        return a.copy()

    def _unsqueeze(self, a, dim):
        return np.expand_dims(a, dim)

    def _squeeze(self, a, dim):
        return np.squeeze(a, dim) if a.shape[dim] == 1 else a

    def _expand(self, a, shape):
        return np.broadcast_to(a, [new if new != -1 else old for new, old in zip(shape, a.shape, strict=False)])

    def _unbind(self, a, dim=0):
        return list(np.moveaxis(a, dim, 0))

    def _select(self, a, dim, index):
        return np.moveaxis(a, dim, 0)[index, ...]

    def _slice(self, a, dim=0, start=None, end=None, step=1):
        return np.moveaxis(np.moveaxis(a, dim, 0)[start:end:step], 0, dim)

    def _split(self, a, size, dim=0):
        return np.split(a, range(size, a.shape[dim], size), dim)

    def _stack(self, parts, dim=0):
        return np.stack(parts, dim)

    def _cat(self, parts, dim=0):
        return np.concatenate(parts, dim)

    def _sum(self, a):
        total = 0.0
        for value in a.flatten():
            total = self.each("add", total, value) if total != 0.0 else np.asarray(value, dtype=object)
        return total

    # New ones.

    def _ones_like(self, a):
        return np.full(a.shape, 1.0, dtype=object)

    def _zeros(self, shape):
        return np.full(shape, 0.0, dtype=object)

    def _empty_like(self, a):
        return np.full(a.shape, 0.0, dtype=object)

    def _fill(self, a, value):
        return np.full(a.shape, value, dtype=object)

    def _scalar_tensor(self, value):
        return np.asarray(value, dtype=object)


def value_and_gradient(loss: Loss, names: Sequence[str] = ()) -> Callable:
    """A function of a predicted and a target box, ``(4,)``, and of some settings of ``fn`` by name, as tensors."""

    def run(pred, target, *values):
        pred = pred.detach().requires_grad_()
        rows = pred.unsqueeze(0), target.unsqueeze(0)
        seen = {**loss.observe(*rows, None), **dict(zip(names, values, strict=True))}
        value = loss.unweighted(*rows, seen)[0].sum()
        return value, torch.autograd.grad(value, pred)[0]

    return run


def ready(cls: type[Loss], **settings: Any) -> Loss:
    """An instance in float64 that neither learns nor looks at values."""
    loss = cls.make(**settings).double().eval()
    loss.unchecked = 0
    return loss


def javascript(loss: Loss, names: Sequence[str] = ()) -> tuple[str, list[str]]:
    """A function of JavaScript, ``(pred, target, settings) => [loss, gradient]``, of arrays and an object; and which of
    the settings it uses."""
    defaults = [inspect.signature(loss.fn).parameters[name].default for name in names]
    inputs = [torch.tensor(value, dtype=torch.float64) for value in (*BOXES, *defaults)]
    graph = make_fx(value_and_gradient(loss, names))(*inputs)
    lowering = Lowering()
    arrays = [np.asarray([f"{box}{i}" for i in range(4)], dtype=object) for box in "pt"]
    arrays += [np.asarray(f"s_{name}", dtype=object) for name in names]
    value, gradient = lowering.run(graph, arrays)
    outputs = [*np.asarray(value).flatten(), *gradient]
    body, (of_loss, *slopes) = lowering.code.script(outputs), map(literal, outputs)
    used = [name for name in names if re.search(rf"\bs_{name}\b", body)]
    given = f",{{{','.join(f'{name}:s_{name}' for name in used)}}}=s" if used else ""
    head = f"(p,t,s)=>{{const [p0,p1,p2,p3]=p,[t0,t1,t2,t3]=t{given};"
    return f"{head}{body}return [{of_loss},[{','.join(slopes)}]]}}", used


def numbers_of(cls: type[Loss]) -> list[str]:
    """The numeric settings of a loss's function that can be an input: those that a trace takes as tensors."""
    parameters = inspect.signature(cls.fn).parameters.values()
    names = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY and type(p.default) is float and p.name != "eps"]
    found: list[str] = []
    for name in names:
        try:
            javascript(ready(cls), [*found, name])
        except RuntimeError:  # an operator that takes a plain number
            continue
        found.append(name)
    return found


APART = {"d": (0.0, 0.9), "u": (0.91, 1.0)}  # of FocalerIoULoss, whose d must be below its u


def slider(cls: type[Loss], name: str) -> dict[str, Any]:
    """Name, default and range of a setting."""
    value, rule = inspect.signature(cls.fn).parameters[name].default, cls.rules.get(name)

    def first(*values):
        return next((v for v in values if rule is None or rule.holds(v)), value)

    if name in APART:
        return {"name": name, "value": value, "min": APART[name][0], "max": APART[name][1]}
    low, high = first(*([0.0] if rule else []), value / 20, 1.0), first(*([4 * value or 2.0] if rule else []), 1.0)
    return {"name": name, "value": value, "min": float(f"{low:.2g}"), "max": float(f"{high:.3g}")}


def choices(cls: type[Loss]) -> list[dict[str, Any]]:
    """The settings of the variants of a loss: the defaults, and one for each other choice of a single setting."""
    found: list[dict[str, Any]] = [{}]
    for p in inspect.signature(cls.fn, eval_str=True).parameters.values():
        if p.kind == p.KEYWORD_ONLY and p.name in cls.rules:
            of = get_args(p.annotation) if get_origin(p.annotation) is Literal else (True, False)
            if get_origin(p.annotation) is Literal or p.annotation is bool:
                found += [{p.name: choice} for choice in of if choice != p.default]
    return found


def variants(cls: type[Loss]) -> list[dict[str, Any]]:
    """The variants of a loss: what is set, its sliders, and the function as JavaScript under ``"f"``."""
    found, names = [], numbers_of(cls)
    for settings in choices(cls):
        script, used = javascript(ready(cls, **settings), names)
        if script not in [variant["f"] for variant in found]:
            found.append({"settings": settings, "sliders": [slider(cls, name) for name in used], "f": script})
    return found


def script_of(variants_of: dict[str, list[dict[str, Any]]]) -> str:
    """A file of JavaScript that defines ``DETLOSS``, ``{name: [variants]}``."""
    lines = []
    for name, found in variants_of.items():
        of_loss = ",\n".join(f"{{...{json.dumps({**each, 'f': None})}, f: {each['f']}}}" for each in found)
        lines.append(f"{json.dumps(name)}: [\n{of_loss}]")
    losses = ",\n".join(lines)
    return f"// Made by tools/playground.py of the package's functions.\nglobalThis.DETLOSS = {{\n{losses}\n}};\n"


def write(path: Path = FILE, names: Sequence[str] | None = None) -> None:
    """Write the file for all box losses, or some."""
    classes = {name: cls for name, cls in registered_losses().items() if cls.facts.family == "box"}
    losses = {name: variants(cls) for name, cls in classes.items() if not names or name in names}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(script_of(losses), encoding="utf-8")


def main(argv=None):
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=FILE, metavar="FILE", help="(default %(default)s)")
    args = parser.parse_args(argv)
    write(args.file)
    print(f"losses: {args.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
